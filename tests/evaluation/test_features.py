"""Features: cached, shared by processes, computed again when damaged, swept when old."""

import os

import torch

from stablevm.evaluation import features
from stablevm.evaluation.evaluate import evaluate
from stablevm.evaluation.extractors import InceptionExtractor
from stablevm.evaluation.features import FeatureCache, extract
from stablevm.evaluation.sources import ArraySource
from stablevm.support.processes import Process
from tests.helpers.evaluations import COUNT, FAKE, REAL


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
