"""The look of the report, and the script of its copy buttons."""

STYLE = """
:root {
  --page: #f5f7fa; --panel: #ffffff; --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --accent: #0b69a3;
  --code: #f0f4f8; --shadow: 0 1px 2px rgb(16 42 67 / 6%), 0 4px 16px rgb(16 42 67 / 5%);
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12171d; --panel: #1b222a; --ink: #e4e7eb; --soft: #9aa5b1; --line: #2d3741; --accent: #6cb8ea;
    --code: #141a20; --shadow: none;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 1096px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { margin: 0 0 28px; font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; letter-spacing: -0.015em; }
h2 { margin: 0 0 16px; font-size: 1.15rem; line-height: 1.3; }
section, .card {
  background: var(--panel); border: 1px solid var(--line); border-radius: 14px; box-shadow: var(--shadow);
}
section { margin-top: 24px; padding: 24px; }
dl, dd, figure { margin: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 14px; }
.card { padding: 16px; display: flex; flex-direction: column; justify-content: space-between; gap: 4px; }
.card dt { color: var(--soft); font-size: 0.85rem; line-height: 1.35; }
.card dd {
  font-size: 1.5rem; font-weight: 650; line-height: 1.25; letter-spacing: -0.02em; color: var(--accent);
  white-space: nowrap;
}
.card dd, .number { font-variant-numeric: tabular-nums; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: 8px; background: #fff; }
figcaption { margin-top: 14px; color: var(--soft); font-size: 0.92rem; max-width: 76ch; }
.wide, .picture { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.95rem; }
th, td { padding: 9px 20px 9px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-size: 0.85rem; font-weight: 600; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
.number { white-space: nowrap; }
.command { position: relative; margin-top: 12px; }
pre {
  margin: 0; padding: 14px 92px 14px 16px; border-radius: 10px; background: var(--code);
  border: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere;
}
code { font: 0.86rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code span { display: inline-block; max-width: 100%; }
button {
  position: absolute; top: 8px; right: 8px; padding: 5px 12px; border-radius: 7px; cursor: pointer;
  border: 1px solid var(--line); background: var(--panel); color: var(--soft); font: inherit; font-size: 0.8rem;
}
button:hover, button:focus-visible { color: var(--accent); border-color: var(--accent); }
.protocol { display: grid; grid-template-columns: minmax(140px, max-content) 1fr; gap: 8px 24px; font-size: 0.95rem; }
.protocol dt { color: var(--soft); }
.protocol dd { overflow-wrap: anywhere; }
@media (max-width: 560px) {
  main { padding: 28px 14px 40px; }
  section { padding: 18px 16px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 12px; }
  .picture img { min-width: 640px; }
  .protocol { grid-template-columns: 1fr; gap: 2px; }
  .protocol dd { margin-bottom: 10px; }
}
@media print {
  body { background: #fff; }
  section, .card { box-shadow: none; break-inside: avoid; }
}
"""

# The buttons stay hidden where the browser offers no clipboard to a page (an old one, or plain HTTP).
SCRIPT = """
if (navigator.clipboard) {
  for (const button of document.querySelectorAll(".command button")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
}
"""
