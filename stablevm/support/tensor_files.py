"""Writing safetensors files, complete or not at all."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stablevm.support.files import replacing


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, complete or not at all; OSError, as for other files, if the disk is full."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as temporary, system_errors(path):
        save_file(plain, temporary, metadata)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raise the OSError, such as that of a full disk, which safetensors mentions only in the text of its own error."""
    try:
        yield
    except SafetensorError as error:
        if found := re.search(r"(?:os error |code: )(\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        raise
