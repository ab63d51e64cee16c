"""The tests mirror the package, and every file of tests that a text names exists."""

import re

import pytest

from tests.helpers.modules import PACKAGE

ROOT = PACKAGE.parent
# The modules at the root; what crosses rooms; what is about the repository; what is shown on a GPU.
OTHERS = {"method", "commands", "project", "device"}
NAMED = re.compile(r"(?<![\w/])tests/[\w./-]+\.(?:py|json)|tests\.helpers\.\w+")


def test_each_folder_of_tests_is_a_room():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in ROOT.glob("tests/**/test_*.py")}
    assert folders == rooms | OTHERS


@pytest.mark.parametrize("folder", [".", "docs", "stablevm", "tests", "benchmarks", "examples"])
def test_named_files_of_tests_exist(folder):
    pages = [
        path
        for kind in ("*.md", "*.py", "*.toml")
        for path in (ROOT / folder).glob(f"**/{kind}" if folder != "." else kind)
    ]
    for page in pages:
        for name in NAMED.findall(page.read_text(encoding="utf-8")):
            path = ROOT / (name if "/" in name else name.replace(".", "/") + ".py")
            assert path.exists(), f"{page.relative_to(ROOT)} names {name}"
