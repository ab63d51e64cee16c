"""Whether progress bars are drawn."""

import os

NO_BARS = "TQDM_DISABLE"  # an environment variable of tqdm, which heeds it only for bars that are given no `disable`


def hidden(show: bool) -> bool:
    """tqdm's `disable` for a bar that this process is to `show`: bars are switched off by the environment too."""
    return not show or os.environ.get(NO_BARS, "") not in ("", "0")
