"""Time outside the network: statistics of 50,000 x 2,048 features, compared with torch-fidelity and scipy.

python benchmarks/evaluation.py [--samples 50000] [--reference 10000] [--no-peers]
python benchmarks/evaluation.py --collapsed [--samples 4000]     # precision and recall of near copies alone
"""

import resource
import time
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
import tyro

from stablevm.metrics.neighbours import precision_recall
from stablevm.metrics.statistics import FeatureStatistics, frechet_distance, inception_score
from stablevm.support.machine import describe_machine

WIDTH, CLASSES = 2048, 1008


@dataclass(frozen=True)
class Sizes:
    """Numbers of synthetic features; with `peers`, torch-fidelity and scipy are measured too."""

    samples: int = 50_000
    reference: int = 10_000
    peers: bool = True
    collapsed: bool = False


def features(count, seed):
    """Positive and correlated features, with variances that decrease like those of Inception's pool features."""
    stream = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    spectrum = 2 * torch.arange(1, WIDTH + 1).float() ** -0.3
    rows = torch.empty(count, WIDTH)
    for block in rows.split(4096):
        block.copy_((torch.randn(block.shape, generator=stream) * spectrum) @ mix).add_(0.3).abs_()
    return rows


def timed(name, work, table, column):
    began = time.perf_counter()
    result = work()
    table.setdefault(name, {})[column] = (time.perf_counter() - began, result)
    print(f"{column}: {name}: {table[name][column][0]:.1f} s", flush=True)
    return result


def memory():
    """The peak memory of the process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def ours(samples, reference, logits, table):
    def fid():
        sets = [FeatureStatistics.from_features(each) for each in (samples, reference)]
        return frechet_distance(*sets)

    timed("FID", fid, table, "stablevm")
    timed("inception score", lambda: inception_score(logits)[0], table, "stablevm")


def torch_fidelity(samples, reference, logits, table):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    def fid():
        sets = [fid_features_to_statistics(each) for each in (samples, reference)]
        return fid_statistics_to_metric(*sets, verbose=False)["frechet_inception_distance"]

    def prc():
        # its faster method holds 50,000 x 50,000 distances twice, which takes 20 GB
        found = prc_features_to_metric(samples, reference, save_cpu_ram=True, verbose=False)
        return found["precision"], found["recall"]

    splits = max(1, len(logits) // 5000)
    column = "torch-fidelity"
    timed("FID", fid, table, column)
    timed(
        "inception score", lambda: isc_features_to_metric(logits, splits, False)["inception_score_mean"], table, column
    )
    timed("precision, recall", prc, table, column)


def scipy_root(samples, reference, table):
    """The matrix square root as in ADM's suite."""

    def fid():
        means = [each.numpy().mean(0) for each in (samples, reference)]
        covariances = [np.cov(each, rowvar=False) for each in (samples, reference)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        return float(np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))

    timed("FID", fid, table, "scipy")


def near_copies(kind, count, stream):
    """Samples whose distances can't be computed from norms and products in float32."""

    def noise(size):
        return size * torch.randn(count, WIDTH, generator=stream)

    rows, centres = torch.arange(count), torch.rand(count, WIDTH, generator=stream)
    return {
        "distinct": lambda: centres,
        "collapsed": lambda: centres[:1] + noise(1e-3),
        "ten modes": lambda: centres[rows % 10] + noise(1e-3),
        "copies of 20": lambda: centres[rows // 20] + noise(1e-4),
        "half of them collapsed": lambda: torch.where((rows % 2 == 0)[:, None], centres, centres[:1] + noise(1e-3)),
        "duplicates of ten": lambda: centres[rows % 10],
        "one float32 step apart": lambda: torch.where(noise(1) > 0, centres[:1].nextafter(torch.ones(1)), centres[:1]),
    }[kind]()


def collapsed(options):
    """Measure processor time, which other work on the machine hardly affects, for near copies and distinct rows."""
    for count in (256, 512, 1024, options.samples):
        plain = 0.0
        for kind in ("distinct", "collapsed", "ten modes", "copies of 20", "half of them collapsed",
                     "duplicates of ten", "one float32 step apart"):  # fmt: skip
            stream = torch.Generator().manual_seed(0)
            reference = torch.rand(500, WIDTH, generator=stream)
            samples = near_copies(kind, count, stream)
            began = time.process_time()
            found = precision_recall(reference, samples)
            seconds = time.process_time() - began
            plain = plain or seconds
            print(f"{count} {kind}: {seconds:.2f} s, {seconds / plain:.1f} times distinct; {found}", flush=True)


def main(options):
    print(describe_machine())
    if options.collapsed:
        collapsed(options)
        return
    samples, reference = features(options.samples, 1), features(options.reference, 2).mul_(1.05)
    table = {}
    before = memory()
    timed("precision, recall", lambda: precision_recall(reference, samples), table, "stablevm")
    print(f"memory: {before:.2f} GB with the features, at most {memory():.2f} GB")
    logits = 3 * torch.randn(options.samples, CLASSES, generator=torch.Generator().manual_seed(3))
    ours(samples, reference, logits, table)
    if options.peers:
        scipy_root(samples, reference, table)
        torch_fidelity(samples, reference, logits, table)
    for name, columns in table.items():
        print(
            f"{name}: "
            + "; ".join(f"{column} {seconds:.1f} s, {value}" for column, (seconds, value) in columns.items())
        )
    if options.peers:
        total = {column: sum(row[column][0] for row in table.values()) for column in ("stablevm", "torch-fidelity")}
        print(f"total: {total}, {total['torch-fidelity'] / total['stablevm']:.1f} times faster")


if __name__ == "__main__":
    main(tyro.cli(Sizes))
