"""The commands: parse, call, nothing else. Users' mistakes end with one line on stderr and status 2."""

import errno
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import tyro

from stablevm import __version__
from stablevm.errors import UserError
from stablevm.evaluation.config import EvaluateConfig
from stablevm.files import read_json
from stablevm.quickstart.config import ExtractorConfig, QuickstartConfig
from stablevm.sampling.config import GenerateConfig
from stablevm.toy.config import ToyConfig
from stablevm.training.config import CONFIG_FILE, TrainConfig

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT
SECONDS_FOR_THE_FIRST = 5.0  # torchrun looks every 0.1 s whether a process has ended
# Faults of the machine that a user can mend, not bugs: no space, no permission, a read-only or full file system.
SYSTEM_LIMITS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


Config = TypeVar("Config")


def train(arguments: Sequence[str] | None = None) -> int:
    """`train.py` and `stablevm train`. Returns the exit status, as all commands do."""
    given = _given(arguments)
    return _run(TrainConfig, "train", given, "stablevm.training.trainer:train", default=lambda: _resumed(given))


def generate(arguments: Sequence[str] | None = None) -> int:
    """`generate.py` and `stablevm generate`."""
    return _run(GenerateConfig, "generate", _given(arguments), "stablevm.sampling.generation:generate")


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """`evaluate.py` and `stablevm evaluate`."""
    return _run(EvaluateConfig, "evaluate", _given(arguments), "stablevm.evaluation.evaluate:evaluate")


def quickstart(arguments: Sequence[str] | None = None) -> int:
    """`stablevm quickstart`."""
    return _run(QuickstartConfig, "stablevm quickstart", _given(arguments), "stablevm.quickstart.run:quickstart")


def toy(arguments: Sequence[str] | None = None) -> int:
    """`gmm_exp.py` and `stablevm toy`."""
    return _run(ToyConfig, "gmm_exp", _given(arguments), "stablevm.toy.experiment:run")


def extractor(arguments: Sequence[str] | None = None) -> int:
    """`stablevm extractor`."""
    return _run(ExtractorConfig, "stablevm extractor", _given(arguments), "stablevm.quickstart.run:extractor")


def prepare(arguments: Sequence[str] | None = None) -> int:
    """`stablevm prepare KIND`."""
    app = tyro.extras.SubcommandApp()

    @app.command(name="digits")
    def digits(folder: tyro.conf.Positional[Path]) -> None:
        """Write scikit-learn's handwritten digits (1,797 scans of 8 x 8) as a prepared data set.

        Args:
            folder: Folder for the splits train and test.
        """
        print(_load("stablevm.data.digits:prepare_digits")(folder))

    return _guarded(lambda: app.cli(prog="stablevm prepare", args=_given(arguments)))


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


def _run(
    kind: type[Config],
    program: str,
    arguments: list[str],
    target: str,
    default: Callable[[], Config | None] = lambda: None,
) -> int:
    """Parse the arguments into a `kind` and call `target` ("module:function") with it.

    The module is imported last, so that help and mistakes are answered without waiting for torch.
    """

    def run() -> None:
        given, plain_flags = default(), (tyro.conf.DisallowNone,)
        if given is None:
            config = tyro.cli(kind, prog=program, args=arguments, config=plain_flags)
        else:
            config = tyro.cli(kind, prog=program, args=arguments, config=plain_flags, default=given)
        _load(target)(config)

    return _guarded(run)


def _load(target: str) -> Callable[..., object]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _guarded(run: Callable[[], object]) -> int:
    """Run a command; returns its exit status."""
    try:
        run()
    except UserError as error:
        _tell(f"error: {error}")
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        _tell("interrupted; run the same command again to go on")
        return INTERRUPTED_STATUS
    except OSError as error:
        if error.errno not in SYSTEM_LIMITS:
            raise
        _tell(f"error: {error.strerror}: {error.filename or 'while writing'}")
        return USER_ERROR_STATUS
    return 0


def _tell(line: str) -> None:
    """Print the last line of a command, once even if many processes, which launchers number by RANK, end with it.

    Most errors meet all processes. The others therefore give the first one time to speak: its end makes the launcher
    end them. Who is still there after that has an error of its own, such as a damaged part of the data.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(SECONDS_FOR_THE_FIRST)
        line = f"{line} (process {rank})"
    print(line, file=sys.stderr)


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
    # The folder may have been moved since: it is where it is.
    return replace(saved, resume=True, resume_step=0, exp_name=name, output_dir=Path(folder))
