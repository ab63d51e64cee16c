"""Whole generations from a tiny checkpoint: the same images however the work is split, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stablevm.networks.snapshot import load_card, load_model, save
from stablevm.sampling import generation, image_sampler
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate
from stablevm.sampling.guidance import GuidanceSettings, sample_latents
from stablevm.sampling.parts import PART_LENGTH, PartFolder
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.errors import UserError
from stablevm.support.rng import RowGenerators
from tests.helpers.checkpoints import random_weights, save_checkpoint, tiny_card

COUNT = 70  # four full parts and one of six


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_card())


@pytest.fixture
def options(checkpoint, tmp_path):
    """Build a config: few cheap steps by default."""

    def build(**given):
        return GenerateConfig(
            **{
                "ckpt": checkpoint,
                "num_fid_samples": COUNT,
                "num_steps": 4,
                "cfg_scale": 1.5,
                "guidance_high": 0.7,
                "sample_dir": tmp_path / "samples",
                "name": "run",
                **given,
            }
        )

    return build


def as_process(monkeypatch, rank, world_size):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


def images_of(path):
    with np.load(path) as archive:
        return archive["arr_0"]


def levels_apart(path, other):
    return np.abs(images_of(path).astype(int) - images_of(other).astype(int)).max()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_result(options, capsys):
    target = generate(options())
    assert {path.name for path in target.parent.iterdir()} == {"run.npz", "run.png"}, "the parts are gone"
    with np.load(target) as archive:
        images, labels, protocol = archive["arr_0"], archive["labels"], json.loads(archive["protocol"].item())
    assert images.shape == (COUNT, 8, 8, 3) and images.dtype == np.uint8
    assert (images[..., 0] == images[..., 2]).all() and images.std() > 20 and len(np.unique(images, axis=0)) == COUNT
    assert labels.dtype == np.int64 and sorted(np.bincount(labels)) == [17, 17, 18, 18]
    assert protocol["num_steps"] == 4 and protocol["weights"] == "ema" and len(protocol["weights_sha256"]) == 64
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{target}: 70 images, EMA weights of step 120"
    # Of the times 1, 0.68, 0.36, 0.04, three are in the guided interval.
    assert last.startswith(f"{target}: complete, 7 network evaluations per image, ")


def test_pixels_are_latents_rounded_to_the_nearest_level(options, checkpoint):
    config = options(mode="ode", num_fid_samples=PART_LENGTH)
    target = generate(config)
    labels = torch.from_numpy(np.load(target)["labels"])
    card = load_card(checkpoint)
    model = load_model(checkpoint, card)
    streams = RowGenerators.for_keys("generate", 0, positions=range(PART_LENGTH))
    settings, guidance = SamplerSettings(mode="ode", num_steps=4), GuidanceSettings(cfg_scale=1.5, guidance_high=0.7)
    latents, _ = sample_latents(model, card, labels, streams, settings, "cpu", guidance=guidance)
    levels = ((latents.double() + 1) * 127.5).clamp(0, 255)[:, 0].numpy()
    assert np.abs(levels - images_of(target)[..., 0]).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "sde"},
        {"mode": "ode", "heun": True},
        {"mode": "stablevs", "num_steps": 6, "steps_below": 3, "noise_factor": 0.5},
    ],
)
def test_batch_size_does_not_change_the_images(options, given):
    whole = generate(options(per_proc_batch_size=64, **given))
    small = generate(options(per_proc_batch_size=7, name="small", **given))
    assert levels_apart(whole, small) <= 1


def test_adaptive_steps_are_each_images_own(options):
    one, eight = (
        generate(
            options(
                mode="ode", solver="dopri5", rtol=1e-2, num_fid_samples=8, per_proc_batch_size=batch, name=f"by{batch}"
            )
        )
        for batch in (1, 8)
    )
    assert levels_apart(one, eight) <= 1


def test_processes_do_not_change_the_images(options, monkeypatch):
    whole = generate(options())
    for rank in (1, 2, 0):  # the first process last: it would wait for the others
        as_process(monkeypatch, rank, world_size=3)
        shared = generate(options(name="shared"))
        assert shared.exists() == (rank == 0)
        if rank == 1:
            parts = {path.name for path in shared.with_suffix(".parts").glob("*.npy")}
            assert parts == {"000016-000032.npy", "000064-000070.npy"}, "its share alone"
    assert not torch.distributed.is_initialized(), "no collective could time out"
    assert levels_apart(whole, shared) <= 1
    assert np.array_equal(np.load(whole)["labels"], np.load(shared)["labels"])


def test_the_first_process_waits_for_the_others(options, monkeypatch):
    whole = generate(options())

    def others_work_meanwhile(seconds):
        as_process(monkeypatch, 1, world_size=2)
        generate(options(name="shared"))

    monkeypatch.setattr(generation.time, "sleep", others_work_meanwhile)
    as_process(monkeypatch, 0, world_size=2)
    assert levels_apart(whole, generate(options(name="shared"))) <= 1


def test_image_depends_on_seed_and_index_alone(options):
    many, few = generate(options(classes="2")), generate(options(classes="2", num_fid_samples=20, name="few"))
    assert np.abs(images_of(many)[:20].astype(int) - images_of(few).astype(int)).max() <= 1
    other_seed = generate(options(classes="2", num_fid_samples=20, name="other", global_seed=1))
    assert levels_apart(few, other_seed) > 50


def test_interrupted_and_resumed_gives_the_same_file(options, monkeypatch):
    whole = generate(options(per_proc_batch_size=PART_LENGTH))
    write, written = PartFolder.write, []

    def write_until_interrupted(self, part, images):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, images)

    config = options(name="resumed", per_proc_batch_size=PART_LENGTH)
    with monkeypatch.context() as patch:
        patch.setattr(PartFolder, "write", write_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(config)
    parts = config.sample_dir / "resumed.parts"
    assert {path.name for path in parts.iterdir()} == {"protocol.json", "000000-000016.npy", "000016-000032.npy"}
    drawn = []
    monkeypatch.setattr(PartFolder, "write", lambda self, part, images: (drawn.append(part), write(self, part, images)))
    assert generate(config).read_bytes() == whole.read_bytes()
    assert drawn == [range(32, 48), range(48, 64), range(64, 70)], "only what was missing"


def interrupted(config, monkeypatch, parts=2):
    """Draw until so many parts are there; returns their paths."""
    write = PartFolder.write

    def write_until_interrupted(self, part, images):
        if part.start >= parts * PART_LENGTH:
            raise KeyboardInterrupt
        write(self, part, images)

    with monkeypatch.context() as patch:
        patch.setattr(PartFolder, "write", write_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(config)
    return sorted(config.sample_dir.glob(f"{config.name}.parts/*.npy"))


def test_damaged_and_foreign_parts_are_drawn_again(options, monkeypatch, capsys):
    whole = generate(options())
    others = interrupted(options(name="other", global_seed=1), monkeypatch)
    for number, damage in enumerate(
        (
            lambda one, two: one.write_bytes(b""),
            lambda one, two: one.write_bytes(one.read_bytes()[:-100]),
            lambda one, two: one.write_bytes(one.read_bytes()[:500] + b"x" + one.read_bytes()[501:]),
            lambda one, two: one.write_bytes(two.read_bytes()),
            lambda one, two: one.write_bytes(others[0].read_bytes()),
        )
    ):
        config = options(name=f"damaged-{number}")
        parts = interrupted(config, monkeypatch)
        assert len(parts) == 2
        damage(*parts)
        assert levels_apart(whole, generate(config)) <= 1
        assert "1 parts are damaged or hold other images; they are made again" in capsys.readouterr().out


def test_a_part_that_is_damaged_later_is_reported_and_made_again(options, monkeypatch):
    whole, config = generate(options()), options(name="late")
    sweep = PartFolder.sweep

    def damage(self):
        sweep(self)
        next(self.folder.glob("*.npy")).write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(PartFolder, "sweep", damage)
        with pytest.raises(UserError, match="damaged; run the same command again"):
            generate(config)
    assert levels_apart(whole, generate(config)) <= 1


def test_the_archive_is_there_whatever_befalls_the_picture(options, monkeypatch):
    def fail(*_):
        raise RuntimeError("no font")

    whole, config = generate(options()), options(name="unseen")
    with monkeypatch.context() as patch:
        patch.setattr(generation.sheets, "plot_sheet", fail)
        with pytest.raises(RuntimeError):
            generate(config)
    archive = config.sample_dir / "unseen.npz"
    content = archive.read_bytes()
    assert content == whole.read_bytes() and not archive.with_suffix(".png").exists()
    generate(config)
    left = {path.name for path in config.sample_dir.iterdir() if path.name.startswith("unseen")}
    assert left == {"unseen.npz", "unseen.png"} and archive.read_bytes() == content


def test_parts_of_another_run_are_never_removed(options, monkeypatch):
    parts = interrupted(options(), monkeypatch)
    with pytest.raises(UserError, match="holds images made with"):
        generate(options(global_seed=1))
    assert all(part.exists() for part in parts)


@pytest.mark.parametrize("name", ["two\nlines", "\u2029", "\x85\x1c\x1d", "\x1b[31mred", "x" * 4000])
def test_no_name_of_a_class_stops_a_generation(name, tmp_path):
    card = replace(tiny_card(), class_names=(name, "cat", "dog", "owl"))
    save_checkpoint(tmp_path / "checkpoint", card)
    settings = {"num_fid_samples": 8, "num_steps": 2, "sample_dir": tmp_path, "name": "named"}
    for more in ({}, {"trajectory": True, "name": "film"}):
        assert generate(GenerateConfig(ckpt=tmp_path / "checkpoint", **{**settings, **more})).exists()


def test_resumed_with_another_batch_size_and_process_count(options, monkeypatch):
    whole = generate(options())
    as_process(monkeypatch, 2, world_size=3)
    generate(options(name="resumed", per_proc_batch_size=5))
    as_process(monkeypatch, 0, world_size=1)
    assert levels_apart(whole, generate(options(name="resumed", per_proc_batch_size=33))) <= 1


def test_killed_process_leaves_complete_parts_alone(options):
    config = options(name="killed", per_proc_batch_size=2, num_steps=60)
    given = {**vars(config), "ckpt": str(config.ckpt), "sample_dir": str(config.sample_dir)}
    code = (
        "import json, sys; from pathlib import Path\n"
        "from stablevm.sampling.config import GenerateConfig; from stablevm.sampling.generation import generate\n"
        "given = json.loads(sys.argv[1]); given |= {key: Path(given[key]) for key in ('ckpt', 'sample_dir')}\n"
        "generate(GenerateConfig(**given))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(given)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    parts = config.sample_dir / "killed.parts"
    deadline = time.monotonic() + 60
    while not list(parts.glob("0*.npy")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed at work"
    found = list(parts.glob("0*.npy"))
    assert found and all(np.load(path).shape == (PART_LENGTH, 8, 8, 3) for path in found)
    resumed = generate(config)
    assert levels_apart(resumed, generate(options(name="whole", num_steps=60))) <= 1
    assert not parts.exists()


def test_finished_run_is_returned_at_once(options, monkeypatch, capsys):
    target = generate(options())
    before = contents(target.parent)
    monkeypatch.setattr(image_sampler, "sample_latents", None)
    (target.parent / "run.parts").mkdir()  # as a process killed while it tidied up leaves it
    capsys.readouterr()
    assert generate(options(per_proc_batch_size=3)) == target
    assert capsys.readouterr().out == f"{target} is already complete\n"
    assert contents(target.parent) == before and not (target.parent / "run.parts").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_another_protocol_is_refused_and_nothing_changes(options, finished, monkeypatch):
    config = options()
    if finished:
        generate(config)
    else:
        as_process(monkeypatch, 1, world_size=2)
        generate(config)
        as_process(monkeypatch, 0, world_size=1)
    before = contents(config.sample_dir)
    for given, difference in (
        ({"cfg_scale": 2.0}, "cfg_scale 1.5, this run has 2.0"),
        ({"weights": "model"}, "weights ema"),
    ):
        with pytest.raises(UserError, match=difference):
            generate(options(**given))
    assert contents(config.sample_dir) == before
    without_effect = options(diffusion_scale=config.diffusion_scale, heun=True)
    assert generate(without_effect).exists(), "an option without effect is no difference"


def test_other_weights_under_the_same_name_are_refused(options, tmp_path):
    generate(options())
    other = save_checkpoint(tmp_path / "other", tiny_card(), seed=9)
    with pytest.raises(UserError, match="weights_sha256"):
        generate(options(ckpt=other))


def test_default_names_keep_runs_apart(options):
    first, second = (generate(options(name=None, num_fid_samples=2, global_seed=seed)) for seed in (0, 1))
    assert first != second and first.name.startswith("SiT-XXS-4-0000120-sde4-cfg1.5-")


def test_weights_labels_and_precision_choices_change_the_images(options):
    base = generate(options())
    for name, given in (
        ("model", {"weights": "model"}),
        ("bf16", {"precision": "bf16"}),
        ("unconditional", {"unconditional": True}),
        ("noisy", {"diffusion_scale": 2.0}),
        ("late", {"last_time": 0.2}),
        ("low", {"guidance_low": 0.5}),
    ):
        assert levels_apart(base, generate(options(name=name, **given))) > 1, name
    assert set(np.load(options().sample_dir / "unconditional.npz")["labels"]) == {4}, "the null class"
    assert levels_apart(base, generate(options(name="explicit attention", fused_attn=False))) <= 1


def test_classes_and_random_labels(options):
    chosen = np.load(generate(options(name="chosen", classes="3,1", num_fid_samples=9)))["labels"]
    assert sorted(np.bincount(chosen)[[1, 3]]) == [4, 5]
    drawn = np.load(generate(options(name="random", label_sampling="random")))["labels"]
    assert set(drawn) == {0, 1, 2, 3}


def test_idle_options_warn(options, capsys):
    generate(options(num_fid_samples=1, heun=True, tf32=not torch.cuda.is_available()))
    assert "warning: --heun has no effect with --mode sde\n" in capsys.readouterr().err


def test_values_that_are_not_finite_are_an_error(options, tmp_path):
    """Weights that are finite, but overflow; those that are not finite are found when they are loaded."""
    card = tiny_card()
    weights = {name: torch.full_like(value, 1e30) for name, value in random_weights(card, 0).items()}
    save(tmp_path / "broken", card, {"ema": weights})
    with pytest.raises(UserError, match="--precision fp32: image 0 has values that are not finite"):
        generate(options(ckpt=tmp_path / "broken"))


def test_missing_weights_are_named(options, tmp_path):
    save(tmp_path / "ema only", tiny_card(), {"ema": random_weights(tiny_card(), 0)})
    with pytest.raises(UserError, match=r"it has no model\.safetensors"):
        generate(options(ckpt=tmp_path / "ema only", weights="model"))
    assert not Path(options().sample_dir).exists()
