"""Calls that other processes make, with results in order."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import is_dataclass
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from stablevm.support.errors import UserError, arg

Request = TypeVar("Request")
Result = TypeVar("Result")

_SECONDS_TO_DIE = 1.0  # between a worker's last sign and its end, as its parent sees them


class Calls(Generic[Result]):
    """`work` of each request, in their order, done by `workers` processes two requests ahead; 0: in this one.

    UserError and OSError are raised here as they were there: torch would put a worker's traceback into the message. A
    worker that dies is a UserError too, raised where the next result is waited for and nowhere else.
    Ctrl-C, which reaches every process of the terminal, does not end the workers; with `finish_after_signals` neither
    does the SIGTERM that a launcher sends to all of this process's group, as they leave it. `pin_memory` as torch's.
    """

    def __init__(
        self,
        work: Callable[[Request], Result],
        requests: Iterable[Request],
        workers: int,
        *,
        finish_after_signals: bool = False,
        pin_memory: bool = False,
    ) -> None:
        many = min(workers, len(requests)) if isinstance(requests, Sized) else workers
        with _many_workers_allowed():
            self._loader = DataLoader(
                _Work(work),
                batch_sampler=cast(Any, requests),  # each is what one call gets, be it a list or not
                collate_fn=_as_made,
                num_workers=many,
                worker_init_fn=_leave_group if finish_after_signals else _ignore_interrupts,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # seeds the workers: without it the global generator would be used
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
            raise UserError(f"processes that read data can't be started ({error.strerror}); {_more_room()}") from None
        with _Watch(getattr(results, "_workers", [])) as watch:
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
    """Tells of dead workers while their results are waited for.

    torch's own watch raises its error from the signal that a child has died, wherever the program is then; in this
    block that signal matters only in `waiting`, where it ends a wait for what will never come.
    """

    def __init__(self, workers: Sequence[BaseProcess]) -> None:
        self._workers, self._is_waiting = workers, False

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
        """UserError where a worker is dead, or dies in the block."""
        self._is_waiting = True
        try:
            self._check()
            yield
        except (RuntimeError, OSError, EOFError):  # of torch, of a message that was cut short, of a worker's socket
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
        ):  # 0: told to end, after the last result
            self._check()

    def _check(self) -> None:
        for worker in self._workers:
            if worker.exitcode is not None:
                self._is_waiting = False
                raise UserError(_cause(worker)) from None


def _more_room() -> str:
    return f"give {arg('num_workers')} 0, or more shared memory (/dev/shm; docker run --shm-size 8g)"


def _cause(worker: BaseProcess) -> str:
    who, status = f"a process that reads data (pid {worker.pid})", worker.exitcode or 0
    if status == -signal.SIGBUS:
        return f"{who} was ended by SIGBUS, most often because shared memory is full; {_more_room()}"
    if status == -signal.SIGKILL:
        return f"{who} was killed, most often because memory ran out; lower {arg('num_workers')}, or run the same again"
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"{who} {how}; run the same command again, with {arg('num_workers')} 0 if that happens again"


class _Work(Dataset):
    """torch's loader passes each request to `__getitems__` as it is."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

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
            return UserError(f"shared memory fails ({error}); {_more_room()}")
        return result


def _share(result: Any) -> None:
    """Move tensors to shared memory now: in the thread of the queue an error would be lost."""
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
    """Without torch's warning of more workers than cores, which published commands ask for on a small machine."""
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
