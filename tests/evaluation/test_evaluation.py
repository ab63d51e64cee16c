"""Whole evaluations with an Inception of random weights: numbers, peers, references, caches, processes, refusals."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from stablevm.evaluation import evaluate as command
from stablevm.evaluation import features
from stablevm.evaluation.config import EvaluateCheckpointConfig, EvaluateConfig, EvaluationOptions, ReferenceConfig
from stablevm.evaluation.evaluate import CheckpointSource, evaluate, evaluate_checkpoint
from stablevm.evaluation.extractors import InceptionExtractor
from stablevm.evaluation.features import FeatureCache, extract
from stablevm.evaluation.reference import reference
from stablevm.evaluation.sample_report import metric_curves
from stablevm.evaluation.sources import ArraySource, StreamedSource
from stablevm.metrics import statistics
from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.statistics import frechet_distance, moments_of
from stablevm.metrics.table import results_of
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate
from stablevm.support.errors import UserError
from stablevm.support.processes import Process
from tests.helpers import inception
from tests.helpers.checkpoints import save_checkpoint, tiny_card
from tests.helpers.data_sets import one_line, source, write

COUNT, SIDE = 26, 12
REAL, FAKE = (inception.smooth_images(COUNT, SIDE, seed).numpy() for seed in (1, 2))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Weights and a cache that all tests share: each image goes through the network once."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.save(inception.random_weights(), folder / "weights.pth")
    return folder


@pytest.fixture
def options(home, tmp_path):
    """Build a config: FAKE against REAL unless told otherwise."""

    def build(samples=None, real=None, **given):
        np.savez(tmp_path / "samples.npz", **(samples or {"arr_0": FAKE}))
        np.savez(tmp_path / "ref.npz", **(real or {"arr_0": REAL}))
        defaults = {
            "samples": tmp_path / "samples.npz",
            "reference": tmp_path / "ref.npz",
            "inception_weights": home / "weights.pth",
            "cache_dir": home / "cache",
        }
        return EvaluateConfig(**(defaults | given))

    return build


def refusal(config):
    with pytest.raises(UserError) as error:
        evaluate(config)
    assert not config.samples.with_suffix(".json").exists()
    return one_line(error)


def test_all_five_numbers_agree_with_torch_fidelity(options, home, capsys):
    """One run of the peer on the same weights and images; it names the file of random weights as its own."""
    import torch_fidelity

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    with torch.random.fork_rng(devices=[]):  # its network draws first values, its loader a seed
        peer = torch_fidelity.calculate_metrics(
            input1=Images(FAKE),
            input2=Images(REAL),
            **dict.fromkeys(("fid", "isc", "prc"), True),
            **dict.fromkeys(("cuda", "cache", "verbose", "samples_shuffle"), False),
            save_cpu_ram=True,
            isc_splits=1,
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(home / "weights.pth"),
        )
    ours = evaluate(options())["inception"]
    assert ours["frechet_distance"] == pytest.approx(peer["frechet_inception_distance"], rel=1e-4)
    assert ours["score"] == pytest.approx(peer["inception_score_mean"], rel=1e-4) and ours["score"] > 1.01
    assert ours["precision"] == pytest.approx(peer["precision"], abs=1e-4) and 0 < ours["precision"] < 1
    assert ours["recall"] == pytest.approx(peer["recall"], abs=1e-4) and 0 < ours["recall"] < 1
    printed = capsys.readouterr().out
    assert "other weights" in printed and "not FID" in printed and not any("fid" in key for key in ours)


def test_published_weights_alone_give_fid(options, monkeypatch, home, capsys):
    from stablevm.support.files import sha256

    monkeypatch.setattr("stablevm.evaluation.extractors.PUBLISHED_SHA256", sha256(home / "weights.pth"))
    results = evaluate(options())["inception"]
    assert {"fid", "sfid", "inception_score", "precision", "recall"} <= results.keys()
    assert results["extractor"] == "Inception 2015-12-05"
    printed = capsys.readouterr().out
    assert "FID" in printed and "sFID" in printed and "the statistics of 26 reference images" in printed
    assert json.loads(options().samples.with_suffix(".json").read_text())["inception"] == results


def test_identical_sets_are_at_distance_zero(options):
    results = evaluate(options(samples={"arr_0": REAL}))["inception"]
    assert 0 <= results["frechet_distance"] < 1e-6 and 0 <= results["spatial_frechet_distance"] < 1e-6
    assert results["precision"] == results["recall"] == 1


def test_mode_collapse_is_precise_and_recalls_next_to_nothing(options):
    collapsed = REAL[:1].repeat(COUNT, 0)
    collapsed[np.arange(COUNT), 0, 0, 0] ^= np.arange(COUNT).astype(np.uint8) % 4
    results = evaluate(options(samples={"arr_0": collapsed}))["inception"]
    assert results["precision"] == 1 and results["recall"] <= 1 / COUNT


def test_adm_arithmetic_is_named_and_moves_precision_alone(options, capsys):
    exact, adm = (evaluate(options(precision_recall=each))["inception"] for each in ("exact", "adm"))
    assert (exact["precision_recall"], adm["precision_recall"]) == ("exact", "adm")
    assert "float16 distances as in ADM's script" in capsys.readouterr().out
    of_exact_distances = {"density", "coverage", "memorisation"}
    assert exact.keys() - adm.keys() == of_exact_distances
    same = exact.keys() - {"precision", "recall", "precision_recall"} - of_exact_distances
    assert {key: exact[key] for key in same} == {key: adm[key] for key in same}


def test_files_sorted_by_class_get_a_warning(options, capsys):
    shuffled, ordered = np.arange(COUNT) * 7 % COUNT % 4, np.arange(COUNT) // 7
    assert not evaluate(options(samples={"arr_0": FAKE, "labels": shuffled}))["warnings"][1:]
    warnings = evaluate(options(samples={"arr_0": FAKE, "labels": ordered}))["warnings"]
    assert "looks sorted by class" in warnings[1] and warnings[1] in capsys.readouterr().err
    network_sees = evaluate(options(samples={"arr_0": REAL[np.arange(COUNT) // 7]}))["warnings"]
    assert "the class that the network sees" in network_sees[1]


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
    results = evaluate(options(reference=tmp_path / "made.npz"))
    assert results["inception"]["statistics"] == "the file's stored statistics of 26 images"
    for key in ("frechet_distance", "spatial_frechet_distance"):
        assert results["inception"][key] == pytest.approx(whole[key], rel=1e-6)
    assert results["reference_images"] == 10


def test_stored_statistics_alone_give_distances_alone(options, home):
    """As published statistics without images; and a report of what there is."""
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


def test_features_come_from_the_cache(options, monkeypatch):
    first = evaluate(options())
    monkeypatch.setattr(InceptionExtractor, "__call__", None)
    again = evaluate(options(batch_size=3))
    assert again == first


def test_processes_share_the_work(home, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART_LENGTH", 4)
    calls = []

    class Means:
        name, fingerprint, feature_names = "means", "0", ("pool",)

        def __call__(self, images):
            calls.append(len(images))
            return {"pool": images.float().mean((2, 3))}

    cache, images, cpu = FeatureCache(tmp_path / "cache"), ArraySource(FAKE), torch.device("cpu")

    def share(rank):
        return extract(images, Means(), cache, Process(rank, 3, cpu), batch_size=3, title="x")

    assert share(1) is None and sum(calls) == 8
    assert share(2) is None and sum(calls) == 16
    torch.testing.assert_close(share(0).load("pool"), torch.from_numpy(FAKE).float().mean((1, 2)))
    assert sum(calls) == COUNT and max(calls) <= 3
    files = list((tmp_path / "cache").glob("*/*"))
    assert len(files) == 7
    for age, path in enumerate(sorted(files)):
        os.utime(path, (0, age))
    (files[0].parent / ".tmp-1-ab-x.safetensors").write_text("left over")
    os.utime(files[0].parent / ".tmp-1-ab-x.safetensors", (0, 0))
    cache.sweep(gigabytes=3.5 * files[0].stat().st_size / 1e9)
    assert set((tmp_path / "cache").glob("*/*")) == set(sorted(files)[-3:])


def test_an_encoder_gives_a_frechet_distance_beside_or_instead(options, tmp_path):
    import timm
    from safetensors.torch import save_file

    name = "vit_tiny_patch16_224"
    with torch.random.fork_rng(devices=[]):
        save_file(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    config = options(inception=False, enc_type=name, encoder_weights=tmp_path / "vit.safetensors")
    results = evaluate(config)
    assert "inception" not in results and results["encoder"]["extractor"] == name
    assert results["encoder"].keys() >= {"frechet_distance", "precision", "recall"}
    assert not any("fid" in key for key in results["encoder"])
    both = evaluate(dataclasses.replace(config, inception=True))
    assert both["encoder"] == results["encoder"] and "score" in both["inception"]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"images": FAKE}, "holds no arr_0"),
        ({"arr_0": FAKE.astype(np.float32) * np.nan}, "images of type float32, expected uint8"),
        ({"arr_0": FAKE[..., 0]}, "grey images"),
        ({"arr_0": FAKE[..., :1]}, "grey images"),
        ({"arr_0": FAKE.transpose(0, 3, 1, 2)}, r"expected (N, H, W, 3)"),
        ({"arr_0": FAKE[:0]}, "no images"),
        ({"arr_0": FAKE[:3]}, "3 samples images, too few for a covariance"),
        ({"arr_0": FAKE, "labels": np.arange(3)}, "labels are int64 (3,)"),
    ],
)
def test_bad_samples_get_one_clear_line(options, samples, message):
    assert message in refusal(options(samples=samples))


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


def test_bad_options_get_one_clear_line(options, tmp_path):
    assert "--no-inception: expected an --enc-type to use" in refusal(options(inception=False))
    assert "--batch-size 0" in refusal(options(batch_size=0))
    assert "stablevm reference" in refusal(options(reference=tmp_path))
    assert "no such file" in refusal(options(reference=tmp_path / "absent.npz"))


def test_broken_weights_are_named(options, home, tmp_path):
    weights = torch.load(home / "weights.pth", weights_only=True)
    weights["Mixed_7c.branch1x1.conv.weight"][0, 0] = torch.nan
    torch.save(weights, tmp_path / "broken.pth")
    four = {"arr_0": FAKE[:4]}
    config = options(samples=four, real={"arr_0": REAL[:4]}, inception_weights=tmp_path / "broken.pth")
    assert "4 of 4 rows of features hold NaN" in refusal(config)


def test_a_checkpoint_is_evaluated_without_a_file_in_between(options, home, tmp_path, monkeypatch):
    """The same numbers as from the file that generate writes; and nothing is drawn twice."""
    checkpoint_folder = save_checkpoint(tmp_path / "checkpoint", tiny_card())
    sampling = GenerateConfig(
        ckpt=checkpoint_folder, num_fid_samples=9, num_steps=2, sample_dir=tmp_path, name="x", per_proc_batch_size=4
    )
    config = options(real={"arr_0": REAL[:9, :8, :8]}, samples={"arr_0": FAKE[:0]})
    compared = EvaluationOptions(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(EvaluationOptions)}
    )
    results = evaluate_checkpoint(EvaluateCheckpointConfig(compared, sampling))
    assert json.loads((tmp_path / "x.json").read_text()) == results
    from_file = evaluate(EvaluateConfig(samples=generate(sampling), **vars(compared)))
    for key, value in from_file["inception"].items():
        assert results["inception"][key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)
    monkeypatch.setattr(CheckpointSource, "images", lambda self, indices: np.zeros((len(indices), 8, 8, 3), np.uint8))
    assert evaluate_checkpoint(EvaluateCheckpointConfig(compared, sampling)) == results, "features from the cache"


def test_report_shows_everything(options, tmp_path, capsys):
    labels = np.arange(COUNT) * 7 % COUNT % 3
    copied = {"arr_0": np.concatenate([FAKE[:-1], REAL[3:4]]), "labels": labels}
    config = options(samples=copied, real={"arr_0": REAL, "labels": labels}, report=True)
    evaluate(config)
    page = (tmp_path / "samples.html").read_text()
    assert (
        page.count("<img") == 1 + 1 + 6 and f"report written to {tmp_path / 'samples.html'}" in capsys.readouterr().out
    )
    for text in (
        "Read this first",
        "Samples",
        "Nearest reference images",
        "Dependence on the number of samples",
        "Classes (Inception with other weights",
        "median distance to the nearest reference image",
        "at least",
        "Of each class, of ten at most",
    ):
        assert text in page, text
    assert len(page.split("Classes (")[1].split("</table>")[0].split("<tr>")) == 1 + 1 + 3, "a row for each class"


def test_curves_are_means_over_disjoint_subsets(monkeypatch):
    stream = torch.Generator().manual_seed(1)
    pool, real = torch.randn(40, 3, generator=stream), torch.randn(50, 3, generator=stream)
    comparison = FeatureSets("x", False, {"pool": pool}, {"pool": real}, {}, "exact", torch.device("cpu"))
    seen = []

    def watched(sets, **options):
        seen.append(sets.samples["pool"])
        return results_of(sets, **options)

    monkeypatch.setattr("stablevm.evaluation.sample_report.results_of", watched)
    whole = results_of(comparison)
    curves = metric_curves(comparison, whole)
    assert [point.samples for point in curves["precision"]] == [10, 20, 40]  # eighths are too small
    for sets, point in zip((seen[:4], seen[4:]), curves["frechet_distance"], strict=False):
        rows = torch.cat(sets)
        assert len(rows) == 40 and torch.equal(rows.sort(0).values, pool.sort(0).values), "each sample once"
        values = np.array([frechet_distance(moments_of(each), moments_of(real)) for each in sets])
        assert (point.mean, point.deviation) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)))
    assert curves["recall"][-1].mean == whole["recall"]


def test_compressed_files_and_adms_labels_are_read(options, monkeypatch):
    monkeypatch.setattr(features, "PART_LENGTH", 5)
    config = options()
    first = evaluate(config)
    np.savez_compressed(config.samples, FAKE, np.arange(COUNT) % 3)
    np.savez_compressed(config.reference, REAL)
    samples = command.open_samples(config.samples)
    assert isinstance(samples.source, StreamedSource) and samples.labels.tolist() == (np.arange(COUNT) % 3).tolist()
    evaluate(dataclasses.replace(config, report=True))
    assert json.loads(config.samples.with_suffix(".json").read_text())["inception"] == first["inception"]


def save_images(folder, images):
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:02d}.png")
    return folder


def test_folders_of_images_are_taken_as_they_are(options, tmp_path):
    count = 7
    fake, real = save_images(tmp_path / "fake", FAKE[:count]), save_images(tmp_path / "real", REAL[:count])
    whole = evaluate(options(samples={"arr_0": FAKE[:count]}, real={"arr_0": REAL[:count]}))["inception"]
    found = evaluate(dataclasses.replace(options(reference=real), samples=fake))
    assert found["num_samples"] == found["reference_images"] == count
    assert json.loads((tmp_path / "fake.json").read_text()) == found
    for key in ("frechet_distance", "precision", "recall", "coverage", "density", "memorisation"):
        assert found["inception"][key] == pytest.approx(whole[key], rel=1e-5)
    shuffled = command.open_samples(fake).source.images(range(count))
    assert not np.array_equal(shuffled, FAKE[:count]), "a folder sorted by class must not look like chunks"
    Image.fromarray(FAKE[0, :6, :6]).save(fake / "small.png")
    with pytest.raises(UserError, match=r"small\.png|\d\d\.png"):
        evaluate(dataclasses.replace(options(), samples=fake))


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


def test_what_costs_nothing_more_is_reported(options, capsys):
    """Of these distances and features: by their definitions in the units' tests; here that they arrive."""
    results = evaluate(options(samples={"arr_0": np.concatenate([FAKE[:13], REAL[:13]])}))["inception"]
    assert results["memorisation"] >= 0.5, "half of them are copies"
    assert 0 < results["coverage"] <= 1 and results["density"] > 0 and np.isfinite(results["kernel_distance"])
    assert results["kernel_distance_deviation"] == 0, "one subset: all of both"
    printed = capsys.readouterr().out
    for title in ("kernel distance", "density", "coverage", "memorisation"):
        assert f"\n{title} " in printed
    assert "not KID" in printed and "kid" not in results


def test_a_short_last_chunk_is_warned_of_with_both_numbers(options, monkeypatch, capsys):
    for function in (statistics.chunk_scores, statistics.short_chunk_warning):
        monkeypatch.setattr(function, "__defaults__", (10,))
    found = evaluate(options())
    results, (warning,) = found["inception"], [each for each in found["warnings"] if "chunk" in each and "last" in each]
    assert len(results["score_of_chunks"]) == 3
    assert results["score_of_whole_chunks"] == pytest.approx(np.mean(results["score_of_chunks"][:2]))
    assert f"{results['score']:.6g} over all chunks" in warning
    assert f"{results['score_of_whole_chunks']:.6g} over the full ones" in warning
    captured = capsys.readouterr()
    assert warning in captured.err and f"without it {results['score_of_whole_chunks']:.6g}" in captured.out


def test_damaged_features_are_computed_again(options, tmp_path, monkeypatch):
    config = options(samples={"arr_0": FAKE[:4]}, real={"arr_0": REAL[:4]}, cache_dir=tmp_path / "cache")
    first = evaluate(config)
    calls, whole = [], InceptionExtractor.__call__

    def counted(self, images):
        calls.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(InceptionExtractor, "__call__", counted)
    paths = sorted((tmp_path / "cache").glob("*/*"))
    for damage in (
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),  # a bit of a number
        lambda content: content[:60] + bytes([content[60] ^ 1]) + content[61:],  # of the header
        lambda content: content[:-5],
    ):
        calls.clear()
        paths[0].write_bytes(damage(paths[0].read_bytes()))
        assert evaluate(config) == first and sum(calls) == 4


def test_sweeping_leaves_files_of_others_alone(tmp_path):
    other = tmp_path / "ab" / "thesis.txt"
    other.parent.mkdir()
    other.write_text("x" * 1000)
    os.utime(other, (0, 0))
    FeatureCache(tmp_path).sweep(gigabytes=0)
    assert other.exists()


def test_outputs_never_replace_what_is_read_or_another_output(options, home, tmp_path):
    """All that is read against all that is written, by other spellings and links too; nothing is touched."""
    config = options(encoder_weights=home / "weights.pth")
    (tmp_path / "sub").mkdir()
    (tmp_path / "page.html").symlink_to(config.samples)
    (tmp_path / "link.json").symlink_to(config.reference)
    np.savez(tmp_path / "x", arr_0=FAKE)
    for name in ("x.json", "x.html"):
        (tmp_path / name).write_bytes((tmp_path / "x.npz").read_bytes())
    images = save_images(tmp_path / "images", FAKE[:4])
    (images / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for given, message in (
        ({"output": config.samples}, "--output would replace"),
        ({"output": tmp_path / "sub" / ".." / "samples.npz"}, "--output would replace"),
        ({"output": tmp_path / "link.json"}, "--output would replace"),
        ({"output": config.reference}, "--output would replace"),
        ({"output": home / "weights.pth"}, "--output would replace"),
        ({"output": tmp_path / "page.json", "report": True}, "--report would replace"),
        ({"samples": tmp_path / "x.json"}, "--output would replace"),
        ({"samples": tmp_path / "x.html", "report": True}, "--report would replace"),
        ({"reference": tmp_path / "x.json", "output": tmp_path / "x.json"}, "--output would replace"),
        ({"output": tmp_path / "new.html", "report": True}, "which is --output too"),
        ({"samples": images, "output": images / "notes.txt"}, "--output would replace"),
        ({"samples": images, "output": images / "00.png"}, "--output would replace"),
        ({"output": tmp_path / "sub"}, "is a folder"),
        ({"output": config.samples / "x.json"}, "--output .*samples.npz"),
        ({"output": config.samples / "sub" / "x.json"}, "--output .*samples.npz"),
        ({"cache_dir": config.samples}, "--cache-dir"),
        ({"cache_dir": config.samples / "x"}, "--cache-dir"),
        ({"output": tmp_path / "both", "cache_dir": tmp_path / "both"}, "--output would replace"),
    ):
        changed = dataclasses.replace(config, **given)
        with pytest.raises(UserError, match=message) as error:
            evaluate(changed)
        one_line(error)
    for given, message in (
        ({"output": tmp_path / "sub" / ".." / "x.npz", "source": tmp_path / "x.npz"}, "--output would replace"),
        ({"output": tmp_path / "dir.npz"}, "is a folder"),
        ({"cache_dir": config.samples}, "--cache-dir"),
    ):
        (tmp_path / "dir.npz").mkdir(exist_ok=True)
        defaults = {"source": images, "output": tmp_path / "r.npz", "transform": "none", "statistics": False}
        with pytest.raises(UserError, match=message) as error:
            reference(ReferenceConfig(**(defaults | given)))
        one_line(error)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
