"""The training engine: network, moving average, optimiser and objective, and one step of training, without files."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn

from stablevm.data.dataset import PreparedDataset
from stablevm.data.loader import TrainingBatch, training_loader
from stablevm.data.workers import Calls
from stablevm.networks.backbone import Backbone
from stablevm.networks.encoders import Encoder, load_encoder
from stablevm.networks.network_config import NetworkConfig
from stablevm.networks.registry import build_network, empty_network, network_config
from stablevm.networks.snapshot import ModelCard
from stablevm.support import rng
from stablevm.support.compiler import check_compiler
from stablevm.support.errors import UserError
from stablevm.support.text import shown
from stablevm.training.average import WIDTHS, snapshot_name
from stablevm.training.checkpoint import DamagedError, Progress, TrainingState
from stablevm.training.config import TrainConfig
from stablevm.training.guard import Guard
from stablevm.training.muon import MOMENTUM, make_optimizer, muon_weights
from stablevm.training.objectives import AnchorPlan, make_meanflow, make_objective, time_shift
from stablevm.training.start import class_counts, class_names
from stablevm.training.step import BatchDrawer, PhaseClock, StepMetrics, StepRunner, make_terms
from stablevm.training.stored import StoredEncoder, open_features, stored_features
from stablevm.training.weights import (
    MovingAverage,
    PowerAverage,
    initial_weights,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
)


class Engine:
    """The engine of a run in one process. Its constructor checks that options, data and encoders fit, without files."""

    def __init__(
        self, config: TrainConfig, dataset: PreparedDataset, accelerator: Accelerator, encoders: Sequence[Encoder]
    ) -> None:
        """Build network, optimiser and objective; encoders: those of `config.encoder_names`, on the device."""
        self.config, self.dataset, self.accelerator = config, dataset, accelerator
        self.step = 0  # finished steps
        self.progress = Progress()  # unfinished sums of an earlier command
        self.stored = stored_features(encoders)
        self.terms = make_terms(config, encoders)
        self.card = _model_card(config, dataset, encoders)
        device = accelerator.device
        model = build_network(self.card.model, rng.generator(config.seed, "weights")).to(device)
        self.ema = MovingAverage(model, config.ema_decay)
        widths = WIDTHS if config.average_every else ()
        self.averages = {snapshot_name(width): PowerAverage(model, width) for width in widths}
        if config.compile:
            check_compiler(device)
            model.compile_blocks()
        if config.checkpoint_activations:
            model.checkpoint_activations()
        self.objective = make_objective(config, self.card.model, dataset, device)
        if config.optimizer == "muon" and accelerator.is_fsdp2:
            raise UserError("--optimizer muon: makes whole matrices orthogonal, which FSDP shards; give adamw")
        optimizer = make_optimizer(config, model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if accelerator.is_fsdp2:
            for average in self._all_averages():
                average.model = fsdp2_prepare_model(accelerator, average.model)  # in shards like the model
        self.drawer = BatchDrawer(self.objective, dataset, accelerator, config)
        meanflow = make_meanflow(config, self.card.model)
        if meanflow is not None and accelerator.is_fsdp2:
            raise UserError("--meanflow: its derivative is not computed on sharded weights; train without FSDP")
        self.runner = StepRunner(self.model, self.optimizer, accelerator, config, self.terms, meanflow)
        self.guard = Guard(accelerator, config.max_bad_steps)

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def train_step(self, batch: TrainingBatch, rate: float, clock: PhaseClock) -> StepMetrics:
        """Take one step at the learning rate `rate`; clock: measures the phases."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        samples = self.drawer.samples(batch, self.step)  # noisy samples and their targets
        clock.end("draw")
        metrics = self.runner.run(samples, self.step, clock)  # loss, gradient, update of the weights
        norm = metrics.means["grad_norm"]
        for average in self._all_averages():
            average.update(self.plain_model, self.step, norm.isfinite())
        clock.end("ema")
        self.step += 1
        self.guard.add(self.step, metrics.means["loss"], norm, samples.draw.ids, metrics.velocity_loss)
        return metrics

    def loader(self, num_steps: int) -> Iterator[TrainingBatch]:
        """Load this process's batches for the next steps, with images as long as a term of the loss needs them."""
        end = self.step + num_steps
        needs = [end if term.stops_at is None else term.stops_at for term in self.terms if term.needs_images]
        without = min(max(needs, default=self.step), end)
        if without > self.step:
            yield from self._loader(self.step, without, with_images=True)
        if end > without:
            yield from self._loader(max(self.step, without), end, with_images=False)

    def _loader(self, start: int, end: int, *, with_images: bool) -> Calls[TrainingBatch]:
        return training_loader(
            self.dataset,
            global_batch=self.config.batch_size,
            seed=self.config.seed,
            num_steps=end - start,
            start_step=start,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.num_workers,
            with_images=with_images,
            images=self.stored,
            image_rows=self._anchor_plan(end - start) if with_images else None,
            finite=self.objective.bank is not None,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def start_from(self, folder: Path) -> list[str]:
        """Load the weights of the checkpoint in `folder`, and return lines about what was loaded.

        UserError if they do not fit.
        """
        own = build_network(self.card.model, rng.generator(self.config.seed, "weights")).state_dict()
        weights, lines = initial_weights(folder, self.config.init_weights, self.card, own)
        load_model_tensors(self.model, weights)
        for average in self._all_averages():
            load_model_tensors(average.model, weights)
        return lines

    def restore(self, state: TrainingState) -> None:
        """Load the state of an earlier command; UserError if it does not fit this run."""
        if not state.card.agrees_with(self.card):
            raise UserError(f"{self.config.folder}: its checkpoint does not fit the network or data set of the options")
        self._check_tensors(state)
        load_optimizer_tensors(self.model, self.runner.adamw, state.optimizer)
        load_model_tensors(self.model, state.model)
        load_model_tensors(self.ema.model, state.ema)
        for name, average in self.averages.items():
            load_model_tensors(average.model, state.averages[name])
        if self.objective.bank is not None and not self.config.bank_is_fixed:
            self.objective.bank.load_state_dict(state.bank)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.step, self.progress = state.card.step, state.progress
        self.guard.in_a_row = list(state.progress.bad_steps)

    def _check_tensors(self, state: TrainingState) -> None:
        """Raise DamagedError unless the tensors are those that `state` saves."""
        weights = {name: (tensor.shape, tensor.dtype) for name, tensor in self.model_state().items()}
        bank = {name: (tensor.shape, tensor.dtype) for name, tensor in self._bank_state().items()}
        trained = {name for name, parameter in self.plain_model.named_parameters() if parameter.requires_grad}
        by_muon = muon_weights(self.config, self.plain_model)
        by_adamw = trained - by_muon.keys()
        moments = {f"{name}.{key}": weights[name] for name in by_adamw for key in ("exp_avg", "exp_avg_sq")}
        moments |= {f"{name}.step": (torch.Size([]), torch.float32) for name in by_adamw}
        moments |= {f"{name}.{MOMENTUM}": weights[name] for name in by_muon}
        parts = {"model": (state.model, weights), "ema": (state.ema, weights), "bank": (state.bank, bank)}
        parts |= {"optimizer": (state.optimizer, moments)}
        parts |= {name: (state.averages.get(name, {}), weights) for name in self.averages}
        for part, (tensors, expected) in parts.items():
            found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            if fault := _difference(found, expected):
                raise DamagedError(f"{part}.safetensors {fault}")

    def model_state(self) -> dict[str, Tensor]:
        """The weights by their plain names, in shards if the model is sharded."""
        return self.plain_model.state_dict()

    @property
    def plain_model(self) -> Backbone:
        model: Backbone = self.accelerator.unwrap_model(self.model)
        return model

    def state(self) -> TrainingState:
        """The state for `restore`, in the main process; all processes must call it, as each may hold shards."""
        main = self.accelerator.is_main_process
        return TrainingState(
            card=self.stamped_card(),
            model=model_tensors(self.model),
            ema=model_tensors(self.ema.model),
            optimizer=optimizer_tensors(self.model, self.runner.adamw),
            bank=self._bank_state() if main else {},
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
            averages=self.averages_state(),
        )

    def averages_state(self) -> dict[str, dict[str, Tensor]]:
        """The averages of power-function profile, whole, in the main process; all processes must call it."""
        return {name: model_tensors(average.model) for name, average in self.averages.items()}

    def _all_averages(self) -> list[MovingAverage]:
        return [self.ema, *self.averages.values()]

    def stamped_card(self) -> ModelCard:
        """The network's card with the number of finished steps."""
        return dataclasses.replace(self.card, step=self.step)

    def whole_average(self) -> nn.Module:
        """The moving average as a network that the main process can use alone; all processes must call it."""
        if not self.accelerator.is_fsdp2:
            return self.ema.model
        model = empty_network(self.card.model)
        tensors = model_tensors(self.ema.model)
        if self.accelerator.is_main_process:
            model.load_state_dict(tensors, assign=True)
            model.to(self.accelerator.device)
        return model.eval().requires_grad_(False)

    def _anchor_plan(self, num_steps: int) -> AnchorPlan | None:
        """The plan of anchors whose images the loader reads, if they are not the fresh samples."""
        if self.objective.bank is None or self.objective.anchors == "batch":
            return None
        bank, positions = self.objective.bank, self.drawer.positions
        return AnchorPlan(bank, self.dataset, self.config, positions, start_step=self.step, num_steps=num_steps)

    def _bank_state(self) -> dict[str, Tensor]:
        """The state of the bank; empty without one, and for a bank that depends only on the data and the seed."""
        bank = self.objective.bank
        return {} if bank is None or self.config.bank_is_fixed else bank.state_dict()


Kinds = dict[str, tuple[torch.Size, torch.dtype]]  # shapes and dtypes of tensors by name


def _difference(found: Kinds, expected: Kinds) -> str | None:
    """A description of the first difference between tensors and those expected; None if there is none."""
    if foreign := sorted(found.keys() - expected.keys()):
        return f"holds {shown(foreign[0])}, which is not a tensor of this run"
    if missing := sorted(expected.keys() - found.keys()):
        return f"lacks {shown(missing[0])}"
    for name, (shape, dtype) in found.items():
        if (shape, dtype) != expected[name]:
            ours = f"{list(expected[name][0])} {expected[name][1]}"
            return f"holds {name} as {list(shape)} {dtype}, this run's is {ours}"
    return None


def model_config(config: TrainConfig, dataset: PreparedDataset) -> NetworkConfig:
    """The configuration of the network without projectors, whose widths depend on the encoders.

    UserError if the block to align does not exist.
    """
    channels, height, width = dataset.latent.shape
    if height != width:
        raise UserError(f"--data-dir {config.data_dir}: its latents are {height} x {width}, networks need squares")
    model = network_config(
        config.model,
        input_size=height,
        in_channels=channels,
        num_classes=config.num_classes or dataset.num_classes,
        qk_norm=config.qk_norm,
        intervals=config.meanflow,
        fused_attn=config.fused_attn,
        encoder_depth=config.encoder_depth,
        projector_kind="conv" if config.use_irepa else "mlp",
    )
    if config.use_proj_loss and not 1 <= config.encoder_depth <= model.depth:
        raise UserError(
            f"--encoder-depth {config.encoder_depth}: {config.model} has {model.depth} blocks; give 1 to {model.depth}"
        )
    return model


def load_encoders(
    config: TrainConfig, dataset: PreparedDataset, grid_size: int, device: torch.device, dtype: torch.dtype
) -> list[Encoder]:
    """The frozen encoders on `device`, for a network of `grid_size` tokens per side, or their stored tokens."""
    if config.features_dir is not None:
        return [StoredEncoder(open_features(config, dataset, grid_size))]
    antialias = config.encoder_resize == "antialiased"
    return [
        load_encoder(name, grid_size=grid_size, weights=weights, device=device, dtype=dtype, antialias=antialias)
        for name, weights in zip(config.encoder_names, config.encoder_files, strict=True)
    ]


def _model_card(config: TrainConfig, dataset: PreparedDataset, encoders: Sequence[Encoder]) -> ModelCard:
    """The card of the network before its first step."""
    return ModelCard(
        model=dataclasses.replace(
            model_config(config, dataset),
            projector_dims=tuple(encoder.dim for encoder in encoders),
            cls_token_dim=encoders[0].dim if config.cls_token else 0,
        ),
        latent=dataset.latent,
        path_type=config.path_type,
        prediction=config.prediction,
        class_names=class_names(config, dataset),
        step=0,
        class_counts=class_counts(config, dataset),
        label_dropout=config.cfg_prob,
        time_shift=time_shift(config, dataset.latent.shape),
    )
