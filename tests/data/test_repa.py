"""The layout of REPA: pairs by name, folders or archives, and every fault named."""

import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from stablevm import cli
from stablevm.data.dataset import check_finite
from stablevm.data.loader import training_loader
from stablevm.data.mirrored import MirroredDataset
from stablevm.data.opening import open_dataset
from stablevm.data.repa import RepaDataset, latent_name
from stablevm.support.errors import UserError
from tests.helpers.data_sets import one_line
from tests.helpers.tiny_vae import save_tiny_vae

COUNT, SIDE = 6, 16
NUMBERS = [0, 1, 3, 4, 7, 9]  # convert leaves out the numbers of bad images


def stem(number):
    return f"00000/img{number:08d}"


def write_repa(folder, facts=None, leading=False):
    """Image and latent of number n are filled with n, so that a wrong pair shows."""
    labels = []
    for row, number in enumerate(NUMBERS):
        image, latent = (
            folder / "images" / f"{stem(number)}.png",
            folder / "vae-sd" / latent_name(f"{stem(number)}.png"),
        )
        for path in (image, latent):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((SIDE, SIDE, 3), number, np.uint8)).save(image)
        moments = np.full((8, 2, 2), number, np.float32)
        np.save(latent, moments[None] if leading else moments)
        labels.append([latent_name(f"{stem(number)}.png"), row % 2])
    # In disorder, as a listing may be: names decide.
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels[::-1], **(facts or {})}))
    return folder


def check(dataset):
    assert len(dataset) == COUNT and dataset.resolution == SIDE and dataset.index().tolist() == NUMBERS
    rows = [5, 0, 2, 2]
    wanted = torch.tensor(NUMBERS)[rows]
    assert torch.equal(dataset.moments(rows)[:, 0, 0, 0].long(), wanted)
    assert torch.equal(dataset.images(rows)[:, 0, 0, 0].long(), wanted)
    assert dataset.labels().tolist() == [0, 1, 0, 1, 0, 1]
    assert dataset.moments(rows).dtype == torch.float16 and dataset.moments(rows).shape == (4, 8, 2, 2)


@pytest.mark.parametrize("leading", [False, True])
def test_images_and_latents_are_paired_by_name(tmp_path, leading):
    dataset = open_dataset(write_repa(tmp_path, leading=leading))
    check(dataset)
    check(pickle.loads(pickle.dumps(dataset)))
    latent = dataset.latent
    assert (latent.shape, latent.scale, latent.autoencoder) == ((4, 2, 2), 0.18215, "stabilityai/sd-vae-ft-mse")


def test_archives_stand_for_folders(tmp_path):
    write_repa(tmp_path)
    for name in ("images", "vae-sd"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for path in sorted((tmp_path / name).rglob("*.*")):
                archive.write(path, path.relative_to(tmp_path / name))
        (tmp_path / name).rename(tmp_path / f"gone-{name}")
    check(RepaDataset(tmp_path))


def test_what_the_folder_says_of_itself_counts(tmp_path):
    latent = {"shape": [4, 2, 2], "scale": 0.5, "shift": 0.1, "autoencoder": "somewhere"}
    facts = {"latent": latent, "class_names": ["cat", "dog"], "resolution": [SIDE, SIDE], "crop": "none"}
    dataset = RepaDataset(write_repa(tmp_path, facts))
    unsaid = {"fingerprint": None, "measured": False, "deterministic": False}
    assert dataset.latent.to_dict() == {**latent, "shape": (4, 2, 2), **unsaid}
    assert dataset.class_names == ("cat", "dog") and dataset.crop == "none"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"resolution": []}, "its resolution [] is not [WIDTH, HEIGHT]"),
        ({"resolution": "256x256"}, "is not [WIDTH, HEIGHT]"),
        ({"latent": {"shape": [4, 2, 2]}}, "latent: scale: missing"),
        ({"latent": "sd"}, 'latent: "sd", expected an object'),
    ],
)
def test_faulty_facts_are_one_clear_line(tmp_path, facts, message):
    with pytest.raises(UserError) as error:
        RepaDataset(write_repa(tmp_path, facts))
    assert message in one_line(error)


def test_a_resolution_may_be_one_number(tmp_path):
    check(RepaDataset(write_repa(tmp_path, {"resolution": SIDE})))


def test_images_under_other_names_come_from_their_listing(tmp_path):
    write_repa(tmp_path)
    names = []
    for path in sorted((tmp_path / "images").rglob("*.png")):
        path = path.rename(path.with_suffix(".PNG"))
        names.append([f"00000/{path.name}", 0])
    (tmp_path / "images" / "dataset.json").write_text(json.dumps({"labels": names}))
    check(RepaDataset(tmp_path))
    (tmp_path / "images" / "dataset.json").write_text(json.dumps({"labels": names[1:]}))
    with pytest.raises(UserError) as error:
        RepaDataset(tmp_path).check_images()
    assert "1 latents have no image" in one_line(error) and "img-mean-std-00000000.npy" in one_line(error)


def test_the_training_loader_reads_it_like_shards(tmp_path):
    dataset = open_dataset(write_repa(tmp_path))
    for workers in (0, 2):
        loader = training_loader(dataset, global_batch=4, seed=0, num_steps=3, workers=workers, with_images=True)
        batches = list(loader)
        for batch in batches:
            assert torch.equal(batch.moments[:, 0, 0, 0].long(), torch.tensor(NUMBERS)[batch.rows])
            assert torch.equal(batch.images[:, 0, 0, 0].long(), torch.tensor(NUMBERS)[batch.rows])
    assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == sorted([*range(COUNT)] * 2)
    with pytest.raises(UserError, match="no latents of mirrored images"):
        MirroredDataset(dataset)


def test_unpaired_files_are_named(tmp_path):
    write_repa(tmp_path)
    assert list(RepaDataset(tmp_path).faults()) == []
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "images" / f"{stem(2)}.png")
    np.save(tmp_path / "vae-sd" / "00000" / "img-mean-std-00000005.npy", np.zeros((8, 2, 2)))
    lines = list(RepaDataset(tmp_path).faults())
    assert len(lines) == 2 and "img-mean-std-00000005" in lines[0] and "img00000002" in lines[1]


def damage(folder, case):
    latent, image = folder / "vae-sd" / latent_name(f"{stem(3)}.png"), folder / "images" / f"{stem(3)}.png"
    match case:
        case "cut latent":
            latent.write_bytes(latent.read_bytes()[:-5])
        case "pickled latent":
            np.save(latent, np.array([{"a": 1}]), allow_pickle=True)
        case "other shape":
            np.save(latent, np.zeros((8, 4, 4)))
        case "no latent":
            latent.unlink()
        case "other size":
            Image.new("RGB", (SIDE, SIDE + 1)).save(image)
        case "cut image":
            image.write_bytes(image.read_bytes()[:40])
        case "no image":
            image.unlink()


def test_damaged_members_of_archives_are_named(tmp_path):
    write_repa(tmp_path)
    for name in ("images", "vae-sd"):
        archive = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(archive, "w") as opened:
            for path in sorted((tmp_path / name).rglob("*.*")):
                opened.write(path, path.relative_to(tmp_path / name))
        content = bytearray(archive.read_bytes())
        content[zipfile.ZipFile(archive).infolist()[3].header_offset - 3] ^= 0xFF
        archive.write_bytes(content)
        (tmp_path / name).rename(tmp_path / f"gone-{name}")
    dataset = RepaDataset(tmp_path)
    for read in (dataset.images, dataset.moments):
        with pytest.raises(UserError, match="can't be read"):
            read(range(COUNT))


@pytest.mark.parametrize(
    "case", ["cut latent", "pickled latent", "other shape", "no latent", "other size", "cut image", "no image"]
)
def test_damaged_files_are_named(tmp_path, case):
    damage(write_repa(tmp_path), case)
    dataset = RepaDataset(tmp_path)
    read = dataset.images if "image" in case or "size" in case else dataset.moments
    read([0, 1])
    with pytest.raises(UserError) as error:
        read([0, 2])
    assert "00000003" in one_line(error)


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_first_image_that_tells_no_size_is_named(tmp_path, content):
    folder = write_repa(tmp_path)
    first = folder / "images" / RepaDataset(folder).image_names[0]
    first.unlink()
    if content is not None:
        first.write_bytes(content)
    with pytest.raises(UserError, match=f"{first}: can't be read .*; convert it again") as error:
        RepaDataset(folder)
    one_line(error)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    folder = write_repa(tmp_path / "a", {"latent": {"shape": [4, 4, 4], "scale": 1, "shift": 0, "autoencoder": "x"}})
    with pytest.raises(UserError, match="name the autoencoder that made"):
        RepaDataset(folder)
    (folder / "vae-sd" / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset.json: no such file"):
        RepaDataset(folder)
    with pytest.raises(UserError, match="no vae-sd"):
        RepaDataset(tmp_path)
    plain = write_repa(tmp_path / "b")
    (plain / "images").rename(plain / "elsewhere")
    dataset = RepaDataset(plain)
    assert not dataset.has_images and len(dataset.moments([0])) == 1
    with pytest.raises(UserError, match="has no images"):
        dataset.check_images()


def test_without_images_the_given_autoencoder_says_how_large_they_were(tmp_path):
    vae = save_tiny_vae(tmp_path / "vae", widths=(4, 4, 4, 4, 8))
    folder = write_repa(tmp_path / "data")
    (folder / "images").rename(folder / "elsewhere")
    assert RepaDataset(folder, str(vae)).resolution == 2 * 16
    assert RepaDataset(folder).resolution == 2 * 8


def test_an_autoencoder_that_contradicts_the_listing_is_refused(tmp_path):
    mse = {"shape": [4, 2, 2], "scale": 0.18215, "shift": 0.0, "autoencoder": "stabilityai/sd-vae-ft-mse"}
    folder = write_repa(tmp_path, {"latent": mse, "resolution": [SIDE, SIDE]})
    assert RepaDataset(folder, "mse").latent == RepaDataset(folder).latent
    with pytest.raises(
        UserError, match=r"^autoencoder ema: .*dataset\.json records latents of stabilityai/sd-vae-ft-mse"
    ):
        RepaDataset(folder, "ema")
    pack = ["pack", "--source", str(folder), "--dest", str(tmp_path / "packed"), "--vae", "ema", "--num-workers", "0"]
    assert cli.prepare(pack) == 2 and not (tmp_path / "packed").exists()


def test_values_beyond_float16_are_refused_by_name(tmp_path):
    """They became infinite before. NaN is read as it is, as in shards."""
    write_repa(tmp_path)
    path = tmp_path / "vae-sd" / latent_name(f"{stem(4)}.png")
    for value, fits in ((65_519.0, True), (-65_520.0, False), (1e30, False), (np.nan, True)):
        np.save(path, np.full((8, 2, 2), value, np.float32))
        dataset = open_dataset(tmp_path)
        if fits:
            dataset.moments(range(COUNT))
            continue
        with pytest.raises(UserError, match=r"img-mean-std-00000004.npy: holds .* latents.*float16") as error:
            dataset.moments(range(COUNT))
        assert f"holds {abs(value):g}" in one_line(error)
    with pytest.raises(UserError, match=r"row 3 \(.*vae-sd/00000/img-mean-std-00000004.npy\) is not finite"):
        check_finite(dataset, range(COUNT), dataset.moments(range(COUNT)))


def test_the_fingerprint_is_of_the_content(tmp_path):
    """The same for a folder, its copy and its archives; another when two files or two labels change places."""
    one = write_repa(tmp_path / "one")
    known = open_dataset(one).fingerprint(with_images=True)
    archives = tmp_path / "archives"
    archives.mkdir()
    for part in ("images", "vae-sd"):
        shutil.make_archive(str(archives / part), "zip", one / part)
    assert open_dataset(write_repa(tmp_path / "two")).fingerprint(with_images=True) == known
    assert open_dataset(archives).fingerprint(with_images=True) == known
    first, second = (one / "vae-sd" / latent_name(f"{stem(number)}.png") for number in (3, 7))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    found = open_dataset(one).fingerprint(with_images=True)
    assert found.difference(known) == "other latents or labels, or the same in another order"
