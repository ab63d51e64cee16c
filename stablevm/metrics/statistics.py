"""Two sets of features compared by their first two moments, and the Inception score.

Features are (n, width), one row per image, of any floating type, and finite. Nothing here knows which extractor made
them: the caller names it beside each number.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stablevm.support.errors import UserError

SCORE_CHUNK = 5000  # images whose mean prediction the Inception score compares with (ADM's evaluation script)
BLOCK_ROWS = 4096  # rows that are widened to float64 at once: 64 MiB where features are 2,048 wide
# A covariance whose smallest pivot is below this share of its largest takes the careful way to a square root.
WELL_CONDITIONED = 1e-10
COVARIANCE_ROUNDING = 1e-6  # of a stored covariance's norm: its asymmetry and its negative eigenvalues
# The quick way is left where rounding could move the distance by more than this share of the traces.
QUICK_ERROR = 1e-9


@dataclass(frozen=True)
class Moments:
    """Mean (width,) and covariance (width, width), float64; and what the Fréchet distance needs of the covariance."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def trace(self) -> float:
        return float(self.covariance.trace())

    @cached_property
    def factor(self) -> Tensor:
        """F (width, rank) with F F^T = covariance: Cholesky's, or the eigenvectors times the roots of their values."""
        triangle, failed = torch.linalg.cholesky_ex(self.covariance)
        pivots = triangle.diagonal().square()
        if not failed and float(pivots.min()) > WELL_CONDITIONED * float(pivots.max()):
            return triangle
        values, vectors = torch.linalg.eigh(self.covariance)
        noise = len(values) * torch.finfo(values.dtype).eps * values.abs().max()  # what rounding makes of a zero
        kept = values > noise
        return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class FewRows:
    """The moments of fewer rows than features: the rows about their mean are a factor of the covariance already."""

    mean: Tensor
    factor: Tensor  # (width, n)

    @cached_property
    def trace(self) -> float:
        return float(self.factor.square().sum())


AnyMoments = Moments | FewRows


def check_covariance(covariance: Tensor, where: str) -> Tensor:
    """The finite matrix (width, width), exactly symmetric; UserError unless it is a covariance to float32's rounding.

    Others store their statistics in float32 too, which leaves eigenvalues below zero by this much.
    """
    size = float(covariance.norm())
    if float((covariance - covariance.T).abs().max()) > COVARIANCE_ROUNDING * size:
        raise UserError(f"{where} is not symmetric, so it is no covariance; make it again")
    symmetric = (covariance + covariance.T) / 2
    shifted = symmetric.clone()
    shifted.diagonal().add_(COVARIANCE_ROUNDING * size)
    # a matrix has Cholesky's factor if and only if it is positive definite
    if size and int(torch.linalg.cholesky_ex(shifted).info):
        raise UserError(f"{where} has negative eigenvalues, so it is no covariance; make it again")
    return symmetric


def moments_of(features: Tensor) -> AnyMoments:
    """Mean and covariance of the rows (n, width); UserError for fewer than two, and for values that are not finite."""
    count, width = features.shape
    if not 2 <= count <= width:
        return FeatureStatistics.from_features(features).moments
    check_features(features)
    rows = features.detach().to("cpu", torch.float64)
    mean = rows.mean(0)
    return FewRows(mean, (rows - mean).T / (count - 1) ** 0.5)


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
        check_features(features)
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    def update(self, features: Tensor) -> None:
        """Add the rows of `features` (n, width); UserError for another width or values that are not finite."""
        check_features(features)
        if features.shape[1] != len(self.mean):
            raise UserError(f"features are {features.shape[1]} wide, the ones before were {len(self.mean)} wide")
        for block in features.detach().split(BLOCK_ROWS):
            rows = block.to("cpu", torch.float64)
            mean = rows.mean(0)
            centred = rows - mean
            self._join(len(rows), mean, self._scatter.addmm_(centred.T, centred))

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the rows that `other` was gathered from."""
        self._join(other.count, other.mean, self._scatter.add_(other._scatter))

    def _join(self, count: int, mean: Tensor, scatters: Tensor) -> None:
        """Take in `count` rows of this mean; `scatters` is the sum of their scatter and this one's."""
        if count == 0:
            return
        step, total = mean - self.mean, self.count + count
        self._scatter = scatters.addr_(step, step, alpha=self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(width, width) float64, positive semidefinite; UserError with fewer than two rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)

    @property
    def moments(self) -> Moments:
        return Moments(self.mean, self.covariance)


def frechet_distance(a: AnyMoments | FeatureStatistics, b: AnyMoments | FeatureStatistics) -> float:
    """`||mu1 - mu2||^2 + tr(S1 + S2 - 2 sqrt(S1 S2))` (Dowson and Landau, 1982; Heusel et al., 2017, equation 6).

    With any factors `S = F F^T`, `tr sqrt(S1 S2)` is the sum of the singular values of `F1^T F2`. That needs no
    square root of a matrix that is not symmetric, is finite for singular covariances (fewer samples than features),
    so that nothing has to be added to a diagonal, and has no imaginary part that would have to be dropped. Not below
    0; equal statistics give 0 to rounding.
    """
    if len(a.mean) != len(b.mean):
        raise UserError(f"features are {len(a.mean)} and {len(b.mean)} wide: take both from the same extractor")
    first, second = (each.moments if isinstance(each, FeatureStatistics) else each for each in (a, b))
    trace = first.trace + second.trace
    cross = _sum_of_singular_values(first.factor.T @ second.factor, tolerance=QUICK_ERROR * trace)
    distance = float((first.mean - second.mean).square().sum()) + trace - 2 * cross
    return max(distance, 0.0)


def _sum_of_singular_values(matrix: Tensor, tolerance: float) -> float:
    """The roots of the eigenvalues of M^T M, if rounding can't move their sum by `tolerance`; else by an SVD.

    Squaring costs half the digits of the small singular values: an eigenvalue that is off by delta has a root that is
    off by at most delta / root, and by at most sqrt(delta).
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
    """Mean over consecutive chunks of exp(mean KL(p(y|x) || p(y))), and each chunk's (Salimans et al., 2016).

    `logits` (n, classes) are in the order of the file, which is not shuffled: p(y) is the mean over a chunk, so a file
    sorted by class gets a wrong, low score. A last chunk may be shorter, which moves the score: that is warned of, with
    the score of the whole chunks. Computed in float64.
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
    """What to say where the last of several chunks of `count` images is shorter than the others, else None."""
    if len(scores) < 2 or count % chunk == 0:
        return None
    with_it, without = sum(scores) / len(scores), sum(scores[:-1]) / (len(scores) - 1)
    return (
        f"the last chunk of the inception score has {count % chunk:,} images of {chunk:,}, which moves it: "
        f"{with_it:.6g} over all chunks, {without:.6g} over the whole ones; give a multiple of {chunk:,} images"
    )


def check_features(features: Tensor) -> None:
    """UserError unless features are (n, width) and finite."""
    if features.ndim != 2:
        raise UserError(f"features must be (n, width), got shape {tuple(features.shape)}")
    broken = sum(int((~block.isfinite()).any(1).sum()) for block in features.split(BLOCK_ROWS))
    if broken:
        raise UserError(f"{broken} of {len(features)} rows of features hold NaN or infinity; check the images")
