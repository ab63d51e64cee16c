"""The commands, which only parse options and call functions. Bad input ends in one line on stderr and status 2."""

import atexit
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Protocol, runtime_checkable

from stablevm.commands.arguments import parse
from stablevm.commands.quiet import quietly
from stablevm.commands.table import COMMANDS, FOLDER_STEPS, PURPOSES, Command
from stablevm.support.errors import UserError, arguments_spelt
from stablevm.support.extras import explained
from stablevm.support.launcher import tell
from stablevm.support.options import options_of
from stablevm.support.text import nearest, printable_streams, shown, usable_streams
from stablevm.support.version import __version__

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT
UNREAD_STATUS = 141  # 128 + SIGPIPE
# OpenMP's threads spin for some 20 microseconds while they wait for each other, then sleep. If they spin for as long as
# its default says, a step of training takes several times as long beside other busy processes; if they sleep at once,
# small operations take twice as long on an idle machine (benchmarks/waiting.py). Read when torch is imported.
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
# Errors of the machine that a user can fix, not bugs: no space, no permission, a disk that fails or is missing.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Impossible names: below a file, a folder instead of a file, too long, a link to itself.
NO_SUCH_NAME = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
SYSTEM_LIMITS = (
    *NO_SPACE, *NO_SUCH_NAME, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN,
    errno.EMFILE, errno.ENFILE, errno.EFBIG,
)  # fmt: skip


class Entry(Protocol):
    """A function that runs a command with arguments, or those of the program, and returns the exit status."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int: ...


@runtime_checkable
class Checked(Protocol):
    """Options that can check themselves, which is done before the command's module is imported."""

    def validate(self) -> None: ...


def _entry(command: Command, program: str = "") -> Entry:
    """Make a function that runs the command; see `_run`."""

    def entry(arguments: Sequence[str] | None = None) -> int:
        return _run(command, program or f"stablevm {command.name}", _given(arguments))

    return entry


def _named(name: str) -> Command:
    return next(command for command in COMMANDS if command.name == name)


# Commands that are scripts of the published code, or that are called from Python.
train = _entry(_named("train"), "train.py")
generate = _entry(_named("generate"), "generate.py")
evaluate = _entry(_named("evaluate"), "evaluate.py")
toy = _entry(_named("toy"), "gmm_exp.py")
reference = _entry(_named("reference"))
import_checkpoint = _entry(_named("import"))
quickstart = _entry(_named("quickstart"))
extractor = _entry(_named("extractor"))
variance = _entry(_named("variance"))
benchmark = _entry(_named("benchmark"))


def prepare(arguments: Sequence[str] | None = None) -> int:
    """The command `stablevm prepare STEP`."""
    return _choose("stablevm prepare", "STEP", _behind("prepare"), _given(arguments))


def data(arguments: Sequence[str] | None = None) -> int:
    """The command `stablevm data ACTION`."""
    return _choose("stablevm data", "ACTION", _behind("data"), _given(arguments))


def dataset_tools(arguments: Sequence[str] | None = None) -> int:
    """`preprocessing/dataset_tools.py STEP`."""
    steps = {step.name: (_entry(step, f"dataset_tools.py {step.name}"), step.purpose) for step in FOLDER_STEPS}
    return _choose("dataset_tools.py", "STEP", steps, _given(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `stablevm COMMAND ...`."""
    given = _given(arguments)
    if given == ["--version"]:
        print(f"stablevm {__version__}")
        return 0
    groups: dict[str, Entry] = {"prepare": prepare, "data": data}
    table: Table = {}
    for command in COMMANDS:
        word = command.name.split()[0]
        table[word] = (groups[word], PURPOSES[word]) if word in groups else (_entry(command), command.purpose)
    return _choose("stablevm", "COMMAND", table, given)


Table = dict[str, tuple[Entry, str]]  # commands with their purposes, by name


def _behind(word: str) -> Table:
    """The commands with two words whose first is `word`, by the second."""
    return {
        command.name.split()[1]: (_entry(command), command.purpose)
        for command in COMMANDS
        if command.name.split()[0] == word
    }


def _choose(program: str, what: str, table: Table, arguments: list[str]) -> int:
    """Run the command that the first argument names, with the other arguments."""
    name, *rest = arguments or ["--help"]
    if name in table:
        return table[name][0](rest)
    if name in ("-h", "--help"):
        width = max(map(len, table))
        lines = [f"  {command.ljust(width)}  {purpose}" for command, (_, purpose) in table.items()]
        usage = f"usage: {program} {what} ... ({what} --help lists its options)"
        print("\n".join([usage, "", f"{what.lower()}s:", *lines]))
        return 0
    tell(f"error: {_unknown(program, what, table, name)}")
    return USER_ERROR_STATUS


def _unknown(program: str, what: str, table: Table, name: str) -> str:
    """The line about a command or step that there is not, with the nearest that there is."""
    if name.startswith("-"):
        return f"{shown(name, quoted=False)}: expected first one of {', '.join(table)}"
    behind = {word: command.name for command in COMMANDS for word in command.name.split()[1:] if program == "stablevm"}
    near = nearest(name, [*table, *behind])
    remedy = f"expected one of {', '.join(table)}" if near is None else f"did you mean {behind.get(near, near)}?"
    return f"{shown(name, quoted=False)}: {program} has no such {what.lower()}; {remedy}"


def _run(command: Command, program: str, arguments: list[str]) -> int:
    """Parse the arguments, do the command's work with its options, and return the exit status.

    The status is 0, or the result of the work if the command says so. Only the work imports the module that it calls,
    so that help and errors do not wait for torch.
    """

    def run() -> object:
        asked = parse(command, program, arguments)
        spelling = options_of(asked.use.options)
        if isinstance(asked.options, Checked):
            with arguments_spelt(spelling):
                asked.options.validate()
        if not PATIENT_THREADS.keys() & os.environ.keys():
            os.environ.update(PATIENT_THREADS)
        with (
            printable_streams(),
            quietly() if asked.quiet else nullcontext(),
            arguments_spelt(spelling),
            _telling_of_termination(command.resumes),
        ):
            result = asked.use.work(asked.options)
        return result if command.returns_status else None

    return _guarded(run, program, command.resumes)


def _guarded(run: Callable[[], object], program: str, resumes: bool = True) -> int:
    """Run the command `program` and return its exit status, which is the result of `run` if that is a number.

    resumes: whether the command resumes when it is run again.
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
        tell(f"interrupted; {_remedy(resumes)}")
        return INTERRUPTED_STATUS
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:  # training was stopped by a signal
            _take_no_more_interrupts()
        raise
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the remaining output of Python
        return UNREAD_STATUS
    except OSError as error:
        if error.errno not in SYSTEM_LIMITS:
            raise
        remedy = "; make space and run the same command again" if error.errno in NO_SPACE else ""
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "while writing"
        tell(f"error: {error.strerror}: {name}{remedy}")
        return USER_ERROR_STATUS
    return status if isinstance(status, int) else 0


def _remedy(resumes: bool) -> str:
    return "run the same command again to " + ("resume" if resumes else "start over")


@contextmanager
def _telling_of_termination(resumes: bool) -> Iterator[None]:
    """Inside the block, print a line when SIGTERM ends the process, as after Ctrl-C.

    The process ends at once, as it would without this: every file is complete or absent. Where there are several
    processes the launcher tells, and training handles the signal itself.
    """
    takes = threading.current_thread() is threading.main_thread() and os.environ.get("WORLD_SIZE", "1") == "1"
    before, process = signal.getsignal(signal.SIGTERM), os.getpid()
    if not takes or before != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # not in a process that was forked
            os.write(2, f"\nterminated; {_remedy(resumes)}\n".encode())  # a stream may be in use
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _take_no_more_interrupts() -> None:
    """Ignore Ctrl-C from now on, because in Python's cleanup it would only show a traceback."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda number, frame: None)  # unlike SIG_IGN not inherited by other programs
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # Python's last steps undo the line above


def _explaining(run: Callable[[], object], program: str) -> object:
    """Run the command; UserError for a package that is not installed, if an extra has it."""
    try:
        return run()
    except ModuleNotFoundError as error:
        raise explained(error, program) from None


def _given(arguments: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if arguments is None else arguments)
