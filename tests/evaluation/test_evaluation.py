"""Whole evaluations with an Inception of random weights: numbers, warnings, checkpoints, reports."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from stablevm import cli
from stablevm.evaluation import evaluate as command
from stablevm.evaluation import features
from stablevm.evaluation.config import EvaluateCheckpointConfig, EvaluateConfig, EvaluationOptions
from stablevm.evaluation.evaluate import CheckpointSource, evaluate, evaluate_checkpoint
from stablevm.evaluation.sample_report import metric_curves
from stablevm.evaluation.sources import StreamedSource
from stablevm.metrics import statistics
from stablevm.metrics.metric import FeatureSets
from stablevm.metrics.statistics import frechet_distance, moments_of
from stablevm.metrics.table import results_of
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate
from stablevm.support.errors import UserError
from tests.helpers.checkpoints import save_checkpoint, tiny_card
from tests.helpers.evaluations import COUNT, FAKE, REAL, save_images


def test_all_five_numbers_agree_with_torch_fidelity(options, home, capsys):
    """torch-fidelity runs once on the same weights and images, and takes the file of random weights for its own."""
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


def test_a_checkpoint_is_evaluated_without_a_file_in_between(options, home, tmp_path, monkeypatch):
    """The numbers are those of the file that generate writes, and no image is generated twice."""
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
    assert results["protocol"] == from_file["protocol"] and results["protocol"]["num_steps"] == 2
    pushed = ["push", str(checkpoint_folder), "me/net", "--evaluations", str(tmp_path / "x.json")]
    assert cli.main([*pushed, "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "README.md").read_text()
    assert f"| {results['inception']['frechet_distance']:.2f} | to the statistics of 9 reference images;" in page
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
    again = evaluate(dataclasses.replace(config, report=True, output=config.samples.with_name("again.json")))
    assert again["inception"] == first["inception"]


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
        evaluate(dataclasses.replace(options(), samples=fake, output=tmp_path / "other.json"))


def test_what_costs_nothing_more_is_reported(options, capsys):
    """The metrics themselves are tested in tests/metrics; this test checks that they are in the results."""
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
