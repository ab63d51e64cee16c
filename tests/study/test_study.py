"""The command `stablevm study`, on the handwritten digits with a tiny network, and its arithmetic."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from stablevm.data.digits import prepare_digits
from stablevm.data.opening import open_dataset
from stablevm.evaluation.small_extractor import save_extractor, train_extractor
from stablevm.preparation.config import EncoderConfig, FeaturesConfig
from stablevm.preparation.features import features
from stablevm.preparation.masked_encoder import encoder
from stablevm.study.config import ARMS, StudyConfig
from stablevm.study.pictures import _places
from stablevm.study.results import Comparison, Estimate, Result, path_of
from stablevm.study.run import FIGURE_FILE, SAMPLES_FILE, TABLE_FILE, study
from stablevm.support.errors import UserError
from stablevm.training.config import TrainConfig
from tests.helpers.data_sets import one_line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    prepare_digits(folder / "data")
    splits = open_dataset(folder / "data"), open_dataset(folder / "data", "test")
    save_extractor(folder / "extractor", train_extractor(*splits, seed=0, steps=5))
    return StudyConfig(
        data_dir=folder / "data", extractor=folder / "extractor", output_dir=folder / "study", seeds=1, points="4,2",
        arms="cfm,stablevm-va-repa", model="SiT-XXS/2", batch_size=8, num_fid_samples=20, num_steps=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tiny):
    study(tiny)
    return tiny


def results_in(config):
    return {path.name: json.loads(path.read_text()) for path in (config.output_dir / "results").iterdir()}


def test_each_arm_and_point_has_a_result(done):
    found = results_in(done)
    assert sorted(found) == [f"{arm}-seed0-000000{step}.json" for arm in ("cfm", "stablevm-va-repa") for step in (2, 4)]
    assert found["stablevm-va-repa-seed0-0000004.json"]["options"] == ARMS["stablevm-va-repa"]
    for each in found.values():
        assert math.isfinite(each["metrics"]["frechet_test"]) and each["metrics"]["num_samples"] == 20
        assert each["seconds"] > 0 and each["study"]["model"] == "SiT-XXS/2"
    early, late = (found[f"cfm-seed0-000000{step}.json"] for step in (2, 4))
    assert early["seconds"] == pytest.approx(2 * early["seconds_per_step"])
    assert late["seconds"] == pytest.approx(early["seconds"] + 2 * late["seconds_per_step"])
    assert early["seconds"] < late["seconds"] and early["metrics"] != late["metrics"]
    run = TrainConfig.read(done.output_dir / "runs/stablevm-va-repa-seed0")
    assert (run.loss_type, run.bank_capacity_per_class) == ("stablevm", 256)
    assert (run.use_proj_loss, run.enc_type) == (True, "extractor")


def test_the_table_and_the_figure(done):
    table = (done.output_dir / TABLE_FILE).read_text()
    assert table.startswith("# 4 of 4 results") and "After 2 steps:" in table and "After 4 steps:" in table
    assert "At equal processor time" in table
    assert (done.output_dir / FIGURE_FILE).read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_row_of_images_for_each_arm_below_real_ones(done):
    cell = 64 + 2  # images are enlarged to 64 pixels, two apart
    with Image.open(done.output_dir / SAMPLES_FILE) as picture:
        pixels = np.asarray(picture)
    assert len(pixels) == 3 * cell + 2  # test images, cfm, stablevm-va-repa
    with np.load(done.output_dir / "samples/cfm-seed0-0000004.npz") as file:
        first = file["arr_0"][np.flatnonzero(file["labels"] == 0)[1]].repeat(8, axis=0).repeat(8, axis=1)
    top, left = cell + 2, pixels.shape[1] - 19 * cell  # the second of 20 columns, two of each class
    assert np.array_equal(pixels[top : top + 64, left : left + 64], first)


def test_the_places_of_images_are_of_the_classes_that_all_sets_have():
    first, second = np.array([2, 0, 0, 1, 0]), np.array([0, 5, 0, 2])
    assert list(_places([first, second])) == [[1, 0], [0, 3]]  # one of the classes 0 and 2, as one has but one of 2
    assert list(_places([first, np.array([7])])) == []


def test_a_finished_study_trains_nothing_again_and_takes_more(done, capsys):
    before = results_in(done)
    study(done)
    assert "step" not in capsys.readouterr().out and results_in(done) == before
    more = dataclasses.replace(done, points="2,4,5", arms="cfm")
    study(more)
    assert set(results_in(done)) - set(before) == {"cfm-seed0-0000005.json"}


def test_an_interrupted_study_has_the_same_numbers(done, tmp_path, monkeypatch):
    from stablevm.study import run

    again = dataclasses.replace(done, output_dir=tmp_path / "again", arms="cfm", points="2,4")
    calls = []

    def killed(config):
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluated(config)

    evaluated = run.evaluate
    monkeypatch.setattr(run, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        study(again)
    assert len(results_in(again)) == 1
    study(again)
    for name, each in results_in(again).items():
        assert each["metrics"] == results_in(done)[name]["metrics"]
    # the point was trained before the interruption, so that the time of the whole training is not known
    late = results_in(again)["cfm-seed0-0000004.json"]
    assert late["seconds"] is None and late["seconds_per_step"] is None


def test_a_study_with_other_options_is_refused(done):
    with pytest.raises(UserError) as error:
        study(dataclasses.replace(done, batch_size=16))
    assert "holds a study with --batch-size 8, this one has --batch-size 16" in one_line(error)


def test_a_study_by_another_extractor_in_the_same_place_is_refused(tiny, tmp_path):
    """One that began with an earlier version, which did not record what was in the folders, goes on."""
    extractor = shutil.copytree(tiny.extractor, tmp_path / "extractor")
    config = dataclasses.replace(tiny, extractor=extractor, output_dir=tmp_path / "study", arms="cfm", points="2")
    study(config)
    study(config)
    card = extractor / "extractor.json"
    card.write_text(card.read_text().replace('"steps": 5', '"steps": 6'))
    with pytest.raises(UserError) as error:
        study(config)
    assert f"--extractor {extractor}: its content has changed since {config.output_dir} began" in one_line(error)
    path = config.output_dir / "study.json"
    options = json.loads(path.read_text())
    del options["sha256"]
    path.write_text(json.dumps(options))
    study(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": "cfm,nonsense"}, "--arms cfm,nonsense: expected different ones of cfm, stablevm-fifo256"),
        ({"arms": "cfm,cfm"}, "expected different ones"),
        ({"points": "0,5"}, "--points 0,5: expected different steps from 1"),
        ({"points": "ten"}, "--points ten: expected different steps"),
        ({"num_fid_samples": 3}, "at least 10"),
        ({"arms": "nowhere.toml"}, "--arms nowhere.toml: can't be read"),
    ],
)
def test_bad_options_are_one_clear_line(tiny, options, message):
    with pytest.raises(UserError) as error:
        study(dataclasses.replace(tiny, **options))
    assert message in one_line(error)


def test_arms_with_stored_tokens_of_an_encoder_without_labels(tiny, tmp_path):
    encoder(EncoderConfig(tiny.data_dir, tmp_path / "encoder", patch_size=2, steps=2))
    weights = tmp_path / "encoder/encoder.safetensors"
    features(FeaturesConfig(tiny.data_dir, tmp_path / "tokens", 4, "masked", weights, num_workers=0))
    shared = {"arms": "va-repa", "points": "2", "output_dir": tmp_path / "study"}
    study(
        dataclasses.replace(
            tiny, enc_type="masked", encoder_weights=str(weights), features_dir=tmp_path / "tokens", **shared
        )
    )
    run = TrainConfig.read(tmp_path / "study/runs/va-repa-seed0")
    assert (run.enc_type, run.features_dir) == ("masked", tmp_path / "tokens")
    file = tmp_path / "arms.toml"
    file.write_text(
        f'[own]\nuse_proj_loss = true\nfeatures_dir = "{tmp_path / "tokens"}"\nenc_type = "masked"\n'
        f'encoder_weights = "{weights}"\n'
    )
    from_file = dataclasses.replace(tiny, arms=str(file), points="2", output_dir=tmp_path / "own")
    study(from_file)
    assert TrainConfig.read(tmp_path / "own/runs/own-seed0").features_dir == tmp_path / "tokens"
    assert results_in(from_file)["own-seed0-0000002.json"]["options"]["features_dir"] == str(tmp_path / "tokens")


def test_arms_in_a_file(tiny, tmp_path):
    file = tmp_path / "arms.toml"
    file.write_text('[plain]\n[shifted]\ntime-shift = 2.0\nloss_type = "stablevm"\n')
    config = dataclasses.replace(tiny, arms=str(file))
    assert config.arms_by_name() == {"plain": {}, "shifted": {"time_shift": 2.0, "loss_type": "stablevm"}}
    for text, message in [
        ("[a]\nnonsense = 1", "nonsense: expected options of train"),
        ("[a]\nseed = 1", "seed: expected options of train that arms may have"),
        ("a = 1", "a: expected a table of options"),
        ('["../a"]', "../a: expected a table of options"),
        ("", "holds no arm"),
        ("[", "can't be read"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError) as error:
            config.arms_by_name()
        assert message in one_line(error)


def test_every_arm_is_a_valid_training(tiny):
    for options in ARMS.values():
        TrainConfig(exp_name="x", data_dir=tiny.data_dir, output_dir=tiny.output_dir / "runs", **options).validate()


def test_differences_are_taken_seed_by_seed(tmp_path):
    values = {"cfm": {0: 5.0, 1: 9.0, 2: 7.0}, "stablevm": {0: 4.0, 1: 7.5, 2: 6.5}}
    results = [
        Result(arm, seed, 10, {}, {"frechet_test": value, "precision": 0.5}, 3.0)
        for arm, seeds in values.items()
        for seed, value in seeds.items()
    ]
    comparison = Comparison(results, ["cfm", "stablevm", "absent"])
    assert comparison.arms == ["cfm", "stablevm"]
    gain = comparison.gain("stablevm", 10, "frechet_test")
    assert gain.mean == pytest.approx(1.0) and gain.error == pytest.approx(0.5 / math.sqrt(3)) and gain.count == 3
    assert Estimate.of([2.0]) == Estimate(2.0, None, 1)
    assert comparison.estimate("stablevm", 10, "frechet_test").mean == pytest.approx(6.0)
    assert comparison.seconds("cfm", 10) == 3.0 and comparison.estimate("cfm", 99, "frechet_test") is None
    results[0].write(tmp_path)
    assert path_of(tmp_path, "cfm", 0, 10).is_file()


def test_equal_time_lies_between_the_points_of_slower_arms():
    def result(arm, seed, step, value, seconds):
        return Result(arm, seed, step, {}, {"frechet_test": value}, None, seconds_per_step=seconds)

    values = {"cfm": (16.0, 4.0), "slow": (12.0, 3.0)}  # at 100 and 400 steps: the distance falls as 1 / steps
    results = [
        result(arm, seed, step, value * (1 + seed), seconds)
        for arm, pair in values.items()
        for seed in (0, 1)
        for step, value, seconds in zip((100, 400), pair, {"cfm": (0.3, 0.1), "slow": (None, 0.2)}[arm], strict=True)
    ]
    comparison = Comparison(results, ["cfm", "slow"])
    equal = comparison.equal_time()
    assert equal.budget == pytest.approx(40.0) and equal.steps("slow") == pytest.approx(200.0)
    assert comparison.values_after("slow", 200.0, "frechet_test") == pytest.approx({0: 6.0, 1: 12.0})
    assert comparison.values_after("cfm", 400.0, "frechet_test") == pytest.approx({0: 4.0, 1: 8.0})
    table = "\n".join(comparison.equal_time_table())
    assert "At equal processor time, 40 s" in table
    assert "| slow | 0.200 | 200 | 9.00 ± 3.00 | -3.00 ± 1.00 | -3.0 |" in table
    assert Comparison(results[:1], ["cfm"]).equal_time() is None  # one point is no curve
