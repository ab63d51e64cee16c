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

if TYPE_CHECKING:
    from stablevm.alignment import AlignmentSchedule, alignment_loss, normalize_over_space, weighted_alignment
    from stablevm.bank import ClassBank
    from stablevm.draw import Draw, ObjectiveSettings
    from stablevm.integrations.diffusers_scheduler import StableVSFlowMatchScheduler as StableVSFlowMatchScheduler
    from stablevm.interpolant import COSINE, LINEAR, Interpolant
    from stablevm.metrics.neighbours import coverage, precision_recall
    from stablevm.metrics.statistics import FeatureStatistics, frechet_distance
    from stablevm.objective import FlowMatching, StableTargetField, StableVM, squared_error
    from stablevm.posterior import Posterior
    from stablevm.solvers.fixed_steps import stable_velocity_step
    from stablevm.solvers.integration import integrate
    from stablevm.solvers.settings import SamplerSettings
    from stablevm.support.errors import UserError
    from stablevm.times import draw_times
    from stablevm.variance import VarianceCurve, variance_curve

keep_old_addresses()

# The module of each public name. __all__ lists them too, except the one that needs diffusers, which is optional.
_HOMES = {
    "alignment": ("AlignmentSchedule", "alignment_loss", "normalize_over_space", "weighted_alignment"),
    "bank": ("ClassBank",),
    "draw": ("Draw", "ObjectiveSettings"),
    "integrations.diffusers_scheduler": ("StableVSFlowMatchScheduler",),
    "interpolant": ("COSINE", "LINEAR", "Interpolant"),
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

__all__ = [
    "COSINE",
    "LINEAR",
    "AlignmentSchedule",
    "ClassBank",
    "Draw",
    "FeatureStatistics",
    "FlowMatching",
    "Interpolant",
    "ObjectiveSettings",
    "Posterior",
    "SamplerSettings",
    "StableTargetField",
    "StableVM",
    "UserError",
    "VarianceCurve",
    "alignment_loss",
    "coverage",
    "draw_times",
    "frechet_distance",
    "integrate",
    "normalize_over_space",
    "precision_recall",
    "squared_error",
    "stable_velocity_step",
    "variance_curve",
    "weighted_alignment",
]


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
