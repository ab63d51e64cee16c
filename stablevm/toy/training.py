"""Training the small network with the targets of one method, and comparing it with the exact field."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from stablevm.data.workers import Calls
from stablevm.interpolant import LINEAR
from stablevm.objective import Draw, FlowMatching, ObjectiveSettings, StableTargetField, squared_error
from stablevm.support import rng
from stablevm.support.bars import progress_bar
from stablevm.support.threads import torch_threads
from stablevm.toy.config import Method, ToyConfig
from stablevm.toy.mixture import GaussianMixture, published_mixture
from stablevm.toy.network import ToyNetwork, make_network
from stablevm.training.tracker import Trackers
from stablevm.training.weights import MovingAverage

BLOCK = 2048  # references drawn from one generator, so that any part of a set can be drawn again
SETTINGS = ObjectiveSettings(path=LINEAR)
# Up to this many products of an update (batch x references x dimensions), a process of its own for draws is worth more
# than threads. It draws several updates at once, because each transfer takes a tenth of a millisecond.
FEW_PRODUCTS, UPDATES_AT_ONCE = 2**24, 16
EVALUATED_AT_ONCE = 5_000  # points, whose hidden values fit into a cache


def mixture_of(config: ToyConfig, seed: int, dimension: int | None = None) -> GaussianMixture:
    """The mixture for a seed, the same for all methods, whatever was run before."""
    size = dimension or config.dimension
    return published_mixture(config.components, size, rng.generator(seed, "mixture", size))


def to_field(config: ToyConfig, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Convert a velocity to the field that is learnt: itself, or sigma times the score."""
    if config.vector_field == "velocity":
        return velocity
    return -LINEAR.convert(velocity, x_t, t, "velocity", "noise")


@dataclass(frozen=True)
class EvaluationPoints:
    """Points x_t at all times of evaluation with the exact field there, as one batch of (times x samples) rows."""

    x_t: Tensor
    t: Tensor
    exact: Tensor
    times: tuple[float, ...]

    @classmethod
    def of(cls, config: ToyConfig, mixture: GaussianMixture, seed: int) -> "EvaluationPoints":
        points, exact = [], []
        for time_ in config.eval_times:
            generator = rng.generator(seed, "evaluation", f"{time_:.6f}")
            x0 = mixture.sample(config.eval_samples, generator)
            noise = torch.randn(x0.shape, generator=generator)
            t = torch.tensor(time_)
            x_t = LINEAR.interpolate(x0, noise, t)
            points.append(x_t)
            velocity = mixture.field(LINEAR, x_t, time_)
            exact.append(to_field(config, velocity, x_t.double(), t.double()).float())
        t = torch.tensor(config.eval_times).repeat_interleave(config.eval_samples)
        return cls(torch.cat(points), t, torch.cat(exact), config.eval_times)

    @torch.no_grad()
    def divergence(self, network: nn.Module) -> list[float]:
        """The Fisher divergence E |predicted - exact|^2 at each time."""
        parts = zip(*(part.split(EVALUATED_AT_ONCE) for part in (self.x_t, self.t, self.exact)), strict=True)
        errors = torch.cat([(network(x_t, t) - exact).square().sum(1) for x_t, t, exact in parts])
        return errors.reshape(len(self.times), -1).double().mean(1).tolist()


class Draws:
    """The training batches of one method, an endless iterator that depends only on the seed."""

    def __init__(self, method: Method, config: ToyConfig, mixture: GaussianMixture, seed: int) -> None:
        self.method, self.config, self.mixture, self.seed = method, config, mixture, seed
        self.generator = rng.generator(seed, "training", method.removesuffix("_efficient"))
        self.update = 0

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        draw = self._drawn()
        self.update += 1
        return draw

    def batches(self, updates: int) -> list[Tensor]:
        """The next batches: x_t and target (updates, B, d), and between them t (updates, B)."""
        draws = [next(self) for _ in range(updates)]
        return [torch.stack(parts) for parts in zip(*((draw.x_t, draw.t, draw.target) for draw in draws), strict=True)]

    def _drawn(self) -> Draw:
        config = self.config
        if self.method == "cfm":
            x0 = self.mixture.sample(config.batch_size, self.generator)
            return FlowMatching(SETTINGS).draw(x0, torch.zeros(len(x0), dtype=torch.int64), self.generator)
        field = StableTargetField(SETTINGS)
        if self.method == "stf":
            chosen = torch.arange(config.batch_size)  # each of the first samples perturbs itself
        else:
            chosen = torch.randint(config.references, (config.batch_size,), generator=self.generator)
        if self.method == "stable_vm_efficient":
            return field.draw_over_blocks(self._pick(chosen), self._blocks(chosen), self.generator)
        blocks = [self._block(number) for number in range(self._num_blocks)]
        references = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return field.draw(references, None, self.generator, anchors=chosen)

    @property
    def _num_blocks(self) -> int:
        return -(-self.config.references // BLOCK)

    def _block(self, number: int) -> Tensor:
        """The references of this update from number * BLOCK on."""
        count = min(BLOCK, self.config.references - number * BLOCK)
        return self.mixture.sample(count, rng.generator(self.seed, "references", self.update, number))

    def _pick(self, chosen: Tensor) -> Tensor:
        """The chosen references, one block at a time."""
        anchors = torch.empty(len(chosen), self.mixture.dimension)
        for number in (chosen // BLOCK).unique().tolist():
            rows = chosen // BLOCK == number
            anchors[rows] = self._block(number)[chosen[rows] % BLOCK]
        return anchors

    def _blocks(self, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self._num_blocks):
            yield self._block(number), chosen - number * BLOCK


def training_batches(
    method: Method, config: ToyConfig, mixture: GaussianMixture, seed: int
) -> Iterator[Sequence[Tensor]]:
    """The batches (x_t, t, target) of all updates, drawn in another process meanwhile if there is a core for it.

    They do not depend on the network, so the numbers are the same.
    """
    draws = Draws(method, config, mixture, seed)
    sizes = [min(UPDATES_AT_ONCE, config.updates - start) for start in range(0, config.updates, UPDATES_AT_ONCE)]
    few = config.batch_size * config.references * config.dimension <= FEW_PRODUCTS
    workers = 1 if few and torch.get_num_threads() > 1 else 0
    for several in Calls(draws.batches, sizes, workers, task="draws batches", without="set OMP_NUM_THREADS=1"):
        yield from zip(*several, strict=True)


def _as_one_vector(network: nn.Module) -> nn.ParameterList:
    """All weights of a network as one vector, whose parts its parameters are from now on.

    For one tensor, clipping, Adam and the moving average take a third of the time that they take for 28 small ones.
    """
    vector = parameters_to_vector(network.parameters()).detach()
    vector_to_parameters(vector, network.parameters())
    return nn.ParameterList([vector])


def train_method(
    method: Method, config: ToyConfig, seed: int, trackers: Trackers
) -> tuple[list[dict[str, Any]], ToyNetwork, dict[str, float]]:
    """Train one method: rows {"update", "divergence" (one value per time)}, the averaged network, and the seconds of
    each part.
    """
    mixture = mixture_of(config, seed)
    points = EvaluationPoints.of(config, mixture, seed)
    network, averaged = (make_network(config, rng.generator(seed, "network")) for _ in range(2))
    parameters = list(network.parameters())
    weights = _as_one_vector(network)
    average = MovingAverage(weights, config.ema_decay, warm_up=config.ema_warmup)
    vector_to_parameters(next(average.model.parameters()), averaged.parameters())
    dropped = rng.generator(seed, "dropout")
    reduction = config.dimension if config.loss_reduction == "sum" else 1  # squared_error is a mean over dimensions
    optimizer = torch.optim.Adam(weights, lr=config.learning_rate, fused=True)
    clock = {"waiting for draws": 0.0, "network": 0.0, "evaluation": 0.0}
    rows: list[dict[str, Any]] = []

    def evaluate(update: int, loss: float | None) -> None:
        start = time.perf_counter()
        divergence = points.divergence(averaged)
        rows.append({"update": update, "divergence": divergence})
        named = {f"divergence/t={t:g}": value for t, value in zip(config.eval_times, divergence, strict=True)}
        trackers.log(update, named if loss is None else {"loss": loss, **named})
        clock["evaluation"] += time.perf_counter() - start

    evaluate(0, None)
    drawn = training_batches(method, config, mixture, seed)
    for update in progress_bar(range(1, config.updates + 1), desc=f"{method}, seed {seed}", unit="update"):
        start = time.perf_counter()
        x_t, t, target = next(drawn)
        ready = time.perf_counter()
        with torch_threads(1):  # of a network this small, operations are faster on one thread
            predicted = network(x_t, t, dropped)
            loss = reduction * squared_error(predicted, to_field(config, target, x_t, t)).mean()
            weights[0].grad = parameters_to_vector(torch.autograd.grad(loss, parameters))
            clip_grad_norm_(weights, config.max_grad_norm)
            optimizer.step()
            average.update(weights, update - 1)
        clock["waiting for draws"] += ready - start
        clock["network"] += time.perf_counter() - ready
        if update % config.eval_every == 0 or update == config.updates:
            evaluate(update, loss.item())
    return rows, averaged, clock
