"""The class tokens of a data set (REG: Wu et al., 2025), computed once by an encoder and kept in a file of the run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stablevm.data.dataset import PreparedDataset
from stablevm.data.streaming import StreamedTensor, write_streamed
from stablevm.data.tensor_file import TensorFile, bytes_of, opener
from stablevm.data.workers import Calls
from stablevm.networks.encoders import Encoder
from stablevm.support.bars import progress_bar
from stablevm.support.errors import UserError
from stablevm.support.files import sha256
from stablevm.training.config import TrainConfig
from stablevm.training.console import on_terminal
from stablevm.training.launch import on_main, told_by_main

FILE, NAME = "cls_tokens.safetensors", "tokens"
# Images that the encoder sees at a time, whatever the number of processes, so that tokens do not depend on it.
CHUNK = 64


class ClsTokens:
    """The class tokens of all rows of a data set, read from a file: float16, as moments are."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(str(path), path.stat().st_size, opener())
        self.width = self._file.shapes[NAME][1]

    def __call__(self, rows: Sequence[int] | Tensor) -> Tensor:
        """The tokens (n, D), float32, on the CPU, of these rows."""
        numbers = np.asarray(rows, np.int64)
        values = np.empty((len(numbers), self.width), np.float16)
        size = self.width * values.itemsize
        spans = [(bytes_of(value), size * int(row)) for value, row in zip(values, numbers, strict=True)]
        self._file.read_into(NAME, spans)
        return torch.from_numpy(values).float()


def class_tokens(
    config: TrainConfig, dataset: PreparedDataset, encoder: Encoder, accelerator: Accelerator
) -> ClsTokens:
    """The class tokens of the run's data, from its file, which is written first if it is absent or of other data.

    encoder: the first of `config.encoder_names`. All processes must call it; each encodes a part of the images.
    """
    path = config.folder / FILE
    facts = told_by_main(accelerator, lambda: _facts(config, dataset, encoder))
    if not told_by_main(accelerator, lambda: _facts_in(path) == facts):
        tokens = _encode(config, dataset, encoder, accelerator)
        on_main(accelerator, lambda: _write(path, tokens, facts))
    return ClsTokens(path)


def _facts(config: TrainConfig, dataset: PreparedDataset, encoder: Encoder) -> dict[str, str]:
    """What determines the tokens."""
    weights = config.encoder_files[0]
    known = dataset.fingerprint(with_images=True)
    return {
        "encoder": config.encoder_names[0],
        "weights": "" if weights is None else sha256(weights),
        "resize": config.encoder_resize,
        "shape": f"{len(dataset)} x {encoder.dim}",
        "data": f"{known.latents} {known.images}",
    }


def _facts_in(path: Path) -> dict[str, str] | None:
    try:
        with safe_open(path, framework="np") as file:
            metadata: dict[str, Any] | None = file.metadata()
            return metadata
    except (OSError, SafetensorError):
        return None


def _encode(
    config: TrainConfig, dataset: PreparedDataset, encoder: Encoder, accelerator: Accelerator
) -> list[np.ndarray]:
    """The tokens, in the order of rows, as arrays (n, D) float16, in the main process; none in the others."""
    world, rank = accelerator.num_processes, accelerator.process_index
    rounds = math.ceil(len(dataset) / (CHUNK * world))
    starts = [(each * world + rank) * CHUNK for each in range(rounds)]
    own = [[min(row, len(dataset) - 1) for row in range(start, start + CHUNK)] for start in starts]  # the last repeats
    found = []
    show = accelerator.is_main_process and on_terminal()
    for images in progress_bar(
        Calls(dataset.images, own, config.num_workers), desc="class tokens", unit="batch", show=show
    ):
        tokens = accelerator.gather(encoder.pooled(images.to(accelerator.device)))
        assert isinstance(tokens, Tensor)
        _check(config, tokens)
        if accelerator.is_main_process:
            found.append(tokens.half().cpu().numpy())
    return found


def _check(config: TrainConfig, tokens: Tensor) -> None:
    if not tokens.half().isfinite().all():
        raise UserError(
            f"--enc-type {config.encoder_names[0]}: a class token is not finite in float16; choose another encoder, or "
            "leave --cls-token out"
        )


def _write(path: Path, tokens: list[np.ndarray], facts: dict[str, str]) -> None:
    rows, width = map(int, facts["shape"].split(" x "))
    surplus = sum(map(len, tokens)) - rows
    while surplus > 0:  # whole chunks of repeated rows, and the end of the last one
        last = tokens.pop()
        if len(last) > surplus:
            tokens.append(last[: len(last) - surplus])
        surplus -= len(last)
    write_streamed(path, {NAME: StreamedTensor(np.dtype(np.float16), (rows, width), tokens)}, facts)
