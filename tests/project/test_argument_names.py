"""The library names its arguments, and a command the options that set them."""

import ast
import re
from pathlib import Path

import pytest

import stablevm
from stablevm.commands import table
from stablevm.support.errors import arg, arguments_spelt
from stablevm.support.options import OPTION_OF, options_of
from stablevm.training.config import TrainConfig

PACKAGE = Path(stablevm.__file__).parent
# Rooms of commands, and the files of others that take a command's configuration.
COMMANDS = (
    "advice",
    "cli.py",
    "commands",
    "demo",
    "recipes",
    "evaluation",
    "preparation",
    "profiling",
    "quickstart",
    "sampling",
    "study",
    "sweep",
    "toy",
    "training",
)
OF_A_COMMAND = ("integrations/config.py", "integrations/importing.py", "integrations/pushing.py")
# A remedy may be a whole command: then its options stand behind its name.
WHOLE_COMMAND = re.compile(r"(stablevm (prepare|data|train|generate) |docker run |dataset_tools\.py )[^;:()]*")
LIBRARY = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if (inner := path.relative_to(PACKAGE)).parts[0] not in COMMANDS and inner.as_posix() not in OF_A_COMMAND
)


def texts(path):
    """The strings of a module, docstrings too; of an f-string its fixed parts, with {} for the others."""
    tree = ast.parse(path.read_text())
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_library_names_no_option(path):
    said = [text for text in texts(path) if re.search(r"--[a-z]", WHOLE_COMMAND.sub("", text))]
    assert not said, "name the argument, with `arg(...)` where a command has an option for it"


def test_an_argument_is_its_name_and_in_a_command_the_option_that_sets_it():
    assert arg("label_dropout") == "label_dropout"
    with arguments_spelt(options_of(TrainConfig)):
        assert arg("label_dropout") == "--cfg-prob"
        assert arg("data_dir") == arg("folder") == "--data-dir"
        assert arg("references") == "references"
    assert arg("label_dropout") == "label_dropout"


def test_every_option_that_an_argument_is_spelt_as_exists():
    options = {name for command in table.COMMANDS for name in command.fields}
    assert set(OPTION_OF.values()) <= options
