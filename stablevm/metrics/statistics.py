"""Means and covariances of features, the Fréchet distance between them, and the Inception score.

Features are (n, width), one row per image, of any floating-point type, and finite. Nothing here depends on the network
that made them; the caller names it beside each number.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stablevm.support.errors import UserError

SCORE_CHUNK = 5000  # images over which the Inception score takes p(y), as in ADM's evaluation script
BLOCK_ROWS = 4096  # rows widened to float64 at once: 64 MiB where features are 2,048 wide
# Below this ratio of its smallest to its largest pivot, a covariance is factorised by eigenvectors, not by Cholesky.
WELL_CONDITIONED = 1e-10
COVARIANCE_ROUNDING = 1e-6  # tolerated asymmetry and negative eigenvalues of a stored covariance, relative to its norm
# Singular values come from eigenvalues unless rounding could change the distance by more than this share of the traces.
QUICK_ERROR = 1e-9


@dataclass(frozen=True)
class Moments:
    """Mean (width,) and covariance (width, width) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def trace(self) -> float:
        return float(self.covariance.trace())

    @cached_property
    def factor(self) -> Tensor:
        """F (width, rank) with F F^T = covariance: the Cholesky factor, or eigenvectors times roots of eigenvalues."""
        triangle, failed = torch.linalg.cholesky_ex(self.covariance)
        pivots = triangle.diagonal().square()
        if not failed and float(pivots.min()) > WELL_CONDITIONED * float(pivots.max()):
            return triangle
        values, vectors = torch.linalg.eigh(self.covariance)
        noise = len(values) * torch.finfo(values.dtype).eps * values.abs().max()  # a zero eigenvalue after rounding
        kept = values > noise
        return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class FewRows:
    """Moments of fewer rows than features, where the centred rows themselves are a factor of the covariance."""

    mean: Tensor
    factor: Tensor  # (width, n)

    @cached_property
    def trace(self) -> float:
        return float(self.factor.square().sum())


AnyMoments = Moments | FewRows


def check_covariance(covariance: Tensor, where: str) -> Tensor:
    """The finite matrix (width, width) made exactly symmetric; UserError unless it is a covariance up to rounding.

    Other programs may store statistics in float32, which leaves small negative eigenvalues.
    """
    size = float(covariance.norm())
    if float((covariance - covariance.T).abs().max()) > COVARIANCE_ROUNDING * size:
        raise UserError(f"{where} is not symmetric, so it is not a covariance; make it again")
    symmetric = (covariance + covariance.T) / 2
    shifted = symmetric.clone()
    shifted.diagonal().add_(COVARIANCE_ROUNDING * size)
    # a symmetric matrix has a Cholesky factor if and only if it is positive definite
    if size and int(torch.linalg.cholesky_ex(shifted).info):
        raise UserError(f"{where} has negative eigenvalues, so it is not a covariance; make it again")
    return symmetric


def moments_of(features: Tensor) -> AnyMoments:
    """The mean and covariance of rows (n, width); UserError for fewer than two rows or values that are not finite."""
    check_rank(features)
    count, width = features.shape
    if not 2 <= count <= width:
        return FeatureStatistics.from_features(features).moments
    check_features(features)
    rows = features.detach().to("cpu", torch.float64)
    mean = rows.mean(0)
    return FewRows(mean, (rows - mean).T / (count - 1) ** 0.5)


class FeatureStatistics:
    """Mean and covariance (divisor n - 1) of features in float64, accumulated over any number of updates.

    Updates are merged as by Chan, Golub and LeVeque (1983), which keeps the digits that a running sum of squares loses
    where the mean is large compared with the deviation.
    """

    def __init__(self, width: int) -> None:
        """Start with no rows; width: the number of features."""
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def from_features(cls, features: Tensor) -> "FeatureStatistics":
        """The statistics of features (n, width); UserError if they have another rank or are not finite."""
        check_rank(features)
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    def update(self, features: Tensor) -> None:
        """Add the rows of features (n, width); UserError for another width or values that are not finite."""
        check_features(features)
        if features.shape[1] != len(self.mean):
            raise UserError(f"features are {features.shape[1]} wide, the ones before were {len(self.mean)} wide")
        for block in features.detach().split(BLOCK_ROWS):
            rows = block.to("cpu", torch.float64)
            mean = rows.mean(0)
            centred = rows - mean
            self._join(len(rows), mean, self._scatter.addmm_(centred.T, centred))

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the rows that `other` holds the statistics of."""
        self._join(other.count, other.mean, self._scatter.add_(other._scatter))

    def _join(self, count: int, mean: Tensor, scatters: Tensor) -> None:
        """Merge `count` rows with this mean; `scatters` is the sum of their scatter matrix and this one's."""
        if count == 0:
            return
        step, total = mean - self.mean, self.count + count
        self._scatter = scatters.addr_(step, step, alpha=self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The covariance (width, width), float64, positive semidefinite; UserError with fewer than two rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)

    @property
    def moments(self) -> Moments:
        """The mean and the covariance; UserError with fewer than two rows."""
        return Moments(self.mean, self.covariance)


def frechet_distance(a: AnyMoments | FeatureStatistics, b: AnyMoments | FeatureStatistics) -> float:
    """The Fréchet distance between the Gaussians with the means and covariances of `a` and `b`, squared as in FID:

        ||mu1 - mu2||^2 + tr(S1 + S2 - 2 sqrt(S1 S2))    (Dowson and Landau, 1982; Heusel et al., 2017, equation 6)

    For any factors S = F F^T, tr sqrt(S1 S2) is the sum of the singular values of F1^T F2. Computed this way it needs
    no square root of a matrix that is not symmetric, adds nothing to the diagonal of singular covariances (fewer
    samples than features), and has no imaginary part to drop. The result is 0 or more, and 0 up to rounding for equal
    statistics. UserError for different numbers of features.
    """
    check_widths(len(a.mean), len(b.mean))
    first, second = (each.moments if isinstance(each, FeatureStatistics) else each for each in (a, b))
    trace = first.trace + second.trace
    cross = _sum_of_singular_values(first.factor.T @ second.factor, tolerance=QUICK_ERROR * trace)
    distance = float((first.mean - second.mean).square().sum()) + trace - 2 * cross
    return max(distance, 0.0)


def _sum_of_singular_values(matrix: Tensor, tolerance: float) -> float:
    """The sum of the singular values: from eigenvalues of M^T M if that is accurate to `tolerance`, else by an SVD.

    Squaring loses half the digits of small singular values: if an eigenvalue has an error of delta, the error of its
    root is at most delta / root and at most sqrt(delta).
    """
    if 0 in matrix.shape:
        return 0.0
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    roots = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    delta = 4 * torch.finfo(roots.dtype).eps * roots.max().square()
    if float(torch.minimum(delta / roots, delta.sqrt()).sum()) <= tolerance:
        return float(roots.sum())
    return float(torch.linalg.svdvals(matrix).sum())


def inception_score(logits: Tensor, chunk: int = SCORE_CHUNK) -> tuple[float, list[float]]:
    """The Inception score (Salimans et al., 2016) of logits (n, classes), averaged over chunks, and that of each chunk.

    The score of a chunk is exp(mean KL(p(y|x) || p(y))), where p(y) is the mean over the chunk. Chunks are consecutive
    and not shuffled, so images sorted by class get a wrong, low score. A shorter last chunk changes the score; then a
    warning gives the score without it. Computed in float64.
    """
    scores = chunk_scores(logits, chunk)
    warning = short_chunk_warning(scores, len(logits), chunk)
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return sum(scores) / len(scores), scores


def chunk_scores(logits: Tensor, chunk: int = SCORE_CHUNK) -> list[float]:
    """The Inception score of each chunk of logits (n, classes)."""
    check_features(logits)
    if len(logits) == 0:
        raise UserError("the Inception score needs at least 1 image, got 0")
    scores = []
    for part in logits.split(chunk):
        log_p = part.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log().to(part.device)
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    return scores


def short_chunk_warning(scores: Sequence[float], count: int, chunk: int = SCORE_CHUNK) -> str | None:
    """The warning for a last chunk that is shorter than the others; None if the chunks of `count` images are equal."""
    if len(scores) < 2 or count % chunk == 0:
        return None
    with_it, without = sum(scores) / len(scores), sum(scores[:-1]) / (len(scores) - 1)
    return (
        f"the last chunk of the inception score has {count % chunk:,} of {chunk:,} images, which changes the score: "
        f"{with_it:.6g} over all chunks, {without:.6g} over the full ones; give a multiple of {chunk:,} images"
    )


def check_features(features: Tensor) -> None:
    """Raise UserError unless features are (n, width) and finite."""
    check_rank(features)
    broken = sum(int((~block.isfinite()).any(1).sum()) for block in features.split(BLOCK_ROWS))
    if broken:
        raise UserError(f"{broken} of {len(features)} rows of features hold NaN or infinity; check the images")


def check_rank(features: Tensor) -> None:
    """Raise UserError unless features are (n, width)."""
    if features.ndim != 2:
        raise UserError(f"features must be (n, width), got shape {tuple(features.shape)}")


def check_widths(first: int, second: int) -> None:
    """Raise UserError for two sets of features of different widths."""
    if first != second:
        raise UserError(f"features are {first} and {second} wide: take both from the same extractor")


def check_sets(*sets: Tensor) -> None:
    """Raise UserError unless all sets of features are (n, width), finite and equally wide."""
    for features in sets:
        check_features(features)
        check_widths(sets[0].shape[1], features.shape[1])


def check_count(name: str, count: int, least: int, reason: str) -> None:
    """Raise UserError for fewer images than a metric needs; reason: the metric with its verb, "a covariance needs"."""
    if count < least:
        raise UserError(f"{name}: {count} images, but {reason} at least {least}")
