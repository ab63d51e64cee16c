"""Modules and keywords under the names that version 0.1 gave them: they still work, with a warning, until 0.3."""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

GONE_IN = "0.3"
Function = TypeVar("Function", bound=Callable[..., Any])
# The old address of a module or a package, and the new one, both below `stablevm`.
MOVED = {
    "autoencoder": "networks.autoencoder",
    "benchmark": "profiling",
    "benchmark.config": "profiling.config",
    "benchmark.machine": "profiling.machine",
    "benchmark.measure": "profiling.measure",
    "benchmark.random_data": "profiling.random_data",
    "benchmark.report": "profiling.report",
    "benchmark.run": "profiling.run",
    "compiler": "support.compiler",
    "encoders": "networks.encoders",
    "errors": "support.errors",
    "evaluation.adm_distances": "metrics.adm_distances",
    "evaluation.figures": "figures.evaluation",
    "evaluation.neighbours": "metrics.neighbours",
    "evaluation.sample_figures": "figures.samples",
    "evaluation.statistics": "metrics.statistics",
    "files": "support.files",
    "foreign_weights": "support.foreign_weights",
    "images": "support.images",
    "importing": "integrations",
    "importing.command": "integrations.importing",
    "importing.config": "integrations.config",
    "importing.conversion": "integrations.conversion",
    "importing.reader": "integrations.reader",
    "models": "networks",
    "models.config": "networks.sit_config",
    "models.digits_net": "networks.digits_net",
    "models.initialisation": "networks.initialisation",
    "models.projectors": "networks.projectors",
    "models.sit": "networks.sit",
    "options": "support.options",
    "plotting": "figures.style",
    "precision": "support.precision",
    "processes": "support.processes",
    "rng": "support.rng",
    "sampling.dopri5": "solvers.dopri5",
    "sampling.pictures": "figures.sheets",
    "sampling.sampler": "solvers.integration",
    "sampling.scheduler": "integrations.diffusers_scheduler",
    "sampling.solvers": "solvers.fixed_steps",
    "schedules": "alignment",
    "snapshot": "networks.snapshot",
    "toy.figures": "figures.toy",
    "variance_figure": "figures.variance",
}
_ALSO = {"alignment": ("times",), "solvers.integration": ("sampling.guidance", "solvers.settings")}  # parted since


class _OldAddress(MetaPathFinder, Loader):
    """Finds a module by its old address, as one that has the names of the new module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        old = name.removeprefix("stablevm.")
        if old == name or old not in MOVED:
            return None
        return ModuleSpec(name, self, is_package=any(other.startswith(f"{old}.") for other in MOVED))

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__.removeprefix("stablevm.")]
        homes = [importlib.import_module(f"stablevm.{home}") for home in (new, *_ALSO.get(new, ()))]

        def look_up(name: str) -> object:
            for home in homes:
                if hasattr(home, name):
                    return getattr(home, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = look_up  # type: ignore[method-assign]
        message = f"{module.__name__} is now {homes[0].__name__}; the old address goes in stablevm {GONE_IN}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)


def keep_old_addresses() -> None:
    """Let Python look up modules by their old addresses, after all other ways."""
    if not any(isinstance(finder, _OldAddress) for finder in sys.meta_path):
        sys.meta_path.append(_OldAddress())


def renamed(**new_by_old: str) -> Callable[[Function], Function]:
    """A decorator: the function takes keywords by their old names too, with a warning."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def called(*values: Any, **keywords: Any) -> Any:
            for old in keywords.keys() & new_by_old:
                new = new_by_old[old]
                message = f"{function.__qualname__}: {old} is now {new}; the old keyword goes in stablevm {GONE_IN}"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                keywords[new] = keywords.pop(old)
            return function(*values, **keywords)

        return called  # type: ignore[return-value]

    return decorate
