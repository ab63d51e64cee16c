"""`generate.py`: see `stablevm generate --help`."""

import sys

from stablevm.cli import generate

if __name__ == "__main__":
    sys.exit(generate())
