"""The `.npz` of generated images: `arr_0` as the ADM suite reads it, `labels`, and their provenance as `protocol`."""

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablevm.sampling.provenance import Provenance
from stablevm.support.errors import UserError
from stablevm.support.files import parse_json
from stablevm.support.images import read_png_text
from stablevm.support.npz import NpzFile, write_npz


def write_archive(
    path: Path,
    chunks: Iterable[NDArray[np.uint8]],
    labels: NDArray[np.int64],
    provenance: Provenance,
    more: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write images, in chunks uint8 (n, H, W, 3) of which one is in memory at a time, as many in all as labels.

    more: further arrays, such as statistics of the images. The bytes of the file depend only on its contents.
    """
    arrays = {"labels": labels, "protocol": np.array(json.dumps(provenance)), **(more or {})}
    write_npz(path, "arr_0", chunks, len(labels), arrays)


def read_provenance(path: Path) -> Provenance:
    """The provenance that an archive or a picture records; UserError when `path` is not one of ours."""
    if path.suffix == ".png":
        text = read_png_text(path).get("protocol")
    else:
        archive = NpzFile(path, repair="move it away") if zipfile.is_zipfile(path) else None
        text = archive.text("protocol") if archive is not None and "protocol" in archive else None
    if text is None:
        raise UserError(f"{path} exists and was not made by this command; give another --name or --sample-dir")
    values = parse_json(text, f"{path}: its protocol")
    if not isinstance(values, dict):
        raise UserError(f"{path}: its protocol is not an object; move the file away")
    return values
