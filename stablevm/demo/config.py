"""The options of `stablevm demo`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stablevm.support.options import require

_LARGEST_PORT = 65535


@dataclass(frozen=True)
class DemoConfig:
    """Generate images on a page in the browser: sliders for sampler, steps, guidance and class.

    Below each picture stands the command that makes it again. Only this machine can reach the page.
    """

    ckpt: Path
    """Checkpoint folder: model.json with ema.safetensors and model.safetensors."""
    weights: Literal["ema", "model"] = "ema"
    """ema: the moving average of the weights. model: the weights of the last training step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network; the solver's is always 64 bits."""
    vae: str | None = None
    """Autoencoder: ema, mse, or the folder of one to decode with. Default: the one that the checkpoint records."""
    port: int = 7860
    """The page is http://127.0.0.1:PORT; from 1 to 65535."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [("port", 1 <= self.port <= _LARGEST_PORT, f"a number from 1 to {_LARGEST_PORT}")])
