"""LightningDiT's safetensors of latents, with the statistics of the channels, read as a layout and trained on."""

import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from stablevm import cli
from stablevm.data import lightning_dit
from stablevm.data.opening import open_dataset
from stablevm.networks.snapshot import load_card
from stablevm.support.errors import UserError
from tests.helpers import runs
from tests.helpers.data_sets import one_line

ROWS = (5, 3, 7)  # of each file
MEANS, DEVIATIONS = torch.tensor([0.5, -3.0]), torch.tensor([2.0, 0.25])


def tensors(rows, seed, flips=True, **changes):
    stream = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 2, 8, 8, generator=stream) * DEVIATIONS.view(2, 1, 1) + MEANS.view(2, 1, 1)
    labels = torch.arange(rows) % 3
    found = {"latents": latents, "labels": labels} | ({"latents_flip": latents.flip(-1)} if flips else {})
    return {name: value.contiguous() for name, value in {**found, **changes}.items()}


def write(folder, *, statistics=True, flips=True, files=None):
    folder.mkdir(exist_ok=True)
    files = files or {f"latents_rank0{n % 2}_shard00{n // 2}": tensors(r, n, flips) for n, r in enumerate(ROWS)}
    for name, content in files.items():
        save_file(content, folder / f"{name}.safetensors")
    if statistics:
        shaped = {"mean": MEANS.view(1, 2, 1, 1), "std": DEVIATIONS.view(1, 2, 1, 1)}
        torch.save(shaped, folder / "latents_stats.pt")
    return folder


def in_order(name="latents"):
    """The rows of all files, in the order of their names: rank 0 before rank 1."""
    return torch.cat([tensors(ROWS[n], n)[name] for n in (0, 2, 1)])


def test_rows_are_those_of_all_files_in_the_order_of_their_names(tmp_path):
    dataset = open_dataset(write(tmp_path / "d"))
    assert len(dataset) == 15 and dataset.layout.startswith("safetensors") and dataset.resolution == 128
    assert torch.equal(dataset.labels(), in_order("labels")) and dataset.class_names == ("0", "1", "2")
    rows = [14, 0, 6, 6]
    assert torch.equal(dataset.moments(rows), in_order()[rows].half())
    assert torch.equal(dataset.moments_flip(rows), in_order("latents_flip")[rows].half())
    latents = dataset.latent.from_moments(dataset.moments(rows), torch.ones(4, 2, 8, 8))
    expected = (in_order()[rows].half().float() - MEANS.view(2, 1, 1)) / DEVIATIONS.view(2, 1, 1)
    torch.testing.assert_close(latents, expected)
    assert "latents_rank01_shard000.safetensors, row 2" in dataset.describe(14)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.moments([3]), dataset.moments([3])) and again.latent == dataset.latent


def test_it_trains_with_mirror_images_and_resumes(tmp_path):
    write(tmp_path / "data")
    options = {"model": "LightningDiT-XXS/2", "loss_type": "stablevm", "horizontal_flips": True}
    settings = runs.config(tmp_path, "run", max_train_steps=2, num_workers=1, **options)
    runs.run(settings)
    folder = runs.run(runs.config(tmp_path, "run", max_train_steps=3, num_workers=1, **options))
    latent = load_card(folder / "checkpoints" / "0000003").latent
    assert latent.measured and latent.deterministic and latent.shape == (2, 8, 8)
    assert latent.shift == tuple(MEANS.tolist()) and latent.autoencoder == lightning_dit.VAVAE


def test_statistics_that_are_missing_are_asked_for_and_measured(tmp_path, capsys):
    write(tmp_path / "data", statistics=False)
    with pytest.raises(UserError, match=r"has no latents_stats.pt; .* stablevm data statistics"):
        runs.run(runs.config(tmp_path, "run", model="LightningDiT-XXS/2"))
    assert cli.main(["data", "statistics", str(tmp_path / "data")]) == 0
    assert "recorded" in capsys.readouterr().out
    means, deviations = lightning_dit.read_statistics(tmp_path / "data" / "latents_stats.pt", "x")
    values = in_order().half().double()
    torch.testing.assert_close(means, values.mean((0, 2, 3)))
    torch.testing.assert_close(deviations, values.std((0, 2, 3), unbiased=False))
    runs.run(runs.config(tmp_path, "run", model="LightningDiT-XXS/2", max_train_steps=1))
    assert cli.main(["data", "verify", str(tmp_path / "data"), "--num-workers", "0"]) == 0


def test_other_content_is_another_fingerprint(tmp_path):
    known = open_dataset(write(tmp_path / "a")).fingerprint(with_images=False)
    assert open_dataset(write(tmp_path / "b")).fingerprint(with_images=True) == known
    other = {f"latents_rank0{n % 2}_shard00{n // 2}": tensors(r, n + 9) for n, r in enumerate(ROWS)}
    assert open_dataset(write(tmp_path / "c", files=other)).fingerprint(with_images=False) != known


GOOD = tensors(4, 0)
FAULTS = {
    "other shape": (
        {"a": GOOD, "b": {**GOOD, "latents": torch.zeros(4, 3, 8, 8)}},
        r"b.safetensors: latents \(4, 3, 8",
    ),
    "other rows": ({"a": {**GOOD, "labels": torch.arange(3)}}, "a.safetensors: latents"),
    "no mirror": ({"a": GOOD, "b": tensors(4, 1, flips=False)}, r"b.safetensors: latents_flip \(\) None, expected"),
    "bfloat16": ({"a": {**tensors(4, 0, False), "latents": GOOD["latents"].bfloat16()}}, "expected float16 or float32"),
    "labels": ({"a": {**GOOD, "labels": torch.rand(4)}}, r"expected labels \(n,\) of whole numbers"),
    "negative": ({"a": {**GOOD, "labels": torch.arange(4) - 1}}, "a label is -1, expected 0 or more"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_named(fault, tmp_path):
    files, told = FAULTS[fault]
    with pytest.raises(UserError, match=told) as error:
        open_dataset(write(tmp_path / "d", files=files))
    one_line(error)


def test_what_can_not_be_read_is_named(tmp_path):
    folder = write(tmp_path / "d", files={"a": {**GOOD, "latents": GOOD["latents"] * 1e6}, "b": GOOD})
    with pytest.raises(UserError, match=r"a.safetensors: row 0 holds .*, latents are kept in float16"):
        open_dataset(folder).moments([0])
    with pytest.raises(UserError, match="this layout holds no images, which are needed here"):
        open_dataset(folder).check_images()
    whole = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"b.safetensors can't be read"):
        open_dataset(folder)


def test_without_mirror_images_there_are_none(tmp_path):
    dataset = open_dataset(write(tmp_path / "d", flips=False))
    assert not dataset.has_flips
    with pytest.raises(UserError, match="holds no latents of mirrored images"):
        dataset.moments_flip([0])


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_other_safetensors_are_no_such_layout(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    assert not lightning_dit.is_lightning_dit_folder(tmp_path)
    save_file({"moments": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert not lightning_dit.is_lightning_dit_folder(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        open_dataset(tmp_path)
