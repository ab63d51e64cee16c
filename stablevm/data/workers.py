"""Calls that other processes make, with results in order."""

import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from stablevm.errors import UserError

Request = TypeVar("Request")
Result = TypeVar("Result")


def ordered_results(work: Callable[[Request], Result], requests: Sequence[Request], workers: int) -> Iterator[Result]:
    """`work` of each request, in their order, done by `workers` processes a few requests ahead; 0: in this one.

    UserError and OSError are raised here as they were there: torch would put a worker's traceback into the message.
    """
    with warnings.catch_warnings():
        # Of more workers than cores, which is what published commands ask for on a small machine.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            _Calls(work),
            batch_sampler=cast(Any, requests),  # each is what one call gets, be it a list or not
            collate_fn=_as_made,
            num_workers=min(workers, len(requests)),
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # seeds the workers: without it the global generator would be used
        )
        results = iter(loader)
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result


class _Calls(Dataset):
    """torch's loader passes each request to `__getitems__` as it is."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __getitems__(self, request: Any) -> Any:
        try:
            return self.work(request)
        except (UserError, OSError) as error:
            return error


def _as_made(result: Any) -> Any:
    return result


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
