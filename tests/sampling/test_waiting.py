"""The first process of a generation waits for parts of others, but not for those that no process will make."""

from types import SimpleNamespace

import pytest

from stablevm.sampling import generation
from stablevm.sampling.parts import PartFolder
from stablevm.support.errors import UserError
from stablevm.support.locks import owned


def test_waiting_ends_when_the_result_is_there_or_the_parts_are_gone(tmp_path):
    run = SimpleNamespace(target=tmp_path / "x.npz", parts=PartFolder(tmp_path / "x.parts", 20, {}))
    with pytest.raises(UserError, match="was removed while images were made"):
        generation._wait(run, None)
    run.target.touch()
    assert generation._wait(run, None)


def test_a_name_is_drawn_by_one_command_at_a_time(tmp_path, monkeypatch):
    run = SimpleNamespace(name="x", target=tmp_path / "x.npz", file=lambda suffix: tmp_path / f"x{suffix}")
    monkeypatch.setattr(generation, "_prepare", lambda config, process: run)
    monkeypatch.setattr(generation, "_generate", lambda run, process: None)
    config = SimpleNamespace(validate=lambda: None, sample_dir=tmp_path)
    (tmp_path / ".tmp-123-0123abcd-x.npz").touch()
    (tmp_path / ".tmp-123-0123abcd-y.npz").touch()
    with owned(tmp_path, "x"), pytest.raises(UserError, match="x: another command is running there"):
        generation.generate(config)
    generation.generate(config)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-123-0123abcd-y.npz"], "what may be another's stays"
