"""Trainings one after another in the processes of one launcher, whose start takes longer than a tiny run.

python -m torch.distributed.run --nproc_per_node=2 -m tests.helpers.each_run FILE (of JSON, a list of command lines)
"""

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from stablevm import cli


def main(file):
    for arguments in json.loads(Path(file).read_text()):
        AcceleratorState._reset_state()  # as in a process of its own; the group of processes stays
        if status := cli.train(arguments):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
