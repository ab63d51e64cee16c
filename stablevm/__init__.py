"""stablevm: train flow-matching image generators on targets with less variance.

The main entry point is the objective, three lines in any training loop:

    objective = StableVM(ClassBank(num_classes=10, capacity=256, shape=(4, 32, 32)))
    draw = objective.draw(latents, labels, generator)
    loss = squared_error(model(draw.x_t, draw.t, draw.labels), draw.target).mean()

The names below are the public interface. Their signatures follow semantic versioning, and a name that will be removed
warns for one minor version first. Each is imported on first use, so `import stablevm` is fast. docs/api.md lists them
with one line each.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from stablevm.support.extras import explained
from stablevm.support.moved import keep_old_addresses
from stablevm.support.version import __version__ as __version__

if TYPE_CHECKING:  # what editors and type checkers see; a test compares it with _HOMES
    from stablevm.alignment import AlignmentSchedule as AlignmentSchedule
    from stablevm.alignment import alignment_loss as alignment_loss
    from stablevm.alignment import normalize_over_space as normalize_over_space
    from stablevm.alignment import weighted_alignment as weighted_alignment
    from stablevm.bank import ClassBank as ClassBank
    from stablevm.draw import Draw as Draw
    from stablevm.draw import ObjectiveSettings as ObjectiveSettings
    from stablevm.integrations.diffusers_pipeline import StableVMPipeline as StableVMPipeline
    from stablevm.integrations.diffusers_scheduler import (
        StableVSDPMSolverMultistepScheduler as StableVSDPMSolverMultistepScheduler,
    )
    from stablevm.integrations.diffusers_scheduler import StableVSFlowMatchScheduler as StableVSFlowMatchScheduler
    from stablevm.integrations.diffusers_scheduler import (
        StableVSUniPCMultistepScheduler as StableVSUniPCMultistepScheduler,
    )
    from stablevm.interpolant import COSINE as COSINE
    from stablevm.interpolant import LINEAR as LINEAR
    from stablevm.interpolant import Interpolant as Interpolant
    from stablevm.meanflow import MeanFlow as MeanFlow
    from stablevm.metrics.neighbours import coverage as coverage
    from stablevm.metrics.neighbours import precision_recall as precision_recall
    from stablevm.metrics.statistics import FeatureStatistics as FeatureStatistics
    from stablevm.metrics.statistics import frechet_distance as frechet_distance
    from stablevm.objective import FlowMatching as FlowMatching
    from stablevm.objective import StableTargetField as StableTargetField
    from stablevm.objective import StableVM as StableVM
    from stablevm.objective import squared_error as squared_error
    from stablevm.posterior import Posterior as Posterior
    from stablevm.solvers.fixed_steps import stable_velocity_step as stable_velocity_step
    from stablevm.solvers.integration import integrate as integrate
    from stablevm.solvers.settings import SamplerSettings as SamplerSettings
    from stablevm.support.errors import UserError as UserError
    from stablevm.times import draw_times as draw_times
    from stablevm.variance import VarianceCurve as VarianceCurve
    from stablevm.variance import variance_curve as variance_curve

keep_old_addresses()

# Names that need diffusers, which is optional.
_SCHEDULERS = (
    "StableVSDPMSolverMultistepScheduler",
    "StableVSFlowMatchScheduler",
    "StableVSUniPCMultistepScheduler",
)
_OPTIONAL = ("StableVMPipeline", *_SCHEDULERS)
# The module of each public name.
_HOMES = {
    "alignment": ("AlignmentSchedule", "alignment_loss", "normalize_over_space", "weighted_alignment"),
    "bank": ("ClassBank",),
    "draw": ("Draw", "ObjectiveSettings"),
    "integrations.diffusers_pipeline": ("StableVMPipeline",),
    "integrations.diffusers_scheduler": _SCHEDULERS,
    "interpolant": ("COSINE", "LINEAR", "Interpolant"),
    "meanflow": ("MeanFlow",),
    "metrics.neighbours": ("coverage", "precision_recall"),
    "metrics.statistics": ("FeatureStatistics", "frechet_distance"),
    "objective": ("FlowMatching", "StableTargetField", "StableVM", "squared_error"),
    "posterior": ("Posterior",),
    "solvers.fixed_steps": ("stable_velocity_step",),
    "solvers.integration": ("integrate",),
    "solvers.settings": ("SamplerSettings",),
    "support.errors": ("UserError",),
    "times": ("draw_times",),
    "variance": ("VarianceCurve", "variance_curve"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
# Names that were public: what each is called now, and the version that removes the old name (see CONTRIBUTING.md).
_MOVED = {"Protocol": ("stablevm.ObjectiveSettings", "0.3")}

__all__ = sorted(set(_HOME_OF) - set(_OPTIONAL))


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        now, gone_in = _MOVED[name]
        message = f"stablevm.{name} is now {now}; the old name will be removed in stablevm {gone_in}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        module, _, name = now.rpartition(".")
        return getattr(importlib.import_module(module), name)
    if name not in _HOME_OF:
        raise AttributeError(f"module 'stablevm' has no attribute {name!r}")
    try:
        home = importlib.import_module(f"stablevm.{_HOME_OF[name]}")
    except ModuleNotFoundError as error:
        raise explained(error, f"stablevm.{name}") from None
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
