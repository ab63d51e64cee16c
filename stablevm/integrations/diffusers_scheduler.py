"""StableVS for pipelines of diffusers:

    pipe.scheduler = StableVSFlowMatchScheduler.from_config(pipe.scheduler.config)

Needs diffusers (`pip install 'stablevm[vae]'`); no other module imports this one, so nothing else waits for it.
"""

import sys
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

# A saved pipeline loads a class of ours by a base class that it finds in the module of the class: this one.
from diffusers import SchedulerMixin as SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stablevm.interpolant import LINEAR
from stablevm.solvers.fixed_steps import ode_times, stable_velocity_step, thinned
from stablevm.solvers.settings import SAMPLER_RANGES, SamplerOptions

# Names of the published scheduler's arguments, and ours.
PUBLISHED_NAMES = {
    "fast_low_split_point": "split_time",
    "fast_low_low_substeps": "steps_below",
    "low_region_noise_factor": "noise_factor",
}
_DEFAULTS: dict[str, Any] = {name: getattr(SamplerOptions, name) for name in PUBLISHED_NAMES.values()}
OWN_NAMES = {*_DEFAULTS, "grid_below", "use_fast_low_schedule"}
FLOW_PREDICTION = "flow_prediction"  # what schedulers for several processes call a velocity in their configurations


class StableVSFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """Stands wherever a FlowMatchEulerDiscreteScheduler does, and takes fewer steps (Yang et al., 2026).

    Down to `split_time` its sigmas and steps are those of the Euler scheduler, shifts and all. Of the sigmas below it,
    `steps_below` stay, and the steps from there on are made by the Gaussian posterior of `stable_velocity_step`. So 30
    steps asked for may be 20 steps made: `len(scheduler.timesteps)`.

    split_time: a sigma in (0, 1). steps_below: 1 or more. noise_factor: 0 (none) to 1 (as much as the path permits).
    grid_below: "schedule" takes the sigmas below the split out of the Euler scheduler's, evenly by their number, as
    published; "even" replaces them by even steps from `split_time` itself to 0. use_fast_low_schedule: False is the
    Euler scheduler. `fast_low_split_point`, `fast_low_low_substeps` and `low_region_noise_factor` are the published
    names of the first three. The other arguments are the Euler scheduler's.

    `timesteps[k:]` and `set_begin_index(k)`, by which pipelines begin in the middle, count k in the steps asked for:
    the first noise level is the Euler scheduler's there, and then come those of ours below it.

    Raises ValueError for values outside their range, for `invert_sigmas`, whose time runs the other way, and for
    configurations of processes that are not flow matching; TypeError for an argument that it doesn't know.
    """

    sigmas: Tensor  # (steps + 1,), the last one 0
    timesteps: Tensor  # (steps,), what the network is asked at

    def __init__(
        self,
        *args: Any,
        split_time: float = _DEFAULTS["split_time"],
        steps_below: int = _DEFAULTS["steps_below"],
        noise_factor: float = _DEFAULTS["noise_factor"],
        grid_below: Literal["schedule", "even"] = "schedule",
        use_fast_low_schedule: bool = True,
        **kwargs: Any,
    ) -> None:
        given = {"split_time": split_time, "steps_below": steps_below, "noise_factor": noise_factor}
        for published, ours in PUBLISHED_NAMES.items():
            if published in kwargs and given[ours] not in (_DEFAULTS[ours], kwargs[published]):
                raise TypeError(f"{published}: the published name of {ours}, which is given too; give one of them")
        given |= {PUBLISHED_NAMES[name]: kwargs.pop(name) for name in PUBLISHED_NAMES if name in kwargs}
        super().__init__(*args, **kwargs)
        for name, value in given.items():
            kind, words = (Integral, "a whole number, ") if name == "steps_below" else (Real, "")
            if not _is_number(value, kind) or value not in SAMPLER_RANGES[name]:
                raise ValueError(f"{name} {value!r}: expected {words}{SAMPLER_RANGES[name].words}")
        if grid_below not in ("schedule", "even"):
            raise ValueError(f'grid_below {grid_below!r}: expected "schedule" or "even"')
        if self.config.invert_sigmas:
            raise ValueError("invert_sigmas True: StableVS expects sigmas that fall to 0")
        self.register_to_config(**given, grid_below=grid_below, use_fast_low_schedule=use_fast_low_schedule)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler of a pipeline's configuration: `from_config(pipe.scheduler.config, split_time=0.8)`.

        A `flow_shift` there is the shift. ValueError if it is not flow matching's; TypeError for an unknown argument.
        """
        unknown = sorted(set(kwargs) - cls._get_init_keys(cls))
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: {cls.__name__} has no such argument")
        if config is not None:
            given = {PUBLISHED_NAMES.get(name, name) for name in kwargs}
            config = {name: value for name, value in _of_flow_matching(dict(config)).items() if name not in given}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Which entries of a configuration are arguments: those that `__init__` hands on count too."""
        return (
            FlowMatchEulerDiscreteScheduler._get_init_keys(FlowMatchEulerDiscreteScheduler)
            | OWN_NAMES
            | set(PUBLISHED_NAMES)
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the Euler scheduler's, then with fewer sigmas below the split, and the timesteps that belong to them."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        if not self.config.use_fast_low_schedule:
            return
        take = self._published_grid if self.config.grid_below == "schedule" else self._even_grid
        sigmas_kept, timesteps_kept = take()
        if len(timesteps_kept) < len(self.timesteps) or not torch.equal(sigmas_kept, self.sigmas):
            below = (sigmas_kept >= self.sigmas[:, None]).sum(1).tolist()
            self.sigmas = _Schedule.of(sigmas_kept, self.sigmas, below, anywhere=False)
            self.timesteps = _Schedule.of(timesteps_kept, self.timesteps, below, anywhere=True)
        self.num_inference_steps = self.timesteps.shape[0]

    def _published_grid(self) -> tuple[Tensor, Tensor]:
        """The Euler scheduler's sigmas and timesteps, with some of those below the split left out."""
        levels = self.sigmas[:-1]
        above = int((levels >= self.config.split_time).sum())
        kept = torch.cat([torch.arange(above), above + thinned(len(levels) - above, self.config.steps_below)])
        kept = kept.to(levels.device)
        return torch.cat([levels[kept], self.sigmas[-1:]]), self.timesteps[kept]

    def _even_grid(self) -> tuple[Tensor, Tensor]:
        """Even steps from the split to 0 below it; timesteps are read off the line through the pairs there are."""
        start = self.sigmas[0].clamp(max=self.config.split_time)
        above = int((self.sigmas[:-1] > start).sum())
        replaced = len(self.timesteps) - above
        if replaced == 0:
            return self.sigmas, self.timesteps
        below = start * ode_times(min(self.config.steps_below, replaced)).to(self.sigmas)
        known = [*self.timesteps.tolist(), 0.0]  # no noise is time 0
        asked = np.interp(below[:-1].tolist(), self.sigmas.tolist()[::-1], known[::-1])
        timesteps = torch.cat([self.timesteps[:above], torch.as_tensor(asked).to(self.timesteps)])
        return torch.cat([self.sigmas[:above], below]), timesteps

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at the Euler scheduler's noise level number `begin_index`."""
        self._begin_at(begin_index)
        super().set_begin_index(begin_index)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None) -> Tensor:
        """The sample with as much of the noise as the timestep asks for."""
        self._follow_slice(timestep)
        return super().scale_noise(sample, timestep, noise)

    def _init_step_index(self, timestep: float | Tensor) -> None:
        self._follow_slice(timestep)
        super()._init_step_index(timestep)

    def _follow_slice(self, timestep: float | Tensor) -> None:
        """Begin where a pipeline has cut the timesteps, if it asks for that one first and hasn't said where it is."""
        schedule = self.timesteps
        if self.begin_index is None and isinstance(schedule, _Schedule) and schedule.cut_at > 0:
            first = torch.as_tensor(timestep).flatten()[0].item()
            if first == schedule.euler[schedule.cut_at].item():
                self._begin_at(schedule.cut_at)

    def _begin_at(self, index: int) -> None:
        if index > 0 and isinstance(self.timesteps, _Schedule) and isinstance(self.sigmas, _Schedule):
            self.sigmas, self.timesteps = self.sigmas.begun(index), self.timesteps.begun(index)
            self.num_inference_steps = len(self.timesteps) - index

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The sample at the next sigma, in the dtype of `model_output`, a velocity; `generator` is for the noise.

        `per_token_timesteps`, one per token, take the Euler scheduler's steps at all times. Pipelines hand no generator
        to `step`: with a `noise_factor` their noise then comes from torch's global one.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        above = not self.config.use_fast_low_schedule or sigma > self.config.split_time
        if per_token_timesteps is not None or above:
            return super().step(
                model_output,
                timestep,
                sample,
                s_churn,
                s_tmin,
                s_tmax,
                s_noise,
                generator,
                per_token_timesteps,
                return_dict,
            )

        def noise() -> Tensor:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)

        velocity, x = model_output.float(), sample.float()
        ahead = stable_velocity_step(velocity, x, sigma, sigma_next, LINEAR, noise, self.config.noise_factor)
        self._step_index += 1
        ahead = ahead.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=ahead) if return_dict else (ahead,)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class _Schedule(Tensor):
    """The sigmas or timesteps of a run, which knows those of the Euler scheduler from which it was made.

    Image-to-image pipelines take a share `strength` of the steps that were asked for and cut `timesteps[k:]`. Of fewer
    steps that would be another noise level, or none. So a cut counts in the Euler scheduler's steps: its value number
    k comes first, and then ours below it. Sigmas are cut so by a pipeline's `get_timesteps` alone, and stay a tensor
    for whoever looks at them. Everything else is a tensor's.
    """

    euler: Tensor  # the Euler scheduler's values
    below: list[int]  # for each of the Euler scheduler's noise levels, where our values below it begin
    anywhere: bool  # whether every cut counts so, or only those of a pipeline's `get_timesteps`
    cut_at: int  # the latest k of a cut

    # What is computed from it, a slice for example, is a plain tensor: no network sees this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, kept: Tensor, euler: Tensor, below: list[int], anywhere: bool) -> "_Schedule":
        schedule = kept.as_subclass(cls)
        schedule.euler, schedule.below, schedule.anywhere, schedule.cut_at = euler, below, anywhere, 0
        return schedule

    def begun(self, index: int) -> Tensor:
        """The Euler scheduler's values down to number `index`, and then ours: a schedule of which `[index:]` is run."""
        ours = self.as_subclass(Tensor)
        return torch.cat([self.euler[: index + 1], ours[self.below[min(index, len(self.below) - 1)] :]])

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Schedule":
        copy = self.of(self.as_subclass(Tensor).clone(), self.euler.clone(), self.below, self.anywhere)
        copy.cut_at = self.cut_at
        return copy

    def __getitem__(self, index: Any) -> Tensor:
        is_cut = isinstance(index, slice) and index.stop is None and index.step is None and (index.start or 0) > 0
        if is_cut and (self.anywhere or _caller() == "get_timesteps"):
            self.cut_at = index.start if index.start < len(self.euler) else 0
            return self.begun(index.start)[index.start :]
        return self.as_subclass(Tensor)[index]

    def __len__(self) -> int:
        # `retrieve_timesteps` turns this length into the number of steps of which `strength` takes a share, where a
        # pipeline gives its own sigmas (Flux, Qwen-Image, ...).
        return len(self.euler) if _caller() == "retrieve_timesteps" else self.shape[0]


def _caller() -> str:
    """The function that uses a schedule. Each pipeline of diffusers has its copy of the two that matter, so named."""
    return sys._getframe(2).f_code.co_name


def _of_flow_matching(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with its `flow_shift` as the shift; ValueError if it is not that of a flow-matching scheduler."""
    name = str(config.get("_class_name", "FlowMatch"))
    prediction = config.get("prediction_type", FLOW_PREDICTION)
    if prediction != FLOW_PREDICTION:
        raise ValueError(f"prediction_type {prediction}: StableVS expects the velocity of flow matching")
    if config.get("use_flow_sigmas", True) is False:
        raise ValueError("use_flow_sigmas False: StableVS expects the sigmas of flow matching")
    known = "FlowMatch" in name or "prediction_type" in config or config.get("use_flow_sigmas")
    if not known and ("shift" not in config or "beta_start" in config):
        raise ValueError(f"{name}: not the configuration of a flow-matching scheduler")
    if "shift" not in config and config.get("flow_shift") is not None:
        config["shift"] = config["flow_shift"]
    for published, ours in PUBLISHED_NAMES.items():
        if published in config:
            config.setdefault(ours, config.pop(published))
    return config
