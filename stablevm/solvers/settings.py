"""How to get from noise to a sample. Free of torch, so that the command's options can be checked against it."""

import functools
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from stablevm.support.errors import UserError

Mode = Literal["ode", "sde", "stablevs"]
Solver = Literal["euler", "heun", "dopri5"]
Spelling = Callable[[str, Any], str]  # a field and its value, as the reader gives them

# What was a field of SamplerSettings, though `integrate` knows no network.
_MOVED = ("cfg_scale", "guidance_low", "guidance_high", "legacy", "precision")


def _refuse_moved(cls: type) -> type:
    """Say where a field went, in place of Python's "unexpected keyword argument"."""
    construct = cls.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def told(self: Any, *args: Any, **given: Any) -> None:
        moved = [name for name in _MOVED if name in given]
        if moved:
            raise UserError(
                f"SamplerSettings has no {', '.join(moved)} any more, which `integrate` never looked at: guide inside "
                "your velocity, as stablevm.sampling.guidance.GuidedVelocity does"
            )
        construct(self, *args, **given)

    cls.__init__ = told  # type: ignore[misc]
    return cls


@_refuse_moved
@dataclass(frozen=True)
class SamplerSettings:
    """The integrator of `integrate`; `GenerateConfig` documents each field.

    UserError for what is out of range, and for a value that has no effect with the others: nothing is ignored.
    """

    mode: Mode = "sde"
    num_steps: int = 250
    solver: Solver = "euler"
    rtol: float = 1e-3
    atol: float = 1e-6
    edm_schedule: bool = False
    diffusion_scale: float = 1.0
    last_time: float = 0.04
    split_time: float = 0.85
    steps_below: int = 9
    above_split: Literal["ode", "sde"] = "ode"
    noise_factor: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _is_of_kind(value, kind):
                words = get_args(kind)
                expected = f"one of {', '.join(words)}" if words else f"a value of type {kind.__name__}"
                raise UserError(f"{name} {value!r}: expected {expected}")
        for name, met, expected in expectations(self, spelt_in_python):
            if not met:
                raise UserError(f"{spelt_in_python(name, getattr(self, name))}: expected {expected}")
        for name, reason in without_effect(self, spelt_in_python).items():
            value = getattr(self, name)
            if value != _DEFAULTS[name]:
                raise UserError(f"{spelt_in_python(name, value)} has no effect with {reason}: leave it out")


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(SamplerSettings)}


def spelt_in_python(name: str, value: Any) -> str:
    return f"{name} {value!r}"


def expectations(settings: Any, spelt: Spelling) -> list[tuple[str, bool, str]]:
    """Of each field that can be out of range: whether it is right, and what was expected. `settings` has the fields
    of `SamplerSettings`, of the right types.
    """
    mode, steps = spelt("mode", settings.mode), settings.num_steps
    stablevs, adaptive = settings.mode == "stablevs", settings.solver == "dopri5"
    two_steps = settings.mode != "ode" or (settings.edm_schedule and not adaptive)
    reason = spelt("edm_schedule", True) if settings.mode == "ode" else mode
    return [
        ("num_steps", steps >= 1, "at least 1"),
        ("num_steps", not two_steps or steps >= 2, f"at least 2 with {reason}"),
        ("solver", settings.mode == "ode" or settings.solver in ("euler", "heun"), f"euler or heun with {mode}"),
        ("rtol", 0 < settings.rtol < math.inf, "more than 0"),
        ("atol", 0 < settings.atol < math.inf, "more than 0"),
        (
            "edm_schedule",
            not stablevs or not settings.edm_schedule,
            f"{spelt('mode', 'ode')} or sde: stablevs has times of its own",
        ),
        ("split_time", 0 < settings.split_time < 1, "a time between 0 and 1"),
        ("steps_below", settings.steps_below >= 1, "at least 1"),
        (
            "steps_below",
            not stablevs or settings.steps_below < steps,
            f"fewer than {spelt('num_steps', steps)}",
        ),
        ("noise_factor", 0 <= settings.noise_factor <= 1, "a number in [0, 1]"),
        ("diffusion_scale", 0 <= settings.diffusion_scale < math.inf, "0 or more"),
        ("last_time", 0 < settings.last_time < 1, "a time between 0 and 1"),
    ]


def without_effect(settings: Any, spelt: Spelling) -> dict[str, str]:
    """Fields that the others make useless, and which others."""
    mode, idle = spelt("mode", settings.mode), {}
    if settings.mode == "stablevs":
        idle = {"last_time": mode}
        if settings.above_split == "ode":
            idle["diffusion_scale"] = spelt("above_split", "ode")
    else:
        idle |= dict.fromkeys(("split_time", "steps_below", "above_split", "noise_factor"), mode)
    if settings.mode == "sde" and settings.edm_schedule:
        idle["last_time"] = spelt("edm_schedule", True)
    if settings.mode == "ode":
        idle |= dict.fromkeys(("diffusion_scale", "last_time"), mode)
    solver = spelt("solver", settings.solver)
    idle |= dict.fromkeys(("num_steps", "edm_schedule") if settings.solver == "dopri5" else ("rtol", "atol"), solver)
    return idle


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Whether it is one of the words, or a bool, a whole number or a number, as `kind` says; no bool is a number."""
    if words := get_args(kind):
        return value in words
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, numbers.Real if kind is float else numbers.Integral)
