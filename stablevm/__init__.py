"""stablevm: flow-matching image generators trained on less noisy targets.

The front door is the objective, which fits into any training loop (see `stablevm.objective`). Names are imported
when they are first used, so that `import stablevm` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stablevm.alignment import alignment_loss, normalize_over_space, weighted_alignment
    from stablevm.bank import ClassBank
    from stablevm.interpolant import COSINE, LINEAR, Interpolant
    from stablevm.objective import Draw, FlowMatching, Protocol, StableTargetField, StableVM, squared_error
    from stablevm.posterior import Posterior
    from stablevm.schedules import AlignmentSchedule

_HOMES = {
    "alignment": ("alignment_loss", "normalize_over_space", "weighted_alignment"),
    "bank": ("ClassBank",),
    "interpolant": ("COSINE", "LINEAR", "Interpolant"),
    "objective": ("Draw", "FlowMatching", "Protocol", "StableTargetField", "StableVM", "squared_error"),
    "posterior": ("Posterior",),
    "schedules": ("AlignmentSchedule",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "COSINE",
    "LINEAR",
    "AlignmentSchedule",
    "ClassBank",
    "Draw",
    "FlowMatching",
    "Interpolant",
    "Posterior",
    "Protocol",
    "StableTargetField",
    "StableVM",
    "alignment_loss",
    "normalize_over_space",
    "squared_error",
    "weighted_alignment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'stablevm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stablevm.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
