"""`dataset_tools.py convert` and `dataset_tools.py encode`: see README.md beside this file."""

import sys

from stablevm.cli import dataset_tools

if __name__ == "__main__":
    sys.exit(dataset_tools())
