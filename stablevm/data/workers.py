"""Calls that other processes make, with results in order."""

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from stablevm.errors import UserError

Request = TypeVar("Request")
Result = TypeVar("Result")


class Calls(Generic[Result]):
    """`work` of each request, in their order, done by `workers` processes two requests ahead; 0: in this one.

    UserError and OSError are raised here as they were there: torch would put a worker's traceback into the message.
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
        with _many_workers_allowed():
            results = iter(self._loader)
        for result in results:
            if isinstance(result, Exception):
                raise result
            yield result


class _Work(Dataset):
    """torch's loader passes each request to `__getitems__` as it is."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __getitems__(self, request: Any) -> Any:
        try:
            return self.work(request)
        except (UserError, OSError) as error:
            return error


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
