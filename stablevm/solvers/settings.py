"""The settings of solvers, from noise to data, without importing torch, so that options can be checked with them."""

import functools
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from stablevm.support.errors import UserError
from stablevm.support.ranges import ABOVE_0, AT_LEAST_1, NOT_NEGATIVE, TIME_BETWEEN, UNIT, Range

Mode = Literal["ode", "sde", "stablevs", "meanflow"]
Solver = Literal["euler", "heun", "dopri5"]
Spelling = Callable[[str, Any], str]  # writes a field and its value in the words of the reader

# Former fields of SamplerSettings, which concern the network and not `integrate`.
_MOVED = ("cfg_scale", "guidance_low", "guidance_high", "legacy", "precision")


@dataclass(frozen=True)
class SamplerOptions:
    """The integrator: from noise at t = 1 to a sample at t = 0."""

    GROUP: ClassVar[str] = "sampler"

    mode: Mode = "sde"
    """ode: integrate the velocity. sde: SiT's stochastic sampler. stablevs: StableVS, few large steps below
    `split_time`. meanflow: one or a few steps with the mean velocities of a network that learnt them (MeanFlow)."""
    num_steps: int = 250
    """Steps from noise to image, 1 or more; for the sde, stablevs and `edm_schedule` 2 or more."""
    solver: Solver = "euler"
    """euler: one network evaluation per step; for the sde it is Euler-Maruyama. heun: second order, two evaluations
    per step. dopri5, for the ode: fifth order, with steps that adapt to each image until `rtol` and `atol` are met."""
    rtol: float = 1e-3
    """Relative error that dopri5 permits in a step, more than 0."""
    atol: float = 1e-6
    """Absolute error that dopri5 permits in a step in addition to the relative one, more than 0."""
    edm_schedule: bool = False
    """Steps spaced as EDM's noise levels, densest near the image, instead of evenly."""
    time_shift: float | None = None
    """Shift of the grid of times towards noise, more than 0: sigma / alpha of each time is multiplied by it, so that on
    the linear path t becomes s t / (1 + (s - 1) t). 1 leaves the grid as it is.
    Default: as the network was trained."""
    diffusion_scale: float = 1.0
    """Noise of the sde, 0 or more: its diffusion is this times sigma(t). 1 as in StableVM, 2 as in REPA."""
    last_time: float = 0.04
    """Time at which the sde stops adding noise, in (0, 1); one step without noise leads from there to 0."""
    split_time: float = 0.85
    """Time in (0, 1) below which stablevs takes its large steps."""
    steps_below: int = 9
    """Number of large steps below `split_time`, 1 or more and less than `num_steps`."""
    above_split: Literal["ode", "sde"] = "ode"
    """How stablevs integrates from noise to `split_time`."""
    noise_factor: float = 0.0
    """Fresh noise in the large steps of stablevs, from 0 (none) to 1 (the largest possible)."""

    def expectations(self, spelt: Spelling) -> list[tuple[str, bool, str]]:
        """For each field that can be out of range: its name, whether it is right, and what was expected.

        The fields must have the right types.
        """
        mode, steps = spelt("mode", self.mode), self.num_steps
        stablevs, adaptive = self.mode == "stablevs", self.solver == "dopri5"
        two_steps = self.mode in ("sde", "stablevs") or (self.edm_schedule and not adaptive)
        reason = mode if self.mode in ("sde", "stablevs") else spelt("edm_schedule", True)
        solvers = {"sde": "euler or heun", "stablevs": "euler or heun", "meanflow": "euler"}
        return [
            *(
                (name, (value := getattr(self, name)) is None or value in range_, range_.words)
                for name, range_ in SAMPLER_RANGES.items()
            ),
            ("num_steps", not two_steps or steps >= 2, f"at least 2 with {reason}"),
            (
                "solver",
                self.mode == "ode" or self.solver in solvers.get(self.mode, self.solver).split(" or "),
                f"{solvers.get(self.mode)} with {mode}",
            ),
            (
                "edm_schedule",
                not stablevs or not self.edm_schedule,
                f"{spelt('mode', 'ode')} or sde: stablevs has times of its own",
            ),
            ("steps_below", not stablevs or self.steps_below < steps, f"fewer than {spelt('num_steps', steps)}"),
        ]

    def without_effect(self, spelt: Spelling) -> dict[str, str]:
        """The fields without effect, each with the setting that is the reason."""
        mode, idle = spelt("mode", self.mode), {}
        if self.mode == "stablevs":
            idle = {"last_time": mode}
            if self.above_split == "ode":
                idle["diffusion_scale"] = spelt("above_split", "ode")
        else:
            idle |= dict.fromkeys(("split_time", "steps_below", "above_split", "noise_factor"), mode)
        if self.mode == "sde" and self.edm_schedule:
            idle["last_time"] = spelt("edm_schedule", True)
        if self.mode in ("ode", "meanflow"):
            idle |= dict.fromkeys(("diffusion_scale", "last_time"), mode)
        solver = spelt("solver", self.solver)
        if self.edm_schedule:
            idle["time_shift"] = spelt("edm_schedule", True)
        grid = ("num_steps", "edm_schedule", "time_shift")
        idle |= dict.fromkeys(grid if self.solver == "dopri5" else ("rtol", "atol"), solver)
        return idle


# The range of each number; conditions on several fields are in `SamplerOptions.expectations`.
SAMPLER_RANGES: dict[str, Range] = {
    "num_steps": AT_LEAST_1,
    "rtol": ABOVE_0,
    "atol": ABOVE_0,
    "time_shift": ABOVE_0,
    "diffusion_scale": NOT_NEGATIVE,
    "last_time": TIME_BETWEEN,
    "split_time": TIME_BETWEEN,
    "steps_below": AT_LEAST_1,
    "noise_factor": UNIT,
}
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(SamplerOptions)}


def _refuse_moved(cls: type) -> type:
    """Explain where a former field is now, instead of Python's "unexpected keyword argument"."""
    construct = cls.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        moved = [name for name in _MOVED if name in given]
        if moved:
            raise UserError(
                f"SamplerSettings has no {', '.join(moved)} any more, because `integrate` never used them: apply "
                "guidance in your velocity, as stablevm.sampling.guidance.GuidedVelocity does"
            )
        construct(self, *args, **given)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


@_refuse_moved
@dataclass(frozen=True)
class SamplerSettings(SamplerOptions):
    """The integrator of `integrate`: the options of `SamplerOptions`, which documents each field.

    UserError for what is out of range, and for a value that has no effect with the others: nothing is ignored.
    """

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if name in _DEFAULTS and not _is_of_kind(getattr(self, name), kind):
                kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind
                words = get_args(kind)
                expected = f"one of {', '.join(words)}" if words else f"a value of type {kind.__name__}"
                raise UserError(f"{spelt_in_python(name, getattr(self, name))}: expected {expected}")
        for name, met, expected in self.expectations(spelt_in_python):
            if not met:
                raise UserError(f"{spelt_in_python(name, getattr(self, name))}: expected {expected}")
        for name, reason in self.without_effect(spelt_in_python).items():
            value = getattr(self, name)
            if value != _DEFAULTS[name]:
                raise UserError(f"{spelt_in_python(name, value)} has no effect with {reason}: leave it out")


def settings_of(options: SamplerOptions) -> SamplerSettings:
    """The sampler's part of a command's options; UserError where one of them has no effect."""
    return SamplerSettings(**{name: getattr(options, name) for name in _DEFAULTS})


def spelt_in_python(name: str, value: Any) -> str:
    return f"{name} {value!r}"


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Whether it is one of the words, or a bool, a whole number or a number, as `kind` says; no bool is a number."""
    if isinstance(kind, UnionType):
        return value is None or _is_of_kind(value, get_args(kind)[0])
    if words := get_args(kind):
        return value in words
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, numbers.Real if kind is float else numbers.Integral)
