"""The wheel and the sdist: what is in them, and that the wheel works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import stablevm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "docs", "examples", "preprocessing", "stablevm", "tests")

EVERY_PUBLIC_NAME = """
import sys, stablevm
for name in stablevm._HOME_OF:
    getattr(stablevm, name)
homes = {module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "stablevm"}
sys.exit([home for home in homes if not home.startswith(sys.argv[1])] or None)
"""
# As small as in test_quickstart.py.
QUICKSTART = """
import sys
from stablevm import cli
from stablevm.quickstart import recipe
recipe.NUM_SAMPLES, recipe.EXTRACTOR_STEPS = 40, 40
sys.exit(cli.main(["quickstart", "--output-dir", sys.argv[1], "--steps", "4", "--no-compare"]))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What is tracked, copied, so that building leaves nothing in the checkout and finds nothing old there."""
    copy = tmp_path_factory.mktemp("distribution") / "checkout"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("[!.]*"):
        if file.is_file():
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def archives(checkout):
    """The sdist, the wheel that is built from it, and the wheel that is built from the checkout."""
    build, folder = [sys.executable, "-m", "build", "--no-isolation"], checkout.parent
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for more in (["--outdir", folder / "dist"], ["--wheel", "--outdir", folder / "direct"]):
        done = subprocess.run([*build, *more, checkout], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    patterns = ("dist/*.tar.gz", "dist/*.whl", "direct/*.whl")
    return [next(folder.glob(pattern)) for pattern in patterns]


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
    subprocess.run([*pip, archives[1]], check=True)
    return folder


def outside(installed, *command):
    """Run a command that finds the installed wheel before any checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command], cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_sdist_holds_the_checkout(archives, checkout):
    with tarfile.open(archives[0]) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", "check", "train.py"} <= names
    assert {f"{folder}/{name}" for folder in FOLDERS for name in files(checkout / folder)} <= names


def test_wheel_holds_the_package_and_nothing_else(archives, checkout):
    from_sdist, direct = (set(zipfile.ZipFile(wheel).namelist()) for wheel in archives[1:])
    assert from_sdist == direct
    metadata = f"stablevm-{stablevm.__version__}.dist-info/"
    assert {name for name in direct if not name.startswith(metadata)} == {
        f"stablevm/{name}" for name in files(checkout / "stablevm")
    }
    assert metadata + "licenses/LICENSE" in direct


def test_every_public_name_outside_the_checkout(installed):
    outside(installed, sys.executable, "-c", EVERY_PUBLIC_NAME, installed)


def test_quickstart_outside_the_checkout(installed, tmp_path):
    assert "quickstart" in outside(installed, installed / "bin" / "stablevm", "--help")
    outside(installed, sys.executable, "-c", QUICKSTART, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()
