"""Rows around bad ones keep their own image, latent, class and number; and verify names each kind of fault."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stablevm import cli
from stablevm.data.manifest import Manifest
from stablevm.data.opening import open_dataset
from stablevm.data.png import encode_png
from stablevm.data.repa import latent_name
from stablevm.data.writer import ShardWriter
from stablevm.networks.autoencoder import LatentSpec
from stablevm.preparation import joining
from stablevm.preparation.pictures import TRANSFORMS
from stablevm.preparation.source import fingerprint
from stablevm.preparation.sources import open_source
from stablevm.support.errors import UserError
from tests.helpers.data_sets import one_line
from tests.helpers.sources import write_source
from tests.helpers.tiny_vae import save_tiny_vae

SIDE = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three classes of eight JPEGs; the first of the first, two of the second and the last of all are no pictures."""
    folder = write_source(tmp_path_factory.mktemp("source"), images=24, classes=3, shortest=20, longest=40)
    for row in (0, 9, 12, 23):
        (folder / open_source(folder).names[row]).write_text("no picture")
    return folder


def convert(source, dest):
    size = f"{SIDE}x{SIDE}"
    crop = ["--resolution", size, "--transform", "center-crop-dhariwal"]
    return ["convert", "--source", str(source), "--dest", str(dest), *crop, "--num-workers", "0"]


@pytest.mark.parametrize("shard_length", [5, 1000])
def test_rows_keep_what_is_theirs_where_others_are_bad(source, tmp_path, monkeypatch, shard_length, capsys):
    monkeypatch.setattr(joining, "SHARD_LENGTH", shard_length)
    images, shards = tmp_path / "DATA" / "images", tmp_path / "shards"
    latents = tmp_path / "DATA" / "vae-sd"
    identity = ["--vae", "identity", "--num-workers", "0"]
    assert cli.dataset_tools(convert(source, images)) == 3
    assert cli.dataset_tools(["encode", "--source", str(images), "--dest", str(latents), *identity]) == 0
    assert cli.prepare(convert(source, shards)) == 3
    assert ": 20 images converted, 4 skipped; report.json" in capsys.readouterr().out.splitlines()[-1]
    assert cli.prepare(["encode", "--data-dir", str(shards), *identity]) == 0, "it skipped none itself"
    assert ": 20 images in the data set, 4 skipped by convert; report.json" in capsys.readouterr().out.splitlines()[-1]
    good = [row for row in range(24) if row not in (0, 9, 12, 23)]
    for dataset in (open_dataset(shards), open_dataset(tmp_path / "DATA")):
        assert dataset.index().tolist() == good
        assert dataset.labels().tolist() == open_source(source).labels[good].tolist()
        for row, number in enumerate(good):
            pixels = Image.open(images / f"00000/img{number:08d}.png")
            assert np.array_equal(dataset.images([row])[0].permute(1, 2, 0), np.asarray(pixels))
            mean = dataset.images([row]).float() / 127.5 - 1
            assert torch.equal(dataset.moments([row])[:, :3], mean.half())


def write_repa(folder, count=12):
    """A folder as other programs may have made it: a leading 1, no facts; everything of number n is filled with n."""
    labels = []
    for number in range(count):
        image = folder / "images" / "00000" / f"img{number:08d}.png"
        latent = folder / "vae-sd" / latent_name(f"00000/img{number:08d}.png")
        for path in (image, latent):
            path.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(encode_png(np.full((SIDE, SIDE, 3), number, np.uint8)))
        np.save(latent, np.full((1, 8, 2, 2), number, np.float32))
        labels.append([latent_name(f"00000/img{number:08d}.png"), number // 4])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


@pytest.mark.parametrize("more", [[], ["--compress"], ["--no-images"]], ids=str)
def test_pack_leaves_bad_rows_out_and_the_others_whole(tmp_path, more, capsys):
    folder, packed = write_repa(tmp_path / "DATA"), tmp_path / "packed"
    latents = folder / "vae-sd" / "00000"
    np.save(latents / "img-mean-std-00000000.npy", np.full((1, 8, 2, 2), np.nan, np.float32))
    (latents / "img-mean-std-00000005.npy").write_bytes(b"no array")
    (folder / "images" / "00000" / "img00000007.png").unlink()
    bad = (0, 5) if "--no-images" in more else (0, 5, 7)
    pack = ["pack", "--source", str(folder), "--dest", str(packed), "--num-workers", "0", *more]
    assert cli.prepare(pack) == cli.prepare(pack) == 3
    assert f"{12 - len(bad)} images packed, {len(bad)} skipped" in capsys.readouterr().out.splitlines()[-1]
    report = json.loads((packed / "report.json").read_text())
    assert [problem["index"] for problem in report["problems"]] == list(bad)
    dataset = open_dataset(packed)
    good = [number for number in range(12) if number not in bad]
    assert dataset.index().tolist() == good
    assert dataset.labels().tolist() == [number // 4 for number in good]
    rows = range(len(good))
    assert dataset.moments(rows)[:, 7, 1, 1].tolist() == good
    if dataset.has_images:
        assert dataset.images(rows)[:, 2, -1, -1].tolist() == good
    assert cli.data(["verify", str(packed), "--num-workers", "0"]) == 0


def test_pack_takes_up_what_an_earlier_version_began_but_not_another_latent(tmp_path, capsys):
    """Plans of earlier versions lack the latents' fields `measured` and `deterministic`."""
    folder, packed = write_repa(tmp_path / "DATA"), tmp_path / "packed"
    pack = ["pack", "--source", str(folder), "--dest", str(packed), "--num-workers", "0"]
    assert cli.prepare(pack) == 0
    record = json.loads((packed / "report.json").read_text())
    latent = record["plan"]["latent"]
    del latent["measured"], latent["deterministic"]
    (packed / "report.json").write_text(json.dumps(record))
    assert cli.prepare(pack) == 0
    latent["scale"] = 1.0
    (packed / "report.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert cli.prepare(pack) != 0
    assert "was started with latent" in capsys.readouterr().err


def test_numbers_that_repeat_give_way_to_positions(tmp_path):
    for name in ("a", "b"):
        path = tmp_path / "vae-sd" / name / "img-mean-std-00000001.npy"
        path.parent.mkdir(parents=True)
        np.save(path, np.zeros((8, 2, 2), np.float32))
    labels = [[f"{name}/img-mean-std-00000001.npy", 0] for name in ("a", "b")]
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert open_dataset(tmp_path).index().tolist() == [0, 1]


def test_the_fingerprint_tells_names_classes_and_class_names_apart():
    prints = {
        fingerprint(["a", "b"], [0, 1], ["x", "y"]),
        fingerprint(["a", "c"], [0, 1], ["x", "y"]),
        fingerprint(["a", "b"], [1, 0], ["x", "y"]),
        fingerprint(["a", "b"], [0, 1], ["x", "z"]),
    }
    assert len(prints) == 4


def write_faulty(folder, **changes):
    """A set of four rows, intact but for `changes`; what a writer would refuse is put into the files afterwards."""
    rows = {
        "moments": torch.ones(4, 2, 2, 2).half(),
        "moments_flip": torch.ones(4, 2, 2, 2).half(),
        "labels": torch.tensor([0, 1, 0, 1]),
        "index": torch.arange(4),
    }
    latent = LatentSpec((1, 2, 2), 1.0, 0.0, "somewhere")
    writer = ShardWriter(folder, Manifest(("x", "y"), 2, "none", latent, has_flips=True, has_images=False))
    writer.add(**rows)
    writer.finish()
    file = folder / "latents-00000.safetensors"
    save_file(rows | changes, file)
    manifest = json.loads((folder / "dataset.json").read_text())
    counts = torch.bincount((rows | changes)["labels"], minlength=2).tolist()
    described = vars(joining.ShardFile.of(file))
    manifest |= {"class_counts": counts, "shards": [{"rows": 4, "latents": described, "images": None}]}
    (folder / "dataset.json").write_text(json.dumps(manifest))


def changed(value, channel):
    moments = torch.ones(4, 2, 2, 2).half()
    moments[2, channel, 1, 0] = value
    return moments


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"moments": changed(torch.inf, 0)}, "moments of row 2: not finite"),
        ({"moments_flip": changed(torch.nan, 1)}, "moments_flip of row 2: not finite"),
        ({"moments": changed(-0.5, 1)}, "moments of row 2: a negative standard deviation"),
        ({"moments": changed(-0.5, 0)}, None),
        ({"index": torch.tensor([0, 5, 5, 3])}, "1 images are in it twice or more, the first is number 5"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "1 classes have no image, the first is y"),
    ],
)
def test_verify_names_each_kind_of_fault(tmp_path, capsys, changes, fault):
    write_faulty(tmp_path / "set", **changes)
    status = cli.data(["verify", str(tmp_path / "set"), "--num-workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    if fault is None:
        assert status == 0 and lines == [f"{tmp_path / 'set'}: intact"]
    else:
        assert status == 1 and len(lines) == 2 and fault in lines[0]


def test_verify_misses_no_image_that_is_not_listed(tmp_path, capsys):
    folder = write_repa(tmp_path)
    names = [[f"00000/img{number:08d}.png", 0] for number in range(11)]
    (folder / "images" / "dataset.json").write_text(json.dumps({"labels": names}))
    assert cli.data(["verify", str(folder), "--num-workers", "0"]) == 1
    assert "1 latents have no image" in capsys.readouterr().out


def test_verify_names_values_beyond_float16(tmp_path, capsys):
    folder = write_repa(tmp_path)
    path = sorted((folder / "vae-sd").rglob("*.npy"))[1]
    np.save(path, np.full_like(np.load(path), 70_000.0))
    assert cli.data(["verify", str(folder), "--num-workers", "0"]) == 1
    assert f"{path}: holds 70000, but latents are stored in float16" in capsys.readouterr().out


def test_a_complete_set_is_refused_to_other_options_and_sheds_its_images(source, tmp_path, capsys):
    folder = tmp_path / "shards"
    cli.prepare(convert(source, folder))
    encode = ["encode", "--data-dir", str(folder), "--vae", "identity", "--num-workers", "0"]
    assert cli.prepare([*encode, "--no-keep-images"]) == 0
    assert not list(folder.glob("images-*")) and not open_dataset(folder).has_images
    for option in (["--precision", "bf16"], ["--flip"], []):
        capsys.readouterr()
        assert cli.prepare([*encode, *option]) == 2
        assert "is complete, encoded with" in capsys.readouterr().err


def test_a_latent_that_is_not_finite_ends_the_encoding_with_its_name(tmp_path):
    pytest.importorskip("diffusers")
    from stablevm.networks.autoencoder import latent_spec_of
    from stablevm.preparation.encoding import make_encoder
    from stablevm.support.processes import Process

    spec = latent_spec_of(str(save_tiny_vae(tmp_path / "vae")), 16)
    encoder = make_encoder(spec, "fp32", Process(0, 1, torch.device("cpu")))
    encoder.autoencoder.model.quant_conv.bias.data.fill_(1e6)  # beyond float16
    with pytest.raises(UserError) as error:
        encoder(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ["first.png", "second.png"])
    assert "the latent of first.png is not finite" in one_line(error)


def test_finished_parts_are_not_done_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "SHARD_LENGTH", 5)
    crop, seen = TRANSFORMS["center-crop-dhariwal"], []

    def counted(picture, size, last=None):
        seen.append(picture)
        if len(seen) == last:
            raise KeyboardInterrupt
        return crop(picture, size)

    monkeypatch.setitem(TRANSFORMS, "center-crop-dhariwal", partial(counted, last=12))
    assert cli.prepare(convert(source, tmp_path / "shards")) == 130
    assert len(seen) == 12  # images 0, 9 and 12 are bad: 4 + 4 are in finished parts, 4 in the third
    seen.clear()
    monkeypatch.setitem(TRANSFORMS, "center-crop-dhariwal", counted)
    assert cli.prepare(convert(source, tmp_path / "shards")) == 3
    assert len(seen) == 20 - 8
