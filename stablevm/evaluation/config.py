"""Options of `stablevm evaluate`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class EvaluateConfig:
    """Judge a file of generated images against real ones."""

    samples: tyro.conf.Positional[Path]
    """File of generated images: .npz with arr_0, uint8 (N, H, W, 3), and labels, integers (N,)."""

    reference: Path
    """Prepared data set with the splits train and test: the test split is compared with, the training split is
    searched for copies."""

    extractor: Path
    """Folder of the trained feature extractor (extractor.safetensors and extractor.json)."""

    output: Path | None = None
    """JSON file for the results; the samples' name with .json in place of .npz if not given."""
