"""The options of `generate`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from stablevm.errors import UserError
from stablevm.options import idle_warnings, require


@dataclass(frozen=True)
class GenerateConfig:
    """Generate images from a checkpoint into SAMPLE_DIR/NAME.npz. To go on after an interruption, run it again."""

    ckpt: Path
    """Checkpoint folder: model.json with ema.safetensors and model.safetensors."""
    num_fid_samples: int = 50_000
    """Number of images, 1 or more."""
    per_proc_batch_size: int = 64
    """Images per batch in each process, 1 or more. It changes speed and memory, not the images."""
    mode: Literal["ode", "sde"] = "sde"
    """ode: integrate the velocity. sde: SiT's stochastic sampler, by Euler-Maruyama."""
    num_steps: int = 250
    """Steps from noise to image: 1 or more, for the sde 2 or more."""
    heun: bool = False
    """Heun's second-order method for the ode, at two network evaluations per step."""
    cfg_scale: float = 1.0
    """Classifier-free guidance, 0 or more: 1 is no guidance, more than 1 pulls towards the class."""
    guidance_low: float = 0.0
    """Guide from this time on, in [0, 1]; 0 is the image and 1 is noise."""
    guidance_high: float = 1.0
    """Guide up to this time, in [0, 1]."""
    label_sampling: Literal["equal", "random"] = "equal"
    """equal: as many images of each class, exact to one. random: each image's class is drawn uniformly."""
    classes: str | None = None
    """Only these classes: indices separated by commas, such as 207,360. Default: all."""
    unconditional: bool = False
    """Images of no class in particular, from the network's null class."""
    global_seed: int = 0
    """Seed, 0 or more. Image i depends on it, on i and on its class alone."""
    sample_dir: Path = Path("samples")
    """Folder for the result."""
    name: str | None = None
    """The result is SAMPLE_DIR/NAME.npz. Default: made from the checkpoint, the settings and a hash of both."""
    grid: bool = False
    """A quick look: no .npz, only SAMPLE_DIR/NAME.png of 8 images of each class, or of 64 if classes are many."""
    trajectory: bool = False
    """Also draw SAMPLE_DIR/NAME.gif: the images of the picture, as the network foresees them, while they form."""
    weights: Literal["ema", "model"] = "ema"
    """ema: the moving average of the weights. model: the weights of the last training step."""
    diffusion_scale: float = 1.0
    """Noise of the sde, 0 or more: its diffusion is this times sigma(t). 1 as in StableVM, 2 as in REPA."""
    last_time: float = 0.04
    """Time at which the sde stops adding noise, in (0, 1); one step without noise leads from there to 0."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network; the solver's is always 64 bits."""
    compile: bool = False
    """Let torch.compile make faster kernels of the network's blocks: minutes at the start, less for each image."""
    tf32: bool = False
    """Let a GPU round the factors of float32 products to TF32."""
    vae: str | None = None
    """Autoencoder: ema, mse, or the folder of one to decode with. Default: the one that the checkpoint records."""
    fused_attn: bool | None = None
    """Compute attention with the fused kernel, or else step by step. Default: as the checkpoint records."""
    model: str | None = None
    """Model size, such as SiT-XL/2. The checkpoint records it; if given, it is checked, as all options below."""
    path_type: Literal["linear", "cosine"] | None = None
    """Interpolant of the training, checked against the checkpoint."""
    prediction_type: Literal["v", "x"] | None = None
    """What the network predicts: the velocity (v) or the image (x), checked against the checkpoint."""
    resolution: int | None = None
    """Side of the images in pixels, checked against the checkpoint."""
    encoder_depth: int | None = None
    """Block (from 1) whose tokens were aligned in training, checked against the checkpoint."""
    projector_embed_dims: str | None = None
    """Widths of the projectors' outputs, separated by commas, checked against the checkpoint."""
    use_projector: bool | None = None
    """Whether the network has projectors, checked against the checkpoint."""
    use_irepa: bool | None = None
    """Whether its projectors are convolutions, checked against the checkpoint."""
    qk_norm: bool | None = None
    """Whether its attention normalises queries and keys, checked against the checkpoint."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        low, high = self.guidance_low, self.guidance_high
        expectations = [
            ("num_fid_samples", self.num_fid_samples >= 1, "at least 1"),
            ("per_proc_batch_size", self.per_proc_batch_size >= 1, "at least 1"),
            ("num_steps", self.num_steps >= 1, "at least 1"),
            ("num_steps", self.mode != "sde" or self.num_steps >= 2, "at least 2 with --mode sde"),
            ("cfg_scale", 0 <= self.cfg_scale < float("inf"), "0 or more; 1 is no guidance"),
            ("guidance_low", 0 <= low <= 1, "a time in [0, 1]"),
            ("guidance_high", 0 <= high <= 1, "a time in [0, 1]"),
            ("guidance_high", low <= high, f"at least --guidance-low {low}"),
            ("global_seed", self.global_seed >= 0, "0 or more"),
            ("diffusion_scale", 0 <= self.diffusion_scale < float("inf"), "0 or more"),
            ("last_time", 0 < self.last_time < 1, "a time between 0 and 1"),
            ("name", self.name is None or _is_file_stem(self.name), "a file name without folder and .npz"),
        ]
        require(self, expectations)
        self.class_indices()

    def class_indices(self) -> tuple[int, ...] | None:
        """The numbers in `classes`; None for all. UserError if they are not distinct integers from 0."""
        if self.classes is None:
            return None
        parts = [part.strip() for part in self.classes.split(",")]
        if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
            raise UserError(f"--classes {self.classes}: expected distinct class indices from 0, such as 3,5")
        return tuple(int(part) for part in parts)

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect with the others."""
        return idle_warnings(self, self._idle_options())

    def effective(self) -> "GenerateConfig":
        """The same request, with options that have no effect at their defaults."""
        return replace(self, **{option: _DEFAULTS[option] for option in self._idle_options()})

    def _idle_options(self) -> dict[str, str]:
        """Options that the others make useless, and which others."""
        idle = {}
        if self.mode == "sde":
            idle["heun"] = "--mode sde"
        if self.mode == "ode":
            idle["diffusion_scale"] = idle["last_time"] = "--mode ode"
        if self.cfg_scale == 1:
            idle["guidance_low"] = idle["guidance_high"] = "--cfg-scale 1"
        if self.grid:
            idle["num_fid_samples"] = "--grid"
        if self.unconditional:
            for option in ("cfg_scale", "guidance_low", "guidance_high", "label_sampling", "classes"):
                idle[option] = "--unconditional"
        return idle


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(GenerateConfig)}


def _is_file_stem(name: str) -> bool:
    return name != "" and name == Path(name).name and not name.startswith(".") and not name.endswith(".npz")
