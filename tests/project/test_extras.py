"""The base installation is small, an extra brings whatever else its room imports, and what is missing is one line."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import stablevm
from stablevm.support import extras
from stablevm.support.errors import UserError
from stablevm.support.extras import distribution, need
from tests.helpers.modules import MODULES, PACKAGE, dotted, imports

PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
# Extras whose packages a room may import, beside the base.
EXTRAS_OF_ROOM = {
    "support": {"hub", "plots"},
    "networks": {"train", "vae"},
    "data": {"data"},
    "figures": {"plots"},
    "integrations": {"vae", "hub", "pipelines"},
    "preparation": {"data", "train"},  # stablevm encoder trains
    "evaluation": {"eval"},
    "training": {"train", "wandb"},
    "toy": {"plots"},
    "profiling": {"train"},
    "demo": {"demo"},
    "commands": {"train"},
}


def names(requirements):
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}


def brought(extra):
    """The packages that an extra installs, those of the extras that it includes too."""
    found = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        inner = re.fullmatch(r"stablevm\[(.*)\]", requirement)
        found |= set().union(*map(brought, inner[1].split(","))) if inner else names([requirement])
    return found


BASE = names(PROJECT["dependencies"])
EXTRAS = {extra: brought(extra) for extra in PROJECT["optional-dependencies"].keys() - {"docs", "dev"}}


def third_party(module):
    packages = {name.partition(".")[0] for name in imports(module)}
    return {distribution(package) for package in packages - sys.stdlib_module_names - {"stablevm", "__future__"}}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_package_is_in_the_base_or_in_an_extra_of_its_room(module):
    room = dotted(module).partition(".")[0]
    allowed = BASE.union(*(EXTRAS[extra] for extra in EXTRAS_OF_ROOM.get(room, ())))
    assert third_party(module) <= allowed, f"{module} imports {third_party(module) - allowed}"


def test_no_package_is_installed_that_nothing_imports():
    imported = set().union(*map(third_party, MODULES))
    every = BASE | brought("all") | brought("demo")
    others = {"tensorboard", "transformers", "ftfy", "imageio", "imageio-ffmpeg"}
    assert every == imported | others, "accelerate's tracker, diffusers' RAE, its pipelines and its files of videos"


def test_the_table_is_that_of_the_project():
    assert {extra: {*map(distribution, packages)} for extra, packages in extras.EXTRAS.items()} == EXTRAS


def test_what_is_missing_is_named_with_its_extras(monkeypatch):
    for package in ("sklearn", "timm", "accelerate"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as error:
        need("this", "torch", "timm", "sklearn", "accelerate")
    assert str(error.value) == "this needs timm, scikit-learn, accelerate: pip install 'stablevm[train]'"


def test_a_public_name_names_the_extra_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "stablevm.integrations.diffusers_scheduler", raising=False)
    with pytest.raises(UserError, match=r"^stablevm.StableVSFlowMatchScheduler needs diffusers: .*\[vae\]'$"):
        stablevm.StableVSFlowMatchScheduler  # noqa: B018


def test_every_command_of_the_base_alone_ends_in_one_line(tmp_path):
    """What is not in the base is hidden; each command that needs some of it says so before it writes anything."""
    commands = {
        "train --exp-name a --data-dir .": "train",
        "train --exp-name a --data-dir . --resume": "train",
        "generate --ckpt x": "train",
        "evaluate x.npz --reference y.npz --report": "plots",
        "evaluate --ckpt x --reference y.npz": "train",
        "import x.pt --output model": "train",
        "push x me/y": "hub",
        "demo --ckpt x": "demo",
        "quickstart": "train",
        "variance --data-dir .": "plots",
        "study --data-dir . --extractor x": "train",
        "benchmark": "train",
        "toy": "plots",
        "prepare digits digits": "data",
        "prepare features --data-dir . --dest d --grid-size 4": "train",
        "prepare convert --source . --dest d --resolution 8": "data",
        "prepare pack --source . --dest d": "data",
        "data info .": "plots",
    }
    code = f"""
import contextlib, io, sys
hidden = {sorted({*extras.EXTRAS["all"], *extras.EXTRAS["demo"], "scipy", "torchvision"})}
sys.modules.update(dict.fromkeys(hidden))
from stablevm import cli
for command in {list(commands)}:
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        assert cli.main(command.split()) == 2, command
    print(told.getvalue(), end="")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line, (command, extra) in zip(lines, commands.items(), strict=True):
        assert re.fullmatch(rf"error: .* needs .*: pip install 'stablevm\[{extra}\]'", line), (command, line)
    assert not list(Path(tmp_path).iterdir())
