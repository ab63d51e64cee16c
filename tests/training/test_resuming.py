"""Resuming: after a graceful stop, from an earlier step, past a checkpoint with tensors of another run."""

import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from stablevm import cli
from stablevm.support.files import sha256
from stablevm.training.checkpoint import best_record, saved_steps
from stablevm.training.launch import Interruption
from tests.helpers import kill, runs

RHYTHM = {"max_train_steps": 12, "checkpointing_steps": 4, "log_steps": 3}


def stop_at(monkeypatch, count):
    """Make the next run receive a signal to stop at its `count`-th step."""
    asked = []

    def agreed(interruption, accelerator):
        asked.append(None)
        if len(asked) == count:
            interruption.signal = signal.SIGTERM
        return interruption.signal is not None

    monkeypatch.setattr(Interruption, "agreed", agreed)


def test_a_run_that_is_interrupted_again_and_again_keeps_no_more(root, monkeypatch):
    """Those of its own interruptions are removed; those of a command with another plan are not."""
    settings = runs.config(root, "often", max_train_steps=12, checkpointing_steps=None)
    longer = replace(settings, max_train_steps=30)
    for plan, counts in ((settings, (3, 4, 100)), (longer, (2, 3, 4))):
        for count in counts:
            stop_at(monkeypatch, count)
            with suppress(SystemExit):
                runs.run(plan)
    assert saved_steps(settings.folder) == [10, 12, 18, 21]
    monkeypatch.undo()
    runs.run(longer)
    assert saved_steps(settings.folder) == [10, 12, 27, 30]


def test_a_graceful_stop_splits_neither_rows_nor_means(root, monkeypatch):
    settings = {**RHYTHM, "keep_best": "loss", "loss_type": "stablevm"}
    calm = runs.run(runs.config(root, "calm", **settings))
    stopped = runs.config(root, "stopped", **settings)
    for count in (5, 2):  # at steps 5 and 7, neither of which has a row or a checkpoint of its own
        stop_at(monkeypatch, count)
        with pytest.raises(SystemExit) as end:
            runs.run(stopped)
        assert end.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    runs.run(stopped)
    assert saved_steps(stopped.folder) == [4, 5, 7, 8, 12]
    assert best_record(stopped.folder) == best_record(calm)
    assert kill.comparable(stopped.folder / "metrics.jsonl") == kill.comparable(calm / "metrics.jsonl")
    runs.assert_same_checkpoint(stopped.folder, calm, step=12)


def test_a_return_that_is_given_again_resumes(root, capsys, monkeypatch):
    settings = runs.config(root, "returned", **RHYTHM)
    runs.run(settings)
    aside = settings.folder / "checkpoints" / "newer-than-0000004"
    back = replace(settings, resume_step=4)
    stop_at(monkeypatch, 5)
    with pytest.raises(SystemExit):
        runs.run(back)
    monkeypatch.undo()
    originals = kill.contents(aside)
    assert saved_steps(settings.folder) == [4, 8, 9] and {name[:7] for name in originals} == {
        "0000008",
        "0000012",
        "metrics",
    }
    runs.run(back)
    assert "went back to step 4 before; resumes from step 9" in capsys.readouterr().out
    assert saved_steps(settings.folder) == [4, 8, 9, 12] and kill.contents(aside) == originals
    runs.run(settings)
    runs.run(back)  # another command came between, so this one is a new wish
    assert kill.contents(aside) == originals and aside.with_name("newer-than-0000004-2").is_dir()


def test_what_a_course_left_behind_does_not_pass_for_the_new_ones(root):
    """Grids and the best checkpoint of later steps, and the rows that are taken off the metrics."""
    settings = runs.config(root, "left", **RHYTHM, keep_best="loss", sampling_steps=4)
    folder = runs.run(settings)
    rows = (folder / "metrics.jsonl").read_text()
    samples = folder / "samples"
    before = {path.name for path in samples.iterdir()}
    assert before == {"step-0000004.png", "step-0000008.png", "step-0000012.png"}
    best = best_record(folder)
    runs.run(replace(settings, resume_step=4, max_train_steps=5))
    aside = folder / "checkpoints" / "newer-than-0000004"
    assert {path.name for path in samples.iterdir()} == {"step-0000004.png", "step-0000005.png"}
    assert {path.name for path in (aside / "samples").iterdir()} == before - {"step-0000004.png"}
    assert (aside / "metrics.jsonl").read_text() == rows
    assert best_record(folder).step <= 5 and (best.step <= 4 or best_record(aside.parent.parent) != best)


def spoil(folder, part, change):
    """Change the tensors of a checkpoint, and update its checksums so that it seems intact."""
    path = folder / f"{part}.safetensors"
    tensors = load_file(path)
    change(tensors)
    before = sha256(path)
    save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").replace(
        path
    )  # tensors that were read before may lie in the old file (an older safetensors maps it)
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(before, sha256(path)))


FOREIGN = {
    "counts": ("bank", lambda tensors: tensors.pop("counts"), 'bank.safetensors lacks "counts"'),
    "escape": (
        "model",
        lambda tensors: tensors.update({"\x1b[2Jx": torch.zeros(1)}),
        "which is not a tensor of this run",
    ),
    "moments": (
        "optimizer",
        lambda tensors: tensors.update({"final_layer.linear.bias.exp_avg": torch.zeros(3)}),
        "optimizer.safetensors holds final_layer.linear.bias.exp_avg as [3] torch.float32, this run's is ",
    ),
    "doubles": (
        "ema",
        lambda tensors: tensors.update({name: value.double() for name, value in tensors.items()}),
        "torch.float64, this run's is ",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_tensors_of_others_are_named_and_the_checkpoint_before_is_taken(kind, root, capsys):
    part, change, said = FOREIGN[kind]
    settings = runs.config(root, f"foreign-{kind}", **RHYTHM, loss_type="stablevm")
    folder = runs.run(settings)
    expected = runs.saved(folder, 12)
    spoil(folder / "checkpoints" / "0000012", part, change)
    capsys.readouterr()
    assert cli.train([*runs.as_arguments(settings), "--resume-step=12"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {folder / 'checkpoints' / '0000012'}: ") and said in error
    assert cli.train(runs.as_arguments(settings)) == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "0000012: " in line)
    assert said in warning and warning.endswith("; trying the one before")
    found = runs.saved(folder, 12)
    assert all(torch.equal(found["ema"][name], value) for name, value in expected["ema"].items())


@pytest.mark.parametrize("option", ["adam-weight-decay", "learning-rate", "max-grad-norm", "proj-coeff", "cfg-prob"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(option, value, root, capsys):
    assert cli.train([*runs.as_arguments(runs.config(root, "infinite")), f"--{option}={value}"]) == 2
    assert capsys.readouterr().err == f"error: --{option} {value}: expected a finite number\n"
