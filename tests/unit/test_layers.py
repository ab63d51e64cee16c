"""A room imports only from lower floors, heavy packages stay where they belong, option definitions stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stablevm

PACKAGE = Path(stablevm.__file__).parent
FLOORS = dict(
    enumerate(
        [
            ("errors", "text", "shapes"),
            ("files", "foreign_weights", "hub", "interpolant", "launcher", "rng", "precision", "compiler"),
            (
                "locks",
                "processes",
                "posterior",
                "schedules",
                "bank",
                "alignment",
                "models",
                "autoencoder",
                "images",
                "plotting",
                "cards",
                "tensor_files",
                "options",
            ),
            (
                "objective",
                "encoders",
                "snapshot",
                "variance",
                "data",
                "evaluation.statistics",
                "sampling.solvers",
                "sampling.dopri5",
            ),
            ("sampling", "preparation", "importing", "variance_figure"),
            ("evaluation",),
            ("training", "study"),
            ("toy", "quickstart", "benchmark"),
            ("cli",),
            ("__main__", "__init__"),
        ]
    )
)
# Packages of training machinery and of the command line, and the lowest floor that may use them.
LOWEST_FLOOR = {"accelerate": 6, "wandb": 6, "tensorboard": 6, "tyro": 4, "tqdm": 4, "matplotlib": 2}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def dotted(module):
    return ".".join(module.with_suffix("").parts).removesuffix(".__init__")


def home(name):
    """The floor and the room of `models.sit` or the like: the longest entry of the table that it starts with."""
    rooms = [(room, floor) for floor, rooms in FLOORS.items() for room in rooms]
    matching = [(room, floor) for room, floor in rooms if f"{name}.".startswith(f"{room}.")]
    assert matching, f"stablevm.{name} is on no floor: add it to the table in {Path(__file__).name}"
    room, floor = max(matching, key=lambda entry: len(entry[0]))
    return floor, room.split(".")[0]


def imports(module):
    """Full names that a module imports, inside functions too."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("stablevm.").replace(".", "/")
                is_module = (PACKAGE / f"{inner}.py").exists() or (PACKAGE / inner).is_dir()
                yield f"{node.module}.{alias.name}" if node.module.startswith("stablevm") and is_module else node.module


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_lead_downstairs(module):
    floor, room = home(dotted(module))
    for name in imports(module):
        package, _, inner = name.partition(".")
        if package == "stablevm" and inner:
            below, other = home(inner)
            assert below < floor or other == room, f"{module} (floor {floor}) imports {name} (floor {below})"
        assert floor >= LOWEST_FLOOR.get(package, 0), f"{module} (floor {floor}) imports {package}"


def test_the_documents_show_the_same_floors():
    page = (PACKAGE.parent / "docs" / "design.md").read_text()
    shown = {
        int(floor): set(re.findall(r"`([\w.]+)`", rooms)) for floor, rooms in re.findall(r"\| (\d) \| (.*) \|", page)
    }
    assert shown == {floor: set(rooms) for floor, rooms in FLOORS.items() if rooms != ("__main__", "__init__")}


def test_option_definitions_import_no_torch():
    code = (
        "import sys, stablevm.cli, stablevm.training.config, stablevm.sampling.config, stablevm.quickstart.config, "
        "stablevm.evaluation.config, stablevm.preparation.config, "
        "stablevm.importing.config, stablevm.study.config, stablevm.benchmark.config; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_of_every_command_imports_no_torch():
    code = """
import sys
from stablevm import cli
commands = [(cli.main, [name]) for name in cli.COMMANDS] + [(cli.main, ["evaluate", "--ckpt", "x"])]
steps = ((cli.prepare, cli.PREPARE_STEPS), (cli.data, cli.DATA_ACTIONS), (cli.dataset_tools, cli.FOLDER_STEPS))
for command, words in [*commands, *((choose, [name]) for choose, table in steps for name in table)]:
    try:
        status = command([*words, "--help"])
    except SystemExit as end:
        status = end.code
    heavy = {"torch", "numpy", "scipy", "sklearn", "PIL", "matplotlib", "diffusers"} & set(sys.modules)
    assert not status and not heavy, (words, status, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    for name in stablevm._HOME_OF:
        assert getattr(stablevm, name) is not None
    with pytest.raises(AttributeError):
        stablevm.nothing  # noqa: B018


def test_help_into_a_pipe_that_nobody_reads_is_no_traceback():
    program = "import sys; from stablevm.cli import main; sys.exit(main(['train', '--help']))"
    command = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdout.close()
    assert command.stderr.read() == b"" and command.wait() == 141
