"""Write the list of the package's files in docs/design.md, from their first lines:  python docs/tree.py"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- tree -->\n", "<!-- end of tree -->"


def tree() -> str:
    """A line for each file of the package: the method at the root first, then room by room."""
    package = ROOT / "stablevm"
    rooms = [package, *sorted(folder for folder in package.iterdir() if (folder / "__init__.py").exists())]
    lines = []
    for room in rooms:
        if room != package:
            lines += ["", f"{room.name}/    {first_line(room / '__init__.py')}"]
        files = [path for path in sorted(room.glob("*.py")) if not path.name.startswith("__")]
        width = max(len(path.name) for path in files)
        indent = "" if room == package else "  "
        lines += [f"{indent}{path.name.ljust(width)}  {first_line(path)}" for path in files]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def with_tree(page: str) -> str:
    """The page with the list as it is now."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + tree() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
