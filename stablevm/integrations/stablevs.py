"""What the schedulers of StableVS for pipelines of diffusers have in common: arguments, noise levels, large steps.

The schedulers are in diffusers_scheduler.py, which alone imports this module.
"""

import sys
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stablevm.interpolant import LINEAR
from stablevm.solvers.fixed_steps import ode_times, stable_velocity_step, thinned
from stablevm.solvers.settings import SAMPLER_RANGES, SamplerOptions

# The names of arguments in the published schedulers, and ours.
PUBLISHED_NAMES = {
    "fast_low_split_point": "split_time",
    "fast_low_low_substeps": "steps_below",
    "low_region_noise_factor": "noise_factor",
}
DEFAULTS: dict[str, Any] = {name: getattr(SamplerOptions, name) for name in PUBLISHED_NAMES.values()}
OWN_NAMES = {*DEFAULTS, "grid_below", "use_fast_low_schedule"}
FLOW_PREDICTION = "flow_prediction"  # the name for a velocity in configurations of schedulers for several processes


class StableVSMixin(SchedulerMixin, ConfigMixin):
    """StableVS (Yang et al., 2026) for a scheduler of diffusers with sigmas of flow matching, its second base class.

    The base class makes noise levels and takes the steps above the split. This class leaves out noise levels below
    the split, takes steps there, and keeps the meaning of a start in the middle. See StableVSFlowMatchScheduler for
    the arguments.
    """

    _base: ClassVar[Any]  # the scheduler of diffusers
    _own_names: ClassVar[set[str]] = OWN_NAMES  # arguments that the base class does not have
    _other_names: ClassVar[dict[str, str]] = PUBLISHED_NAMES  # further names of arguments, and the names they are for

    sigmas: Tensor  # (steps + 1,), the last one 0
    timesteps: Tensor  # (steps,), at which the network is evaluated

    def __init__(
        self,
        *args: Any,
        split_time: float = DEFAULTS["split_time"],
        steps_below: int = DEFAULTS["steps_below"],
        noise_factor: float = DEFAULTS["noise_factor"],
        grid_below: Literal["schedule", "even"] = "schedule",
        use_fast_low_schedule: bool = True,
        **kwargs: Any,
    ) -> None:
        given = {"split_time": split_time, "steps_below": steps_below, "noise_factor": noise_factor}
        for published, ours in PUBLISHED_NAMES.items():
            if published in kwargs and given[ours] not in (DEFAULTS[ours], kwargs[published]):
                raise TypeError(f"{published}: the published name of {ours}, which is given too; give one of them")
        given |= {PUBLISHED_NAMES[name]: kwargs.pop(name) for name in PUBLISHED_NAMES if name in kwargs}
        super().__init__(*args, **self._for_base(kwargs))
        for name, value in given.items():
            kind, words = (Integral, "a whole number, ") if name == "steps_below" else (Real, "")
            if not _is_number(value, kind) or value not in SAMPLER_RANGES[name]:
                raise ValueError(f"{name} {value!r}: expected {words}{SAMPLER_RANGES[name].words}")
        if grid_below not in ("schedule", "even"):
            raise ValueError(f'grid_below {grid_below!r}: expected "schedule" or "even"')
        refuse_other_processes(self.config)
        given |= (
            {"shift": self.config["flow_shift"]} if "flow_shift" in self.config else {}
        )  # for the way back to Euler
        self.register_to_config(**given, grid_below=grid_below, use_fast_low_schedule=use_fast_low_schedule)

    @classmethod
    def _for_base(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the base class."""
        return kwargs

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a scheduler from a pipeline's configuration: `from_config(pipe.scheduler.config, split_time=0.8)`.

        `flow_shift` and `shift` are two names for one number. ValueError if it is not a configuration of flow matching;
        TypeError for an unknown argument.
        """
        unknown = sorted(set(kwargs) - cls._get_init_keys(cls))
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: {cls.__name__} has no such argument")
        if config is not None:
            given = {cls._other_names.get(name, name) for name in kwargs}
            config = {
                name: value
                for name, value in cls._of_flow_matching(dict(config)).items()
                if cls._other_names.get(name, name) not in given
            }
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _of_flow_matching(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration, with `flow_shift` as the shift; ValueError if it is not that of flow matching."""
        name = str(config.get("_class_name", "FlowMatch"))
        refuse_other_processes(config)
        known = "FlowMatch" in name or "prediction_type" in config or config.get("use_flow_sigmas")
        if not known and ("shift" not in config or "beta_start" in config):
            raise ValueError(f"{name}: not the configuration of a flow-matching scheduler")
        if "shift" not in config and config.get("flow_shift") is not None:
            config["shift"] = config["flow_shift"]
        for published, ours in PUBLISHED_NAMES.items():
            if published in config:
                config.setdefault(ours, config.pop(published))
        return config

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        """The entries of a configuration that are arguments, including those that `__init__` passes on."""
        if not issubclass(input_class, StableVSMixin):  # another scheduler whose configuration the base class accepts
            return ConfigMixin._get_init_keys(input_class)
        base = input_class._base
        return base._get_init_keys(base) | input_class._own_names | set(input_class._other_names)

    # --- noise levels ---

    def _thin(self) -> None:
        """Keep fewer of the base class's noise levels below the split."""
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
        """The base class's sigmas and timesteps, with some of those below the split left out."""
        levels = self.sigmas[:-1]
        above = int((levels >= self.config.split_time).sum())
        kept = torch.cat([torch.arange(above), above + thinned(len(levels) - above, self.config.steps_below)])
        kept = kept.to(levels.device)
        return torch.cat([levels[kept], self.sigmas[-1:]]), self.timesteps[kept]

    def _even_grid(self) -> tuple[Tensor, Tensor]:
        """Equal steps from the split to the end; timesteps are interpolated from the base class's sigmas.

        The base class's last sigma above the split is left out if less than half a step lies between: such a step
        would spend an evaluation on nothing, and a multistep solver would divide by it.
        """
        start, end = self.sigmas[0].clamp(max=self.config.split_time), self.sigmas[-1]
        above = int((self.sigmas[:-1] > start).sum())
        replaced = len(self.timesteps) - above
        if replaced == 0:
            return self.sigmas, self.timesteps
        if above > 1 and self.sigmas[above - 1] - start < (self.sigmas[above - 2] - self.sigmas[above - 1]) / 2:
            above -= 1
        below = end + (start - end) * ode_times(min(self.config.steps_below, replaced)).to(self.sigmas)
        known = [*self.timesteps.tolist(), end.item() * self.config.num_train_timesteps]
        asked = np.interp(below[:-1].tolist(), self.sigmas.tolist()[::-1], known[::-1])
        if not self.timesteps.is_floating_point():
            asked = asked.round()  # the known ones are rounded down already
        timesteps = torch.cat([self.timesteps[:above], torch.as_tensor(asked).to(self.timesteps)])
        return torch.cat([self.sigmas[:above], below]), timesteps

    # --- a start in the middle ---

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at the base class's noise level with the index `begin_index`."""
        self._begin_at(begin_index)
        super().set_begin_index(begin_index)

    def _init_step_index(self, timestep: float | Tensor) -> None:
        self._follow_slice(timestep)
        super()._init_step_index(timestep)

    def _follow_slice(self, timestep: float | Tensor) -> None:
        """Start where a pipeline has cut the timesteps, if that is its first timestep and no start index was set."""
        schedule = self.timesteps
        if self.begin_index is None and isinstance(schedule, _Schedule) and schedule.cut_at > 0:
            first = torch.as_tensor(timestep).flatten()[0].item()
            if first == schedule.base[schedule.cut_at].item():
                self._begin_at(schedule.cut_at)

    def _begin_at(self, index: int) -> None:
        if index > 0 and isinstance(self.timesteps, _Schedule) and isinstance(self.sigmas, _Schedule):
            self.sigmas, self.timesteps = self.sigmas.begun(index), self.timesteps.begun(index)
            self.num_inference_steps = len(self.timesteps) - index

    # --- steps ---

    def _is_below(self, timestep: float | Tensor) -> bool:
        """Whether the next step, which starts from `timestep`, is one of StableVS."""
        if self.step_index is None:
            self._init_step_index(timestep)
        return self.config.use_fast_low_schedule and not self.sigmas[self.step_index] > self.config.split_time

    def _large_step(self, velocity: Tensor, sample: Tensor, generator: Any, noise: Tensor | None = None) -> Tensor:
        """The sample at the next sigma by `stable_velocity_step`, float32; `noise` is used in place of drawn noise."""
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]

        def drawn() -> Tensor:
            if noise is not None:
                return noise.to(sample.device, torch.float32)
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)

        ahead = stable_velocity_step(
            velocity.float(), sample.float(), sigma, sigma_next, LINEAR, drawn, self.config.noise_factor
        )
        self._step_index += 1
        return ahead


class _Schedule(Tensor):
    """The sigmas or timesteps of a run, which remembers those of the base class from which it was made.

    Image-to-image pipelines start after a share of the requested steps, given by `strength`, with `timesteps[k:]`. With
    fewer steps this index would mean another noise level, or none. So a slice counts the base class's steps: it
    begins with the base class's value k, followed by our values below it. Sigmas are sliced in this way only in a
    pipeline's `get_timesteps`, and behave like a tensor otherwise, as does everything else.
    """

    base: Tensor  # the base class's values
    below: list[int]  # for each of the base class's noise levels, the index of our first value below it
    anywhere: bool  # whether every slice counts in this way, or only those in a pipeline's `get_timesteps`
    cut_at: int  # the k of the latest slice

    # Results of operations, such as a slice, are plain tensors, so no network receives this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, kept: Tensor, base: Tensor, below: list[int], anywhere: bool) -> "_Schedule":
        schedule = kept.as_subclass(cls)
        schedule.base, schedule.below, schedule.anywhere, schedule.cut_at = base, below, anywhere, 0
        return schedule

    def begun(self, index: int) -> Tensor:
        """The base class's values up to `index`, then ours below, so that the steps from `[index:]` are run."""
        ours = self.as_subclass(Tensor)
        return torch.cat([self.base[: index + 1], ours[self.below[min(index, len(self.below) - 1)] :]])

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Schedule":
        copy = self.of(self.as_subclass(Tensor).clone(), self.base.clone(), self.below, self.anywhere)
        copy.cut_at = self.cut_at
        return copy

    def __getitem__(self, index: Any) -> Tensor:
        is_cut = isinstance(index, slice) and index.stop is None and index.step is None and (index.start or 0) > 0
        if is_cut and (self.anywhere or _caller() == "get_timesteps"):
            self.cut_at = index.start if index.start < len(self.base) else 0
            return self.begun(index.start)[index.start :]
        return self.as_subclass(Tensor)[index]

    def __len__(self) -> int:
        # If a pipeline gives its own sigmas (Flux, Qwen-Image, ...), `retrieve_timesteps` takes this length as the
        # number of steps of which `strength` is a share.
        return len(self.base) if _caller() == "retrieve_timesteps" else self.shape[0]


def _caller() -> str:
    """The name of the function that uses a schedule; each pipeline of diffusers has a copy of the two that matter."""
    return sys._getframe(2).f_code.co_name


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def refuse_other_processes(config: Any) -> None:
    """ValueError for a configuration that states another process than flow matching from noise to data."""
    prediction = config.get("prediction_type", FLOW_PREDICTION)
    if prediction != FLOW_PREDICTION:
        raise ValueError(f"prediction_type {prediction}: StableVS expects the velocity of flow matching")
    if config.get("use_flow_sigmas", True) is False:
        raise ValueError("use_flow_sigmas False: StableVS expects the sigmas of flow matching")
    if config.get("invert_sigmas"):
        raise ValueError("invert_sigmas True: StableVS expects sigmas that decrease to 0")
