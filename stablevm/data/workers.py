"""Function calls made by worker processes, with results in order."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from stablevm.support.errors import UserError, arg

Request = TypeVar("Request")
Result = TypeVar("Result")

_SECONDS_TO_DIE = 1.0  # until the parent process notices the end of a worker


class Calls(Generic[Result]):
    """An iterable over the results of `work` for each request, in order, computed by worker processes in advance.

    Each of the `workers` processes works up to two requests ahead; with 0, the calls are made in this process.
    A UserError or OSError in a worker is raised here unchanged, whereas torch would put the worker's traceback into its
    message. If a worker dies, UserError is raised, but only while the next result is awaited.
    Ctrl-C, which reaches every process of the terminal, does not end the workers. With `finish_after_signals` they also
    leave this process's group, so that a SIGTERM from a launcher does not reach them. pin_memory: as in torch.
    task, without: what each worker does, and what the user does to have none, for messages.
    """

    def __init__(
        self,
        work: Callable[[Request], Result],
        requests: Iterable[Request],
        workers: int,
        *,
        finish_after_signals: bool = False,
        pin_memory: bool = False,
        task: str = "reads data",
        without: str | None = None,
    ) -> None:
        self._messages = _Messages(task, without or f"give {arg('num_workers')} 0")
        many = min(workers, len(requests)) if isinstance(requests, Sized) else workers
        with _many_workers_allowed():
            self._loader = DataLoader(
                _Work(work, self._messages),
                batch_sampler=cast(Any, requests),  # each is the argument of one call, a list or not
                collate_fn=_as_made,
                num_workers=many,
                worker_init_fn=_leave_group if finish_after_signals else _ignore_interrupts,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # seeds the workers; torch would use the global generator otherwise
            )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Result]:
        try:
            with _many_workers_allowed():
                results = iter(self._loader)
        except OSError as error:
            if not self._loader.num_workers:
                raise
            raise UserError(self._messages.not_started(error)) from None
        with _Watch(getattr(results, "_workers", []), self._messages) as watch:
            while True:
                try:
                    with watch.waiting():
                        result = next(results)
                except StopIteration:
                    return
                if isinstance(result, Exception):
                    raise result
                yield result


class _Watch:
    """Detects dead workers while their results are awaited.

    torch itself raises an error when the signal arrives that a child has died, wherever the program is. Inside this
    block the signal matters only in `waiting`, where it ends a wait for a result that will never come.
    """

    def __init__(self, workers: Sequence[BaseProcess], messages: "_Messages") -> None:
        self._workers, self._is_waiting, self._messages = workers, False, messages

    def __enter__(self) -> "_Watch":
        self._takes_signals = bool(self._workers) and threading.current_thread() is threading.main_thread()
        if self._takes_signals:
            self._before = signal.signal(signal.SIGCHLD, self._child_died)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._takes_signals:
            signal.signal(signal.SIGCHLD, self._before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Raise UserError if a worker is dead, or dies during the block."""
        self._is_waiting = True
        try:
            self._check()
            yield
        except (RuntimeError, OSError, EOFError):  # from torch, from a truncated message, from a worker's socket
            end = time.monotonic() + _SECONDS_TO_DIE
            while self._workers and time.monotonic() < end:
                self._check()
                time.sleep(0.01)
            raise
        finally:
            self._is_waiting = False

    def _child_died(self, number: int, frame: FrameType | None) -> None:
        if self._is_waiting and any(
            worker.exitcode for worker in self._workers
        ):  # 0: ended as requested, after the last result
            self._check()

    def _check(self) -> None:
        for worker in self._workers:
            if worker.exitcode is not None:
                self._is_waiting = False
                raise UserError(self._messages.died(worker)) from None


@dataclass(frozen=True)
class _Messages:
    """What to tell the user: `task` is what each worker does ("reads data"), `without` how to do it without them."""

    task: str
    without: str

    def not_started(self, error: OSError) -> str:
        return f"a process that {self.task} can't be started ({error.strerror}); {self._more_room()}"

    def not_shared(self, error: RuntimeError) -> str:
        return f"shared memory failed ({error}); {self._more_room()}"

    def died(self, worker: BaseProcess) -> str:
        """Why a worker died, and what helps."""
        who, status = f"a process that {self.task} (pid {worker.pid})", worker.exitcode or 0
        if status == -signal.SIGBUS:
            return f"{who} was killed by SIGBUS, usually because shared memory is full; {self._more_room()}"
        if status == -signal.SIGKILL:
            how = "was killed, usually because memory ran out"
        else:
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        return f"{who} {how}; run the same command again; if that happens again, {self.without}"

    def _more_room(self) -> str:
        return f"{self.without}, or more shared memory (/dev/shm; docker run --shm-size 8g)"


class _Work(Dataset):
    """A data set for torch's loader, which passes each request unchanged to `__getitems__`."""

    def __init__(self, work: Callable[[Any], Any], messages: _Messages) -> None:
        self.work, self.messages = work, messages

    def __getitems__(self, request: Any) -> Any:
        try:
            result = self.work(request)
        except (UserError, OSError) as error:
            return error
        if get_worker_info() is None:
            return result
        try:
            _share(result)
        except RuntimeError as error:
            return UserError(self.messages.not_shared(error))
        return result


def _share(result: Any) -> None:
    """Move tensors to shared memory now, because an error in the queue's thread would be lost."""
    if isinstance(result, Tensor):
        result.share_memory_()
    elif is_dataclass(result):
        _share(list(vars(result).values()))
    elif isinstance(result, list | tuple):
        for each in result:
            _share(each)
    elif isinstance(result, Mapping):
        _share(list(result.values()))


@contextmanager
def _many_workers_allowed() -> Iterator[None]:
    """Suppress torch's warning about more workers than cores, which published commands cause on a small machine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _as_made(result: Any) -> Any:
    return result


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave_group(worker: int) -> None:
    _ignore_interrupts(worker)
    os.setpgid(0, 0)
