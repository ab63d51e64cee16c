"""The options of `stablevm demo`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass
from pathlib import Path

from stablevm.choices import Precision, Weights
from stablevm.support.options import require
from stablevm.support.ranges import Port


@dataclass(frozen=True)
class DemoConfig:
    """Generate images on a page in the browser: sliders for sampler, steps, guidance and class.

    Below each picture stands the command that makes it again. Only this machine can reach the page.
    """

    ckpt: Path
    """Checkpoint folder: model.json with ema.safetensors and model.safetensors. Or a run's folder, for its newest; or
    hf:OWNER/NAME[@REVISION], on the Hugging Face Hub."""
    weights: Weights = "ema"
    """ema: the moving average of the weights. model: the weights of the last training step."""
    precision: Precision = "fp32"
    """Arithmetic of the network; the solver's is always 64 bits."""
    vae: str | None = None
    """Autoencoder: ema, mse, or the folder of one to decode with. Default: the one that the checkpoint records."""
    port: Port = 7860
    """The page is http://127.0.0.1:PORT; from 1 to 65535."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self)
