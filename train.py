"""`train.py`: see `stablevm train --help`."""

import sys

from stablevm.cli import train

if __name__ == "__main__":
    sys.exit(train())
