"""`evaluate.py`: see `stablevm evaluate --help`."""

import sys

from stablevm.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
