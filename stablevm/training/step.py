"""One optimiser step: from a batch of the loader to updated weights and a few numbers that stay on the device."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from stablevm import rng
from stablevm.alignment import alignment_loss, normalize_over_space, weighted_alignment
from stablevm.data.loader import TrainingBatch
from stablevm.data.shards import PreparedDataset
from stablevm.encoders import Encoder
from stablevm.objective import Draw, FlowMatching, StableVM, squared_error
from stablevm.schedules import AlignmentSchedule
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

    def features(self, encoder: Encoder, images: Tensor) -> Tensor:
        """Tokens (B, T, D) that the projector of this encoder aims at."""
        tokens = encoder(images)
        return tokens if self.irepa_gamma is None else normalize_over_space(tokens, self.irepa_gamma)


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
        streams = rng.RowGenerators.for_keys(seed, "objective", step, positions=self.positions)
        moments = batch.moments.to(device, non_blocking=True)
        labels, ids = batch.labels.to(device, non_blocking=True), batch.rows.to(device, non_blocking=True)
        noise = rng.randn((len(labels), *self.dataset.latent.shape), posterior_streams, device)
        latents = self.dataset.latent.from_moments(moments, noise)
        if isinstance(self.objective, FlowMatching):
            return self.objective.draw(latents, labels, streams, ids=ids)
        home = self.objective.bank.device
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
        images = self.dataset.images(draw.ids.tolist()) if batch.images is None else batch.images
        return images.to(self.accelerator.device, non_blocking=True)

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

    def run(self, draw: Draw, images: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Update the model, unless the gradient's norm is not finite, on any process.

        Returns this process's scalar metrics and the velocity loss of each sample (B,), detached, on the device.
        """
        parts = self.config.gradient_accumulation_steps
        weights, total = self._alignment_weights(draw.t)
        sums: dict[str, Tensor] = {}
        errors: list[Tensor] = []
        for number, rows in enumerate(torch.arange(len(draw.t)).chunk(parts), start=1):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            with self._maybe_no_sync(synchronise=number == parts):
                losses, sample_errors = self._losses(draw, images, weights, total, span)
                self.accelerator.backward(spread(losses["loss"]))
            errors.append(sample_errors.detach())
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
        norm = self._clip()
        self.adamw.skip = ~norm.isfinite()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**sums, "grad_norm": norm.detach(), "effective_sample_size": draw.ess.mean()}, torch.cat(errors)

    def _losses(
        self, draw: Draw, images: Tensor | None, weights: Tensor | None, total: Tensor | None, span: slice
    ) -> tuple[dict[str, Tensor], Tensor]:
        """This micro-batch's part of each loss: over micro-batches they add up, over processes they average.

        And its samples' velocity losses.
        """
        inputs = draw.x_t[span], draw.t[span], draw.labels[span]
        share = len(inputs[1]) / len(draw.t)
        with self.accelerator.autocast():
            if self.alignment is None:
                prediction = self.model(*inputs)
            else:
                prediction, projected = self.model(*inputs, features=True)
        errors = squared_error(prediction, draw.target[span])
        velocity = errors.mean() * share
        if self.alignment is None:
            return {"loss": velocity, "velocity_loss": velocity}, errors
        assert images is not None and weights is not None and total is not None
        aligned = self._aligned(projected, images[span], weights[span], total)
        loss = velocity + self.alignment.coefficient * aligned
        return {"loss": loss, "velocity_loss": velocity, "alignment_loss": aligned}, errors

    def _aligned(self, projected: list[Tensor], images: Tensor, weights: Tensor, total: Tensor) -> Tensor:
        """The alignment term, averaged over encoders, which see only images whose weight is not 0."""
        assert self.alignment is not None
        rows = weights.nonzero().squeeze(1).to(images.device)
        weights = weights.to(images.device)
        terms = []
        for encoder, tokens in zip(self.alignment.encoders, projected, strict=True):
            active = tokens[rows]
            features = self.alignment.features(encoder, images[rows]) if len(rows) else active.detach()
            terms.append(weighted_alignment(alignment_loss(active, features), weights[rows], total))
        return torch.stack(terms).mean() * self.accelerator.num_processes

    def _alignment_weights(self, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The weights (B,), on the host where their zeros are looked for, and their sum over all processes."""
        if self.alignment is None:
            return None, None
        weights = self.alignment.schedule(t)
        total = self.accelerator.reduce(weights.sum(), reduction="sum")
        assert isinstance(total, Tensor)
        return weights.cpu(), total

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
    return Draw(**{field.name: getattr(draw, field.name).to(device, non_blocking=True) for field in fields(draw)})
