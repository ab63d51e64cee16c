"""Continuous integration covers what pyproject.toml promises: each Python, and the oldest dependencies."""

import re
import runpy
import tomllib

from tests.helpers.modules import PACKAGE

ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "check.yml").read_text()


def test_each_python_that_is_allowed_is_checked():
    lowest, end = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    versions = ", ".join(f'"3.{minor}"' for minor in range(int(lowest), int(end)))
    assert f"python: [{versions}]\n" in WORKFLOW and "- run: ./check\n" in WORKFLOW


def test_the_oldest_dependencies_are_the_lower_bounds():
    lines = runpy.run_path(str(ROOT / ".github" / "oldest.py"))["constraints"]()
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+", line) for line in lines)
    names = [line.partition("==")[0] for line in lines]
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    asked = {re.match(r"[\w.-]+", each)[0] for group in groups for each in group} - {PROJECT["name"]}
    assert sorted(names) == sorted(asked), "one line each"
    assert "torch==2.7" in lines and "python .github/oldest.py" in WORKFLOW


def test_the_published_set_up_line_installs_everything():
    """`pip install -r requirements.txt`, as the projects before have it."""
    assert (ROOT / "requirements.txt").read_text() == "-e .[all]\n"
