"""Writing safetensors files, complete or not at all."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stablevm.support.files import replacing


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, complete or not at all; OSError, as for other files, if the disk is full."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:  # it mentions the system's error only in its text
            if found := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
            raise
