"""Evaluation of digits and other small images: the extractor, the metrics and the command `evaluate`."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stablevm.data.dataset import PreparedDataset
from stablevm.data.digits import prepare_digits
from stablevm.data.manifest import MANIFEST_FILE, Manifest
from stablevm.data.opening import open_dataset
from stablevm.data.writer import ShardWriter
from stablevm.evaluation.config import EvaluateConfig
from stablevm.evaluation.digits import digits_rows, evaluate_digits
from stablevm.evaluation.evaluate import evaluate
from stablevm.evaluation.small_extractor import (
    CARD_FILE,
    WEIGHTS_FILE,
    DigitsExtractor,
    all_images,
    data_checksum,
    is_same_data,
    load_extractor,
    save_extractor,
    train_extractor,
)
from stablevm.metrics import table
from stablevm.metrics.metric import FeatureSets, Metric
from stablevm.networks.autoencoder import LatentSpec
from stablevm.networks.encoders import load_encoder
from stablevm.networks.small_net import SmallNet
from stablevm.support.errors import UserError
from stablevm.support.files import sha256

FEW_STEPS = 60  # of 1,500: enough to recognise most digits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    prepare_digits(folder)
    return folder


@pytest.fixture(scope="module")
def train(data: Path) -> PreparedDataset:
    return open_dataset(data, "train")


@pytest.fixture(scope="module")
def test(data: Path) -> PreparedDataset:
    return open_dataset(data, "test")


@pytest.fixture(scope="module")
def extractor(train: PreparedDataset, test: PreparedDataset) -> DigitsExtractor:
    return train_extractor(train, test, seed=0, steps=FEW_STEPS)


def channels_last(dataset: PreparedDataset) -> Tensor:
    return all_images(dataset).permute(0, 2, 3, 1)


def test_training_learns_and_counts_its_steps(train: PreparedDataset, test: PreparedDataset) -> None:
    seen: list[tuple[int, int]] = []
    extractor = train_extractor(train, test, seed=3, steps=FEW_STEPS, progress=lambda *step: seen.append(step))
    assert extractor.test_accuracy > 0.9
    assert seen == [(step, FEW_STEPS) for step in range(1, FEW_STEPS + 1)]
    assert not extractor.net.training
    assert not any(parameter.requires_grad for parameter in extractor.net.parameters())


def test_the_seed_decides_everything(train: PreparedDataset, test: PreparedDataset) -> None:
    first = train_extractor(train, test, seed=1, steps=3).net.state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.rand(5)  # another global state, which must change nothing
        before = torch.random.get_rng_state()
        again = train_extractor(train, test, seed=1, steps=3).net.state_dict()
        assert torch.equal(torch.random.get_rng_state(), before)
    other = train_extractor(train, test, seed=2, steps=3).net.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].is_floating_point())


def test_steps_below_one_are_refused(train: PreparedDataset, test: PreparedDataset) -> None:
    with pytest.raises(UserError, match="0 training steps"):
        train_extractor(train, test, seed=0, steps=0)


def test_extractor_survives_the_disk(extractor: DigitsExtractor, test: PreparedDataset, tmp_path: Path) -> None:
    save_extractor(tmp_path, extractor)
    before = torch.random.get_rng_state()
    loaded = load_extractor(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    images = all_images(test)
    for mine, theirs in zip(extractor.read(images), loaded.read(images), strict=True):
        assert torch.equal(mine, theirs)
    facts = ("test_accuracy", "seed", "steps", "data_sha256", "name")
    assert [getattr(loaded, fact) for fact in facts] == [getattr(extractor, fact) for fact in facts]


def test_a_damaged_extractor_is_named(extractor: DigitsExtractor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no file .*{CARD_FILE}"):
        load_extractor(tmp_path)
    save_extractor(tmp_path, extractor)
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(weights[:1000])
    with pytest.raises(UserError, match=f"{WEIGHTS_FILE} is damaged"):
        load_extractor(tmp_path)
    save_file({"layer": torch.zeros(2)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match=f"{WEIGHTS_FILE} is of another network"):
        load_extractor(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS_FILE} is missing"):
        load_extractor(tmp_path)
    (tmp_path / CARD_FILE).write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format version 99"):
        load_extractor(tmp_path)
    save_extractor(tmp_path, extractor)
    (tmp_path / CARD_FILE).write_text('{"format_version": 1, "name": "digits-cnn"}')
    with pytest.raises(UserError, match=f"{CARD_FILE}: test_accuracy: missing"):
        load_extractor(tmp_path)


def test_the_reference_itself_is_perfect(
    train: PreparedDataset, test: PreparedDataset, extractor: DigitsExtractor
) -> None:
    results = evaluate_digits(channels_last(test), test.labels(), test, train, extractor)
    assert results["accuracy"] == pytest.approx(extractor.test_accuracy)
    assert results["frechet_test"] < 1e-6 < results["frechet_floor"]
    assert results["precision"] == results["recall"] == results["coverage"] == 1
    assert results["nearest_train"] == results["nearest_train_of_test"]
    assert results["nearest_train"]["min"] > 0
    assert results["memorisation"] == pytest.approx(0.01, abs=1 / len(test)) and results["density"] > 1
    assert results["num_samples"] == len(test)
    assert results["extractor"] == "digits-cnn"
    assert not any("fid" in key.lower() for key in results)


def test_copies_of_training_images_are_found(
    train: PreparedDataset, test: PreparedDataset, extractor: DigitsExtractor
) -> None:
    images, labels = channels_last(train)[:50].clone(), train.labels()[:50]
    results = evaluate_digits(images, labels, test, train, extractor)
    assert results["nearest_train"] == {"min": 0, "median": 0} and results["memorisation"] == 1
    images[:, 0, 0] = 255 - images[:, 0, 0]  # one pixel, black in nearly all images: by 2 where black
    assert evaluate_digits(images, labels, test, train, extractor)["nearest_train"]["median"] == pytest.approx(2)


def test_noise_and_wrong_labels_are_bad(
    train: PreparedDataset, test: PreparedDataset, extractor: DigitsExtractor
) -> None:
    real = evaluate_digits(channels_last(train), train.labels(), test, train, extractor)
    wrong = evaluate_digits(channels_last(train), (train.labels() + 1) % 10, test, train, extractor)
    assert real["accuracy"] > 0.9 > 0.1 > wrong["accuracy"]
    assert real["frechet_test"] == real["frechet_floor"] == wrong["frechet_test"]
    stream = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (200, 8, 8, 3), generator=stream, dtype=torch.uint8)
    results = evaluate_digits(noise, torch.arange(200) % 10, test, train, extractor)
    assert results["frechet_test"] > 10 * results["frechet_floor"]
    assert results["accuracy"] < 0.3
    assert results["coverage"] < 0.2


def test_an_extractor_of_other_data_needs_the_same_test_split(
    train: PreparedDataset, test: PreparedDataset, extractor: DigitsExtractor
) -> None:
    with pytest.raises(UserError, match="not the data on which the extractor was trained"):
        evaluate_digits(channels_last(train), train.labels(), train, test, extractor)
    apart = evaluate_digits(channels_last(test), test.labels(), test, test, extractor)  # as if it were other data
    assert apart["accuracy"] == pytest.approx(extractor.test_accuracy)
    with pytest.raises(UserError, match="not the data on which the extractor was trained"):
        evaluate_digits(channels_last(test), test.labels(), test, test, replace(extractor, test_sha256=None))


def test_the_same_images_beside_other_latents_are_the_same_data(tmp_path: Path) -> None:
    grey = images_of_28_pixels(tmp_path / "grey", 60, colour=False, first=0)
    scaled = images_of_28_pixels(tmp_path / "scaled", 60, colour=False, first=0, latent_scale=0.5)
    other = images_of_28_pixels(tmp_path / "other", 60, colour=False, first=1)
    assert sha256(grey.folder / MANIFEST_FILE) != sha256(scaled.folder / MANIFEST_FILE)
    known = data_checksum(grey)
    assert is_same_data(scaled, known) and not is_same_data(other, known) and not is_same_data(grey, None)
    assert is_same_data(grey, sha256(grey.folder / MANIFEST_FILE)), "as recorded by version 0.1"


def images_of_28_pixels(
    folder: Path, count: int, *, colour: bool, first: int, latent_scale: float = 1.0
) -> PreparedDataset:
    """Three classes: a bright left half, a bright right half, and neither, with noise."""
    labels = torch.arange(count) % 3
    pixels = torch.randint(60, (count, 3 if colour else 1, 28, 28), generator=torch.Generator().manual_seed(first))
    for label, columns in ((0, slice(0, 14)), (1, slice(14, 28))):
        pixels[labels == label, :, :, columns] += 150
    images = pixels.expand(-1, 3, -1, -1).to(torch.uint8)
    description = Manifest(("left", "right", "none"), 28, "none", LatentSpec((3, 28, 28), 1.0, 0.0, "identity"),
                           has_flips=False, has_images=True)  # fmt: skip
    writer = ShardWriter(folder, description)
    moments = torch.cat([latent_scale * (images / 127.5 - 1), torch.zeros(images.shape)], dim=1).half()
    writer.add(moments=moments, labels=labels, index=torch.arange(count), images=images)
    writer.finish()
    return open_dataset(folder)


@pytest.mark.parametrize("colour", [False, True])
def test_larger_images_of_other_classes(colour: bool, tmp_path: Path) -> None:
    train = images_of_28_pixels(tmp_path / "train", 120, colour=colour, first=0)
    test = images_of_28_pixels(tmp_path / "test", 60, colour=colour, first=1)
    trained = train_extractor(train, test, seed=0, steps=40)
    assert trained.test_accuracy > 0.9 and trained.name == "small-cnn" and trained.net.channels == (3 if colour else 1)
    save_extractor(tmp_path / "saved", trained)
    loaded = load_extractor(tmp_path / "saved")
    assert torch.equal(loaded.read(all_images(test))[0], trained.read(all_images(test))[0])
    results = evaluate_digits(channels_last(test), test.labels(), test, train, loaded)
    assert results["frechet_test"] < 1e-6 and results["accuracy"] == pytest.approx(trained.test_accuracy)
    assert "test images" in digits_rows(results)[2][2] + digits_rows(results)[3][2]
    encoder = load_encoder("extractor", grid_size=7, weights=tmp_path / "saved" / WEIGHTS_FILE, device="cpu")
    pixels = test.images([0, 1])
    expected = trained.net.patches((pixels if colour else pixels[:, :1]) / 127.5 - 1)
    torch.testing.assert_close(encoder(pixels), expected)
    with pytest.raises(UserError, match="gives 7 x 7 tokens, the model has 8 x 8"):
        load_encoder("extractor", grid_size=8, weights=tmp_path / "saved" / WEIGHTS_FILE, device="cpu")
    with pytest.raises(UserError, match="expected \\(N, 28, 28, 3\\)"):
        evaluate_digits(torch.zeros(9, 8, 8, 3, dtype=torch.uint8), torch.zeros(9).long(), test, train, loaded)


def test_images_of_a_size_that_the_network_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="images of 30 pixels, expected 8, or 28 to 64 in steps of 4"):
        SmallNet(side=30)


def command(data: Path, extractor: DigitsExtractor, folder: Path, **arrays: np.ndarray) -> EvaluateConfig:
    save_extractor(folder / "extractor", extractor)
    np.savez(folder / "samples.npz", **arrays)
    return EvaluateConfig(samples=folder / "samples.npz", reference=data, extractor=folder / "extractor")


def test_evaluate_prints_a_table_and_writes_json(
    data: Path, train: PreparedDataset, extractor: DigitsExtractor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = command(data, extractor, tmp_path, arr_0=channels_last(train).numpy(), labels=train.labels().numpy())
    results = evaluate(config)
    printed = capsys.readouterr().out
    for name, *_ in digits_rows(results):
        assert name in printed
    assert f"{results['frechet_test']:.2f}" in printed
    written = json.loads((tmp_path / "samples.json").read_text())
    assert {key: written[key] for key in results} == results
    elsewhere = tmp_path / "elsewhere" / "results.json"
    evaluate(dataclasses.replace(config, output=elsewhere))
    assert json.loads(elsewhere.read_text()) == written


def test_a_metric_of_ones_own_is_in_results_and_table(
    train: PreparedDataset, test: PreparedDataset, extractor: DigitsExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spread(sets: FeatureSets) -> dict[str, float]:
        return {"spread": float(sets.samples["pool"].std() / sets.reference["pool"].std())}

    own = Metric("spread", "spread", "of features, over that of {images}", None, "spread", spread)
    monkeypatch.setattr(table, "METRICS", [*table.METRICS, own])
    results = evaluate_digits(channels_last(test), test.labels(), test, train, extractor)
    assert results["spread"] == 1
    assert digits_rows(results)[-2] == ("spread", "1.000", "of features, over that of the test digits")


IMAGES = np.zeros((20, 8, 8, 3), np.uint8)
LABELS = np.arange(20) % 10
BAD_ARRAYS = {
    "holds no arr_0": {"labels": LABELS},
    "holds no labels": {"arr_0": IMAGES},
    "images of type float32, expected uint8": {"arr_0": np.full((20, 8, 8, 3), np.nan, np.float32), "labels": LABELS},
    r"images of shape \(20, 16, 16, 3\), expected \(N, 8, 8, 3\)": {
        "arr_0": np.zeros((20, 16, 16, 3), np.uint8),
        "labels": LABELS,
    },
    r"images of shape \(20, 3, 8, 8\)": {"arr_0": np.zeros((20, 3, 8, 8), np.uint8), "labels": LABELS},
    "samples: 1 images": {"arr_0": IMAGES[:1], "labels": LABELS[:1]},
    "samples: 3 images, but 3 nearest neighbours need at least 4": {"arr_0": IMAGES[:3], "labels": LABELS[:3]},
    r"labels are int64 \(19,\), expected one integer per image: \(20,\)": {"arr_0": IMAGES, "labels": LABELS[:19]},
    "labels are float64": {"arr_0": IMAGES, "labels": LABELS.astype(np.float64)},
    "label 10, expected classes 0 to 9": {"arr_0": IMAGES, "labels": LABELS + 1},
    "arr_0 holds <U1": {"arr_0": np.full((20, 8, 8, 3), "a"), "labels": LABELS},
    "damaged": {"arr_0": np.full((20, 8, 8, 3), None), "labels": LABELS},
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_bad_samples_get_one_clear_line(message: str, data: Path, extractor: DigitsExtractor, tmp_path: Path) -> None:
    config = command(data, extractor, tmp_path, **BAD_ARRAYS[message])
    with pytest.raises(UserError, match=message) as error:
        evaluate(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "samples.json").exists()


def test_bad_paths_get_one_clear_line(data: Path, extractor: DigitsExtractor, tmp_path: Path) -> None:
    config = command(data, extractor, tmp_path, arr_0=IMAGES, labels=LABELS)
    with pytest.raises(UserError, match=r"absent\.npz: no such file"):
        evaluate(dataclasses.replace(config, samples=tmp_path / "absent.npz"))
    with pytest.raises(UserError, match="one data set, not a folder with the splits"):
        evaluate(dataclasses.replace(config, reference=data / "train"))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(config.samples.read_bytes()[:500])
    with pytest.raises(UserError, match=r"cut\.npz: not an \.npz file, or cut short"):
        evaluate(dataclasses.replace(config, samples=cut))


def test_options_are_free_of_torch() -> None:
    code = "import sys, stablevm.evaluation.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
