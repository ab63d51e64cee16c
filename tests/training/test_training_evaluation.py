"""Evaluation during training: the metrics, the best checkpoint, and resuming."""

import json
import shutil

import pytest

from stablevm.evaluation.config import ReferenceConfig
from stablevm.evaluation.reference import reference
from stablevm.networks.snapshot import load_card
from stablevm.support.errors import UserError
from stablevm.training.checkpoint import Record, best_record, keep_if_best
from tests.helpers.data_sets import one_line
from tests.helpers.runs import config, run, write_data, write_encoder

RECORD = Record("frechet_distance", 1.0, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_data(folder / "data")
    write_encoder(folder / "encoder.safetensors")
    reference(ReferenceConfig(source=folder / "data", output=folder / "ref.npz", statistics=False))
    return folder


@pytest.fixture
def evaluated(root, monkeypatch):
    """Build a run that is evaluated by the patch features of the tests' tiny encoder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))

    def build(name, **given):
        extractor = {"eval_enc_type": "digits", "eval_weights": str(root / "encoder.safetensors")}
        options = {"eval_every": 2, "eval_samples": 20, "eval_reference": str(root / "ref.npz"), **extractor, **given}
        return config(root, name, **options)

    return build


def evaluations(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "eval_frechet_distance" in row}


def test_the_best_checkpoint_is_kept(evaluated):
    folder = run(evaluated("kept", max_train_steps=5, checkpoints_kept=1))
    found = evaluations(folder)
    assert list(found) == [2, 4, 5]
    assert all(0 <= row["eval_precision"] <= 1 and 0 <= row["eval_recall"] <= 1 for row in found.values())
    values = {step: row["eval_frechet_distance"] for step, row in found.items()}
    step = min(values, key=values.get)
    assert best_record(folder) == Record("frechet_distance", values[step], step)
    assert load_card(folder / "checkpoints" / "best").step == step
    assert len(set(values.values())) == 3, "the network has moved"


def test_an_interrupted_run_has_the_same_evaluations(evaluated):
    whole = run(evaluated("whole"))
    parts = evaluated("parts", max_train_steps=4)
    run(parts)
    assert evaluations(run(evaluated("parts"))) == evaluations(whole)
    shutil.rmtree(whole)


def test_only_a_lower_value_is_the_best(evaluated):
    folder = run(evaluated("lower", max_train_steps=2, eval_every=0, eval_samples=1000))
    assert best_record(folder) is None
    assert keep_if_best(folder, RECORD)
    assert not keep_if_best(folder, RECORD)
    assert not keep_if_best(folder, Record("frechet_distance", float("nan"), 2))
    assert keep_if_best(folder, Record("frechet_distance", 0.5, 2))
    assert best_record(folder).value == 0.5


def test_bad_options_get_one_clear_line(evaluated, root):
    for given, message in (
        ({"eval_reference": None}, "expected a reference to evaluate against"),
        ({"eval_samples": 3}, "--eval-samples 3: expected at least 4"),
        ({"eval_reference": str(root / "absent.npz")}, "no such file"),
        ({"eval_every": -1}, "--eval-every -1"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(evaluated("refused", **given))
        one_line(error)
    assert not (root / "exps" / "refused").exists()
