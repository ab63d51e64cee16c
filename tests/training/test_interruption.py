"""Signals to stop: the first ends the run after a step, the second at once; all processes stop at the same step."""

import os
import signal

import pytest
import torch

from stablevm.training.launch import Interruption


class Processes:
    """Two processes: the other one answers `other`, and `meanwhile` runs while they communicate."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, other=0, meanwhile=lambda: None):
        self.other, self.meanwhile = other, meanwhile

    def reduce(self, value, reduction):
        self.meanwhile()
        return value + self.other


class Alone:
    num_processes = 1


def tell(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", Interruption.SIGNALS)
def test_one_is_noted_and_a_second_one_ends(number):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.agreed(Alone())
        tell(number)
        assert interruption.agreed(Alone()) and interruption.signal == number
        with pytest.raises(KeyboardInterrupt):
            tell(number)
    assert signal.getsignal(number) == before


def test_a_signal_to_one_process_stops_all():
    with Interruption() as interruption:
        assert not interruption.agreed(Processes())
        assert interruption.agreed(Processes(other=signal.SIGINT)) and interruption.signal == signal.SIGTERM


def test_a_signal_while_they_talk_waits_for_the_next_time():
    """Otherwise this process would stop and the other one wait for it in the next step."""
    with Interruption() as interruption:
        assert not interruption.agreed(Processes(meanwhile=tell))
        assert interruption.agreed(Processes()) and interruption.signal == signal.SIGTERM
