"""The options of `stablevm recipes` and `stablevm completion`."""

from dataclasses import dataclass
from typing import Literal

import tyro

Shell = Literal["bash", "zsh", "tcsh"]


@dataclass(frozen=True)
class RecipesConfig:
    """List the recipes: files of options for published and measured settings, with the results to expect.

    To run one, give its name as --config: stablevm train --config NAME --exp-name RUN --data-dir DATA.
    """

    name: tyro.conf.Positional[str | None] = None
    """Print this recipe, to be saved and changed."""


@dataclass(frozen=True)
class CompletionConfig:
    """Print a script that lets a shell complete the commands and their options."""

    shell: tyro.conf.Positional[Shell]
    """The shell for which the script is made."""
