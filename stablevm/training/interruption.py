"""Ctrl-C and SIGTERM as a wish to stop after the current step."""

import signal
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Interruption:
    """While entered, the first signal is only noted; a second one ends the program as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was told to stop; all of them ask at the same step."""
        if accelerator.num_processes == 1:
            return self.signal is not None
        mine = torch.tensor(self.signal or 0, device=accelerator.device)
        received = accelerator.reduce(mine, reduction="sum")
        assert isinstance(received, Tensor)
        agreed = bool(received.item())  # not the signal itself: it may have come since, and the others not know of it
        if agreed and self.signal is None:
            self.signal = signal.SIGTERM
        return agreed

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
