"""The `.npz` of generated images: `arr_0` as the ADM evaluation suite reads it, `labels`, and the `protocol`."""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablevm.errors import UserError
from stablevm.sampling.protocol import Protocol


def write_archive(
    path: Path, chunks: Iterable[NDArray[np.uint8]], labels: NDArray[np.int64], protocol: Protocol
) -> None:
    """Write images uint8 (n, H, W, 3) chunk by chunk, holding one chunk in memory; as many in all as labels.

    The bytes of the file depend on its contents alone: members carry zip's default date.
    """
    chunks = iter(chunks)
    first = next(chunks)
    shape = (len(labels), *first.shape[1:])
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            member.write(np.ascontiguousarray(first).data)
            for chunk in chunks:
                member.write(np.ascontiguousarray(chunk).data)
        for name, array in (("labels", labels), ("protocol", np.array(json.dumps(protocol)))):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read_protocol(path: Path) -> Protocol:
    """The protocol of an archive; UserError when `path` is not one of ours."""
    if zipfile.is_zipfile(path):
        with np.load(path) as archive:
            if "protocol" in archive:
                return json.loads(archive["protocol"].item())
    raise UserError(f"{path} exists and was not made by this command; give another --name or --sample-dir")
