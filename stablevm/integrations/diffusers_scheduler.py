"""StableVS as a scheduler for pipelines of diffusers.

    pipe.scheduler = StableVSFlowMatchScheduler.from_config(pipe.scheduler.config)

It needs diffusers (`pip install 'stablevm[vae]'`). No other module imports this one.
"""

import sys
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

# diffusers loads a class of a saved pipeline by a base class that it finds in the class's module, which is this one.
from diffusers import SchedulerMixin as SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stablevm.interpolant import LINEAR
from stablevm.solvers.fixed_steps import ode_times, stable_velocity_step, thinned
from stablevm.solvers.settings import SAMPLER_RANGES, SamplerOptions

# The names of arguments in the published scheduler, and ours.
PUBLISHED_NAMES = {
    "fast_low_split_point": "split_time",
    "fast_low_low_substeps": "steps_below",
    "low_region_noise_factor": "noise_factor",
}
_DEFAULTS: dict[str, Any] = {name: getattr(SamplerOptions, name) for name in PUBLISHED_NAMES.values()}
OWN_NAMES = {*_DEFAULTS, "grid_below", "use_fast_low_schedule"}
FLOW_PREDICTION = "flow_prediction"  # the name for a velocity in configurations of schedulers for several processes


class StableVSFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """StableVS (Yang et al., 2026) in place of a FlowMatchEulerDiscreteScheduler, with fewer steps.

    Down to `split_time` the sigmas and steps are those of the Euler scheduler, including shifts. Below it, only
    `steps_below` sigmas remain, and each step is that of `stable_velocity_step`. So 30 requested steps may become 20
    actual ones, `len(scheduler.timesteps)`.

    split_time: a sigma in (0, 1). steps_below: 1 or more. noise_factor: from 0 (none) to 1 (the largest possible).
    grid_below: "schedule", as published, takes a subset of the Euler scheduler's sigmas below the split, at evenly
    spaced indices; "even" replaces them by equal steps from `split_time` to 0. use_fast_low_schedule: False gives the
    Euler scheduler. `fast_low_split_point`, `fast_low_low_substeps` and `low_region_noise_factor` are the published
    names of the first three. The other arguments are those of the Euler scheduler.

    Pipelines that start in the middle use `timesteps[k:]` or `set_begin_index(k)`. There k counts the requested steps:
    the first noise level is that of the Euler scheduler, followed by our noise levels below it.

    Raises ValueError for values out of range, for `invert_sigmas`, whose time runs in the other direction, and for
    configurations of other methods than flow matching; TypeError for an unknown argument.
    """

    sigmas: Tensor  # (steps + 1,), the last one 0
    timesteps: Tensor  # (steps,), at which the network is evaluated

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
            raise ValueError("invert_sigmas True: StableVS expects sigmas that decrease to 0")
        self.register_to_config(**given, grid_below=grid_below, use_fast_low_schedule=use_fast_low_schedule)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a scheduler from a pipeline's configuration: `from_config(pipe.scheduler.config, split_time=0.8)`.

        A `flow_shift` in it is used as the shift. ValueError if it is not a configuration of flow matching; TypeError
        for an unknown argument.
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
        """The entries of a configuration that are arguments, including those that `__init__` passes on."""
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
        """Set sigmas and timesteps as the Euler scheduler does, then keep fewer of them below the split."""
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
        """Equal steps from the split to 0; timesteps are interpolated from the Euler scheduler's sigmas."""
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
        """Start at the Euler scheduler's noise level with the index `begin_index`."""
        self._begin_at(begin_index)
        super().set_begin_index(begin_index)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None) -> Tensor:
        """Add noise to the sample up to the noise level of the timestep."""
        self._follow_slice(timestep)
        return super().scale_noise(sample, timestep, noise)

    def _init_step_index(self, timestep: float | Tensor) -> None:
        self._follow_slice(timestep)
        super()._init_step_index(timestep)

    def _follow_slice(self, timestep: float | Tensor) -> None:
        """Start where a pipeline has cut the timesteps, if that is its first timestep and no start index was set."""
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
        """Take one step: the sample at the next sigma, in the dtype of `model_output`, which is a velocity.

        generator: the source of the noise. With `per_token_timesteps`, one for each token, all steps are those of the
        Euler scheduler. Pipelines pass no generator to `step`; with a `noise_factor` the noise then comes from torch's
        global generator.
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
    """The sigmas or timesteps of a run, which remembers those of the Euler scheduler from which it was made.

    Image-to-image pipelines start after a share of the requested steps, given by `strength`, with `timesteps[k:]`. With
    fewer steps this index would mean another noise level, or none. So a slice counts the Euler scheduler's steps: it
    begins with the Euler scheduler's value k, followed by our values below it. Sigmas are sliced in this way only in a
    pipeline's `get_timesteps`, and behave like a tensor otherwise, as does everything else.
    """

    euler: Tensor  # the Euler scheduler's values
    below: list[int]  # for each of the Euler scheduler's noise levels, the index of our first value below it
    anywhere: bool  # whether every slice counts in this way, or only those in a pipeline's `get_timesteps`
    cut_at: int  # the k of the latest slice

    # Results of operations, such as a slice, are plain tensors, so no network receives this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, kept: Tensor, euler: Tensor, below: list[int], anywhere: bool) -> "_Schedule":
        schedule = kept.as_subclass(cls)
        schedule.euler, schedule.below, schedule.anywhere, schedule.cut_at = euler, below, anywhere, 0
        return schedule

    def begun(self, index: int) -> Tensor:
        """The Euler scheduler's values up to `index`, then ours below, so that the steps from `[index:]` are run."""
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
        # If a pipeline gives its own sigmas (Flux, Qwen-Image, ...), `retrieve_timesteps` takes this length as the
        # number of steps of which `strength` is a share.
        return len(self.euler) if _caller() == "retrieve_timesteps" else self.shape[0]


def _caller() -> str:
    """The name of the function that uses a schedule; each pipeline of diffusers has a copy of the two that matter."""
    return sys._getframe(2).f_code.co_name


def _of_flow_matching(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, with `flow_shift` as the shift; ValueError if it is not that of a flow-matching scheduler."""
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
