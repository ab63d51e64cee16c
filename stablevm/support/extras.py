"""The optional packages, and the extra of stablevm that installs each."""

from stablevm.support.errors import UserError

# Import names of the packages, as in pyproject.toml; messages name the first extra that has what is missing.
_DATA = frozenset({"PIL", "pyarrow", "sklearn"})
_PLOTS = frozenset({"PIL", "matplotlib"})
EXTRAS = {
    "data": _DATA,
    "plots": _PLOTS,
    "vae": frozenset({"diffusers"}),
    "rae": frozenset({"diffusers", "transformers"}),
    "pipelines": frozenset({"diffusers", "transformers", "ftfy", "imageio", "imageio_ffmpeg", "PIL"}),
    "hub": frozenset({"huggingface_hub"}),
    "wandb": frozenset({"wandb"}),
    "eval": _PLOTS | {"torch_fidelity"},
    "train": _DATA | _PLOTS | {"accelerate", "psutil", "tensorboard", "timm", "yaml"},
}
# All but the demo, whose server brings fifty packages.
EXTRAS["all"] = frozenset().union(*EXTRAS.values())
EXTRAS["demo"] = EXTRAS["train"] | {"gradio"}
_INSTALLED_AS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def need(purpose: str, *packages: str) -> None:
    """Raise UserError, which names the extra, unless all packages are installed; they are not imported."""
    from importlib.util import find_spec  # a tenth of what a command's help takes

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise _missing(purpose, missing)


def explained(error: ModuleNotFoundError, purpose: str) -> Exception:
    """The error that `need` would raise, if an extra has the missing module; otherwise the error itself."""
    package = (error.name or "").partition(".")[0]
    return _missing(purpose, [package]) if any(package in brought for brought in EXTRAS.values()) else error


def distribution(package: str) -> str:
    """The name under which pip installs an imported package."""
    return _INSTALLED_AS.get(package, package.replace("_", "-"))


def _missing(purpose: str, packages: list[str]) -> UserError:
    names = ", ".join(distribution(package) for package in packages)
    extra = next(extra for extra, brought in EXTRAS.items() if brought.issuperset(packages))
    return UserError(f"{purpose} needs {names}: pip install 'stablevm[{extra}]'")
