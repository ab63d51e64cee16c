"""Foreign text for people: terminals get escapes, captions one clean line."""

import io
import subprocess
import sys

import pytest

from stablevm.support.text import caption, meant, printable, printable_streams, shown, usable_streams

FOREIGN = [
    ("\x1b[31mred", r"\x1b[31mred"),
    ("\x9b31m", r"\x9b31m"),
    ("a\x00b\x07", r"a\x00b\x07"),
    ("two\nlines\r", r"two\nlines\r"),
    ("a\u202egnp.exe", r"a\u202egnp.exe"),
    ("\u2028\u2029\x85\x1c\x1d", r"\u2028\u2029\x85\x1c\x1d"),
    (b"caf\xe9".decode("utf-8", "surrogateescape"), r"caf\xe9"),
    ("\ud800", r"\ud800"),
    ("Wörter 漢字 👩\u200d🔬", "Wörter 漢字 👩\u200d🔬"),
]


@pytest.mark.parametrize(("text", "expected"), FOREIGN)
def test_what_a_terminal_would_obey_is_an_escape(text, expected):
    assert printable(text) == expected


@pytest.mark.parametrize(("text", "_"), FOREIGN)
def test_nothing_foreign_reaches_a_stream_raw(text, _, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with printable_streams():
        print(f"name: {text}", file=sys.stdout)
    assert out.getvalue() == "name: " + printable(text, kept="\n") + ("\n")
    assert sys.stdout is out


def test_a_progress_bar_may_move_about():
    from tqdm import tqdm

    err, saved = io.StringIO(), sys.stderr
    sys.stderr = err
    try:
        with printable_streams():
            for _ in tqdm(range(2), desc="outer"):
                for _ in tqdm(range(2), desc="\x1b[31minner"):
                    tqdm.write("line\x1b[2J", file=sys.stderr)
    finally:
        sys.stderr = saved
    text = err.getvalue()
    assert "\r" in text and "\x1b[A" in text and "line\\x1b[2J\n" in text
    assert "\x1b" not in text.replace("\x1b[A", "")


def test_streams_of_another_encoding_take_any_text(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    with usable_streams():
        print("ü\udce9", flush=True)
    assert raw.getvalue() == b"\\xfc\\udce9\n"


def test_a_process_without_streams_continues(monkeypatch):
    from tqdm import tqdm

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with usable_streams(), printable_streams():
        print("nothing", file=sys.stderr)
        assert list(tqdm(range(2))) == [0, 1]
    assert sys.stderr is None


def test_a_service_without_streams_has_its_status():
    code = "import sys; sys.stdout = sys.stderr = None; from stablevm.cli import main; sys.exit(main({}))"
    for arguments, status in ((["data", "info", "/nowhere"], 2), (["train", "--nonsense"], 2), (["--version"], 0)):
        done = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True)
        assert (done.returncode, done.stderr) == (status, b"")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat", "cat"),
        ("a\nb\u2029c\x85d\x1ce\x1df", "a b c d e f"),
        ("\x1b[31mred\u202e", "[31mred"),
        ("  much \t space ", "much space"),
        ("x" * 4000, "x" * 79 + "…"),
        ("\x00" * 1000 + "x", "…"),
        ("\ud800", ""),
    ],
)
def test_captions_are_one_clean_line(text, expected):
    assert caption(text) == expected


def test_a_missing_path_is_compared_with_those_beside_it(tmp_path):
    (tmp_path / "pets").mkdir()
    assert meant(tmp_path / "pest") == f" (did you mean {tmp_path}/pets?)"
    assert meant(tmp_path / "imagenet256") == meant(tmp_path / "absent" / "pest") == ""


def test_values_of_json_in_a_message():
    values = [
        ("x\n", '"x\\n"'),
        (1, "1"),
        (None, "null"),
        (True, "true"),
        (10**5000, "an integer of more than 64 bits"),
    ]
    assert [shown(value) for value, _ in values] == [text for _, text in values]
    assert shown("x" * 100) == '"' + "x" * 60 + '…"' and shown([1] * 5000) == "a list of 5000"
