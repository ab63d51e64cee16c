"""A room imports only from lower floors, heavy packages stay where they belong, option definitions stay light."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import stablevm
from stablevm.support.moved import MOVED
from tests.helpers.modules import MODULES, PACKAGE, dotted, imports

FLOORS = dict(
    enumerate(
        [
            ("support", "choices"),
            ("interpolant", "metrics", "recipes"),
            ("posterior", "times", "alignment", "bank", "solvers", "networks"),
            ("draw", "variance", "data"),
            ("objective", "meanflow", "figures"),
            ("sampling", "preparation", "advice"),
            ("evaluation",),
            ("training",),
            ("toy", "quickstart", "profiling", "demo", "study", "sweep", "integrations"),
            ("commands",),
            ("cli",),
            ("__main__", "__init__"),
        ]
    )
)
# Packages of training machinery and of the command line, and the lowest floor that may use them.
LOWEST_FLOOR = {"accelerate": 7, "wandb": 7, "tensorboard": 7, "tyro": 4, "matplotlib": 4}


def home(name):
    """The floor and the room of `networks.sit` or the like."""
    room = name.partition(".")[0]
    floors = [floor for floor, rooms in FLOORS.items() if room in rooms]
    assert floors, f"stablevm.{name} is on no floor: add it to the table in {Path(__file__).name}"
    return floors[0], room


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_lead_downstairs(module):
    floor, room = home(dotted(module))
    for name in imports(module):
        package, _, inner = name.partition(".")
        if package == "stablevm":
            below, other = home(inner or "__init__")
            assert below < floor or other == room, f"{module} (floor {floor}) imports {name} (floor {below})"
        assert floor >= LOWEST_FLOOR.get(package, 0), f"{module} (floor {floor}) imports {package}"


def test_the_documents_show_the_same_floors():
    page = (PACKAGE.parent / "docs" / "design.md").read_text()
    shown = {
        int(floor): set(re.findall(r"`([\w.]+)`", rooms)) for floor, rooms in re.findall(r"\| (\d+) \| (.*) \|", page)
    }
    assert shown == {floor: set(rooms) for floor, rooms in FLOORS.items() if rooms != ("__main__", "__init__")}


def test_the_documents_list_every_file():
    page = PACKAGE.parent / "docs" / "design.md"
    done = runpy.run_path(str(PACKAGE.parent / "docs" / "tree.py"))
    assert done["with_tree"](page.read_text()) == page.read_text(), "run python docs/tree.py"


def test_option_definitions_import_no_torch():
    code = (
        "import sys, stablevm.cli, stablevm.training.config, stablevm.sampling.config, stablevm.quickstart.config, "
        "stablevm.evaluation.config, stablevm.preparation.config, "
        "stablevm.integrations.config, stablevm.advice.config, stablevm.study.config, stablevm.profiling.config, "
        "stablevm.training.average_config, stablevm.sweep.config; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_of_every_command_imports_no_torch():
    code = """
import sys
from stablevm import cli
from stablevm.commands.table import COMMANDS, FOLDER_STEPS
commands = [(cli.main, command.name.split()) for command in COMMANDS]
steps = [(cli.dataset_tools, [step.name]) for step in FOLDER_STEPS]
for command, words in [*commands, *steps, (cli.main, ["prepare"]), (cli.main, ["evaluate", "--ckpt", "x"])]:
    try:
        status = command([*words, "--help"])
    except SystemExit as end:
        status = end.code
    heavy = {"torch", "numpy", "scipy", "sklearn", "PIL", "matplotlib", "diffusers", "typeguard"} & set(sys.modules)
    assert not status and not heavy, (words, status, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    for name in stablevm._HOME_OF:
        assert getattr(stablevm, name) is not None
    with pytest.raises(AttributeError):
        stablevm.nothing  # noqa: B018


def test_help_into_a_closed_pipe_is_no_traceback():
    program = "import sys; from stablevm.cli import main; sys.exit(main(['train', '--help']))"
    command = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdout.close()
    assert command.stderr.read() == b"" and command.wait() == 141


OLD_ADDRESSES = [
    "schedules:draw_times",
    "schedules:AlignmentSchedule",
    "models.sit:SiT",
    "errors:UserError",
    "sampling.sampler:draw_latents",
    "sampling.sampler:SamplerSettings",
    "sampling.solvers:heun",
    "evaluation.statistics:frechet_distance",
    "benchmark.config:BenchmarkConfig",
    "benchmark.report:Report",
    "evaluation.report:write_report",
    "evaluation.digits_metrics:judge_digits",
    "evaluation.checkpoint:CheckpointSource",
    "evaluation.figures:UserError",
    "evaluation.sample_figures:sample_grid",
    "preparation.report:Report",
    "sampling.pictures:sheet",
    "sampling.protocol:Protocol",
    "toy.variance:mixture_curve",
    "toy.visualization:visualize",
    "training.setup:open_data",
    "training.setup:prefill",
    "training.ema:MovingAverage",
    "training.previews:Previews",
    "variance_figure:variance_figure",
]


def test_old_addresses_import_with_a_warning():
    code = f"""
import importlib, warnings
before = set()
for old, name in {[each.split(":") for each in OLD_ADDRESSES]}:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = getattr(importlib.import_module(f"stablevm.{{old}}"), name)
    told = [str(each.message) for each in told if each.category is DeprecationWarning]
    seen = any(f"stablevm.{{old}} is now stablevm." in message for message in told)
    assert seen or old in before, (old, told)
    before.add(old)
    assert not found.__module__.startswith(f"stablevm.{{old}}"), (old, name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_old_addresses_lead_to_modules_that_are_there():
    for new in MOVED.values():
        assert (PACKAGE / new.replace(".", "/")).with_suffix(".py").exists() or (
            PACKAGE / new.replace(".", "/")
        ).is_dir()
