"""`generate.py` as users start it: published options, quick looks, two processes, kills, a full disk."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stablevm import cli
from stablevm.networks.autoencoder import LatentSpec, fingerprint, latent_spec_of
from stablevm.networks.projectors import ConvProjector
from stablevm.networks.sit import SiT
from stablevm.sampling.archive import read_provenance
from stablevm.sampling.parts import PartFolder
from stablevm.support.npz import write_npy
from tests.helpers.checkpoints import save_checkpoint, tiny_card
from tests.helpers.tiny_vae import save_tiny_vae

ROOT = Path(__file__).parents[2]
NEEDS_COMPILER = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With an iREPA projector on its second block."""
    card = tiny_card(encoder_depth=2, projector_dims=(16,), projector_kind="conv")
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), card)


@pytest.fixture
def command(checkpoint, tmp_path):
    """Run `generate` with few steps and the options given; returns its status."""

    def run(*options, ckpt=checkpoint, name="run", steps=3):
        words = ["--ckpt", str(ckpt), "--sample-dir", str(tmp_path), "--name", name, "--num-steps", str(steps)]
        return cli.generate([*words, *options])

    return run


def loaded(path):
    with np.load(path) as archive:
        return {name: archive[name] for name in archive}


PUBLISHED = [
    *("--model", "SiT-XXS/4", "--num-fid-samples", "21", "--path-type=linear", "--encoder-depth=2"),
    *("--projector-embed-dims=16", "--per-proc-batch-size=64", "--mode=sde", "--cfg-scale=1.8"),
    *("--guidance-high=0.7", "--use-projector"),
]


@pytest.mark.parametrize("sampling", ["equal", "random"])
def test_only_trained_classes_are_drawn(sampling, command, tmp_path, capsys):
    card = replace(tiny_card(num_classes=6), class_counts=(0, 5, 0, 0, 9, 0))
    ckpt = save_checkpoint(tmp_path / "ckpt", card)
    assert command("--num-fid-samples", "8", "--label-sampling", sampling, ckpt=ckpt) == 0
    labels = loaded(tmp_path / "run.npz")["labels"]
    assert set(labels.tolist()) == {1, 4}
    if sampling == "equal":
        assert sorted(labels.tolist()) == [1] * 4 + [4] * 4
    assert "warning: 4 of 6 classes had no sample in training (0, 2, 3, 5): they are left out" in (
        capsys.readouterr().err
    )
    assert command("--num-fid-samples", "2", "--classes", "2,4", ckpt=ckpt, name="asked") == 0
    assert "training had no sample of class 2" in capsys.readouterr().err


def test_published_options_and_either_spelling(command, tmp_path, capsys):
    assert command(*PUBLISHED) == 0
    assert capsys.readouterr().err.count("warning") == 0
    both = "--use_irepa --label_sampling equal --global_seed 0 --no_qk_norm --no-unconditional --prediction_type v"
    assert command(*PUBLISHED, *both.split(), name="other") == 0
    ours, theirs = loaded(tmp_path / "run.npz"), loaded(tmp_path / "other.npz")
    assert all(np.array_equal(ours[key], theirs[key]) for key in ("arr_0", "labels", "protocol"))
    assert ours["arr_0"].shape == (21, 8, 8, 3) and sorted(np.bincount(ours["labels"])) == [5, 5, 5, 6]


@pytest.mark.parametrize(
    "options, told",
    [
        ("--encoder-depth=8", "--encoder-depth 8: .* records --encoder-depth 2"),
        ("--projector-embed-dims=768", "--projector-embed-dims 768: .* records --projector-embed-dims 16"),
        ("--no-use-projector", "--no-use-projector: .* records --use-projector"),
        ("--resolution=256", "--resolution 256: .* records 8 x 8"),
        ("--vae=mse", "--vae mse: .* records identity"),
        ("--label-sampling=some", "--label-sampling"),
        ("--global-seed=-1", "--global-seed -1: expected 0 or more"),
        ("--no-such-option", "no-such-option"),
    ],
)
def test_mistakes_end_with_status_2_and_leave_nothing(command, tmp_path, capsys, options, told):
    try:
        status = command(options)
    except SystemExit as ended:  # as the parser of options does
        status = ended.code
    assert status == 2
    assert any(re.search(told, line) for line in capsys.readouterr().err.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_projectors_rest(command, monkeypatch):
    ran = []
    monkeypatch.setattr(ConvProjector, "forward", lambda *_: ran.append(1))
    assert command("--num-fid-samples=2", "--cfg-scale=2", "--grid", "--trajectory") == 0
    assert ran == []


def test_a_claim_about_projectors_that_are_not_there_warns(command, tmp_path, capsys):
    bare = save_checkpoint(tmp_path / "bare", tiny_card())
    assert command("--num-fid-samples=2", "--encoder-depth=2", ckpt=bare) == 0
    assert "--encoder-depth 2 has no effect: the checkpoint has no projectors" in capsys.readouterr().err
    assert command("--use-projector", ckpt=bare) == 2


def test_unconditional_and_seed(command, tmp_path, capsys):
    assert command("--num-fid-samples=6", "--unconditional", "--cfg-scale=2") == 0
    assert "warning: --cfg-scale 2.0 has no effect with --unconditional" in capsys.readouterr().err
    assert command("--num-fid-samples=6", "--unconditional", "--global-seed=1", name="other") == 0
    ours, theirs = loaded(tmp_path / "run.npz"), loaded(tmp_path / "other.npz")
    assert set(ours["labels"]) == {4} and not np.array_equal(ours["arr_0"], theirs["arr_0"])


def test_what_was_never_trained_is_not_drawn(command, tmp_path, capsys):
    conditional = save_checkpoint(tmp_path / "conditional", tiny_card(label_dropout=0.0))
    for options in (
        ["--cfg-scale=1.5"],
        ["--unconditional"],
        ["--unconditional", "--cfg-scale=1.5"],
        ["--cfg-scale=0"],
    ):
        assert command(*options, ckpt=conditional) == 2
        told = capsys.readouterr().err
        assert "was trained with --cfg-prob 0, so its null class is untrained" in told and options[0][:11] in told
    assert command("--num-fid-samples=1", ckpt=conditional) == 0
    plain = save_checkpoint(tmp_path / "plain", tiny_card(label_dropout=1.0))
    assert command("--num-fid-samples=1", ckpt=plain, name="other") == 2
    assert "--cfg-prob 1, so its classes are untrained; give --unconditional" in capsys.readouterr().err
    assert command("--num-fid-samples=1", "--unconditional", ckpt=plain, name="other") == 0


def test_decoding_by_an_autoencoder(command, tmp_path, capsys):
    """The folder given stands for the recorded autoencoder, which can't be fetched here."""
    latent = LatentSpec(shape=(4, 8, 8), scale=0.18215, shift=0.0, autoencoder="stabilityai/sd-vae-ft-mse")
    card = tiny_card()
    card = replace(card, model=replace(card.model, in_channels=4), latent=latent)
    ckpt, vae = save_checkpoint(tmp_path / "latents", card), save_tiny_vae(tmp_path / "vae")
    options = ["--num-fid-samples=3", f"--vae={vae}"]
    assert command(*options, "--resolution=64", ckpt=ckpt) == 0
    result = loaded(tmp_path / "run.npz")
    assert result["arr_0"].shape == (3, 64, 64, 3) and len(np.unique(result["arr_0"])) > 2
    assert json.loads(result["protocol"].item())["autoencoder"] == f"sha256:{fingerprint(str(vae))}"
    assert command(*options, "--resolution=256", ckpt=ckpt, name="other") == 2
    assert "--resolution 256: this means latents of 32 x 32" in capsys.readouterr().err
    assert command("--vae=ema", ckpt=ckpt, name="other") == 2


def test_an_autoencoder_that_moved_is_known_by_its_content(command, tmp_path, capsys, monkeypatch):
    folder = save_tiny_vae(tmp_path / "vae")
    card = tiny_card()
    latent = latent_spec_of(str(folder), 64)
    card = replace(card, model=replace(card.model, in_channels=4), latent=latent)
    ckpt = save_checkpoint(tmp_path / "latents", card)
    assert command("--num-fid-samples=2", ckpt=ckpt) == 0
    moved = folder.rename(tmp_path / "moved")
    assert command("--num-fid-samples=2", "--grid", ckpt=ckpt, name="other") == 2
    assert f"autoencoder {folder}: no such folder; if it was moved, give it as --vae" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert command("--num-fid-samples=2", "--vae=moved", ckpt=ckpt) == 0
    told = capsys.readouterr()
    assert "is already complete" in told.out and "warning" not in told.err, "the same protocol"
    other = save_tiny_vae(tmp_path / "other", layers_per_block=2)
    assert command("--num-fid-samples=2", f"--vae={other}", ckpt=ckpt, name="another") == 0
    assert f"warning: --vae {other} is not the data's autoencoder, {folder}" in capsys.readouterr().err
    assert moved.is_dir()


def test_quick_look(command, tmp_path, capsys):
    assert command("--grid", "--classes=3,1", "--trajectory") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run.png", "run.gif"}, "no archive"
    protocol = read_provenance(tmp_path / "run.png")
    assert protocol["num_fid_samples"] == 16 and protocol["classes"] == [3, 1]
    with Image.open(tmp_path / "run.png") as sheet, Image.open(tmp_path / "run.gif") as film:
        picture = np.asarray(sheet)
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("RGB"))[-len(picture) :]
        assert film.n_frames == 4, "the times 1, 0.52, 0.04 and 0"
    assert picture.shape[0] == 2 * 66 + 2 and picture.shape[1] > 8 * 66 + 2 + 30, "two rows, with names"
    assert np.abs(picture.astype(int) - last).mean() < 4, "the film, of 256 colours, ends with the picture"
    capsys.readouterr()
    assert command("--grid", "--classes=3,1", "--trajectory") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.png'} is already complete\n"
    assert command("--grid", "--classes=3,2") == 2, "another protocol"
    assert command("--num-fid-samples=16", "--classes=3,1") == 0, "the same images, with an archive"


def test_film_of_a_complete_run(command, tmp_path):
    assert command("--num-fid-samples=5") == 0 and not (tmp_path / "run.gif").exists()
    assert command("--num-fid-samples=5", "--trajectory") == 0 and (tmp_path / "run.gif").exists()


def test_two_processes_of_torchrun_make_what_one_makes(command, checkpoint, tmp_path):
    options = ["--num-fid-samples=50", "--cfg-scale=1.5", "--per-proc-batch-size=9"]
    assert command(*options, "--per-proc-batch-size=50", name="one") == 0
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2", "--master-port=0"]
    words += [str(ROOT / "generate.py"), "--ckpt", str(checkpoint), "--sample-dir", str(tmp_path), "--name", "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*words, "--num-steps", "3", *options], env=environment, check=True, timeout=300)
    one, two = loaded(tmp_path / "one.npz"), loaded(tmp_path / "two.npz")
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert all(one[key].tobytes() == two[key].tobytes() for key in ("labels", "protocol"))


def test_killed_again_and_again_it_completes():
    killer = [sys.executable, "-m", "tests.helpers.kill_generation"]  # it forks, so a process without threads runs it
    subprocess.run([*killer, "--kills", "3"], cwd=ROOT, check=True, timeout=300)


def test_a_full_disk_is_one_line_and_the_run_resumes(command, tmp_path, monkeypatch, capsys):
    write, written = PartFolder.write, []

    def write_to_full_disk(self, part, images):
        if len(written) == 1:
            with Path("/dev/full").open("wb") as file:
                write_npy(file, [images], len(images))
        written.append(part)
        write(self, part, images)

    with monkeypatch.context() as patch:
        patch.setattr(PartFolder, "write", write_to_full_disk)
        assert command("--num-fid-samples=40") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: No space left on device") and line.endswith("run the same command again")
    assert command("--num-fid-samples=40") == 0 and loaded(tmp_path / "run.npz")["arr_0"].shape[0] == 40


@NEEDS_COMPILER
def test_compiled_network_makes_the_same_images(command, tmp_path, monkeypatch):
    compiled = []
    compile_blocks = SiT.compile_blocks
    monkeypatch.setattr(SiT, "compile_blocks", lambda self: (compiled.append(self), compile_blocks(self)))
    options = ["--num-fid-samples=8", "--cfg-scale=1.5", "--guidance-high=0.7", "--per-proc-batch-size=4"]
    assert command(*options, name="plain") == 0 and not compiled
    assert command(*options, "--compile", name="compiled") == 0 and len(compiled) == 1
    ours, theirs = loaded(tmp_path / "plain.npz"), loaded(tmp_path / "compiled.npz")
    assert np.abs(ours["arr_0"].astype(int) - theirs["arr_0"]).max() <= 1


def test_compiling_needs_a_compiler(command, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert command("--num-fid-samples=1", "--compile") == (2 if not torch.cuda.is_available() else 0)
    assert "--compile: found no C++ compiler (no-such-compiler)" in capsys.readouterr().err


def test_a_run_stands_for_its_newest_checkpoint(command, tmp_path, capsys):
    run = tmp_path / "exps" / "cats"
    for step in (3, 20):
        save_checkpoint(run / "checkpoints" / f"{step:07d}", replace(tiny_card(), step=step))
    (run / "checkpoints" / "best").mkdir()
    assert command("--num-fid-samples=2", ckpt=run) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{run}: its newest checkpoint is 0000020\n") and "of step 20" in told
    assert told.splitlines()[-1].endswith(f"; some of the images: {tmp_path / 'run.png'}")
    assert command("--num-fid-samples=2", ckpt=run / "checkpoints" / "0000020") == 0, "the same images"
    assert command("--num-fid-samples=2", ckpt=tmp_path) == 2
    assert "not a checkpoint folder" in capsys.readouterr().err


def test_classes_by_name(command, tmp_path, capsys):
    names = ("tench, Tinca tinca", "cat", "dog", "owl")
    ckpt = save_checkpoint(tmp_path / "named", replace(tiny_card(), class_names=names))
    assert command("--num-fid-samples=4", "--classes= cat,tench,  Tinca tinca", ckpt=ckpt) == 0
    assert set(loaded(tmp_path / "run.npz")["labels"]) == {0, 1}
    assert command("--num-fid-samples=4", "--classes=1,0", ckpt=ckpt) == 0, "the same images"
    capsys.readouterr()
    for classes, message in {
        "cat,bird": "no class bird; the nearest are",
        "cat,3": "indices from 0, such as 3,5, or names",
        "cat,cat": "expected distinct",
    }.items():
        assert command("--classes", classes, ckpt=ckpt) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
