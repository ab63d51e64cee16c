"""The options of `generate`. Free of torch, so that `--help` stays quick."""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from stablevm.solvers.settings import expectations, without_effect
from stablevm.support.errors import UserError
from stablevm.support.options import Expectation, as_typed, distinct_indices, idle_warnings, require, writable

_LONGEST_STEM = 240  # bytes: a disk takes 255, with the suffix


@dataclass(frozen=True)
class GenerateConfig:
    """Generate images from a checkpoint into SAMPLE_DIR/NAME.npz. To resume after an interruption, run it again."""

    ckpt: Path
    """Checkpoint folder: model.json with ema.safetensors and model.safetensors."""
    num_fid_samples: int = 50_000
    """Number of images, 1 or more."""
    per_proc_batch_size: int = 64
    """Images per batch in each process, 1 or more. It changes speed and memory, not the images."""
    mode: Literal["ode", "sde", "stablevs"] = "sde"
    """ode: integrate the velocity. sde: SiT's stochastic sampler. stablevs: StableVS, few large steps below
    --split-time."""
    num_steps: int = 250
    """Steps from noise to image, 1 or more; for the sde, stablevs and --edm-schedule 2 or more."""
    solver: Literal["euler", "heun", "dopri5"] = "euler"
    """euler: one network evaluation per step; for the sde it is Euler-Maruyama. heun: second order, two evaluations
    per step. dopri5, for the ode: fifth order, with steps that adapt to each image until --rtol and --atol are met."""
    heun: bool = False
    """The same as --solver heun, but for the ode only: the sde ignores it, as in the published command."""
    rtol: float = 1e-3
    """Relative error that dopri5 permits in a step, more than 0."""
    atol: float = 1e-6
    """Absolute error that dopri5 permits in a step beside the relative one, more than 0."""
    edm_schedule: bool = False
    """Steps spaced as EDM's noise levels, densest near the image, instead of evenly."""
    split_time: float = 0.85
    """Time in (0, 1) below which stablevs takes its large steps."""
    steps_below: int = 9
    """How many of the --num-steps are large steps below --split-time, 1 or more; at least one remains above it."""
    above_split: Literal["ode", "sde"] = "ode"
    """How stablevs gets to --split-time."""
    noise_factor: float = 0.0
    """Fresh noise in the large steps of stablevs, from 0 (none) to 1 (as much as the path permits)."""
    cfg_scale: float = 1.0
    """Classifier-free guidance, 0 or more: 1 is no guidance, more than 1 pulls towards the class. It needs a
    network that was trained with --cfg-prob above 0."""
    guidance_low: float = 0.0
    """Guide from this time on, in [0, 1]; 0 is the image and 1 is noise."""
    guidance_high: float = 1.0
    """Guide up to this time, in [0, 1]."""
    legacy: bool = False
    """Guide the first three channels only, as the first samplers of DiT and SiT did, to reproduce their images."""
    label_sampling: Literal["equal", "random"] = "equal"
    """equal: as many images of each class, exact to one. random: each image's class is drawn uniformly."""
    classes: str | None = None
    """Only these classes: indices separated by commas, such as 207,360. Default: all that had samples in training."""
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
        expected = [
            writable("sample_dir", self.sample_dir),
            (
                "name",
                self.name is None or len(os.fsencode(self.name)) <= _LONGEST_STEM,
                f"at most {_LONGEST_STEM} bytes",
            ),
            ("num_fid_samples", self.num_fid_samples >= 1, "at least 1"),
            ("per_proc_batch_size", self.per_proc_batch_size >= 1, "at least 1"),
            *self._solver_expectations(),
            ("cfg_scale", 0 <= self.cfg_scale < float("inf"), "0 or more; 1 is no guidance"),
            ("guidance_low", 0 <= low <= 1, "a time in [0, 1]"),
            ("guidance_high", 0 <= high <= 1, "a time in [0, 1]"),
            ("guidance_high", low <= high, f"at least --guidance-low {low}"),
            ("global_seed", self.global_seed >= 0, "0 or more"),
            ("name", self.name is None or _is_file_stem(self.name), "a file name without folder and .npz"),
        ]
        require(self, expected)
        self.class_indices()

    def _solver_expectations(self) -> list[Expectation]:
        return [
            *expectations(self, as_typed),
            ("heun", not self.heun or self.solver != "dopri5", "no --solver dopri5 with it"),
            (
                "trajectory",
                not self.trajectory or self.solver != "dopri5",
                "no --solver dopri5 with it: each image has steps of its own",
            ),
        ]

    def class_indices(self) -> tuple[int, ...] | None:
        """The numbers in `classes`; None for all. UserError if they are not distinct integers from 0."""
        if self.classes is None:
            return None
        indices = distinct_indices(self.classes)
        if indices is None:
            raise UserError(f"--classes {self.classes}: expected distinct class indices from 0, such as 3,5")
        return indices

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect with the others, or another than in REPA."""
        idle = self._idle_options()
        lines = idle_warnings(self, idle)
        if self.legacy and "legacy" not in idle:
            lines.append(
                "--legacy guides the first three channels only; REPA's and StableVelocity's, for names of early "
                "checkpoints, is not needed: stablevm import knows them"
            )
        return lines

    def effective(self) -> "GenerateConfig":
        """The same request, with options that have no effect at their defaults, and --heun as the solver it names."""
        idle = {option: _DEFAULTS[option] for option in self._idle_options()}
        given = replace(self, **idle)
        return replace(given, solver="heun", heun=False) if given.heun else given

    def _idle_options(self) -> dict[str, str]:
        """Options that the others make useless, and which others."""
        guidance = ("guidance_low", "guidance_high", "legacy")
        idle = self._idle_solver_options()
        if self.cfg_scale == 1:
            idle |= dict.fromkeys(guidance, "--cfg-scale 1")
        if self.grid:
            idle["num_fid_samples"] = "--grid"
        if self.unconditional:
            idle |= dict.fromkeys(("cfg_scale", *guidance, "label_sampling", "classes"), "--unconditional")
        return idle

    def _idle_solver_options(self) -> dict[str, str]:
        idle = without_effect(replace(self, solver="heun") if self.heun else self, as_typed)
        if self.mode == "sde":
            idle["heun"] = "--mode sde"
        if self.mode == "stablevs" and self.above_split == "sde":
            idle["heun"] = "--above-split sde"
        return idle


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(GenerateConfig)}


def _is_file_stem(name: str) -> bool:
    return name != "" and name == Path(name).name and not name.startswith(".") and not name.endswith(".npz")
