"""`stablevm variance` on a small data set: what it writes, and what it refuses."""

import json
import re

import pytest
import torch
from PIL import Image

from stablevm import cli, draw
from stablevm.advice.config import VarianceConfig
from stablevm.advice.variance import Advice
from stablevm.data.manifest import Manifest
from stablevm.data.opening import open_dataset
from stablevm.data.writer import ShardWriter
from stablevm.interpolant import LINEAR
from stablevm.networks.autoencoder import LatentSpec
from stablevm.training.engine import model_config
from stablevm.training.objectives import make_objective, prefill
from stablevm.variance import VarianceCurve
from tests.helpers import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variance") / "data"
    labels = torch.tensor([0] * 30 + [1] * 9 + [2])  # class 1 is smaller than the references, class 2 has no variance
    return runs.write_data(folder, labels, ("many", "few", "one"))


def run(data, folder, *options):
    return cli.main(["variance", f"--data-dir={data}", f"--output-dir={folder}", "--rows=60", *options])


def test_what_it_writes(data, tmp_path, capsys):
    assert run(data, tmp_path, "--references=12", "--times=10") == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "variance.json").read_text())
    # The mean over a class with the 12 and one with its 9 samples, rounded.
    assert found["classes"] == [0, 1] and found["references"] == 10 and len(found["t"]) == len(found["ess"]) == 10
    assert 0 < found["tau"] <= 1 and found["xi"] in [0, *found["t"]]
    assert all(fewer <= plain for fewer, plain in zip(found["stablevm"], found["cfm"], strict=True))
    assert found["noise_share"] == pytest.approx(0.01**2 / (0.01**2 + 0.2**2), rel=0.2)
    assert f"{found['noise_share']:.1%} of the variance within classes is the autoencoder's own noise" in said
    assert f"--proj-tau {found['tau']:.2f}" in said and f"xi = {found['xi']:.2f}" in said
    assert "1 of 2 classes have fewer than 12 samples" in said
    assert Image.open(tmp_path / "variance.png").size == (2000, 580)


def test_a_curve_with_other_options_and_a_foreign_file_are_kept(data, tmp_path, capsys):
    assert run(data, tmp_path, "--times=3") == 0
    made = (tmp_path / "variance.json").read_bytes()
    assert run(data, tmp_path, "--times=3") == 0 and (tmp_path / "variance.json").read_bytes() == made
    capsys.readouterr()
    assert run(data, tmp_path, "--times=3", "--references=12") == 2
    assert "made with --references 256, not --references 12; give another --output-dir" in capsys.readouterr().err
    assert (tmp_path / "variance.json").read_bytes() == made
    for text in ("mine", "{}"):
        (tmp_path / "variance.json").write_text(text)
        assert run(data, tmp_path, "--times=3") == 2
        assert "variance.json exists, and was not made by this command" in capsys.readouterr().err
        assert (tmp_path / "variance.json").read_text() == text


def test_options_change_the_curve(data, tmp_path):
    curves = []
    several = [["--seed=1"], ["--references-from=0.55"], ["--references=5"], ["--classes=0"], ["--path-type=cosine"]]
    # Fewer references than samples: with all of them StableVM's variance is 0, whatever the options.
    for number, options in enumerate([[], *several, ["--rows=50"], ["--times=4"]]):
        assert run(data, tmp_path / str(number), "--references=12", *options) == 0
        curves.append(json.loads((tmp_path / str(number) / "variance.json").read_text())["stablevm"])
    assert all(curves.count(curve) == 1 for curve in curves)
    for name, options in (("again", []), ("all", ["--classes", "all"])):  # those with a variance are the default's
        assert run(data, tmp_path / name, "--references=12", *options) == 0
        assert json.loads((tmp_path / name / "variance.json").read_text())["stablevm"] == curves[0]


def noisy_data(folder, flips=False):
    """Two classes of 32 latents of 64 values, whose means differ by 0.21 and whose autoencoder's deviation is 1."""
    stream = torch.Generator().manual_seed(1)
    means = 0.21 * torch.randn(64, 4, 4, 4, generator=stream)
    latent = LatentSpec(shape=(4, 4, 4), scale=1.0, shift=0.1, autoencoder="mse")
    moments = torch.cat([means, torch.ones_like(means)], dim=1).half()
    writer = ShardWriter(folder, Manifest(("a", "b"), 32, "none", latent, has_flips=flips, has_images=False))
    mirrored = {"moments_flip": moments.flip(-1)} if flips else {}
    writer.add(moments=moments, labels=torch.arange(64) % 2, index=torch.arange(64), **mirrored)
    writer.finish()
    return folder


def sample_size_in_training(folder, root, monkeypatch, **options):
    """The mean effective sample size of 500 draws at t = 0.5 from the bank that a training fills."""
    dataset = open_dataset(folder)
    config = runs.config(root, data_dir=folder, loss_type="stablevm", bank_capacity_per_class="all", **options)
    drawn = make_objective(config, model_config(config, dataset), dataset, torch.device("cpu"))
    prefill(drawn.bank, dataset, config, show=False)
    monkeypatch.setattr(draw, "draw_times", lambda name, path, rows, *_, **__: torch.full((rows,), 0.5))
    labels, stream = torch.arange(500) % 2, torch.Generator().manual_seed(0)
    slots = torch.full_like(labels, drawn.bank.discarded_slot)
    return drawn.draw(torch.zeros(500, 4, 4, 4), labels, stream, slots=slots).ess.mean().item()


def test_it_weighs_what_training_weighs(tmp_path, monkeypatch, capsys):
    """Draws, not means: of 32 references 7 take part by the means, 1 by the draws."""
    folder = noisy_data(tmp_path / "data")
    assert run(folder, tmp_path / "out", "--references=32", "--times=2", "--rows=400") == 0
    found = json.loads((tmp_path / "out" / "variance.json").read_text())
    in_training = sample_size_in_training(folder, tmp_path, monkeypatch, cfg_prob=0.0)
    assert found["ess"][0] == pytest.approx(in_training, abs=0.02) and in_training < 1.05
    assert found["noise_share"] == pytest.approx(1 / (1 + 0.21**2), rel=0.02)
    assert "95." in capsys.readouterr().out


def test_mirrored_samples_are_references_too(tmp_path):
    folder = noisy_data(tmp_path / "data", flips=True)
    sizes = []
    for number, options in enumerate(([], ["--horizontal-flips"])):
        assert run(folder, tmp_path / str(number), "--references=99", "--times=2", *options) == 0
        sizes.append(json.loads((tmp_path / str(number) / "variance.json").read_text())["ess"][-1])
    assert sizes == pytest.approx([32, 64], rel=1e-3)


def test_references_from_a_time_on(data, tmp_path):
    curves = []
    for number, options in enumerate(([], ["--references-from=0.75"])):
        assert run(data, tmp_path / str(number), "--references=12", "--times=4", *options) == 0
        curves.append(json.loads((tmp_path / str(number) / "variance.json").read_text()))
    ever, late = curves
    assert late["stablevm"] == [*late["cfm"][:2], *ever["stablevm"][2:]] and late["ess"] == [1, 1, *ever["ess"][2:]]
    assert late["cfm"] == ever["cfm"]


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--classes=0,2"], "--classes 0,2: .* has 1 samples of it; name classes with 2 or more"),
        (["--classes=7"], "--classes 7: .* has classes 0 to 2"),
        (["--classes=0,0"], "--classes 0,0: expected all, or distinct class indices"),
        (["--references=1"], "--references 1: expected at least 2"),
        (["--references-from=1.5"], r"--references-from 1.5: expected a time in \[0, 1\]"),
        (["--horizontal-flips"], "holds no latents of mirrored images; .* encode --flip"),
    ],
)
def test_mistakes_are_one_line(options, expected, data, tmp_path, capsys):
    assert run(data, tmp_path / "out", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(expected, line), line
    assert not (tmp_path / "out").exists()


def advice_of(folder):
    found = json.loads((folder / "variance.json").read_text())
    return {name: found[name] for name in ("worth", "active_share", "removed_share", "references_from", "idle_share")}


def test_the_advice_follows_from_the_effective_number_of_references(data, tmp_path, capsys):
    assert run(data, tmp_path, "--references=12", "--times=10") == 0
    found, said = advice_of(tmp_path), capsys.readouterr().out
    assert 0 < found["active_share"] < 1 and 0 < found["removed_share"] < 1
    assert found["idle_share"] == pytest.approx(found["references_from"], abs=0.01)  # of uniform times
    assert f"--references-from {found['references_from']:.2f}: {found['idle_share']:.0%} of the samples" in said
    assert f"take part in {found['active_share']:.0%} of the samples" in said and "StableVM: " in said
    # with references from the recommended time on, the variance is the same but for a few percent of what is removed
    late = ["--references=12", "--times=10", f"--references-from={found['references_from']}"]
    assert run(data, tmp_path / "late", *late) == 0
    assert advice_of(tmp_path / "late")["removed_share"] > 0.95 * found["removed_share"]
    # nearly all times of EDM's are early
    assert run(data, tmp_path / "edm", "--references=12", "--times=10", "--weighting=lognormal") == 0
    assert advice_of(tmp_path / "edm")["active_share"] < found["active_share"]


@pytest.mark.parametrize(
    ("ess", "worth", "start"),
    [([1, 1, 1, 1], "no", 1.0), ([1, 1, 1, 200], "unclear", 0.75), ([5, 20, 50, 200], "yes", 0.25)],
)
def test_the_verdict(ess, worth, start):
    band = [(0.0, 0.0)] * 4
    curve = VarianceCurve([0.25, 0.5, 0.75, 1.0], [0.0, 0.1, 0.2, 0.2], [0.0] * 4, band, band, ess, 256)
    advice = Advice.of(curve, LINEAR, VarianceConfig(data_dir="x"))
    assert (advice.worth, advice.references_from) == (worth, start)
    if worth == "unclear":
        # a quarter of the times have references; they remove 99.5 % of 0.2 at 1, and nothing at 0.75
        assert advice.active_share == pytest.approx(0.25, abs=0.01)
        assert advice.removed_share == pytest.approx(0.125 * 0.199 / (0.0125 + 0.0375 + 0.05), abs=0.005)
