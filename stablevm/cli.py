"""The commands: parse, call, nothing else. Users' mistakes end with one line on stderr and status 2."""

import atexit
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import tyro

from stablevm import commands
from stablevm.evaluation.config import EvaluateCheckpointConfig, EvaluateConfig, ExtractorConfig, ReferenceConfig
from stablevm.integrations.config import ImportConfig
from stablevm.preparation.config import (
    ConvertConfig,
    ConvertShardsConfig,
    EncodeConfig,
    EncodeShardsConfig,
    InfoConfig,
    PackConfig,
    VerifyConfig,
)
from stablevm.profiling.config import BenchmarkConfig
from stablevm.quickstart.config import QuickstartConfig
from stablevm.sampling.config import GenerateConfig
from stablevm.study.config import VarianceConfig
from stablevm.support.errors import UserError, arguments_spelt
from stablevm.support.extras import explained
from stablevm.support.files import check_output
from stablevm.support.launcher import is_alone, tell
from stablevm.support.options import options_of
from stablevm.support.text import printable_streams, usable_streams
from stablevm.support.version import __version__
from stablevm.toy.config import ToyConfig
from stablevm.training.config import CONFIG_FILE, TrainConfig

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT
UNREAD_STATUS = 141  # 128 + SIGPIPE
# Faults of the machine that a user can mend, not bugs: no space, no permission, a disk that fails or is gone.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Names that can't be: below a file, a folder for a file, too long, a link to itself.
NO_SUCH_NAME = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
SYSTEM_LIMITS = (
    *NO_SPACE, *NO_SUCH_NAME, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN,
    errno.EMFILE, errno.ENFILE, errno.EFBIG,
)  # fmt: skip

PLAIN_FLAGS = (tyro.conf.DisallowNone,)

Config = TypeVar("Config")


class Command(Protocol):
    """Takes the arguments given, or those of the program that is running; returns the exit status."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int: ...


@runtime_checkable
class Checked(Protocol):
    """Options that know their ranges: they are checked before the command's module is imported."""

    def validate(self) -> None: ...


Table = dict[str, tuple[Command, str]]  # by its name, a command with its purpose


@dataclass(frozen=True)
class _Resuming:
    """The options that tell which run is resumed."""

    resume: bool = False
    exp_name: str | None = None
    output_dir: Path = TrainConfig.output_dir


@dataclass(frozen=True)
class _OfCheckpoint:
    """The option that tells what is evaluated: a checkpoint, or a file."""

    ckpt: Path | None = None


def _command(
    kind: type[Config],
    program: str,
    work: Callable[[Config], object],
    *,
    returns_status: bool = False,
    resumes: bool = True,
) -> Command:
    """A command of the options `kind` that calls `work` with them; see `_run`."""

    def command(arguments: Sequence[str] | None = None) -> int:
        return _run(kind, program, _given(arguments), work, returns_status=returns_status, resumes=resumes)

    return command


def train(arguments: Sequence[str] | None = None) -> int:
    """`train.py` and `stablevm train`."""
    given = _given(arguments)
    return _run(TrainConfig, "train", given, commands.train, default=lambda: _resumed(given))


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """`evaluate.py` and `stablevm evaluate`, of a file or, with --ckpt, of a checkpoint."""
    given = _given(arguments)
    which = _glance(_OfCheckpoint, given)
    if which is None or which.ckpt is not None:
        return _run(EvaluateCheckpointConfig, "evaluate", given, commands.evaluate_checkpoint)
    return _run(EvaluateConfig, "evaluate", given, commands.evaluate)


# Also `generate.py` and `gmm_exp.py`.
generate = _command(GenerateConfig, "generate", commands.generate)
toy = _command(ToyConfig, "gmm_exp", commands.toy)

reference = _command(ReferenceConfig, "stablevm reference", commands.reference)
import_checkpoint = _command(ImportConfig, "stablevm import", commands.import_checkpoint)
quickstart = _command(QuickstartConfig, "stablevm quickstart", commands.quickstart)
extractor = _command(ExtractorConfig, "stablevm extractor", commands.extractor)
variance = _command(VarianceConfig, "stablevm variance", commands.variance, resumes=False)
benchmark = _command(BenchmarkConfig, "stablevm benchmark", commands.benchmark, resumes=False)


def prepare(arguments: Sequence[str] | None = None) -> int:
    """`stablevm prepare STEP`."""
    return _choose("stablevm prepare", "STEP", PREPARE_STEPS, _given(arguments))


def data(arguments: Sequence[str] | None = None) -> int:
    """`stablevm data ACTION`."""
    return _choose("stablevm data", "ACTION", DATA_ACTIONS, _given(arguments))


def dataset_tools(arguments: Sequence[str] | None = None) -> int:
    """`preprocessing/dataset_tools.py STEP`."""
    return _choose("dataset_tools", "STEP", FOLDER_STEPS, _given(arguments))


def _digits(arguments: Sequence[str] | None = None) -> int:
    program = "stablevm prepare digits"

    def digits(folder: tyro.conf.Positional[Path]) -> None:
        """Write scikit-learn's handwritten digits (1,797 scans of 8 x 8) as a prepared data set.

        Args:
            folder: Folder for the splits train and test.
        """
        check_output(f"FOLDER {folder}", folder, is_folder=True)
        with printable_streams():
            print(commands.prepare_digits(folder))

    return _guarded(lambda: tyro.cli(digits, prog=program, args=_given(arguments)), program)


def _preparing(kind: type[Config], program: str, work: Callable[[Config], int]) -> Command:
    return _command(kind, program, work, returns_status=True)


FOLDER_STEPS: Table = {
    "convert": (
        _preparing(ConvertConfig, "dataset_tools convert", commands.convert_to_folder),
        "crop images to one size, one PNG file each",
    ),
    "encode": (
        _preparing(EncodeConfig, "dataset_tools encode", commands.encode_to_folder),
        "encode such images into latents, one .npy file each",
    ),
}
PREPARE_STEPS: Table = {
    "convert": (
        _preparing(ConvertShardsConfig, "stablevm prepare convert", commands.convert),
        "crop images to one size, into shards",
    ),
    "encode": (
        _preparing(EncodeShardsConfig, "stablevm prepare encode", commands.encode),
        "encode the images in shards, which completes the data set",
    ),
    "pack": (
        _preparing(PackConfig, "stablevm prepare pack", commands.pack),
        "pack a folder in the layout of REPA into shards",
    ),
    "digits": (_digits, "write scikit-learn's handwritten digits"),
}
DATA_ACTIONS: Table = {
    "verify": (
        _preparing(VerifyConfig, "stablevm data verify", commands.verify),
        "reread a prepared data set and name what is damaged",
    ),
    "info": (
        _preparing(InfoConfig, "stablevm data info", commands.info),
        "print what a prepared data set holds, and draw examples",
    ),
}
COMMANDS: Table = {
    "quickstart": (quickstart, "prepare, train, sample and evaluate handwritten digits, into one folder with a report"),
    "prepare": (prepare, "write a prepared data set"),
    "data": (data, "verify or show a prepared data set"),
    "train": (train, "train a network"),
    "import": (import_checkpoint, "turn a published checkpoint of SiT, REPA, LightningDiT and others into ours"),
    "generate": (generate, "sample images from a checkpoint"),
    "extractor": (extractor, "train the network that evaluates generated digits"),
    "evaluate": (evaluate, "evaluate a file of generated images, or a checkpoint"),
    "reference": (reference, "write a reference file to evaluate against"),
    "variance": (variance, "how noisy the training targets are on your data, and which tau and xi follow"),
    "benchmark": (benchmark, "what a training step costs on this machine, phase by phase"),
    "toy": (toy, "experiments on a Gaussian mixture, where the exact field is known"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """`stablevm COMMAND ...`."""
    given = _given(arguments)
    if given == ["--version"]:
        print(f"stablevm {__version__}")
        return 0
    return _choose("stablevm", "COMMAND", COMMANDS, given)


def _choose(program: str, what: str, table: Table, arguments: list[str]) -> int:
    """Hand the arguments after the first to the command that it names."""
    name, *rest = arguments or ["--help"]
    if name in table:
        return table[name][0](rest)
    width = max(map(len, table))
    lines = [f"  {command.ljust(width)}  {purpose}" for command, (_, purpose) in table.items()]
    usage = f"usage: {program} {what} ... ({what} --help lists its options)"
    text = "\n".join([usage, "", f"{what.lower()}s:", *lines])
    if name in ("-h", "--help"):
        print(text)
        return 0
    print(f"error: unknown {what.lower()} {name!r}\n\n{text}", file=sys.stderr)
    return USER_ERROR_STATUS


def _run(
    kind: type[Config],
    program: str,
    arguments: list[str],
    work: Callable[[Config], object],
    default: Callable[[], Config | None] = lambda: None,
    returns_status: bool = False,
    resumes: bool = True,
) -> int:
    """Parse the arguments into a `kind` and call `work` with it; returns the exit status.

    The status is 0, or what `work` returns if it `returns_status`; resumes: as for `_guarded`. Only `work` imports the
    module that it calls, so that help and mistakes are answered without waiting for torch.
    """

    def run() -> object:
        config = _parse(kind, program, arguments, default())
        if isinstance(config, Checked):
            with arguments_spelt(options_of(kind)):
                config.validate()
        with printable_streams(), arguments_spelt(options_of(kind)):
            result = work(config)
        return result if returns_status else None

    return _guarded(run, program, resumes)


def _parse(kind: type[Config], program: str, arguments: list[str], default: Config | None) -> Config:
    """The options; ends the program with status 2 where they are none. What the parser says of them is said once."""
    told = io.StringIO()
    try:
        with nullcontext() if is_alone() else redirect_stderr(told):
            if default is None:
                return tyro.cli(kind, prog=program, args=arguments, config=PLAIN_FLAGS)
            return tyro.cli(kind, prog=program, args=arguments, config=PLAIN_FLAGS, default=default)
    except SystemExit:
        if told.getvalue():
            tell(told.getvalue().rstrip(), kept="\n")
        raise


def _glance(kind: type[Config], arguments: list[str]) -> Config | None:
    """The few options of `kind`, whatever else is given; None where one lacks its value, of which `_parse` tells."""
    try:
        options, _ = tyro.cli(
            kind, args=arguments, config=PLAIN_FLAGS, return_unknown_args=True, add_help=False, console_outputs=False
        )
    except SystemExit:
        return None
    return options


def _guarded(run: Callable[[], object], program: str, resumes: bool = True) -> int:
    """Run the command `program`; returns its exit status, the one that `run` returns if it is a number.

    resumes: whether it resumes where it stopped when it is run again.
    """
    with usable_streams():
        return _status(run, program, resumes)


def _status(run: Callable[[], object], program: str, resumes: bool) -> int:
    try:
        status = _explaining(run, program)
    except UserError as error:
        tell(f"error: {error}")
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        _take_no_more_interrupts()
        tell("interrupted; run the same command again to " + ("resume" if resumes else "start over"))
        return INTERRUPTED_STATUS
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:  # a training that was told to stop
            _take_no_more_interrupts()
        raise
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still has to write
        return UNREAD_STATUS
    except OSError as error:
        if error.errno not in SYSTEM_LIMITS:
            raise
        remedy = "; make space and run the same command again" if error.errno in NO_SPACE else ""
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "while writing"
        tell(f"error: {error.strerror}: {name}{remedy}")
        return USER_ERROR_STATUS
    return status if isinstance(status, int) else 0


def _take_no_more_interrupts() -> None:
    """The command has ended: another Ctrl-C could only fall into Python's clearing up, which would show a traceback."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda number, frame: None)  # unlike SIG_IGN not inherited by other programs
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # Python's last steps undo the line above


def _explaining(run: Callable[[], object], program: str) -> object:
    """Run the command; UserError for a package that is not installed, if an extra brings it."""
    try:
        return run()
    except ModuleNotFoundError as error:
        raise explained(error, program) from None


def _given(arguments: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if arguments is None else arguments)


def _resumed(arguments: list[str]) -> TrainConfig | None:
    """With --resume, the options of the run that is resumed stand in for those that are not given."""
    given = _glance(_Resuming, arguments)
    if given is None or not given.resume or given.exp_name is None:
        return None
    folder = given.output_dir / given.exp_name
    if not (folder / CONFIG_FILE).exists():
        return None
    # The folder may have been moved since: it is where it is.
    return replace(
        TrainConfig.read(folder), resume=True, resume_step=0, exp_name=given.exp_name, output_dir=given.output_dir
    )
