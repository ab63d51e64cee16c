"""The options of `stablevm benchmark`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stablevm.errors import UserError
from stablevm.options import require

ROUNDS = 5  # of the measured steps: a disturbance of one leaves the median alone
# Each by its --loss-type and whether it is aligned.
OBJECTIVES: dict[str, tuple[Literal["si", "stablevm"], bool]] = {
    "si": ("si", False),
    "stablevm": ("stablevm", False),
    "si+repa": ("si", True),
    "stablevm+va-repa": ("stablevm", True),
}


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure training steps on this machine, phase by phase, with the code that trains.

    Prints images per second, memory, the share of the machine's arithmetic, and hours to 80 and 800 epochs of ImageNet;
    writes steps.json and steps.png. Nothing is downloaded: the encoder has random weights, and without --data-dir the
    data are random values of ImageNet's shape. Start it as train.py is started to measure several processes.
    """

    objectives: str = "si,stablevm,si+repa,stablevm+va-repa"
    """What is trained, separated by commas: si, stablevm, and both with alignment, si+repa and stablevm+va-repa."""
    model: str | None = None
    """SiT-{S,B,L,XL}/{2,4,8}. Default: SiT-XL/2 on a GPU, SiT-S/2 on a CPU."""
    batch_size: int | None = None
    """Samples per step over all processes. Default: 256 on a GPU, 16 on a CPU."""
    gradient_accumulation_steps: int = 1
    """Parts into which each process splits its share of a step, to save memory."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    """Arithmetic of the network and the encoder."""
    compile: bool = False
    """Compile the network's blocks."""
    fused_attn: bool = True
    """Compute attention with the fused kernel."""
    enc_type: str = "dinov2-vit-b"
    """Encoders to align with, separated by commas: the published names or any vision transformer of timm."""
    encoder_depth: int = 8
    """Block, counted from 1, whose tokens are aligned."""
    proj_weight_schedule: Literal["hard", "hard_high", "sigmoid", "cosine", "snr", "constant"] = "sigmoid"
    """How alignment fades with time; samples of weight 0 are not encoded."""
    bank_capacity_per_class: int = 256
    """References that the bank keeps of each class."""
    num_classes: int = 1000
    """Classes of the random data."""
    resolution: int = 256
    """Side of the random images in pixels, a multiple of 16; their latents are 4 x an eighth of it squared."""
    data_dir: Path | None = None
    """Prepared data set to read from, in place of random values."""
    num_workers: int = 0
    """Processes that read data."""
    steps: int = 20
    """Steps that are measured, in 5 rounds of which the medians are shown; a multiple of 5."""
    warmup: int = 3
    """Steps before them that are not."""
    output_dir: Path = Path("benchmark-steps")
    """Folder for steps.json and steps.png."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        counts = ("gradient_accumulation_steps", "bank_capacity_per_class", "num_classes", "warmup")
        require(
            self,
            [
                *((name, getattr(self, name) >= 1, "at least 1") for name in counts),
                ("batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1"),
                ("resolution", self.resolution >= 16 and self.resolution % 16 == 0, "a positive multiple of 16"),
                ("num_workers", self.num_workers >= 0, "0 or more"),
                ("steps", self.steps >= ROUNDS and self.steps % ROUNDS == 0, f"a positive multiple of {ROUNDS}"),
                ("objectives", set(self.objective_names) <= set(OBJECTIVES),
                 f"some of {', '.join(OBJECTIVES)}, comma-separated"),
            ],
        )  # fmt: skip
        if len(set(self.objective_names)) < len(self.objective_names):
            raise UserError(f"--objectives {self.objectives}: one is named twice")

    @property
    def objective_names(self) -> list[str]:
        return [name.strip() for name in self.objectives.split(",")]
