"""Old names of modules and keywords, from version 0.1: they work until 0.3, with a warning."""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

GONE_IN = "0.3"
Function = TypeVar("Function", bound=Callable[..., Any])
# Old and new names of modules and packages, without the leading `stablevm.`.
MOVED = {
    "autoencoder": "networks.autoencoder",
    "benchmark": "profiling",
    "benchmark.config": "profiling.config",
    "benchmark.machine": "support.machine",
    "benchmark.measure": "profiling.measure",
    "benchmark.random_data": "profiling.random_data",
    "benchmark.report": "profiling.results",
    "benchmark.run": "profiling.run",
    "compiler": "support.compiler",
    "encoders": "networks.encoders",
    "errors": "support.errors",
    "evaluation.adm_distances": "metrics.adm_distances",
    "evaluation.cautions": "evaluation.samples",
    "evaluation.checkpoint": "evaluation.evaluate",
    "evaluation.curves": "evaluation.sample_report",
    "evaluation.digits_extractor": "evaluation.small_extractor",
    "evaluation.digits_metrics": "evaluation.digits",
    "evaluation.figures": "figures.evaluation",
    "evaluation.inception": "evaluation.extractors",
    "evaluation.neighbours": "metrics.neighbours",
    "evaluation.outputs": "evaluation.config",
    "evaluation.report": "evaluation.page",
    "evaluation.report_style": "evaluation.page",
    "evaluation.sample_figures": "figures.evaluation",
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
    "models.digits_net": "networks.small_net",
    "models.initialisation": "networks.initialisation",
    "models.projectors": "networks.projectors",
    "models.sit": "networks.sit",
    "options": "support.options",
    "plotting": "figures.style",
    "precision": "support.precision",
    "preparation.report": "preparation.outcome",
    "processes": "support.processes",
    "rng": "support.rng",
    "sampling.dopri5": "solvers.dopri5",
    "sampling.pictures": "figures.sheets",
    "sampling.protocol": "sampling.provenance",
    "sampling.sampler": "solvers.integration",
    "sampling.scheduler": "integrations.diffusers_scheduler",
    "sampling.solvers": "solvers.fixed_steps",
    "schedules": "alignment",
    "snapshot": "networks.snapshot",
    "study.command": "advice.variance",
    "toy.figures": "figures.toy",
    "toy.variance": "toy.experiment",
    "toy.visualization": "toy.films",
    "training.anchors": "training.objectives",
    "training.clock": "training.step",
    "training.ema": "training.weights",
    "training.initial": "training.weights",
    "training.interruption": "training.launch",
    "training.main_process": "training.launch",
    "training.previews": "training.evaluation",
    "training.progress": "training.checkpoint",
    "training.rate": "training.step",
    "training.setup": "training.engine",
    "training.state": "training.weights",
    "variance_figure": "figures.variance",
}
_ALSO = {  # split since
    "alignment": ("times",),
    "figures.evaluation": ("figures.sheets",),
    "solvers.integration": ("sampling.guidance", "solvers.settings"),
    "toy.experiment": ("toy.mixture", "advice.variance"),
    "toy.films": ("figures.toy",),
    "training.engine": ("training.start", "training.objectives", "training.terms"),
}
# Names that changed too, in whichever new module has them.
RENAMED = {
    "Protocol": "Provenance",
    "Report": "Results",
    "divergence_figure": "plot_divergence",
    "draw_latents": "sample_latents",
    "film_frame": "plot_film_frame",
    "judge_digits": "evaluate_digits",
    "neighbour_rows": "plot_neighbours",
    "protocol_of": "provenance_of",
    "sample_grid": "plot_sample_grid",
    "sheet": "plot_sheet",
    "variance_figure": "plot_variance",
    "visualize": "make_films",
    "write_report": "write_page",
}


class _OldAddress:
    """Import finder for modules under their old names; such a module has the contents of the new one."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        old = name.removeprefix("stablevm.")
        if old == name or old not in MOVED:
            return None
        return ModuleSpec(
            name,
            self,  # type: ignore[arg-type]
            is_package=any(other.startswith(f"{old}.") for other in MOVED),
        )

    def create_module(self, spec: ModuleSpec) -> None:
        """The import system makes the module."""

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__.removeprefix("stablevm.")]
        homes = [importlib.import_module(f"stablevm.{home}") for home in (new, *_ALSO.get(new, ()))]

        def look_up(name: str) -> object:
            for known in (name, RENAMED.get(name, name)):
                for home in homes:
                    if hasattr(home, known):
                        return getattr(home, known)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = look_up  # type: ignore[method-assign]
        message = f"{module.__name__} is now {homes[0].__name__}; the old name will be removed in stablevm {GONE_IN}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)


def keep_old_addresses() -> None:
    """Make old names of modules importable, after all other finders."""
    if not any(isinstance(finder, _OldAddress) for finder in sys.meta_path):
        sys.meta_path.append(_OldAddress())


def old_names(module: str, **new_by_old: str) -> Callable[[str], object]:
    """The `__getattr__` of `module`, by its full name, that also finds names by their old ones, with a warning."""

    def look_up(name: str) -> object:
        if name not in new_by_old:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = new_by_old[name]
        message = f"{module}.{name} is now {module}.{new}; the old name will be removed in stablevm {GONE_IN}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], new)

    return look_up


def renamed(**new_by_old: str) -> Callable[[Function], Function]:
    """A decorator that lets a function accept old names of keywords, with a warning: `@renamed(old="new")`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def called(*values: Any, **keywords: Any) -> Any:
            for old in keywords.keys() & new_by_old:
                new = new_by_old[old]
                change = f"{function.__qualname__}: {old} is now {new}"
                message = f"{change}; the old keyword will be removed in stablevm {GONE_IN}"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                keywords[new] = keywords.pop(old)
            return function(*values, **keywords)

        return called  # type: ignore[return-value]

    return decorate
