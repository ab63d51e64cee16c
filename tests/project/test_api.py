"""The public names and their signatures, frozen: a change must be deliberate, with the version.

python -m tests.project.test_api --write
"""

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import stablevm
from tests.helpers.frozen import plain_json

ROOT = Path(__file__).parents[2]
FROZEN = ROOT / "tests" / "golden" / "api.json"


def described(name):
    """A function's signature; a class's, with its public methods; what else it is."""
    public = getattr(stablevm, name)
    if not inspect.isclass(public):
        return str(inspect.signature(public)) if inspect.isfunction(public) else type(public).__name__
    if issubclass(public, Exception):
        return f"exception ({public.__base__.__name__})"
    members = {
        key: str(inspect.signature(member)) if callable(member) else "value"
        for key, member in inspect.getmembers(public)
        if not key.startswith("_") and key in vars(public)
    }
    fields = dataclasses.fields(public) if dataclasses.is_dataclass(public) else ()
    constructor = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(public)))
    return {"constructor": constructor, **{field.name: "field" for field in fields}, **members}


def surface():
    return {name: described(name) for name in sorted(stablevm._HOME_OF)}


def test_public_interface_is_the_frozen_one():
    assert plain_json(surface()) == json.loads(FROZEN.read_text())


def test_every_public_name_is_documented():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in stablevm._HOME_OF:
        public = getattr(stablevm, name)
        assert public.__doc__, f"{name} has no docstring"
        assert f"`{name}`" in page, f"{name} has no line in docs/api.md"
        assert f"\n::: stablevm.{stablevm._HOME_OF[name]}.{name}\n" in page, f"docs/api.md does not show {name}"


def functions_of(public):
    """A public function, or the methods of a class by their names, each with the text that documents its arguments."""
    if inspect.isfunction(public):
        return {public.__name__: (public, public.__doc__)}
    found = {}
    for name, value in vars(public).items():
        function = getattr(value, "__func__", value.fget if isinstance(value, property) else value)
        generated = name == "__init__" and dataclasses.is_dataclass(public)
        if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")) and not generated:
            found[name] = function, f"{public.__doc__} {function.__doc__}"
            assert function.__doc__ or name == "__init__", f"{public.__name__}.{name} has no docstring"
    return found


@pytest.mark.parametrize("name", sorted(set(stablevm.__all__) - {"LINEAR", "COSINE"}))
def test_docstrings_name_every_argument(name):
    """They are shown on hover, where no other text explains an argument."""
    for where, (function, text) in functions_of(getattr(stablevm, name)).items():
        arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
        unnamed = sorted(argument for argument in arguments if not re.search(rf"\b{argument}\b", text))
        assert not unnamed, f"the docstring of {where} does not mention {', '.join(unnamed)}"


def test_type_checkers_see_the_same_names():
    seen = {}
    for node in ast.walk(ast.parse(Path(stablevm.__file__).read_text())):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for line in node.body:
                seen |= {name.asname: line.module for name in line.names if name.asname == name.name}
    assert seen == {name: f"stablevm.{home}" for name, home in stablevm._HOME_OF.items()}


def test_a_moved_name_warns_and_works(monkeypatch):
    moves = {"Bank": ("stablevm.ClassBank", "0.3"), "sit": ("stablevm.networks.sit.SiT", "0.3")}
    monkeypatch.setattr(stablevm, "_MOVED", moves)
    with pytest.warns(
        DeprecationWarning, match=r"^stablevm\.Bank is now stablevm\.ClassBank; .* will be removed in stablevm 0\.3$"
    ) as seen:
        from stablevm import Bank
    assert Bank is stablevm.ClassBank and {warning.filename for warning in seen} == {__file__}
    with pytest.warns(DeprecationWarning, match="SiT"):
        assert stablevm.sit.__name__ == "SiT"


def test_moved_names_are_not_public_and_lead_to_what_exists():
    assert not set(stablevm._MOVED) & set(stablevm._HOME_OF)
    for name in stablevm._MOVED:
        with pytest.warns(DeprecationWarning):
            getattr(stablevm, name)


def test_old_keywords_warn_and_work():
    bank = stablevm.ClassBank(2, 4, (3,))
    with pytest.warns(DeprecationWarning, match=r"protocol is now settings; .* in stablevm 0\.3$") as seen:
        objective = stablevm.StableVM(bank, protocol=stablevm.ObjectiveSettings(null_class=2))
    assert objective.settings.null_class == 2 and {warning.filename for warning in seen} == {__file__}
    latents, labels = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.warns(DeprecationWarning) as seen:
        old = objective.draw(latents, labels, stream=torch.Generator().manual_seed(1), pool_stream=torch.Generator())
        assert objective.protocol is objective.settings
    assert len(seen) == 3
    again = stablevm.StableVM(stablevm.ClassBank(2, 4, (3,)), objective.settings)
    new = again.draw(latents, labels, torch.Generator().manual_seed(1))
    assert torch.equal(old.x_t, new.x_t)
    with pytest.warns(DeprecationWarning, match="draw_times: stream is now generator"):
        stablevm.draw_times("uniform", stablevm.LINEAR, 2, stream=torch.Generator())


def test_a_name_that_is_another_since_is_found_where_it_was():
    from stablevm import objective

    with pytest.warns(DeprecationWarning, match=r"objective.Protocol is now stablevm.objective.ObjectiveSettings"):
        assert objective.Protocol is stablevm.ObjectiveSettings
    with pytest.raises(AttributeError):
        objective.nothing  # noqa: B018


def test_star_gives_every_name_but_the_optional_ones_without_diffusers():
    code = "import sys; sys.modules['diffusers'] = None\nfrom stablevm import *\nprint(*globals())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert set(stablevm._HOME_OF) - set(done.stdout.split()) == set(stablevm._OPTIONAL), done.stderr


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, stablevm; sys.exit(bool({'torch', 'numpy', 'matplotlib', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_one_version_everywhere_and_no_file_left_out_of_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)[1]
    assert project["project"]["version"] == stablevm.__version__ == cited
    globs = project["tool"]["setuptools"]["package-data"]["stablevm"]
    declared = {path for each in globs for path in (ROOT / "stablevm").glob(each)}
    files = (path for path in (ROOT / "stablevm").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    assert set(files) == declared


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    FROZEN.write_text(json.dumps(plain_json(surface()), indent=1) + "\n")
