"""Sweeps: the combinations, each of which is evaluated once and kept, and what is printed about them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from stablevm import cli
from stablevm.data.digits import prepare_digits
from stablevm.data.opening import open_dataset
from stablevm.evaluation.small_extractor import save_extractor, train_extractor
from stablevm.support.errors import UserError
from stablevm.sweep import run as sweeping
from stablevm.sweep.config import SweepConfig
from stablevm.sweep.results import Cell, Sweep, measures_of
from tests.helpers import runs


def config(**given):
    return SweepConfig(ckpt=Path("run"), reference=Path("reference.npz"), **given)


def test_all_combinations_with_values_in_order():
    asked = config(cfg_scale="2, 1", guidance_high="0.7", average="0.1,ema,0.05")
    asked.validate()
    assert asked.axes == ("average", "cfg_scale")
    assert [(point["average"], point["cfg_scale"]) for point in asked.points()] == [
        ("ema", 1), ("ema", 2), (0.05, 1), (0.05, 2), (0.1, 1), (0.1, 2),
    ]  # fmt: skip
    request = asked.request(asked.points()[-1], Path("folder"))
    assert (request.ckpt, request.cfg_scale, request.guidance_high, request.weights) == (Path("folder"), 2, 0.7, "ema")
    assert asked.request({**asked.points()[0], "average": "model"}, Path("folder")).weights == "model"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cfg_scale": "1,high"}, "--cfg-scale 1,high: expected numbers, separated by commas"),
        ({"cfg_scale": "1,1.0"}, "--cfg-scale 1,1.0: expected different values"),
        ({"cfg_scale": "-1,1"}, "--cfg-scale -1.0: expected 0 or more"),
        ({"average": "emma"}, "--average emma: expected numbers or ema or model, separated by commas"),
        ({"average": "ema,0.4"}, "--average 0.4: expected a width above 0 and below 0.289, or ema or model"),
        (
            {"guidance_low": "0.5", "guidance_high": "0.4,1"},
            "--guidance-high 0.4: expected at least --guidance-low 0.5",
        ),
        ({"guide_scale": "1,2"}, "--guide-scale 1,2: expected --guide-ckpt with it"),
        ({"cfg_scale": ",".join(map(str, range(1, 1002)))}, "1,001 combinations .* at most 1,000"),
    ],
)
def test_impossible_grids_are_refused(given, told):
    with pytest.raises(UserError, match=told):
        config(**given).validate()


def cell(distance, **point):
    return Cell(point, {"frechet_test": distance, "accuracy": 0.5})


@pytest.fixture
def grid():
    """Guidance 1, where the interval has no effect, and 1.5, 2 and 3 in two intervals; the best is 2 up to 0.7."""
    table = {(1.5, 0.7): 4.0, (1.5, 1.0): 5.0, (2.0, 0.7): 3.0, (2.0, 1.0): 4.5, (3.0, 0.7): 3.5, (3.0, 1.0): 9.0}
    cells = [cell(value, cfg_scale=scale, guidance_high=high) for (scale, high), value in table.items()]
    return Sweep("run", 500, [cell(6.0, cfg_scale=1.0), *cells])


def test_the_best_has_its_neighbours_and_a_caveat(grid):
    assert grid.best.point == {"cfg_scale": 2.0, "guidance_high": 0.7}
    assert {tuple(each.point.values()) for each in grid.neighbours()} == {(1.5, 0.7), (3.0, 0.7), (2.0, 1.0)}
    first, second = grid.notes()
    assert first.startswith("the best of 7 was chosen by the same 500 samples") and "--global-seed" in first
    assert second == "the best is at the end of --guidance-high: add a value beyond it"


def test_neighbours_reach_a_combination_without_the_interval(grid):
    low = replace(grid, cells=[*grid.cells, cell(1.0, cfg_scale=1.5, guidance_high=0.5)])
    assert {each.point["cfg_scale"] for each in low.neighbours()} == {1.0, 2.0, 1.5} - {2.0}


def test_the_table_has_a_row_for_each_combination_and_says_of_how_many_samples(grid):
    lines = grid.table().splitlines()
    assert lines[0].split() == ["cfg-scale", "guidance-high", "frechet_test", "accuracy", "samples"]
    assert lines[1].split() == ["2", "0.7", "3", "0.5", "500"] and len(lines) == 8
    assert ["1", "any", "6", "0.5", "500"] in [line.split() for line in lines]


def test_a_line_of_the_figure_for_each_interval(grid):
    assert grid.axis == "cfg_scale"
    assert [(line.label, line.points[:2]) for line in grid.lines()] == [
        ("guidance-high 0.7", [(1, 6.0), (1.5, 4.0)]),
        ("guidance-high 1", [(1, 6.0), (1.5, 5.0)]),
    ]
    words = Sweep("run", 500, [cell(2.0, average="ema"), cell(1.0, average=0.05)])
    (line,) = words.lines()
    assert line.points == [(0, 2.0), (1, 1.0)] and line.ticks == ["ema", "0.05"]


def test_measures_of_several_extractors():
    results = {
        "samples": "x",
        "inception": {"extractor": "i", "fid": 3.0, "precision": 0.5, "statistics": "text"},
        "encoder": {"extractor": "e", "frechet_distance": 7.0},
    }
    assert measures_of(results) == {"fid": 3.0, "precision": 0.5, "encoder frechet_distance": 7.0}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits, an extractor of few steps, and a run of four steps with snapshots of averages."""
    folder = tmp_path_factory.mktemp("sweep")
    prepare_digits(folder / "data")
    splits = open_dataset(folder / "data"), open_dataset(folder / "data", "test")
    save_extractor(folder / "extractor", train_extractor(*splits, seed=0, steps=5))
    runs.run(runs.config(folder, average_every=2, max_train_steps=4, model="SiT-XXS/4"))
    return folder


def command(digits, output, *options):
    words = ["--ckpt", str(digits / "exps" / "run"), "--reference", str(digits / "data"), "--output-dir", str(output)]
    return cli.main(
        ["sweep", *words, "--extractor", str(digits / "extractor"), "--num-fid-samples=10", "--mode=ode",
         "--num-steps=2", *options]
    )  # fmt: skip


def test_it_evaluates_each_once_and_resumes(digits, tmp_path, monkeypatch, capsys):
    options = ["--cfg-scale=1,2", "--guidance-high=0.5,1"]
    evaluate, made = sweeping.evaluate_checkpoint, []

    def counted(*given, **more):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(given[0].sampling)
        return evaluate(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "evaluate_checkpoint", counted)
        assert command(digits, tmp_path / "out", *options) == 130
        assert len(list((tmp_path / "out" / "cells").iterdir())) == 1 and not (tmp_path / "out" / "sweep.json").exists()
    assert command(digits, tmp_path / "out", *options) == 0
    told = capsys.readouterr().out
    assert "3 combinations of 10 samples, 1 finished" in told and "2 of 3: cfg-scale 2" in told
    assert "left" in told and "best: " in told and "beside it" in told
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert len(found["combinations"]) == 3 and found["measure"] == "frechet_test"
    assert {each["num_samples"] for each in found["combinations"]} == {10}
    assert (tmp_path / "out" / "sweep.txt").read_text().splitlines()[0].startswith("cfg-scale")
    with Image.open(tmp_path / "out" / "sweep.png") as picture:
        assert picture.width == 1600
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert command(digits, tmp_path / "out", *options, "--cfg-scale=1,2,3") == 0
    assert "5 combinations of 10 samples, 3 finished" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_the_sweep_of_another_checkpoint_is_kept(digits, tmp_path, capsys):
    assert command(digits, tmp_path / "out") == 0
    before = (tmp_path / "out" / "sweep.json").read_bytes()
    step = digits / "exps" / "run" / "checkpoints" / "0000004"
    capsys.readouterr()
    assert command(digits, tmp_path / "out", f"--ckpt={step}") == 2
    assert f"not of {step}; give another --output-dir" in capsys.readouterr().err
    assert (tmp_path / "out" / "sweep.json").read_bytes() == before


def test_another_extractor_in_the_same_place_gives_numbers_of_its_own(digits, tmp_path, capsys):
    assert command(digits, tmp_path / "out") == 0
    splits = open_dataset(digits / "data"), open_dataset(digits / "data", "test")
    before = shutil.copytree(digits / "extractor", tmp_path / "extractor")
    try:
        save_extractor(digits / "extractor", train_extractor(*splits, seed=1, steps=5))
        capsys.readouterr()
        assert command(digits, tmp_path / "out") == 0
        assert "1 combination of 10 samples, 0 finished" in capsys.readouterr().out
    finally:
        shutil.copytree(before, digits / "extractor", dirs_exist_ok=True)
    assert command(digits, tmp_path / "out") == 0
    assert "1 finished" in capsys.readouterr().out


def test_the_numbers_are_those_of_evaluate(digits, tmp_path):
    assert command(digits, tmp_path / "out", "--cfg-scale=2") == 0
    (cell,) = json.loads((tmp_path / "out" / "sweep.json").read_text())["combinations"]
    words = ["--ckpt", str(digits / "exps" / "run"), "--reference", str(digits / "data"), "--mode=ode", "--num-steps=2"]
    words += ["--extractor", str(digits / "extractor"), "--num-fid-samples=10", "--cfg-scale=2"]
    assert cli.main(["evaluate", *words, "--output", str(tmp_path / "alone.json")]) == 0
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert {name: alone[name] for name in cell["measures"]} == cell["measures"]
    assert not (tmp_path / "out" / "sweep.png").exists(), "one combination has no figure"


def test_averages_are_made_and_swept(digits, tmp_path, capsys):
    assert command(digits, tmp_path / "out", "--average=ema,model,0.1") == 0
    assert (digits / "exps" / "run" / "averages" / "0000004-width-0.1" / "model.json").exists()
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["axes"] == {"average": ["ema", "model", 0.1]}
    assert len({each["measures"]["frechet_test"] for each in found["combinations"]}) == 3
    loose = digits / "exps" / "run" / "averages" / "0000004-width-0.1"
    assert command(digits, tmp_path / "out", "--average=0.1", f"--ckpt={loose}") == 2
    assert "is not in the folder of a run" in capsys.readouterr().err


def test_options_without_effect_are_told_once(digits, tmp_path, capsys):
    assert command(digits, tmp_path / "out", "--guidance-high=0.5,1", "--last-time=0.1") == 0
    told = capsys.readouterr()
    assert told.err.count("--last-time 0.1 has no effect with --mode ode") == 1
    assert "--guidance-high 0.5,1 has no effect with --cfg-scale 1" in told.err
    assert "1 combination of 10 samples, 0 finished" in told.out
