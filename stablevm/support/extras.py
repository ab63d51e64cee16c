"""The packages that the base installation leaves out, and the extra of stablevm that brings each."""

from importlib.util import find_spec

from stablevm.support.errors import UserError

# By the names that are imported, as in pyproject.toml; the first extra that brings what is missing is the one to name.
_DATA = frozenset({"PIL", "sklearn"})
_PLOTS = frozenset({"PIL", "matplotlib"})
EXTRAS = {
    "data": _DATA,
    "plots": _PLOTS,
    "vae": frozenset({"diffusers"}),
    "hub": frozenset({"huggingface_hub"}),
    "wandb": frozenset({"wandb"}),
    "eval": _PLOTS | {"torch_fidelity"},
    "train": _DATA | _PLOTS | {"accelerate", "psutil", "tensorboard", "timm"},
}
EXTRAS["all"] = frozenset().union(*EXTRAS.values())
_INSTALLED_AS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def need(purpose: str, *packages: str) -> None:
    """UserError that names the extra unless the packages are there. They are looked up, not imported."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise _missing(purpose, missing)


def explained(error: ModuleNotFoundError, purpose: str) -> Exception:
    """The error that `need` raises, if an extra brings the module that was not found; else the error itself."""
    package = (error.name or "").partition(".")[0]
    return _missing(purpose, [package]) if package in EXTRAS["all"] else error


def distribution(package: str) -> str:
    """The name under which an imported package is installed."""
    return _INSTALLED_AS.get(package, package.replace("_", "-"))


def _missing(purpose: str, packages: list[str]) -> UserError:
    names = ", ".join(distribution(package) for package in packages)
    extra = next(extra for extra, brought in EXTRAS.items() if brought.issuperset(packages))
    return UserError(f"{purpose} needs {names}: pip install 'stablevm[{extra}]'")
