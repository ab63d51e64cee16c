"""The examples, at small size: they run, stay short, and what they say holds."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from stablevm import cli
from stablevm.data.opening import open_dataset
from stablevm.networks import registry
from stablevm.networks.snapshot import load_card
from tests.helpers import runs

FOLDER = Path(__file__).parents[2] / "examples"
LONGEST = 80


@pytest.fixture
def example(monkeypatch):
    """A function that imports an example as if it were started in its folder; its random numbers stay its own."""
    monkeypatch.syspath_prepend(FOLDER)
    with torch.random.fork_rng():
        yield importlib.import_module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_they_are_run(path):
    source = path.read_text()
    assert len(source.splitlines()) < LONGEST and f"    python examples/{path.name}" in source
    assert path.name in (FOLDER / "README.md").read_text()


def test_two_moons(example, tmp_path):
    cfm, stablevm = example("two_moons").main(steps=40, picture=tmp_path / "moons.png")
    assert stablevm.mean() < 0.7 * cfm.mean() and (tmp_path / "moons.png").stat().st_size > 10_000


def test_one_step(example, tmp_path):
    errors = example("one_step").main(steps=40, picture=tmp_path / "one_step.png")
    assert errors["StableVM"].mean() < 0.5 * errors["flow matching"].mean()
    assert (tmp_path / "one_step.png").stat().st_size > 10_000


def test_first_steps(monkeypatch):
    """The notebook's cells, one after the other, but for the installation."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()))
    cells = json.loads((FOLDER / "first_steps.ipynb").read_text())["cells"]
    install, *code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert install.startswith("%pip install") and "steps = 2000" in code[0]
    names = {}
    with torch.random.fork_rng():
        exec(code[0].replace("steps = 2000", "steps = 40"), names)
        for cell in code[1:]:
            exec(cell, names)
    last = {key: losses[-20:].mean() for key, (_, losses) in names["trained"].items()}
    for name in ("two_moons", "eight_gaussians"):
        assert last[name, "StableVM"] < 0.7 * last[name, "CFM"]
    assert len(drawn) == 2
    plt.close("all")


def test_alignment(example):
    results = torch.tensor(example("alignment").main(steps=40, encoder_steps=20))
    (velocity, cosine), (velocity_after, cosine_after) = results[:5].mean(0), results[-5:].mean(0)
    assert velocity_after < 0.7 * velocity and cosine_after > 0.65 > 0.4 > cosine


def test_noise_and_data(example):
    distances = example("noise_and_data").main(steps=100)
    assert max(distances.values()) < 1, "right ones: 0.02 to 0.39; predictions read as another kind: 1.4 to 10"


def test_unconditional(example):
    results = example("unconditional").main(steps=30)
    assert results["CFM"][1] == 1 < results["STF"][1] < results["StableVM"][1]
    assert results["StableVM"][0] < results["CFM"][0]


def test_bias_of_nearest_neighbours(example):
    results = example("vector_conditions").main(samples=500, points=50, repeats=20, sizes=(1, 8, 64), times=(0.6,))
    (no_bias, most), (_, less), (bias, least) = results.values()
    assert most > less > least and bias > 0.02
    # The squared mean of 20 errors of variance 0.6, less its expectation, over 50 x 8 values: deviation 0.002.
    assert abs(no_bias) < 4 * most / 20 * math.sqrt(2 / 400)


def test_own_network(example, tmp_path, monkeypatch):
    """It trains, aligned too, resumes and is sampled by the ordinary commands."""
    runs.write_data(tmp_path / "data")
    weights = runs.write_encoder(tmp_path / "encoder.safetensors")
    monkeypatch.setattr(registry, "NETWORKS", registry.NETWORKS.copy())
    command = example("own_network").cli.main
    options = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path), "--exp-name", "mixer"]
    options += ["--model", "Mixer-S", "--batch-size", "8", "--num-workers", "0", "--sampling-steps", "0"]
    options += ["--report-to", "none", "--mixed-precision", "no", "--use-proj-loss", "--enc-type", "digits"]
    options += ["--encoder-weights", str(weights), "--encoder-depth", "2", "--checkpointing-steps", "1"]
    for steps in ("1", "2"):
        AcceleratorState._reset_state(True)
        assert command(["train", *options, "--max-train-steps", steps]) == 0
    folder = tmp_path / "mixer" / "checkpoints" / "0000002"
    assert load_card(folder).model.kind == "mixer"
    sampled = ["--ckpt", str(folder), "--sample-dir", str(tmp_path), "--name", "x", "--num-fid-samples", "3"]
    assert command(["generate", *sampled, "--mode", "ode", "--num-steps", "2"]) == 0
    assert (tmp_path / "x.npz").is_file()


def test_diffusers(example, tmp_path):
    pytest.importorskip("diffusers")
    images = example("diffusers_unet").main(steps=2, picture=tmp_path / "digits.png")
    assert images.shape == (100, 1, 8, 8) and images.isfinite().all() and (tmp_path / "digits.png").is_file()


def test_stablevs_in_a_pipeline(example):
    pytest.importorskip("diffusers")
    errors = example("diffusers_stablevs").main(training_steps=2, reference_steps=60)
    assert list(errors) == ["Euler, 30 steps", "Euler, 20 steps", "StableVS, 20 steps"]
    assert all(math.isfinite(error) for error in errors.values())


@pytest.mark.slow
def test_tiny_autoencoder(example, tmp_path, monkeypatch):
    """The path through latents: convert, encode, train, sample, decode and evaluate, as a study of three arms."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "digits", "digits"]) == 0
    for split, count in (("train", 120), ("test", 60)):
        digits = open_dataset(Path("digits"), split)
        rows, labels = range(count), digits.labels()
        for row, image in zip(rows, digits.images(rows), strict=True):
            file = Path("pictures", split, str(int(labels[row])), f"{row}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    errors = example("tiny_autoencoder").main(Path("digits"), Path("vae"), latent_side=4, steps=40)
    assert sum(errors[-5:]) < 0.8 * sum(errors[:5])
    with pytest.raises(SystemExit, match="exists already"):
        example("tiny_autoencoder").main(Path("digits"), Path("vae"))
    for split in ("train", "test"):
        part = f"latents/{split}"
        convert = ["--source", f"pictures/{split}", "--dest", part, "--resolution", "8x8", "--num-workers", "0"]
        assert cli.main(["prepare", "convert", *convert]) == 0
        assert cli.main(["prepare", "encode", "--data-dir", part, "--vae", "vae", "--num-workers", "0"]) == 0
    latents = open_dataset(Path("latents")).latent
    assert latents.shape == (4, 4, 4) and latents.autoencoder.endswith("vae")
    assert cli.extractor(["--data-dir", "latents", "--output-dir", "judge", "--steps", "5"]) == 0
    arms = ["--arms", "cfm,stablevm-class,stablevm-va-repa", "--seeds", "1", "--points", "2,3", "--num-steps", "2"]
    options = ["--model", "SiT-XXS/1", "--batch-size", "8", "--num-fid-samples", "20", "--encoder-depth", "1", *arms]
    assert cli.main(["study", "--data-dir", "latents", "--extractor", "judge", *options]) == 0
    assert len(list(Path("study/results").iterdir())) == 6
