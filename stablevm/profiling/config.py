"""The options of `stablevm benchmark`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass
from pathlib import Path

from stablevm.choices import LossName, MixedPrecision, WeightName
from stablevm.support.errors import UserError
from stablevm.support.options import idle_warnings, require, writable
from stablevm.support.ranges import Count, Natural, Time

ROUNDS = 5  # of measured steps; a disturbance of one round does not change the median
# Each with its --loss-type and whether it has alignment.
OBJECTIVES: dict[str, tuple[LossName, bool]] = {
    "si": ("si", False),
    "stablevm": ("stablevm", False),
    "si+repa": ("si", True),
    "stablevm+va-repa": ("stablevm", True),
}


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure training steps on this machine, phase by phase, with the code that trains.

    Prints images per second, memory, the share of the machine's arithmetic, and hours to 80 and 800 epochs of the data;
    writes steps.json and steps.png. Nothing is downloaded: the encoder has random weights, and without --data-dir the
    data are random values of ImageNet's shape and number. To measure several processes, start it as training is.
    """

    objectives: str = "si,stablevm,si+repa,stablevm+va-repa"
    """What is trained, separated by commas: si, stablevm, and both with alignment, si+repa and stablevm+va-repa."""
    model: str | None = None
    """SiT-{S,B,L,XL}/{1,2,4,8}, LightningDiT-{B,L,XL}/{1,2} or JiT-{B,L,H}/{16,32}. Default: SiT-XL/2 on a GPU,
    SiT-S/2 on a CPU."""
    batch_size: Count | None = None
    """Samples per step over all processes. Default: 256 on a GPU, 16 on a CPU."""
    gradient_accumulation_steps: Count | None = None
    """Parts into which each process splits its share of a step. Default: as few of 1, 2, 4, ... as fit into memory."""
    mixed_precision: MixedPrecision = "bf16"
    """Arithmetic of the network and the encoder."""
    compile: bool = False
    """Compile the network's blocks."""
    checkpoint_activations: bool = False
    """Keep only the inputs of the network's blocks for the backward pass, which computes the rest again."""
    fused_attn: bool = True
    """Compute attention with the fused kernel."""
    enc_type: str = "dinov2-vit-b"
    """Encoders to align with, separated by commas: the published names or any vision transformer of timm."""
    encoder_depth: int = 8
    """Block, counted from 1, whose tokens are aligned."""
    proj_weight_schedule: WeightName = "sigmoid"
    """How alignment fades with time; samples of weight 0 are not encoded."""
    bank_capacity_per_class: Count = 256
    """References that the bank keeps of each class."""
    references_from: Time = 0.0
    """References take part from this time on, in [0, 1]."""
    num_classes: Count | None = None
    """Classes of the random data. Default: 1000."""
    resolution: int | None = None
    """Side of the random images in pixels, a multiple of 16; their latents are 4 x an eighth of it squared. Default:
    256."""
    data_dir: Path | None = None
    """Prepared data set to read from, in place of random values."""
    num_workers: Natural | None = None
    """Processes that read data. Default: 4 on a GPU, as in training; 0 on a CPU."""
    steps: int | None = None
    """Steps that are measured, in 5 rounds of which the medians are shown; a multiple of 5. Default: 50 on a GPU, 20 on
    a CPU."""
    warmup: Count = 3
    """Steps before them that are not."""
    output_dir: Path = Path("benchmark-steps")
    """Folder for steps.json and steps.png."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(
            self,
            [
                ("resolution", _multiple(self.resolution, 16), "a positive multiple of 16"),
                ("steps", _multiple(self.steps, ROUNDS), f"a positive multiple of {ROUNDS}"),
                ("num_classes", self.num_classes is None or self.data_dir is None, "none with --data-dir"),
                ("resolution", self.resolution is None or self.data_dir is None, "none with --data-dir"),
                writable("output_dir", self.output_dir),
                ("objectives", set(self.objective_names) <= set(OBJECTIVES),
                 f"some of {', '.join(OBJECTIVES)}, comma-separated"),
            ],
        )  # fmt: skip
        if len(set(self.objective_names)) < len(self.objective_names):
            raise UserError(f"--objectives {self.objectives}: one is named twice")

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect with the others."""
        idle: dict[str, str] = {}
        losses, aligned = zip(*(OBJECTIVES[name] for name in self.objective_names), strict=True)
        if not any(aligned):
            options = ("enc_type", "encoder_depth", "proj_weight_schedule")
            idle |= dict.fromkeys(options, f"--objectives {self.objectives}")
        if "stablevm" not in losses:
            idle |= dict.fromkeys(("bank_capacity_per_class", "references_from"), f"--objectives {self.objectives}")
        return idle_warnings(self, idle)

    @property
    def objective_names(self) -> list[str]:
        return [name.strip() for name in self.objectives.split(",")]


def _multiple(value: int | None, factor: int) -> bool:
    """Whether it is a positive multiple, or not given."""
    return value is None or (value >= factor and value % factor == 0)
