"""The `.npz` of generated images: `arr_0` as the ADM suite reads it, `labels`, and their provenance as `protocol`."""

import io
import json
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from stablevm.sampling.provenance import Provenance
from stablevm.support.errors import UserError
from stablevm.support.files import parse_json
from stablevm.support.images import read_png_text
from stablevm.support.text import shown

_PROTOCOL = "protocol.npy"
_LARGEST_PROTOCOL = 2**24  # bytes; ours have a few thousand, but the file may be untrusted
# Exceptions that zipfile, its decompressors and NumPy raise for damaged data, and for unknown kinds of compression and
# encryption.
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, RuntimeError),
    *(ValueError, TypeError, SyntaxError, LookupError, ArithmeticError, MemoryError, tokenize.TokenError),
)


def write_archive(
    path: Path, chunks: Iterable[NDArray[np.uint8]], labels: NDArray[np.int64], provenance: Provenance
) -> None:
    """Write an archive of images, in chunks uint8 (n, H, W, 3) of which one is in memory at a time.

    There must be as many images as labels. The bytes of the file depend only on its contents: all members have zip's
    default date.
    """
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            write_npy(member, chunks, len(labels))
        for name, array in (("labels", labels), ("protocol", np.array(json.dumps(provenance)))):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_npy(file: IO[bytes], chunks: Iterable[NDArray[np.uint8]], rows: int) -> None:
    """Write chunks of a uint8 array with `rows` rows in all as one array, in NumPy's format.

    If the disk is full it raises OSError with ENOSPC, whereas the error of `np.save` has no number.
    """
    chunks = iter(chunks)
    first = next(chunks)
    shape = (rows, *first.shape[1:])
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for chunk in chain([first], chunks):
        file.write(np.ascontiguousarray(chunk).data)


def read_provenance(path: Path) -> Provenance:
    """The provenance that an archive or a picture records; UserError when `path` is not one of ours."""
    if path.suffix == ".png":
        text = read_png_text(path).get("protocol")
    else:
        text = _text_in_archive(path) if zipfile.is_zipfile(path) else None
    if text is None:
        raise UserError(f"{path} exists and was not made by this command; give another --name or --sample-dir")
    values = parse_json(text, f"{path}: its protocol")
    if not isinstance(values, dict):
        raise UserError(f"{path}: its protocol is not an object; move the file away")
    return values


def _text_in_archive(path: Path) -> str | None:
    """The provenance as text; None if there is none. UserError for a damaged archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            if _PROTOCOL not in archive.namelist():
                return None
            member = archive.getinfo(_PROTOCOL)
            if max(member.file_size, member.compress_size) > _LARGEST_PROTOCOL:
                raise ValueError(f"a protocol of {member.file_size:,} bytes")
            content = io.BytesIO(archive.read(member))
        array = np.lib.format.read_array(content, allow_pickle=False)
    except (*UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # due to the machine, such as a missing permission
        raise UserError(f"{path}: damaged ({shown(str(error), quoted=False)}); move it away") from None
    return str(array.item()) if array.shape == () and array.dtype.kind == "U" else None
