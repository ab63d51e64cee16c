"""Preparing data in both layouts: unusual files, archives, several processes, kills, a full disk."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stablevm import cli
from stablevm.data.opening import open_dataset
from stablevm.preparation import folders, joining, work
from stablevm.preparation.pictures import TRANSFORMS, pixels, read_picture
from tests.helpers.kills import command, finish_despite_kills, steps
from tests.helpers.preparing import (
    GOOD,
    SIDE,
    TOOLS,
    contents,
    convert,
    encode,
    encode_shards,
    raise_interrupt,
    refusal,
    run_quietly,
)
from tests.helpers.sources import HANDLED, SKIPPED, write_hostile, write_source


def test_both_routes_give_the_same_data(source, vae, tmp_path, capsys):
    data, shards, packed = tmp_path / "DATA", tmp_path / "shards", tmp_path / "packed"
    assert cli.dataset_tools(convert(source, data / "images", "--num-workers", "2")) == 0
    assert cli.dataset_tools(encode(data / "images", data / "vae-sd", vae)) == 0
    assert cli.prepare(["pack", "--source", str(data), "--dest", str(packed), "--num-workers", "0"]) == 0
    assert cli.prepare(convert(source, shards, "--num-workers", "0")) == 0
    assert cli.prepare(encode_shards(shards, vae)) == 0
    out = capsys.readouterr().out
    classes = "4 classes: n00000000, n00000001, n00000002, n00000003"
    assert f"{shards}: {GOOD} images in the data set, 0 skipped; {classes}" in out
    assert out.count(f"; {classes}\n") == 5  # each command names them
    names = {"dataset.json", "report.json", "images-00000.safetensors", "latents-00000.safetensors"}
    assert contents(shards).keys() == contents(packed).keys() == names
    for name in names - {"report.json"}:
        assert contents(shards)[name] == contents(packed)[name]

    files = sorted(source.rglob("*.JPEG"))
    for folder in (data, shards):
        dataset = open_dataset(folder)
        for row in (0, 17, GOOD - 1):
            wanted = TRANSFORMS["center-crop-dhariwal"](Image.open(files[row]).convert("RGB"), (SIDE, SIDE))
            assert np.array_equal(dataset.images([row])[0].permute(1, 2, 0), np.asarray(wanted))
            assert dataset.class_names[dataset.labels()[row]] == files[row].parent.name
        assert cli.data(["verify", str(folder), "--num-workers", "0"]) == 0
    assert dataset.latent.autoencoder == str(vae) and dataset.latent.scale == 0.18215


def test_moments_are_the_autoencoders_and_mirrored_ones_those_of_the_mirrored_image(source, vae, tmp_path):
    from diffusers import AutoencoderKL

    folder = tmp_path / "shards"
    assert cli.prepare(convert(source, folder, "--num-workers", "0", "--compress")) == 0
    assert cli.prepare(encode_shards(folder, vae, "--flip", "--batch-size", "7")) == 0
    dataset = open_dataset(folder)
    model = AutoencoderKL.from_pretrained(vae)
    rows = [0, 31, 59]
    images = dataset.images(rows).float() / 127.5 - 1
    for found, seen in ((dataset.moments(rows), images), (dataset.moments_flip(rows), images.flip(-1))):
        with torch.no_grad():
            posterior = model.encode(seen).latent_dist
        wanted = torch.cat([posterior.mean, posterior.std], dim=1)
        assert torch.allclose(found.float(), wanted, atol=2e-3, rtol=2e-3)
    assert cli.data(["verify", str(folder), "--num-workers", "0"]) == 0
    assert cli.main(["data", "info", str(folder), "--picture", str(tmp_path / "p.png")]) == 0
    assert Image.open(tmp_path / "p.png").width == 2000


def test_hostile_files_are_a_non_event(tmp_path, capsys):
    folder = write_source(tmp_path / "source", images=20, classes=20, shortest=40, longest=90)
    fates = write_hostile(folder)
    report = {}
    for tool, dest in ((cli.dataset_tools, tmp_path / "images"), (cli.prepare, tmp_path / "shards")):
        for _ in range(2):  # the second time it only says so again
            assert tool(convert(folder, dest, "--resolution=256x256", "--num-workers", "2")) == 3
            line = capsys.readouterr().out.splitlines()[-1]
            assert line == (
                f"{dest}: 40 images converted, 20 skipped, 10 of unusual form handled; report.json lists them; "
                "20 classes: n00000000, n00000001, n00000002, n00000003, n00000004, n00000005, ..."
            )
        report = json.loads((dest / "report.json").read_text())
        found = {(problem["name"], problem["action"]) for problem in report["problems"]}
        assert found == {(name, fate) for name, fate in fates.items() if fate in (SKIPPED, HANDLED)}
        assert all(problem["cause"] for problem in report["problems"])
    listed = json.loads((tmp_path / "images" / "dataset.json").read_text())
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix and not path.is_dir())
    for name, label in listed["labels"]:
        original = names[int(Path(name).stem.removeprefix("img"))]
        assert listed["class_names"][label] == original.split("/")[0] and fates.get(original) != SKIPPED
        picture, _ = read_picture(lambda original=original: (folder / original).open("rb"))
        wanted = pixels(TRANSFORMS["center-crop-dhariwal"](picture, (256, 256)))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / name)), wanted)
    assert len(listed["labels"]) == 40


def test_workers_processes_and_batches_change_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "SHARD_LENGTH", 24)  # three shards, shared by two processes
    results = []
    for world, workers, batch in ((1, "0", "8"), (2, "2", "3")):
        folder = tmp_path / f"{world}"
        for rank in reversed(range(world)):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            monkeypatch.setattr(work.Job, "wait", wait_only_first if rank == 0 else lambda *_: None)
            more = ["--num-workers", workers, "--batch-size", batch]
            assert cli.dataset_tools(convert(source, folder / "images", *more)) == 0
        results.append(contents(folder))
    assert results[0] == results[1]


def wait_only_first(job, paths):
    assert all(path.exists() for path in paths)


def test_two_processes_share_the_work(source, vae, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    cli.prepare(convert(source, alone, "--num-workers", "0"))
    cli.prepare(encode_shards(alone, vae))
    for arguments in (convert(source, both, "--num-workers", "1"), encode_shards(both, vae)):
        done = run_quietly([*launch, "-m", "stablevm", "prepare", *arguments], OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    assert contents(alone) == contents(both)


def test_kills_at_random_moments_change_nothing(vae, tmp_path):
    """Two kills of each step; kills.py, run as a script, makes any number of kills, with more images."""
    source = write_source(tmp_path / "source", images=150, classes=3, shortest=40, longest=60)
    clean = steps(tmp_path / "clean", source, vae, SIDE)
    killed = steps(tmp_path / "killed", source, vae, SIDE)
    stream = random.Random(0)
    for (program, once, expected), (_, again, result) in zip(clean, killed, strict=True):
        assert getattr(cli, program)(once) == 0
        finish_despite_kills(command(program, again), kills=2, longest=5.0, stream=stream)
        assert contents(result) == contents(expected)


def test_ctrl_c_says_how_to_resume(tmp_path):
    folder = write_source(tmp_path / "many", images=2, classes=2, shortest=300, longest=400)
    for original in list(folder.rglob("*.JPEG")):
        for number in range(2000):  # enough for minutes
            original.with_stem(f"{original.stem}_{number}").hardlink_to(original)
    process = subprocess.Popen(
        [*TOOLS, *convert(folder, tmp_path / "images", "--num-workers", "1")], stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "images").glob("*/*.png")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read().splitlines()[-1] == "interrupted; run the same command again to resume"


def test_a_full_disk_is_one_line_and_no_loss(source, tmp_path, monkeypatch, capsys):
    sync = os.fsync

    def fails_at(last):
        calls = []

        def fsync(descriptor):
            calls.append(descriptor)
            if len(calls) == last:
                raise OSError(28, "No space left on device")
            sync(descriptor)

        return fsync

    for tool, dest, last in ((cli.dataset_tools, tmp_path / "images", 40), (cli.prepare, tmp_path / "shards", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails_at(last))
            assert tool(convert(source, dest, "--num-workers", "0")) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"error: No space left on device: {dest}") and "run the same command again" in message
        assert not (dest / "report.json").exists()
        assert tool(convert(source, dest, "--num-workers", "0")) == 0
        clean = tmp_path / f"clean-{dest.name}"
        assert tool(convert(source, clean, "--num-workers", "0")) == 0
        assert contents(dest) == contents(clean)


def test_what_is_left_out_is_counted_in_the_last_line(source, tmp_path, capsys):
    folder = shutil.copytree(source, tmp_path / "copied")
    (folder / "notes").write_text("by me")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "owl").mkdir()
    (folder / "owl" / "x.jpg").write_bytes(b"no picture")
    for tool, dest in ((cli.dataset_tools, tmp_path / "images"), (cli.prepare, tmp_path / "shards")):
        for _ in range(2):
            assert tool(convert(folder, dest, "--num-workers", "0")) == 3
            assert capsys.readouterr().out.splitlines()[-1] == (
                f"{dest}: {GOOD} images converted, 1 skipped; report.json lists them; 2 files ignored that are no "
                "images (1 hidden or left by systems); 5 classes: n00000000, n00000001, n00000002, n00000003, owl; "
                "1 of them without an image: owl"
            )
    listed = sorted(path.name for path in (folder / "n00000000").iterdir())[:3]
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"n00000000/{name}", 1] for name in listed]}))
    assert cli.dataset_tools(convert(folder, tmp_path / "listed", "--num-workers", "0")) == 0
    told = capsys.readouterr()
    assert f"{GOOD - 2} images not in the source's dataset.json" in told.out.splitlines()[-1]
    assert f"warning: {folder}: {GOOD - 2} images are not in its dataset.json" in told.err
    assert "1 of 2 classes have no image (0)" in told.err


def test_encode_takes_the_published_options(source, vae, tmp_path):
    images, latents = tmp_path / "images", tmp_path / "latents"
    assert cli.dataset_tools(convert(source, images, "--num-workers=0")) == 0
    words = ["encode", f"--source={images}", f"--dest={latents}", f"--model-url={vae}", "--max-images=7"]
    assert cli.dataset_tools([*words, "--num-workers=0"]) == 0
    listed = json.loads((latents / "dataset.json").read_text())
    assert [Path(name).stem for name, _ in listed["labels"]] == [f"img-mean-std-{number:08d}" for number in range(7)]
    assert listed["latent"]["autoencoder"] == str(vae)


def test_the_published_script_scales_without_a_transform(source, tmp_path):
    """Options as published: sizes with a comma, a number of images, and pictures scaled whole without --transform."""
    for number, size in enumerate(("40,24", "40x24")):
        dest = tmp_path / str(number)
        words = convert(source, dest, f"--resolution={size}", "--max-images=7", "--num-workers=0", transform=None)
        assert cli.dataset_tools(words) == 0
        listed = json.loads((dest / "dataset.json").read_text())
        assert len(listed["labels"]) == 7 and listed["crop"] == "scale" and len(listed["class_names"]) == 4
        files = sorted(source.rglob("*.JPEG"))
        for name, _ in listed["labels"]:
            original = Image.open(files[int(Path(name).stem.removeprefix("img"))]).convert("RGB")
            wanted = original.resize((40, 24), Image.Resampling.LANCZOS)
            assert np.array_equal(np.asarray(Image.open(dest / name)), np.asarray(wanted))
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_archives_hold_what_folders_do_and_every_command_reads_them(source, vae, tmp_path, capsys, monkeypatch):
    folder, data = tmp_path / "folder", tmp_path / "DATA"
    folder_words = (convert(source, folder / "images", "--num-workers", "0"),
                    encode(folder / "images", folder / "vae-sd", vae))  # fmt: skip
    archive_words = (convert(source, data / "images.zip", "--num-workers", "2"),
                     encode(data / "images.zip", data / "vae-sd.zip", vae))  # fmt: skip
    monkeypatch.setattr(folders._job, "__defaults__", (16,))  # several parts
    for words in folder_words:
        assert cli.dataset_tools(words) == 0
    for words, name in zip(archive_words, ("images", "vae-sd"), strict=True):
        archive = data / f"{name}.zip"
        with monkeypatch.context() as patch:
            patch.setattr(folders, "format_listing", raise_interrupt)
            assert cli.dataset_tools(words) == 130
        assert not archive.exists() and (data / f"{name}.zip.prepare").exists()
        for _ in range(2):  # the second time it only says so again
            assert cli.dataset_tools(words) == 0
            assert f"{archive}: {GOOD} images" in capsys.readouterr().out.splitlines()[-1]
        assert sorted(path.name for path in data.iterdir()) == sorted({"images.zip", archive.name})
        with zipfile.ZipFile(archive) as opened:
            assert {info.compress_type for info in opened.infolist()} == {zipfile.ZIP_STORED}
            inside = {name: opened.read(name) for name in opened.namelist()}
        expected = contents(folder / name)
        assert inside.keys() == expected.keys()
        assert all(inside[key] == expected[key] for key in expected if key != "report.json")
    one, other = open_dataset(folder), open_dataset(data)
    assert torch.equal(one.moments(range(GOOD)), other.moments(range(GOOD)))
    assert torch.equal(one.images(range(GOOD)), other.images(range(GOOD)))
    assert cli.data(["verify", str(data), "--num-workers", "0"]) == 0
    assert cli.prepare(["pack", "--source", str(data), "--dest", str(tmp_path / "packed"), "--num-workers", "0"]) == 0
    capsys.readouterr()

    before = (data / "images.zip").read_bytes()
    other_size = convert(source, data / "images.zip", "--resolution=48x48")
    assert "was started with resolution 32x32" in refusal(capsys, cli.dataset_tools, other_size)
    (data / "mine.zip").write_bytes(b"mine")
    assert "was not made by this command" in refusal(capsys, cli.dataset_tools, convert(source, data / "mine.zip"))
    assert "shards are no archive, dataset_tools.py makes one" in refusal(
        capsys, cli.prepare, convert(source, data / "x.zip")
    )
    assert (data / "images.zip").read_bytes() == before and (data / "mine.zip").read_bytes() == b"mine"
