"""`python -m stablevm` runs the command `stablevm`."""

import sys

from stablevm.cli import main

if __name__ == "__main__":
    sys.exit(main())
