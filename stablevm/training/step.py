"""One optimiser step, from a batch to noisy samples with targets, to a loss, and to updated weights."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from stablevm.data.dataset import PreparedDataset
from stablevm.data.loader import TrainingBatch
from stablevm.interpolant import get_interpolant
from stablevm.meanflow import MeanFlow
from stablevm.networks.encoders import Encoder
from stablevm.networks.joint_state import joined, parted
from stablevm.objective import Draw
from stablevm.support import rng
from stablevm.training.cls_tokens import ClsTokens
from stablevm.training.config import TrainConfig
from stablevm.training.guard import GuardedAdamW, spread
from stablevm.training.objectives import Objective, objective_streams
from stablevm.training.terms import Output, Samples, Share, Term, alignment_term, cls_token_term, contrastive_term
from stablevm.training.weights import whole

FINAL_SHARE = 0.05  # of the peak rate, at the end of a cosine schedule

# Terms of the loss beside the velocity's: from the options and their encoders to the term, or None without it.
TERMS: list[Callable[[TrainConfig, Sequence[Encoder]], Term | None]] = [
    alignment_term,
    contrastive_term,
    cls_token_term,
]


def make_terms(config: TrainConfig, encoders: Sequence[Encoder]) -> list[Term]:
    """The terms of the loss that the options request."""
    found = (make(config, encoders) for make in TERMS)
    return [term for term in found if term is not None]


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one process in one step: detached tensors, which stay on the device until they are read."""

    means: dict[str, Tensor]  # scalars, means over the process's samples
    t: Tensor  # (B,) times of the samples
    velocity_loss: Tensor  # (B,)
    effective_sample_size: Tensor  # (B,)


class PhaseClock:
    """Measures the seconds of each phase of the steps; a phase ends where the next begins, without gaps.

    On a GPU the ends are events in its queue, which are read only in `read`. So a phase lasts until the GPU has done
    its work, and work of the host, such as reading data, counts only as far as the GPU has to wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ends: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def end(self, phase: str) -> None:
        """Assign the time since the last end to `phase`."""
        self._ends.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """The seconds of each phase since the last reading, in order of appearance; waits for the GPU."""
        seconds: dict[str, float] = {}
        _, before = self._ends[0]
        for phase, now in self._ends[1:]:
            seconds[phase] = seconds.get(phase, 0.0) + _seconds(before, now)
            before = now
        del self._ends[:-1]
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(before: float | torch.cuda.Event, now: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event):
        assert isinstance(now, torch.cuda.Event)
        now.synchronize()
        return before.elapsed_time(now) / 1000
    assert isinstance(now, float)
    return now - before


class BatchDrawer:
    """Turns a loader's batch into a draw of the objective, independently of the number of processes.

    Times, noise and dropped labels of a sample depend on (seed, step, its position in the global batch). Every process
    inserts the fresh latents of all processes into its bank, in the same order, so that all banks are equal.
    """

    def __init__(
        self,
        objective: Objective,
        dataset: PreparedDataset,
        accelerator: Accelerator,
        config: TrainConfig,
    ) -> None:
        self.objective, self.dataset, self.accelerator, self.config = objective, dataset, accelerator, config
        local = config.batch_size // accelerator.num_processes
        self.cls_tokens: ClsTokens | None = None  # of all rows, if the network has a class token
        self.positions = range(accelerator.process_index * local, (accelerator.process_index + 1) * local)

    def draw(self, batch: TrainingBatch, step: int) -> Draw:
        """Draw the samples to regress on in `step`, on the accelerator's device."""
        device, seed = self.accelerator.device, self.config.seed
        posterior_streams = rng.RowGenerators.for_keys(seed, "latent", step, positions=self.positions)
        streams = objective_streams(seed, step, self.positions)
        moments = rng.to_device(batch.moments, device)
        labels, ids = rng.to_device(batch.labels, device), rng.to_device(batch.rows, device)
        noise = rng.randn((len(labels), *self.dataset.latent.shape), posterior_streams, device)
        latents = self.dataset.latent.from_moments(moments, noise)
        if self.cls_tokens is not None:  # one longer state, like any other for the objective and its bank
            latents = joined(latents, rng.to_device(self.cls_tokens(batch.rows), device))
        if self.objective.bank is None:
            return self.objective.draw(latents, labels, streams, ids=ids)
        home = self.objective.bank.device
        if self.config.bank_is_fixed:
            slots = torch.full((self.config.batch_size,), self.objective.bank.discarded_slot, device=home)
        else:
            slots = self.objective.bank.insert(*(self._from_all(part).to(home) for part in (latents, labels, ids)))
        draw = self.objective.draw(
            latents.to(home),
            labels.to(home),
            streams,
            ids=ids.to(home),
            slots=slots[self.positions.start : self.positions.stop],
            pool_generator=rng.generator(seed, "pool", step),
        )
        return on_device(draw, device)

    def samples(self, batch: TrainingBatch, step: int) -> Samples:
        """A draw of the batch with the images of its anchors, if the loader was asked for images."""
        draw = self.draw(batch, step)
        images = None if batch.images is None else self.images(batch, draw)
        path, weighs = get_interpolant(self.config.path_type), self.config.weighs_velocities
        weights = path.velocity_weight(draw.t) if weighs else None
        found = Samples(draw, images, self.positions, self._total, self._from_all, weights=weights)
        return found if self.cls_tokens is None else self._parted(found)

    def _parted(self, samples: Samples) -> Samples:
        """The samples with the class tokens apart from the latents, except in the network's input."""
        draw, shape = samples.draw, self.dataset.latent.shape
        (x0, tokens), (target, cls_target) = parted(draw.x0, shape), parted(draw.target, shape)
        apart = replace(draw, x0=x0, target=target, noise=parted(draw.noise, shape)[0])
        return replace(samples, draw=apart, cls_tokens=tokens, cls_target=cls_target)

    def images(self, batch: TrainingBatch, draw: Draw) -> Tensor:
        """The images (B, 3, H, W) uint8 of the draw's anchors, on the device."""
        assert batch.images is not None and batch.image_rows is not None
        device = self.accelerator.device
        as_planned = (draw.ids == rng.to_device(batch.image_rows, device)).all()
        torch._assert_async(as_planned, "the anchors drawn from the bank are not those whose images were read")
        return rng.to_device(batch.images, device)

    def _total(self, value: Tensor) -> Tensor:
        found = self.accelerator.reduce(value, reduction="sum")
        assert isinstance(found, Tensor)
        return found

    def _from_all(self, part: Tensor) -> Tensor:
        gathered = self.accelerator.gather(part)
        assert isinstance(gathered, Tensor)
        return gathered


class StepRunner:
    """Forward, backward and update for one drawn batch, in micro-batches of equal size."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        accelerator: Accelerator,
        config: TrainConfig,
        terms: Sequence[Term],
        meanflow: MeanFlow | None = None,
    ) -> None:
        """model, optimizer: prepared by `accelerator`; the optimizer is a `GuardedAdamW`."""
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.adamw: GuardedAdamW = optimizer.optimizer
        self.config, self.terms, self.meanflow = config, terms, meanflow
        self.encoding = {term.name for term in terms if term.frozen()}
        self.projectors = _projectors(accelerator, model)

    def run(self, samples: Samples, step: int, clock: PhaseClock) -> StepMetrics:
        """Update the model, unless the gradient's norm is not finite in any process.

        step: the number of steps before this one. clock: measures the phases.
        """
        draw, terms = samples.draw, [term for term in self.terms if term.is_on(step)]
        for term in self.terms:
            if not term.is_on(step):
                term.release()
        sums: dict[str, Tensor] = {}
        errors: list[Tensor] = []
        begun = [term.begin(samples) for term in terms]
        parts = torch.arange(len(draw.t)).chunk(self.config.accumulation_steps)
        for number, rows in enumerate(parts, start=1):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            shares = [(term, begin(span)) for term, begin in zip(terms, begun, strict=True)]
            if any(term.name in self.encoding for term in terms):
                clock.end("encoder")
            with self._maybe_no_sync(synchronise=number == self.config.accumulation_steps):
                losses, error = self._losses(samples, span, shares)
                clock.end("forward")
                self.accelerator.backward(spread(losses["loss"]))
                clock.end("backward")
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
            errors.append(error.detach())
        norm = self._clip()
        self.adamw.skip = ~norm.isfinite()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.end("optimizer")
        return StepMetrics({**sums, "grad_norm": norm.detach()}, draw.t, torch.cat(errors), draw.ess)

    def _losses(
        self, samples: Samples, span: slice, shares: Sequence[tuple[Term, Share]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """This micro-batch's part of each loss, and the error of the velocity for each sample (b,).

        The parts are added over micro-batches and averaged over processes.
        """
        draw = samples.draw
        aligns = any(term.needs_tokens for term, _ in shares)
        output, target = self._forward(samples, span, aligns), draw.target[span]
        if self.meanflow is not None:
            with torch.compiler.set_stance("force_eager"):  # compiled blocks have no forward derivative
                target = self.meanflow.target(self.accelerator.unwrap_model(self.model), draw.part(span))
        error = samples.error(output.prediction, target, span)
        share = len(error) / len(draw.t)
        loss = velocity = error.mean() * share
        if self.meanflow is not None:
            loss = self.meanflow.loss(output.prediction, target).mean() * share
        values = {term.name: error.new_zeros(()) for term in self.terms}  # those that have stopped stay so
        for term, share_of in shares:
            values[term.name] = share_of(output) * self.accelerator.num_processes
            loss = loss + term.coefficient * values[term.name]
        if not aligns and any(term.needs_tokens for term in self.terms):
            # Processes wait for each other's gradients of all parameters, the projectors' too.
            loss = loss + 0 * torch.stack([unused.sum() for unused in output.tokens or self.projectors]).sum()
        return {"loss": loss, "velocity_loss": velocity, **values}, error

    def _forward(self, samples: Samples, span: slice, aligns: bool) -> Output:
        """The output for a micro-batch, with tokens if a term needs them, or if projectors can't be left out."""
        draw = samples.draw
        inputs = draw.x_t[span], draw.t[span], draw.labels[span]
        more = {} if draw.r is None else {"r": draw.r[span]}
        with self.accelerator.autocast():
            if aligns or (not self.projectors and any(term.needs_tokens for term in self.terms)):
                prediction, tokens = self.model(*inputs, **more, features=True)
            else:
                prediction, tokens = self.model(*inputs, **more), []
        if samples.cls_target is None:
            return Output(prediction, tokens)
        latents, cls_token = parted(prediction, draw.target.shape[1:])
        return Output(latents, tokens, cls_token)

    def _maybe_no_sync(self, synchronise: bool) -> AbstractContextManager[None]:
        """Keep gradients in their process for all micro-batches except the last."""
        return nullcontext() if synchronise else self.accelerator.no_sync(self.model)

    def _clip(self) -> Tensor:
        """Clip the gradient, and return its norm before; with --max-grad-norm 0 it is only measured."""
        limit = self.config.max_grad_norm or torch.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        assert isinstance(norm, Tensor)
        return whole(norm)


def _projectors(accelerator: Accelerator, model: nn.Module) -> list[nn.Parameter]:
    """The parameters of projectors, which need not run where no term needs tokens.

    None with FSDP, which gathers shards only in the network's forward pass, so that projectors must run there.
    """
    if accelerator.is_fsdp2:
        return []
    named = accelerator.unwrap_model(model).named_parameters()
    return [parameter for name, parameter in named if name.startswith("projectors.") and parameter.requires_grad]


def on_device(draw: Draw, device: torch.device) -> Draw:
    """The draw with its tensors on `device`, except those of the host."""
    names = [field.name for field in fields(draw) if not field.name.startswith("host_")]
    values = {name: value for name in names if (value := getattr(draw, name)) is not None}
    return replace(draw, **{name: rng.to_device(value, device) for name, value in values.items()})


def rate_at(config: TrainConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step`, counted from 0, in a run of `total_steps`."""
    warmup = config.lr_warmup_steps
    rate = config.learning_rate * min(1.0, (step + 1) / warmup if warmup else 1.0)
    if config.lr_schedule == "constant":
        return rate
    progress = min(1.0, max(0, step - warmup) / max(1, total_steps - warmup))
    return rate * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))
