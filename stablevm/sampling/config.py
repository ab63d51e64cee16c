"""The options of `generate`. Free of torch, so that `--help` stays quick."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from stablevm.choices import LabelSampling, PathName, Precision, Prediction, Weights
from stablevm.solvers.settings import SamplerOptions
from stablevm.support.errors import UserError
from stablevm.support.options import Expectation, as_typed, distinct_indices, idle_warnings, require, writable
from stablevm.support.ranges import Count, Natural, Range, Time

_LONGEST_STEM = 240  # bytes: a disk takes 255, with the suffix
CFG_SCALE = Range("0 or more; 1 is no guidance", 0)


@dataclass(frozen=True)
class GuidanceOptions:
    """Classifier-free guidance, and the arithmetic of the network."""

    GROUP: ClassVar[str] = "guidance"

    cfg_scale: Annotated[float, CFG_SCALE] = 1.0
    """Classifier-free guidance, 0 or more: 1 is no guidance, more than 1 pulls towards the class. It needs a
    network that was trained with --cfg-prob above 0."""
    guidance_low: Time = 0.0
    """Lowest time with guidance, in [0, 1]; 0 is the image and 1 is noise."""
    guidance_high: Time = 1.0
    """Highest time with guidance, in [0, 1]."""
    legacy: bool = False
    """Guide only the first three channels, as the first samplers of DiT and SiT did, to reproduce their images."""
    precision: Precision = "fp32"
    """Arithmetic of the network; the solver's is always 64 bits."""


@dataclass(frozen=True, kw_only=True)
class AutoguidanceOptions:
    """Guidance by a weaker network of the same data, such as an earlier checkpoint or a smaller model."""

    GROUP: ClassVar[str] = "autoguidance"

    guide_ckpt: Path | None = None
    """Checkpoint folder, run's folder, or hf:OWNER/NAME[@REVISION] of the weaker network: samples are driven away from
    what it predicts."""
    guide_weights: Weights = "ema"
    """Which of its weights: ema, the moving average; model, those of the last step."""
    guide_scale: Annotated[float, CFG_SCALE] = 1.0
    """Strength, 0 or more: 1 is none; 2 goes as far beyond the network's prediction as the weaker one's lies behind."""
    guide_low: Time = 0.0
    """Lowest time with it, in [0, 1]."""
    guide_high: Time = 1.0
    """Highest time with it, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Which images: how many, and of which classes."""

    GROUP: ClassVar[str] = "images"

    num_fid_samples: Count = 50_000
    """Number of images, 1 or more."""
    label_sampling: LabelSampling = "equal"
    """equal: equally many images of each class, up to one. random: the class of each image is drawn uniformly."""
    classes: str | None = None
    """Only these classes: indices or names separated by commas, such as 207,360 or cat,dog. Default: all that had
    samples in training."""
    unconditional: bool = False
    """Images without a class, from the network's null class."""
    global_seed: Natural = 0
    """Seed, 0 or more. Image i depends only on it, on i and on its class."""


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Pictures for people."""

    GROUP: ClassVar[str] = "pictures"

    grid: bool = False
    """A quick look: no .npz, only SAMPLE_DIR/NAME.png of 8 images of each class, or of 64 if classes are many."""
    trajectory: bool = False
    """Also make SAMPLE_DIR/NAME.gif: the network's predictions of the images in the picture while they form."""


@dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """Speed and memory."""

    GROUP: ClassVar[str] = "hardware"

    per_proc_batch_size: Count = 64
    """Images per batch in each process, 1 or more. It changes speed and memory, not the images."""
    compile: bool = False
    """Compile the network's blocks with torch.compile: it takes minutes at the start, then less time for each image."""
    tf32: bool = False
    """Let a GPU round the factors of float32 products to TF32."""
    fused_attn: bool | None = None
    """Compute attention with the fused kernel, otherwise step by step. Default: as the checkpoint records."""


@dataclass(frozen=True, kw_only=True)
class CheckedOptions:
    """Facts that the checkpoint records; if given, they are checked."""

    GROUP: ClassVar[str] = "checkpoint"

    model: str | None = None
    """Model size, such as SiT-XL/2. The checkpoint records it; if given, it is checked, as all options below."""
    path_type: PathName | None = None
    """Interpolant of the training, checked against the checkpoint."""
    prediction_type: Prediction | None = None
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


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(
    ImageOptions,
    PictureOptions,
    SamplerOptions,
    GuidanceOptions,
    AutoguidanceOptions,
    HardwareOptions,
    CheckedOptions,
):
    """Generate images from a checkpoint into SAMPLE_DIR/NAME.npz. To resume after an interruption, run it again."""

    GROUP: ClassVar[str] = "run"

    ckpt: Path
    """Checkpoint folder: model.json with ema.safetensors and model.safetensors. Or a run's folder, for its newest; or
    hf:OWNER/NAME[@REVISION], on the Hugging Face Hub."""
    weights: Weights = "ema"
    """ema: the moving average of the weights. model: the weights of the last training step."""
    vae: str | None = None
    """Autoencoder: ema, mse, or the folder of one to decode with. Default: the one that the checkpoint records."""
    sample_dir: Path = Path("samples")
    """Folder for the result."""
    name: str | None = None
    """The result is SAMPLE_DIR/NAME.npz. Default: made from the checkpoint and the settings, with a hash of both."""
    heun: bool = False
    """The same as --solver heun, but for the ode only: the sde ignores it, as in the published command."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        low = self.guidance_low
        expected = [
            writable("sample_dir", self.sample_dir),
            (
                "name",
                self.name is None or len(os.fsencode(self.name)) <= _LONGEST_STEM,
                f"at most {_LONGEST_STEM} bytes",
            ),
            *self._solver_expectations(),
            ("guidance_high", low <= self.guidance_high, f"at least --guidance-low {low}"),
            ("guide_ckpt", self.guide_ckpt is None or self.mode != "meanflow", "none with --mode meanflow"),
            ("guide_high", self.guide_low <= self.guide_high, f"at least --guide-low {self.guide_low}"),
            ("name", self.name is None or _is_file_stem(self.name), "a file name without folder and .npz"),
        ]
        require(self, expected)
        self._check_classes()

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> None:
        """UserError for options that were given and contradict each other, which their values alone can't show."""
        solver = given.get("solver", "heun")
        if given.get("heun") and solver != "heun":
            raise UserError(f"--heun is the same as --solver heun, and --solver {solver} was given: leave out one")

    def _solver_expectations(self) -> list[Expectation]:
        return [
            *self.expectations(as_typed),
            ("heun", not self.heun or self.solver != "dopri5", "no --solver dopri5 with it"),
            (
                "heun",
                not self.heun or self.mode != "meanflow",
                "no --mode meanflow with it, whose steps have one evaluation",
            ),
            (
                "trajectory",
                not self.trajectory or self.solver != "dopri5",
                "no --solver dopri5 with it: each image has steps of its own",
            ),
        ]

    def _check_classes(self) -> None:
        """UserError unless they are distinct numbers or distinct names; which names there are, the checkpoint knows."""
        parts = [part.strip() for part in (self.classes or "all").split(",")]
        mixed = {part.isdecimal() for part in parts} == {True, False}
        if "" in parts or mixed or len(set(parts)) < len(parts):
            raise UserError(
                f"--classes {self.classes}: expected distinct class indices from 0, such as 3,5, or names of classes"
            )

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
        autoguidance = ("guide_weights", "guide_scale", "guide_low", "guide_high")
        if self.guide_ckpt is None:
            idle |= dict.fromkeys(autoguidance, "no --guide-ckpt")
        elif self.guide_scale == 1:
            idle |= dict.fromkeys(("guide_ckpt", *autoguidance), "--guide-scale 1")
        if self.grid:
            idle["num_fid_samples"] = "--grid"
        if self.unconditional:
            idle |= dict.fromkeys(("cfg_scale", *guidance, "label_sampling", "classes"), "--unconditional")
        return idle

    def _idle_solver_options(self) -> dict[str, str]:
        idle = (replace(self, solver="heun") if self.heun else self).without_effect(as_typed)
        if self.mode == "sde":
            idle["heun"] = "--mode sde"
        if self.mode == "stablevs" and self.above_split == "sde":
            idle["heun"] = "--above-split sde"
        return idle


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(GenerateConfig)}


def _is_file_stem(name: str) -> bool:
    return name != "" and name == Path(name).name and not name.startswith(".") and not name.endswith(".npz")
