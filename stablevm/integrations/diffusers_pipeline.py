"""A pipeline of diffusers for checkpoints of stablevm: images of classes, with any scheduler of flow matching.

    pipe = StableVMPipeline.from_checkpoint("exps/digits")
    pipe.save_pretrained("digits-pipeline")
    images = pipe(class_labels=["3", "7"], guidance_scale=1.5).images

diffusers has no list of classes of other packages; it finds the class that a saved pipeline names among its own
attributes. This module adds ours when it is imported, and the modules of the parts add themselves, after which
`DiffusionPipeline.from_pretrained` knows the pipelines that were saved. No code of a saved pipeline runs.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stablevm.choices import Weights
from stablevm.integrations import diffusers_scheduler as _schedulers  # noqa: F401  for pipelines that name them
from stablevm.integrations.diffusers_model import StableVMModel
from stablevm.interpolant import LINEAR, Interpolant, get_interpolant
from stablevm.networks.autoencoder import is_folder, is_of_diffusers, load_autoencoder
from stablevm.networks.diffusers_autoencoders import DiffusersAutoencoder, around
from stablevm.networks.joint_state import parted
from stablevm.networks.snapshot import ModelCard, checkpoint_in, load_card, load_model
from stablevm.sampling.config import CFG_SCALE
from stablevm.sampling.guidance import GuidedVelocity, check_trained
from stablevm.sampling.image_sampler import streams_of
from stablevm.sampling.labels import class_named
from stablevm.solvers.fixed_steps import Velocity, ode_times
from stablevm.support.errors import UserError
from stablevm.support.precision import tf32
from stablevm.support.ranges import AT_LEAST_1, TIME

VAE = "vae"  # the component's name, and in cards that of an autoencoder whose folder is not the user's
OUTPUTS = ("pil", "np", "pt", "latent")
_ROUNDING = 1e-6  # of a scheduler's noise levels, which are float32: a time at the end of an interval is inside
Label = int | str | None
Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


class StableVMPipeline(DiffusionPipeline):
    """Images of classes by a network of stablevm; its parts are `transformer`, `scheduler` and `vae`.

    transformer: the network, whose `card` says what its latents, its path and its classes are. scheduler: any of
    flow matching: those of StableVS, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, and multistep
    ones with `prediction_type="flow_prediction"` and `use_flow_sigmas=True`. vae: the autoencoder that decodes latents;
    None if they are pixels.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = [VAE]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    transformer: StableVMModel
    scheduler: Any
    vae: Any

    def __init__(self, transformer: StableVMModel, scheduler: SchedulerMixin, vae: ModelMixin | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self._interrupt = False

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, *, weights: Weights = "ema", vae: str | None = None
    ) -> "StableVMPipeline":
        """The pipeline of a checkpoint's folder, of the newest checkpoint in a run's folder, or of hf:OWNER/NAME.

        weights: "ema", the moving average, or "model", those of the last step. vae: the name or folder of an
        autoencoder to decode with; the one that the checkpoint records by default. The scheduler is Euler's with the
        shift of the training's times. UserError for what is missing, damaged or does not fit.
        """
        folder = checkpoint_in(folder, weights)
        card = load_card(folder)
        autoencoder, model = load_autoencoder(card.latent, name=vae), None
        if isinstance(autoencoder, DiffusersAutoencoder):
            model = autoencoder.model
            model.register_to_config(_name_or_path=VAE)  # no folder of this machine is to be saved
        if is_of_diffusers(card.latent.autoencoder) and is_folder(card.latent.autoencoder):
            card = replace(card, latent=replace(card.latent, autoencoder=VAE))
        network = load_model(folder, card, weights=weights)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=card.time_shift)
        return cls(StableVMModel.from_network(network, card), scheduler, model)

    @staticmethod
    def generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
        """The generators of the images that `generate` makes with this seed, by their places in its file from 0."""
        return streams_of(seed, indices).generators

    @classmethod
    def component_names(cls) -> list[str]:
        """The parts, which are folders of a saved pipeline."""
        return ["transformer", "scheduler", VAE]

    @property
    def card(self) -> ModelCard:
        """All that the network's weights mean: path, prediction, latents, classes."""
        return self.transformer.card

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are left out; a callback sets `_interrupt`, as in other pipelines."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor = None,
        *,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make an image of each class.

        class_labels: numbers or names of classes, one for each image; None for an image without a class.
        num_inference_steps: 1 or more. sigmas: in their place noise levels, decreasing from 1, to which the scheduler
        adds its shift; by default those of evenly spaced times. guidance_scale: classifier-free guidance, 0 or more; 1
        is none. guidance_interval: the lowest and the highest time with guidance; 0 is the image, 1 is noise.
        generator: the source of all noise; with one generator for each image, as `generators` gives them, an image
        does not depend on the others. latents: the initial noise instead of drawn noise,
        (B, *card.model.state_shape). output_type: "pil" images, "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or
        "latent" (B, C, h, w), in the scale of `card.latent`. callback_on_step_end: called as
        callback(pipe, step, timestep, {"latents": ...}) with the scheduler's state; it returns a dictionary, whose
        latents, if any, are used. On a GPU float32 products are rounded to TF32, those of convolutions too, only if
        torch.backends.cuda.matmul.allow_tf32 is set.

        Returns an ImagePipelineOutput, or without `return_dict` a tuple of the images. UserError for what is out of
        range, was never trained or does not fit.
        """
        labels = self._labels(class_labels)
        _check(guidance_scale, guidance_interval, output_type, callback_on_step_end_tensor_inputs)
        check_trained(self.card, labels, guidance_scale, called="guidance_scale")
        _check_scheduler(self.scheduler)
        device = self._execution_device
        self._set_noise_levels(num_inference_steps, sigmas, device)
        state = self._initial(len(labels), generator, latents, device)
        velocity = self._velocity(labels.to(device), guidance_scale, guidance_interval)
        callback = callback_on_step_end, ("latents",) if callback_on_step_end_tensor_inputs else ()
        with tf32(torch.backends.cuda.matmul.allow_tf32):
            images = self._images(self._integrate(velocity, state, generator, *callback), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _integrate(
        self,
        velocity: Velocity,
        state: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callback | None,
        tensors: Sequence[str],
    ) -> Tensor:
        """The state after all steps of the scheduler."""
        options = {"generator": generator} if _takes(self.scheduler.step, "generator") else {}
        self._interrupt = False
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self._interrupt:
                continue
            sigma = self.scheduler.sigmas[step].to(state.device, torch.float64)
            prediction = velocity(state.double(), sigma).float()
            state = self.scheduler.step(prediction, timestep, state, **options, return_dict=False)[0]
            if callback is not None:
                found = callback(self, step, timestep, dict.fromkeys(tensors, state))
                state = (found or {}).get("latents", state)
        return state

    def _labels(self, given: Label | Sequence[Label] | Tensor) -> Tensor:
        """The classes' numbers (B,) int64, with the null class for None."""
        if isinstance(given, Tensor | np.ndarray):
            given = given.tolist()
        labels = [given] if given is None or isinstance(given, int | str) else list(given)
        null, numbers = self.card.model.null_class, []
        for label in labels:
            number = class_named(label, self.card) if isinstance(label, str) else null if label is None else label
            is_whole = isinstance(number, Integral) and not isinstance(number, bool)
            if not is_whole or int(number) not in range(null + 1):
                raise UserError(
                    f"class_labels {number!r}: expected a class's name or its number, 0 to {null - 1}, or None for none"
                )
            numbers.append(int(number))
        if not numbers:
            raise UserError("class_labels []: expected a class for each image; give one at least")
        return torch.tensor(numbers)

    def _set_noise_levels(self, steps: int, sigmas: Sequence[float] | None, device: torch.device) -> None:
        """Set the scheduler's noise levels: the given ones, or those of evenly spaced times on the network's path.

        A scheduler that takes no `sigmas` uses noise levels of its own, which are nearly the same on the linear path.
        """
        AT_LEAST_1.check("num_inference_steps", steps)
        scheduler = self.scheduler
        options: dict[str, Any] = {}
        takes = _takes(scheduler.set_timesteps, "sigmas")
        if sigmas is not None and not takes:
            raise UserError(f"sigmas: {type(scheduler).__name__} takes none; give num_inference_steps")
        if scheduler.config.get("use_dynamic_shifting"):  # by the shift of the training, as the card has the number
            shift, kind = self.card.time_shift, scheduler.config.get("time_shift_type", "exponential")
            options["mu"] = math.log(shift) if kind == "exponential" else shift
        if takes:
            levels = _levels_of(get_interpolant(self.card.path_type), ode_times(steps)[:-1])
            options["sigmas"] = levels.numpy() if sigmas is None else np.array(sigmas, dtype=np.float64)
        else:
            options["num_inference_steps"] = steps
        scheduler.set_timesteps(device=device, **options)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def _initial(
        self,
        count: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """The initial noise (B, *state_shape), float32."""
        shape = (count, *self.card.model.state_shape)
        if isinstance(generator, list) and len(generator) != count:
            raise UserError(f"generator: {len(generator)} of them for {count} images; give one, or one for each image")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise UserError(f"latents {tuple(latents.shape)}: expected {shape}, a row for each of class_labels")
        return latents.to(device, torch.float32)

    def _velocity(self, labels: Tensor, scale: float, interval: tuple[float, float]) -> Velocity:
        """The guided velocity of flow matching at a scheduler's state and noise level."""
        path = get_interpolant(self.card.path_type)
        guided = GuidedVelocity(
            lambda x, t, y: self.transformer(x, t, y, return_dict=False)[0],
            path,
            self.card.prediction,
            labels,
            self.card.model.null_class,
            scale=scale,
            low=interval[0] - _ROUNDING,
            high=interval[1] + _ROUNDING,
        )
        return guided if path is LINEAR else lambda state, sigma: _linear_velocity(guided, path, state, sigma)

    def _images(self, state: Tensor, output_type: str) -> Any:
        latents = parted(state, self.card.latent.shape)[0] if self.card.model.cls_token_dim else state
        if not latents.isfinite().all():
            raise UserError("the latents are not finite; load the pipeline with torch_dtype=torch.float32")
        if output_type == "latent":
            return latents
        pixels = self._decoded(latents)
        if output_type == "pt":
            return pixels / 255
        rows = pixels.permute(0, 2, 3, 1).numpy()
        return [_picture(row) for row in rows] if output_type == "pil" else rows.astype(np.float32) / 255

    def _decoded(self, latents: Tensor) -> Tensor:
        """Pixels uint8 (B, 3, H, W) on the CPU."""
        latent = self.card.latent
        if self.vae is not None:
            return around(latent, self.vae, latents.device).decode(latents)
        if is_of_diffusers(latent.autoencoder):
            raise UserError(
                f"vae: the pipeline has none, and the latents are those of {latent.autoencoder}; set pipe.vae, or ask "
                'for output_type="latent"'
            )
        return load_autoencoder(latent, device=latents.device).decode(latents)


def _check(scale: float, interval: tuple[float, float], output_type: str, tensors: Sequence[str]) -> None:
    """UserError for arguments out of range."""
    CFG_SCALE.check("guidance_scale", scale)
    if len(interval) != 2 or not all(time in TIME for time in interval) or interval[0] > interval[1]:
        raise UserError(f"guidance_interval {interval}: expected two times in [0, 1], the lower one first")
    if output_type not in OUTPUTS:
        raise UserError(f"output_type {output_type!r}: expected one of {', '.join(OUTPUTS)}")
    if unknown := [name for name in tensors if name != "latents"]:
        raise UserError(f"callback_on_step_end_tensor_inputs {', '.join(unknown)}: expected latents, or none")


def _check_scheduler(scheduler: Any) -> None:
    """UserError for a scheduler of another process than flow matching from noise to data."""
    name, config = type(scheduler).__name__, scheduler.config
    converted = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    if not converted and "FlowMatch" not in name:
        raise UserError(
            f"scheduler {name}: expected one of flow matching, such as FlowMatchEulerDiscreteScheduler, or one with "
            'prediction_type="flow_prediction" and use_flow_sigmas=True'
        )
    if config.get("invert_sigmas"):
        raise UserError(f"scheduler {name}: invert_sigmas True, expected noise levels that decrease to 0")


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _levels_of(path: Interpolant, times: Tensor) -> Tensor:
    """The noise levels of flow matching with the same ratio of noise to data as a path has at these times."""
    c = path.coefficients(times)
    return c.sigma / (c.alpha + c.sigma)


def _linear_velocity(velocity: Velocity, path: Interpolant, state: Tensor, sigma: Tensor) -> Tensor:
    """The velocity `noise - x0` on the linear path, which schedulers follow, by a network that knows another path.

    At the time t of equal ratios of noise to data, the other path's state is (alpha + sigma) times the linear one's.
    """
    t = torch.where(sigma < 1, path.time_at_ratio(sigma / (1 - sigma)), 1.0)
    c = path.coefficients(t)
    x = (c.alpha + c.sigma) * state
    v = velocity(x, t)
    return path.convert(v, x, t, "velocity", "noise") - path.convert(v, x, t, "velocity", "x0")


def _picture(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


setattr(diffusers, StableVMPipeline.__name__, StableVMPipeline)
