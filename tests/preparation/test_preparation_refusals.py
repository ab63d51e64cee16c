"""What preparation refuses, each with one line: mistakes, half-prepared data, a source that vanishes, damage."""

import json
import os
import shutil

import numpy as np
from PIL import Image

from stablevm import cli
from stablevm.preparation import folders
from stablevm.preparation.pictures import TRANSFORMS
from tests.helpers.preparing import SIDE, contents, convert, encode, encode_shards, raise_interrupt, refusal
from tests.helpers.sources import write_source


def test_mistakes_are_one_line_and_harm_nothing(source, vae, tmp_path, capsys):
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    assert "not empty (thesis.txt)" in refusal(capsys, cli.dataset_tools, convert(source, used))
    assert contents(used) == {"thesis.txt": b"mine"}
    assert "it does not exist" in refusal(capsys, cli.dataset_tools, convert(tmp_path / "none", tmp_path / "x"))
    for wrong, message in [
        ("big", "expected WIDTHxHEIGHT"),
        ("0x0", "a positive width and height"),
        ("256x128", "as wide as high"),
    ]:
        found = refusal(capsys, cli.dataset_tools, convert(source, tmp_path / "x", f"--resolution={wrong}"))
        assert message in found
    for dest in (source, source / "images", source / "n00000000" / "x"):
        for tool in (cli.dataset_tools, cli.prepare):
            assert "is inside --source" in refusal(capsys, tool, convert(source, dest))
        assert "is inside --source" in refusal(capsys, cli.dataset_tools, encode(source, dest, vae))
    assert "thesis.txt is a file" in refusal(capsys, cli.prepare, convert(source, used / "thesis.txt/x"))
    assert not (tmp_path / "x").exists() and len(list(source.iterdir())) == 4

    done, odd = convert_to(source, tmp_path / "done", SIDE), convert_to(source, tmp_path / "odd", 30)
    capsys.readouterr()
    before = contents(done)
    line = refusal(capsys, cli.dataset_tools, convert(source, done, "--resolution=48x48"))
    assert "was started with resolution 32x32, this command says 48x48" in line
    (source / "n00000000" / "new.png").write_bytes(next(source.rglob("*.JPEG")).read_bytes())
    try:
        assert "another list of images" in refusal(capsys, cli.dataset_tools, convert(source, done))
    finally:
        (source / "n00000000" / "new.png").unlink()
    assert contents(done) == before
    assert "needs a multiple of 8" in refusal(capsys, cli.dataset_tools, encode(odd, tmp_path / "y", vae))
    assert "no such folder" in refusal(capsys, cli.dataset_tools, encode(done, tmp_path / "y", tmp_path / "no vae"))
    assert "run convert first" in refusal(capsys, cli.prepare, encode_shards(tmp_path / "none", vae))


def test_half_prepared_data_is_refused_by_every_command_that_takes_it(source, vae, tmp_path, capsys, monkeypatch):
    data, shards = tmp_path / "DATA", tmp_path / "shards"
    with monkeypatch.context() as patch:
        patch.setattr(folders, "format_listing", raise_interrupt)
        assert cli.dataset_tools(convert(source, data / "images", "--num-workers", "0")) == 130
    assert cli.prepare(convert(source, shards, "--num-workers", "0")) == 0
    capsys.readouterr()
    train = ["--exp-name", "x", "--output-dir", str(tmp_path / "exps"), "--data-dir"]
    for given in (data / "images", data):
        for tool, words in [
            (cli.dataset_tools, encode(given, tmp_path / "y", vae)),
            (cli.dataset_tools, convert(given, tmp_path / "y")),
            (cli.prepare, convert(given, tmp_path / "y")),
            (cli.reference, [str(given), "--resolution", str(SIDE), "--output", str(tmp_path / "r.npz")]),
            (cli.train, [*train, str(given)]),
        ]:
            line = refusal(capsys, tool, words)
            assert f"{data / 'images'}" in line and "run the same command again" in line, line
    line = refusal(capsys, cli.train, [*train, str(shards)])
    assert f"run stablevm prepare encode --data-dir {shards}" in line
    assert "shards without latents" in refusal(capsys, cli.dataset_tools, encode(shards, tmp_path / "y", vae))

    assert cli.dataset_tools(convert(source, data / "images", "--num-workers", "0")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(folders, "format_listing", raise_interrupt)
        assert cli.dataset_tools(encode(data / "images", data / "vae-sd", vae)) == 130
    capsys.readouterr()
    assert "run the same command again" in refusal(capsys, cli.train, [*train, str(data)])
    assert cli.dataset_tools(encode(data / "images", data / "vae-sd", vae)) == 0
    capsys.readouterr()
    for given, message in [
        (data / "images", f"give the folder above, {data}"),
        (data / "vae-sd", f"give the folder above, {data}"),
        (tmp_path, f"{data} is one; give that"),
    ]:
        assert message in refusal(capsys, cli.train, [*train, str(given)])
    shutil.rmtree(data / "vae-sd")
    for given in (data / "images", data):
        assert f"encode --source {data / 'images'} --dest {data / 'vae-sd'}" in (
            refusal(capsys, cli.train, [*train, str(given)])
        )
    assert f"no dataset.json here, but in {data / 'images'}" in (
        refusal(capsys, cli.dataset_tools, encode(data, tmp_path / "y", vae))
    )
    assert not (tmp_path / "y").exists() and not (tmp_path / "exps").exists()


def test_names_that_json_cannot_hold_are_refused_before_the_work(vae, tmp_path, capsys):
    odd = tmp_path / "images" / os.fsdecode(b"\xff.png")
    odd.parent.mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(odd)
    assert r"\xff.png is not UTF-8" in refusal(capsys, cli.dataset_tools, encode(odd.parent, tmp_path / "y", vae))
    assert not (tmp_path / "y").exists()
    assert cli.dataset_tools(convert(odd.parent, tmp_path / "x", "--num-workers", "0")) == 0


def test_a_source_that_vanishes_ends_the_run_and_nothing_is_lost(tmp_path, capsys, monkeypatch):
    folder = write_source(tmp_path / "source", images=20, classes=2, shortest=40, longest=60)
    crop, calls = TRANSFORMS["center-crop-dhariwal"], []

    def crop_then_unplug(picture, size):
        calls.append(size)
        if len(calls) == 10:
            folder.rename(tmp_path / "elsewhere")
        return crop(picture, size)

    for tool, dest in ((cli.dataset_tools, tmp_path / "images"), (cli.prepare, tmp_path / "shards")):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setitem(TRANSFORMS, "center-crop-dhariwal", crop_then_unplug)
            assert tool(convert(folder, dest, "--num-workers", "0")) == 2
        assert "vanished while it was read" in capsys.readouterr().err.splitlines()[-1]
        (tmp_path / "elsewhere").rename(folder)
        assert tool(convert(folder, dest, "--num-workers", "0")) == 0
        assert "20 images converted, 0 skipped" in capsys.readouterr().out


def test_a_part_without_images_is_told(source, tmp_path, capsys):
    assert cli.prepare(convert(source, tmp_path / "dest", "--num-workers", "0", "--part", "9999/9999")) == 2
    assert f"{source}: no image is left to convert; give another --part" in capsys.readouterr().err


def test_a_part_is_recorded(source, tmp_path):
    for part, recorded in (("1/1", None), ("2/3", "2/3")):
        dest = tmp_path / part.replace("/", "-")
        assert cli.prepare(convert(source, dest, "--num-workers", "0", "--part", part)) == 0
        (report,) = dest.rglob("report.json")
        assert json.loads(report.read_text())["plan"].get("part") == recorded


def convert_to(source, dest, side):
    assert cli.dataset_tools(convert(source, dest, f"--resolution={side}x{side}", "--num-workers", "0")) == 0
    return dest


def test_verify_names_what_is_damaged(source, vae, tmp_path, capsys):
    data, shards = tmp_path / "DATA", tmp_path / "shards"
    cli.dataset_tools(convert(source, data / "images", "--num-workers", "0"))
    cli.dataset_tools(encode(data / "images", data / "vae-sd", vae))
    cli.prepare(convert(source, shards, "--num-workers", "0"))
    cli.prepare(encode_shards(shards, vae))

    image = next((data / "images").rglob("*7.png"))
    image.write_bytes(image.read_bytes()[:-200])
    latent = next((data / "vae-sd").rglob("*9.npy"))
    moments = np.load(latent)
    moments[:, 0, 0] = -1
    np.save(latent, moments)
    (data / "vae-sd" / "00000" / "stray.npy").write_bytes(b"")
    capsys.readouterr()
    assert cli.data(["verify", str(data), "--num-workers", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1] == f"{data}: 3 fault(s)"
    assert all(any(part in line for line in lines) for part in (image.name, "negative standard deviation", "stray.npy"))

    splits = tmp_path / "splits"
    shutil.copytree(shards, splits / "train")
    shutil.copytree(shards, splits / "test")
    assert cli.data(["verify", str(splits), "--num-workers", "0"]) == 0
    (splits / "test" / "dataset.json").write_text("{")
    capsys.readouterr()
    assert cli.data(["verify", str(splits), "--num-workers", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "not valid JSON" in lines[0] and lines[1:] == [
        f"{splits / 'test'}: 1 fault(s)",
        f"{splits / 'train'}: intact",
    ]

    file = shards / "latents-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cli.data(["verify", str(shards), "--num-workers", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert file.name in lines[0] and "checksum" in lines[0] and lines[-1] == f"{shards}: 1 fault(s)"
