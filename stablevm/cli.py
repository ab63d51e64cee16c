"""The commands: parse, call, nothing else. Users' mistakes end with one line on stderr and status 2."""

import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import tyro

from stablevm import __version__
from stablevm.errors import UserError
from stablevm.evaluation.config import EvaluateConfig
from stablevm.files import read_json
from stablevm.quickstart.config import QuickstartConfig
from stablevm.sampling.config import GenerateConfig
from stablevm.toy.config import ToyConfig
from stablevm.training.config import CONFIG_FILE, TrainConfig

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT
# Faults of the machine that a user can mend, not bugs: no space, no permission, a read-only or full file system.
SYSTEM_LIMITS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class TrainExtractor:
    """Train the network that judges generated digits, on the training split."""

    data_dir: Path
    """Prepared digits."""
    output_dir: Path
    """Folder for extractor.safetensors and extractor.json."""
    seed: int = 0
    """Seed of weights, batches and augmentation."""


def train(arguments: Sequence[str] | None = None) -> int:
    """`train.py` and `stablevm train`."""

    def run() -> None:
        config = parse(TrainConfig, "train", arguments, default=_resumed(_given(arguments)))
        from stablevm.training.trainer import train as run_training

        run_training(config)

    return guarded(run)


def generate(arguments: Sequence[str] | None = None) -> int:
    """`generate.py` and `stablevm generate`."""

    def run() -> None:
        config = parse(GenerateConfig, "generate", arguments)
        from stablevm.sampling.generation import generate as run_generation

        run_generation(config)

    return guarded(run)


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """`evaluate.py` and `stablevm evaluate`."""

    def run() -> None:
        config = parse(EvaluateConfig, "evaluate", arguments)
        from stablevm.evaluation.evaluate import evaluate as run_evaluation

        run_evaluation(config)

    return guarded(run)


def quickstart(arguments: Sequence[str] | None = None) -> int:
    """`stablevm quickstart`."""

    def run() -> None:
        config = parse(QuickstartConfig, "stablevm quickstart", arguments)
        from stablevm.quickstart.run import quickstart as run_quickstart

        run_quickstart(config)

    return guarded(run)


def toy(arguments: Sequence[str] | None = None) -> int:
    """`gmm_exp.py` and `stablevm toy`."""

    def run() -> None:
        config = parse(ToyConfig, "gmm_exp", arguments)
        from stablevm.toy.experiment import run as run_experiment

        run_experiment(config)

    return guarded(run)


def prepare(arguments: Sequence[str] | None = None) -> int:
    """`stablevm prepare KIND`."""
    app = tyro.extras.SubcommandApp()

    @app.command(name="digits")
    def digits(folder: tyro.conf.Positional[Path]) -> None:
        """Write scikit-learn's handwritten digits (1,797 scans of 8 x 8) as a prepared data set.

        Args:
            folder: Folder for the splits train and test.
        """
        from stablevm.data.digits import prepare_digits

        print(prepare_digits(folder))

    return guarded(lambda: app.cli(prog="stablevm prepare", args=_given(arguments)))


def extractor(arguments: Sequence[str] | None = None) -> int:
    """`stablevm extractor`."""

    def run() -> None:
        config = parse(TrainExtractor, "stablevm extractor", arguments)
        from stablevm.quickstart.run import make_extractor

        make_extractor(config.data_dir, config.output_dir, config.seed)

    return guarded(run)


COMMANDS: dict[str, tuple[Callable[[Sequence[str] | None], int], str]] = {
    "quickstart": (quickstart, "the whole staircase on handwritten digits, into one folder with a report"),
    "prepare": (prepare, "write a prepared data set"),
    "train": (train, "train a network"),
    "generate": (generate, "sample images from a checkpoint"),
    "extractor": (extractor, "train the network that judges generated digits"),
    "evaluate": (evaluate, "judge a file of generated images"),
    "toy": (toy, "experiments on a Gaussian mixture, where the exact field is known"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """`stablevm COMMAND ...`."""
    name, *rest = _given(arguments) or ["--help"]
    if name in COMMANDS:
        return COMMANDS[name][0](rest)
    width = max(map(len, COMMANDS))
    lines = [f"  {command.ljust(width)}  {purpose}" for command, (_, purpose) in COMMANDS.items()]
    text = "\n".join(["usage: stablevm COMMAND ... (COMMAND --help tells its options)", "", "commands:", *lines])
    if name in ("-h", "--help"):
        print(text)
        return 0
    if name == "--version":
        print(f"stablevm {__version__}")
        return 0
    print(f"error: unknown command {name!r}\n\n{text}", file=sys.stderr)
    return USER_ERROR_STATUS


Config = TypeVar("Config")


def parse(kind: type[Config], program: str, arguments: Sequence[str] | None, default: Config | None = None) -> Config:
    """The configuration that the arguments give; wrong ones end the program with status 2 and what was expected."""
    given, plain_flags = _given(arguments), (tyro.conf.DisallowNone,)
    if default is None:
        return tyro.cli(kind, prog=program, args=given, config=plain_flags)
    return tyro.cli(kind, prog=program, args=given, config=plain_flags, default=default)


def guarded(run: Callable[[], object]) -> int:
    """Run a command; returns its exit status."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED_STATUS
    except OSError as error:
        if error.errno not in SYSTEM_LIMITS:
            raise
        print(f"error: {error.strerror}: {error.filename or 'while writing'}", file=sys.stderr)
        return USER_ERROR_STATUS
    return 0


def _given(arguments: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if arguments is None else arguments)


def _resumed(arguments: Sequence[str]) -> TrainConfig | None:
    """With --resume, the options of the run that is gone on with stand in for those that are not given."""
    dashed = [part.replace("_", "-") if part.startswith("--") else part for part in arguments]
    if "--resume" not in dashed:
        return None

    def value(option: str, otherwise: str | None) -> str | None:
        for position, part in enumerate(dashed):
            if part.split("=", 1)[0] == option:
                return arguments[position].split("=", 1)[1] if "=" in part else [*arguments, ""][position + 1]
        return otherwise

    name, folder = value("--exp-name", None), value("--output-dir", str(TrainConfig.output_dir))
    if name is None or folder is None or not (Path(folder) / name / CONFIG_FILE).exists():
        return None
    saved = TrainConfig.from_dict(read_json(Path(folder) / name / CONFIG_FILE, "run"))
    return replace(saved, resume=True, resume_step=0)
