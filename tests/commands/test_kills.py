"""A small sample of helpers/kill.py: commands killed at a file operation and run again have the same results."""

import pytest

from tests.helpers import kill


@pytest.mark.parametrize(
    ("command", "first", "every", "limit"),
    [
        ("train", 97, 23, 3),
        ("train-evaluated", 60, 37, 2),
        ("average", 3, 3, 2),
        ("generate", 19, 11, 3),
        ("convert", 30, 20, 2),
    ],
)
def test_killed_at_a_file_operation(command, first, every, limit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcome = kill.harass(kill.CASES[command], tmp_path, every, first, limit)
    assert outcome.kills >= 1 and outcome.differences == []
