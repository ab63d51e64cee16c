"""One optimiser step: from a batch of the loader to updated weights and a few numbers that stay on the device."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from stablevm.alignment import AlignmentSchedule, alignment_loss, normalize_over_space, weighted_alignment
from stablevm.data.dataset import PreparedDataset
from stablevm.data.loader import TrainingBatch
from stablevm.networks.encoders import Encoder
from stablevm.objective import Draw, FlowMatching, StableVM, squared_error
from stablevm.support import rng
from stablevm.support.errors import UserError
from stablevm.training.anchors import objective_streams
from stablevm.training.clock import PhaseClock
from stablevm.training.config import TrainConfig
from stablevm.training.guard import GuardedAdamW, spread
from stablevm.training.state import whole


@dataclass(frozen=True)
class Alignment:
    """What VA-REPA adds to a step."""

    encoders: list[Encoder]
    schedule: AlignmentSchedule
    coefficient: float
    irepa_gamma: float | None  # None without iREPA

    def __post_init__(self) -> None:
        if self.irepa_gamma is not None and any(encoder.grid_size == 1 for encoder in self.encoders):
            raise UserError(
                "--use-irepa: the network has one token per image, and iREPA normalises features over tokens; "
                "choose a --model of smaller patches or leave it out"
            )

    def features(self, encoder: Encoder, images: Tensor) -> Tensor:
        """Tokens (B, T, D) that the projector of this encoder aims at."""
        tokens = encoder(images)
        return tokens if self.irepa_gamma is None else normalize_over_space(tokens, self.irepa_gamma)


@dataclass(frozen=True)
class StepMetrics:
    """What one process saw in one step: detached tensors that stay on the device until someone reads them."""

    means: dict[str, Tensor]  # scalars, means over the process's samples
    t: Tensor  # (B,) times of the samples
    velocity_loss: Tensor  # (B,)
    effective_sample_size: Tensor  # (B,)


@dataclass(frozen=True)
class _Aim:
    """What the tokens of one micro-batch are aligned with."""

    rows: Tensor  # of the n samples whose weight is not 0; encoders see no other
    weights: Tensor  # (n,)
    total: Tensor  # sum of the weights over all micro-batches and processes
    features: list[Tensor]  # (n, T, D) for each encoder

    @classmethod
    def at(cls, images: Tensor, weights: Tensor, total: Tensor, alignment: Alignment) -> "_Aim":
        """images (b, 3, H, W) on the device; weights (b,) on the host, so that nobody waits to learn which are 0."""
        active = weights.nonzero().squeeze(1)
        rows = rng.to_device(active, images.device)
        seen = images[rows]
        return cls(
            rows=rows,
            weights=rng.to_device(weights[active], images.device),
            total=total,
            features=[alignment.features(encoder, seen) for encoder in alignment.encoders] if len(active) else [],
        )

    def loss(self, projected: list[Tensor]) -> Tensor:
        """The alignment term of the projected tokens (b, T, D) of each encoder, averaged over encoders."""
        actives = [tokens[self.rows] for tokens in projected]
        features = self.features or [active.detach() for active in actives]  # no row: a 0 attached to the graph
        losses = [alignment_loss(*pair) for pair in zip(actives, features, strict=True)]
        return torch.stack([weighted_alignment(loss, self.weights, self.total) for loss in losses]).mean()


class BatchDrawer:
    """Turns a loader's batch into a draw of the objective, the same whatever the number of processes.

    Times, noise and labels of a sample are functions of (seed, step, its position in the global batch); all processes
    put all fresh latents into their banks, in the same order, so that the banks are the same everywhere.
    """

    def __init__(
        self,
        objective: FlowMatching | StableVM,
        dataset: PreparedDataset,
        accelerator: Accelerator,
        config: TrainConfig,
    ) -> None:
        self.objective, self.dataset, self.accelerator, self.config = objective, dataset, accelerator, config
        local = config.batch_size // accelerator.num_processes
        self.positions = range(accelerator.process_index * local, (accelerator.process_index + 1) * local)

    def draw(self, batch: TrainingBatch, step: int) -> Draw:
        """Samples to regress on in `step`, on the accelerator's device."""
        device, seed = self.accelerator.device, self.config.seed
        posterior_streams = rng.RowGenerators.for_keys(seed, "latent", step, positions=self.positions)
        streams = objective_streams(seed, step, self.positions)
        moments = rng.to_device(batch.moments, device)
        labels, ids = rng.to_device(batch.labels, device), rng.to_device(batch.rows, device)
        noise = rng.randn((len(labels), *self.dataset.latent.shape), posterior_streams, device)
        latents = self.dataset.latent.from_moments(moments, noise)
        if isinstance(self.objective, FlowMatching):
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
            pool_stream=rng.generator(seed, "pool", step),
        )
        return on_device(draw, device)

    def images(self, batch: TrainingBatch, draw: Draw) -> Tensor:
        """The images (B, 3, H, W) uint8 of the draw's anchors, on the device."""
        assert batch.images is not None and batch.image_rows is not None
        device = self.accelerator.device
        as_planned = (draw.ids == rng.to_device(batch.image_rows, device)).all()
        torch._assert_async(as_planned, "the bank drew other anchors than those whose images were read")
        return rng.to_device(batch.images, device)

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
        alignment: Alignment | None,
    ) -> None:
        """model, optimizer: as `accelerator` prepared them, the latter a `GuardedAdamW`."""
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.adamw: GuardedAdamW = optimizer.optimizer
        self.config, self.alignment = config, alignment

    def run(self, draw: Draw, images: Tensor | None, clock: PhaseClock) -> StepMetrics:
        """Update the model, unless the gradient's norm is not finite, on any process.

        images: of the draw's anchors, where something is aligned; clock: told of the phases.
        """
        sums: dict[str, Tensor] = {}
        errors: list[Tensor] = []
        for number, (span, aim) in enumerate(self._parts(draw, images), start=1):
            if aim is not None:
                clock.end("encoder")
            with self._maybe_no_sync(synchronise=number == self.config.accumulation_steps):
                losses, error = self._losses(draw, aim, span)
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

    def _parts(self, draw: Draw, images: Tensor | None) -> Iterator[tuple[slice, _Aim | None]]:
        """The micro-batches, each with what its tokens are aligned with, encoded when its turn comes."""
        alignment = self.alignment
        if alignment is not None:  # weights are functions of t, whose zeros are looked for on the host
            weights = alignment.schedule(draw.host_t)
            total = self.accelerator.reduce(rng.to_device(weights.sum(), draw.t.device), reduction="sum")
        for rows in torch.arange(len(draw.t)).chunk(self.config.accumulation_steps):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            if alignment is None:
                yield span, None
            else:
                assert images is not None and isinstance(total, Tensor)
                yield span, _Aim.at(images[span], weights[span], total, alignment)

    def _losses(self, draw: Draw, aim: _Aim | None, span: slice) -> tuple[dict[str, Tensor], Tensor]:
        """This micro-batch's part of each loss, and the velocity's error of each sample (b,).

        Over micro-batches the parts add up, over processes they average.
        """
        inputs = draw.x_t[span], draw.t[span], draw.labels[span]
        with self.accelerator.autocast():
            if aim is None:
                prediction = self.model(*inputs)
            else:
                prediction, projected = self.model(*inputs, features=True)
        error = squared_error(prediction, draw.target[span])
        velocity = error.mean() * (len(error) / len(draw.t))
        if aim is None:
            return {"loss": velocity, "velocity_loss": velocity}, error
        assert self.alignment is not None
        aligned = aim.loss(projected) * self.accelerator.num_processes
        loss = velocity + self.alignment.coefficient * aligned
        return {"loss": loss, "velocity_loss": velocity, "alignment_loss": aligned}, error

    def _maybe_no_sync(self, synchronise: bool) -> AbstractContextManager[None]:
        """Gradients of all but the last micro-batch stay on their process."""
        return nullcontext() if synchronise else self.accelerator.no_sync(self.model)

    def _clip(self) -> Tensor:
        """The gradient's norm before clipping; with --max-grad-norm 0 it is measured only."""
        limit = self.config.max_grad_norm or torch.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        assert isinstance(norm, Tensor)
        return whole(norm)


def on_device(draw: Draw, device: torch.device) -> Draw:
    names = [field.name for field in fields(draw) if field.name != "host_t"]
    return replace(draw, **{name: rng.to_device(getattr(draw, name), device) for name in names})
