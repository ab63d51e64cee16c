"""Two sets of features compared: Fréchet distance, precision and recall, coverage.

Features are (n, width), one row per image, of any floating type, and finite. Nothing here knows which extractor made
them: the caller names it beside each number.
"""

import torch
from torch import Tensor

from stablevm.errors import UserError

PRECISION_RECALL_K = 3  # Kynkäänniemi et al., 2019, "Improved precision and recall metric"
COVERAGE_K = 5  # Naeem et al., 2020, "Reliable fidelity and diversity metrics": equal sets then get 1 - 2^-5 = 0.97
BLOCK_ROWS = 4096  # rows of the distance matrix held at once: 160 MB against 10,000 columns of float32


class FeatureStatistics:
    """Mean and covariance (divisor n - 1) in float64, gathered over any number of updates.

    The merge of Chan, Golub and LeVeque (1983) keeps the digits that a running sum of squares would lose where the
    mean is large beside the deviation.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def from_features(cls, features: Tensor) -> "FeatureStatistics":
        _check_matrix(features)
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    def update(self, features: Tensor) -> None:
        """Add the rows of `features` (n, width); UserError for another width or values that are not finite."""
        _check_matrix(features)
        if features.shape[1] != len(self.mean):
            raise UserError(f"features are {features.shape[1]} wide, the ones before were {len(self.mean)} wide")
        if len(features) == 0:
            return
        rows = features.detach().to("cpu", torch.float64)
        mean = rows.mean(0)
        centred = rows - mean
        step = mean - self.mean
        total = self.count + len(rows)
        self._scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(rows) / total)
        self.mean = self.mean + step * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(width, width) float64, positive semidefinite; UserError with fewer than two rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """`||mu1 - mu2||^2 + tr(S1 + S2 - 2 sqrt(S1 S2))` (Dowson and Landau, 1982; Heusel et al., 2017, equation 6).

    `tr sqrt(S1 S2)` is the sum of the singular values of `S1^(1/2) S2^(1/2)`: the roots of the eigenvalues of
    `S1^(1/2) S2 S1^(1/2)`, without the loss of half the digits that squaring costs where a covariance is singular
    (fewer samples than features). Not below 0; equal statistics give 0 to rounding.
    """
    if len(a.mean) != len(b.mean):
        raise UserError(f"features are {len(a.mean)} and {len(b.mean)} wide: take both from the same extractor")
    S1, S2 = a.covariance, b.covariance
    cross = torch.linalg.svdvals(_symmetric_root(S1) @ _symmetric_root(S2)).sum()
    distance = (a.mean - b.mean).square().sum() + S1.trace() + S2.trace() - 2 * cross
    return max(float(distance), 0.0)


def _symmetric_root(covariance: Tensor) -> Tensor:
    """The positive semidefinite square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def precision_recall(reference: Tensor, samples: Tensor, k: int = PRECISION_RECALL_K) -> tuple[float, float]:
    """Share of samples inside the reference's manifold, and of the reference inside the samples' (both in [0, 1]).

    A set's manifold is the union of the closed balls around its points that reach the k-th nearest neighbour, itself
    excluded (Kynkäänniemi et al., 2019, equations 1 and 2). Distances are float32, from differences.
    """
    reference, samples = _comparable(reference, samples, k)
    return _share_inside(samples, reference, k), _share_inside(reference, samples, k)


def coverage(reference: Tensor, samples: Tensor, k: int = COVERAGE_K) -> float:
    """Share of the reference's k-nearest-neighbour balls that hold a sample (Naeem et al., 2020)."""
    reference, samples = _comparable(reference, samples, k)
    return float((nearest_distance(reference, samples) <= _radii(reference, k)).double().mean())


def nearest_distance(queries: Tensor, points: Tensor) -> Tensor:
    """Euclidean distance of each query (n, width) to the nearest of `points` (m, width): float32 (n,)."""
    return torch.cat([_distances(block, points).amin(1) for block in queries.split(BLOCK_ROWS)])


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest neighbour, itself excluded by position."""
    radii = []
    for start, block in zip(range(0, len(points), BLOCK_ROWS), points.split(BLOCK_ROWS), strict=True):
        distances = _distances(block, points)
        rows = torch.arange(len(block), device=points.device)
        distances[rows, start + rows] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _share_inside(queries: Tensor, points: Tensor, k: int) -> float:
    """Share of the queries inside the ball of at least one point."""
    radii = _radii(points, k)
    inside = [(_distances(block, points) <= radii).any(1) for block in queries.split(BLOCK_ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The faster |a|^2 + |b|^2 - 2ab cancels: equal rows would lie apart, and radii of near copies would be noise.
    return torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")


def _comparable(reference: Tensor, samples: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both sets on one device, checked: finite, equally wide, more than k rows each."""
    for name, features in (("reference", reference), ("samples", samples)):
        _check_matrix(features)
        if len(features) <= k:
            raise UserError(f"{name}: {len(features)} images, but {k} nearest neighbours need at least {k + 1}")
    if reference.shape[1] != samples.shape[1]:
        raise UserError(
            f"features are {reference.shape[1]} and {samples.shape[1]} wide: take both from the same extractor"
        )
    return reference.detach(), samples.detach().to(reference.device)


def _check_matrix(features: Tensor) -> None:
    if features.ndim != 2:
        raise UserError(f"features must be (n, width), got shape {tuple(features.shape)}")
    broken = int((~features.isfinite()).any(1).sum())
    if broken:
        raise UserError(f"{broken} of {len(features)} rows of features hold NaN or infinity; check the images")
