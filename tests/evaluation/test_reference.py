"""Reference files: what they are made of, what they hold, and which are refused."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from stablevm.evaluation.config import ReferenceConfig
from stablevm.evaluation.evaluate import evaluate
from stablevm.evaluation.reference import reference
from stablevm.support.errors import UserError
from tests.helpers.data_sets import one_line, source, write
from tests.helpers.evaluations import FAKE, REAL, SIDE, refusal
from tests.helpers.packed import pictures_of, write_idx


def test_reference_of_a_folder_is_what_its_images_are(options, home, tmp_path, capsys):
    for index, image in enumerate(REAL):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    config = ReferenceConfig(
        source=tmp_path / "images",
        output=tmp_path / "made.npz",
        transform="none",
        num_images=10,
        inception_weights=home / "weights.pth",
        cache_dir=home / "cache",
    )
    reference(config)
    assert "statistics of 26 images" in capsys.readouterr().out
    with np.load(tmp_path / "made.npz") as made:
        assert made["arr_0"].shape == (10, SIDE, SIDE, 3) and made["arr_0"].dtype == np.uint8
        assert (made["mu"].shape, made["sigma"].shape) == ((2048,), (2048, 2048))
        assert (made["mu_s"].shape, made["sigma_s"].shape) == ((2023,), (2023, 2023))
        assert {made[name].dtype for name in ("mu", "sigma", "mu_s", "sigma_s")} == {np.dtype(np.float64)}
        order = np.concatenate([REAL[0::2], REAL[1::2]])  # class by class
        where = [int((order == image).all((1, 2, 3)).argmax()) for image in made["arr_0"]]
        assert len(set(where)) == 10 and where != sorted(where), "drawn and shuffled"
        assert made["labels"].tolist() == [int(index >= 13) for index in where]
    whole = evaluate(options())["inception"]
    results = evaluate(options(reference=tmp_path / "made.npz", output=tmp_path / "made.json"))
    assert results["inception"]["statistics"] == "the file's stored statistics of 26 images"
    for key in ("frechet_distance", "spatial_frechet_distance"):
        assert results["inception"][key] == pytest.approx(whole[key], rel=1e-6)
    assert results["reference_images"] == 10


def test_stored_statistics_alone_give_distances_alone(options, home):
    """As with published statistics without images; the report shows the metrics that remain."""
    from stablevm.evaluation.extractors import load_inception

    means = {"mu": np.zeros(2048), "mu_s": np.zeros(2023), "sigma": np.eye(2048), "sigma_s": np.eye(2023)}
    made_with = json.dumps({"extractor_fingerprint": load_inception(home / "weights.pth").fingerprint})
    results = evaluate(options(real={**means, "protocol": np.array(made_with)}, report=True))
    assert results["reference_images"] == 0 and "precision" not in results["inception"]
    assert results["inception"]["statistics"] == "the file's stored statistics"
    assert results["inception"]["frechet_distance"] > 0


def test_reference_without_statistics_needs_no_network(tmp_path):
    write(tmp_path / "data" / "train", source(40))
    config = ReferenceConfig(source=tmp_path / "data", output=tmp_path / "plain.npz", num_images=30, statistics=False)
    reference(config)
    with np.load(tmp_path / "plain.npz") as made:
        assert made["arr_0"].shape == (30, 4, 4, 3) and "mu" not in made
        names = json.loads(made["protocol"].item())["class_names"]
    assert names == ["cat", "dog", "owl"]


def test_a_reference_with_other_options_and_a_foreign_file_are_kept(tmp_path):
    write(tmp_path / "data" / "train", source(40))
    config = ReferenceConfig(source=tmp_path / "data", output=tmp_path / "ref.npz", num_images=30, statistics=False)
    reference(config)
    reference(config)
    before = config.output.read_bytes()
    with pytest.raises(UserError, match=r"made with --num-images 30, not --num-images 20; give --output another name"):
        reference(dataclasses.replace(config, num_images=20))
    assert config.output.read_bytes() == before
    np.savez(tmp_path / "mine.npz", arr_0=np.zeros(3))
    with pytest.raises(UserError, match=r"mine\.npz exists, and was not made by this version of the command"):
        reference(dataclasses.replace(config, output=tmp_path / "mine.npz"))


def test_reference_of_a_split_of_files_of_many_images(tmp_path):
    for split, count in (("train", 6), ("t10k", 4)):
        write_idx(tmp_path / "mnist", split, pictures_of(count, 8, 8), [0] * count, ".gz")
    shared = {"source": tmp_path / "mnist", "transform": "none", "statistics": False}
    for split, count in (("train", 6), ("test", 4)):
        reference(ReferenceConfig(output=tmp_path / f"{split}.npz", split=split, **shared))
        assert len(np.load(tmp_path / f"{split}.npz")["arr_0"]) == count
    with pytest.raises(UserError, match=r"split dev: .* has test, train"):
        reference(ReferenceConfig(output=tmp_path / "dev.npz", split="dev", **shared))


def test_reference_refuses_a_folder_of_bad_or_unsized_images(tmp_path):
    Image.fromarray(REAL[0]).save(tmp_path / "good.png")
    config = ReferenceConfig(source=tmp_path, output=tmp_path / "ref.npz", statistics=False)
    for given, message in (
        ({}, "needs --resolution"),
        ({"resolution": 8, "source": tmp_path / "absent"}, "absent"),
        ({"output": tmp_path / "ref.txt"}, r"ends in \.npz"),
    ):
        with pytest.raises(UserError, match=message) as error:
            reference(dataclasses.replace(config, **given))
        one_line(error)
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(UserError, match=r"bad\.png: not an image; remove it"):
        reference(dataclasses.replace(config, resolution=8))
    assert not (tmp_path / "ref.npz").exists()


def test_statistics_of_another_network_are_refused(options):
    stored = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    config = options(real={"arr_0": REAL, **stored})
    assert "its statistics are of Inception 2015-12-05, this command has Inception with other weights" in refusal(
        config
    )


@pytest.mark.parametrize(
    ("real", "message"),
    [
        ({"x": REAL}, "holds neither arr_0"),
        ({"arr_0": REAL.astype(np.int64)}, "images of type int64"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "holds NaN"),
        ({"mu": np.zeros(2048)}, "holds mu but no sigma"),
        ({"mu": np.zeros(2048), "sigma": np.eye(7)}, "expected (D,) and (D, D)"),
        ({"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}, "holds mu_s but no mu"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048) + np.eye(2048, k=-1)}, "sigma is not symmetric"),
    ],
)
def test_bad_references_get_one_clear_line(options, real, message):
    assert message in refusal(options(real=real))


def test_a_reference_of_another_size_is_warned_of(options, capsys):
    results = evaluate(options(samples={"arr_0": FAKE[:8, :8, :10]}, report=True))
    assert "images of 8 x 10 pixels, but the reference" in results["warnings"][0]
    assert results["warnings"][0] in capsys.readouterr().err and results["inception"]["frechet_distance"] > 0


def test_mu_and_sigma_alone_give_a_distance_and_say_what_is_missing(options, home, capsys):
    from stablevm.evaluation.extractors import load_inception

    made_with = json.dumps({"extractor_fingerprint": load_inception(home / "weights.pth").fingerprint})
    stored = {"mu": np.zeros(2048), "sigma": np.eye(2048), "protocol": np.array(made_with)}
    results = evaluate(options(real=stored))
    assert results["inception"]["frechet_distance"] > 0 and "spatial_frechet_distance" not in results["inception"]
    told = capsys.readouterr().err
    assert "holds mu and sigma, but no mu_s and sigma_s: no sFID" in told
    assert "holds no arr_0 (images): no precision, recall" in told
