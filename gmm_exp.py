"""`gmm_exp.py`: see `stablevm toy --help`."""

import sys

from stablevm.cli import toy

if __name__ == "__main__":
    sys.exit(toy())
