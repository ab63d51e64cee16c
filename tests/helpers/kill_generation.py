"""Kill a generation at random moments until it is done: python -m tests.helpers.kill_generation --kills 10

The killed runs have one, two or three processes, whatever the dice say, and all their processes are killed at once. The
result is compared with that of a run that nobody disturbed: the same labels, no pixel more than one level apart.
kill.py beside it kills at every file operation; here the number of processes changes from run to run, which moves the
images between batches, so that results may differ in their last bits.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads would not survive the fork

import numpy as np
from tqdm import tqdm

from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate
from tests.helpers.checkpoints import save_checkpoint, tiny_card


def start(config, rank, world_size):
    """Fork a process that generates; returns its id."""
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    tqdm.set_lock(threading.RLock())  # the inherited one is shared, and stays taken if a process is killed in it
    status = 1
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            generate(config)
        status = 0
    finally:
        os._exit(status)


def statuses(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def finish_despite_kills(config, kills, longest, stream):
    """Start it again and again, killing it after up to `longest` seconds; returns (kills done, starts it took)."""
    done = starts = 0
    while True:
        world_size = stream.randint(1, 3)
        children = [start(config, rank, world_size) for rank in range(world_size)]
        starts += 1
        if done < kills:
            time.sleep(stream.uniform(0, longest))
            for child in children:
                os.kill(child, signal.SIGKILL)  # it is not reaped yet, so the number is still its own
        ended = statuses(children)
        assert set(ended) <= {0, -signal.SIGKILL}, ended
        done += -signal.SIGKILL in ended
        if ended[0] == 0:
            return done, starts


def same(one, other):
    with np.load(one) as ours, np.load(other) as theirs:
        apart = np.abs(ours["arr_0"].astype(int) - theirs["arr_0"].astype(int)).max()
        return (
            apart <= 1
            and np.array_equal(ours["labels"], theirs["labels"])
            and ours["protocol"].item() == theirs["protocol"].item()
        )


def main(kills, seed):
    stream, done, rounds = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = save_checkpoint(folder / "checkpoint", tiny_card())
        config = GenerateConfig(
            ckpt=checkpoint, num_fid_samples=500, num_steps=20, cfg_scale=1.5, sample_dir=folder / "samples"
        )
        began = time.perf_counter()
        whole = generate(config)
        seconds = time.perf_counter() - began
        whole = whole.rename(folder / "whole.npz")
        while done < kills:  # a round ends when the images are complete, however often it was killed
            for path in config.sample_dir.iterdir():
                path.unlink()
            killed, starts = finish_despite_kills(config, kills - done, seconds / 3, stream)
            (result,) = config.sample_dir.glob("*.npz")
            assert same(whole, result), f"seed {seed}, round {rounds}: the images differ"
            left = {path.suffix for path in config.sample_dir.iterdir()}
            assert left == {".npz", ".png"}, f"left behind: {left}"
            done, rounds = done + killed, rounds + 1
            print(f"round {rounds}: {killed} kills, {starts} starts, complete and the same")
    print(f"{done} kills in {rounds} rounds of {seconds:.1f} s: always complete and the same")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.kills, options.seed))
