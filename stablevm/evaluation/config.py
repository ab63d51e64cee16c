"""Options of `stablevm evaluate` and `stablevm reference`. Free of torch, so that `--help` stays quick."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stablevm.sampling.config import GenerateConfig
from stablevm.support.errors import UserError
from stablevm.support.options import idle_warnings, require, writable


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What generated images are compared with, and how."""

    reference: Path
    """Reference .npz: images, stored statistics or both, as ADM's suite and stablevm reference write them; or a folder
    or .zip of images of one size. With --extractor, a prepared data set with the splits train and test."""
    extractor: Path | None = None
    """Judge digits instead: folder of the extractor that was trained on them (stablevm extractor)."""
    inception: bool = True
    """Compute FID, sFID, inception score, precision, recall and others from Inception's features."""
    inception_weights: Path | None = None
    """File with Inception's weights. Default: downloaded once."""
    enc_type: Annotated[str | None, tyro.conf.arg(aliases=["--encoder"])] = None
    """Also compute the Fréchet distance, precision and recall on this encoder's features: dinov2-vit-l and the other
    names of training, or any vision transformer's name in timm."""
    encoder_weights: Path | None = None
    """File with the encoder's weights. Default: downloaded once by timm."""
    precision_recall: Literal["exact", "adm"] = "exact"
    """exact: distances of float32 features, and density, coverage and memorisation from them. adm: squared distances in
    float16, as ADM's script rounds them."""
    batch_size: int = 64
    """Images per forward pass, 1 or more. It changes speed and memory alone."""
    cache_dir: Path | None = None
    """Folder of features that were computed before. Default: stablevm/features in the user's cache folder."""
    cache_gigabytes: float = 20.0
    """Space for them: files used longest ago are removed beyond it."""
    output: Path | None = None
    """JSON file for the results. Default: the samples' name with .json."""
    report: bool = False
    """Also write an HTML report beside the results: samples, nearest reference images, classes, dependence on the
    number of samples."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range or in conflict with another."""
        require(
            self,
            [
                ("batch_size", self.batch_size >= 1, "at least 1"),
                ("cache_gigabytes", self.cache_gigabytes >= 0, "0 or more"),
                writable("cache_dir", self.cache_dir),
                writable("output", self.output, is_folder=False),
                ("inception", self.inception or bool(self.enc_type or self.extractor), "an --enc-type to use"),
            ],
        )

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect with the others."""
        idle: dict[str, str] = {}
        if self.enc_type is None:
            idle["encoder_weights"] = "no --enc-type"
        if not self.inception:
            idle["inception_weights"] = "--no-inception"
        if self.extractor is not None:
            features = ("inception", "inception_weights", "enc_type", "encoder_weights", "precision_recall")
            idle |= dict.fromkeys((*features, "batch_size", "cache_dir", "cache_gigabytes", "report"), "--extractor")
        return idle_warnings(self, idle)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JudgeConfig):
    """Judge a file of generated images: FID, sFID, inception score, precision and recall, as ADM's suite has them.

    To evaluate a checkpoint without a file in between, give --ckpt and the options of generate in place of SAMPLES.
    Several processes share the work: torchrun --nproc_per_node=4 evaluate.py ...
    """

    samples: tyro.conf.Positional[Path]
    """File of generated images: .npz with arr_0, uint8 (N, H, W, 3), and possibly labels, integers (N,); or a folder or
    .zip of images of one size."""


@dataclass(frozen=True)
class EvaluateCheckpointConfig:
    """Judge what a checkpoint generates, without a file in between: the options of generate, and those of evaluate.

    Results go to SAMPLE_DIR/NAME.json. Features are cached, so an interrupted evaluation resumes where it stopped.
    """

    judging: tyro.conf.OmitArgPrefixes[JudgeConfig]
    """What the images are compared with, and how."""
    sampling: tyro.conf.OmitArgPrefixes[GenerateConfig]
    """How they are generated."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        self.judging.validate()
        self.sampling.validate()

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect with the others."""
        pictures = idle_warnings(self.sampling, {"grid": "evaluate", "trajectory": "evaluate"})
        return [*self.judging.warnings(), *self.drawn.warnings(), *pictures]

    @property
    def drawn(self) -> GenerateConfig:
        """The request for images, without the pictures that only generate makes of them."""
        return replace(self.sampling, grid=False, trajectory=False)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Write a reference file for evaluate, which ADM's suite reads too: images, and statistics of the whole set."""

    source: tyro.conf.Positional[Path]
    """Prepared data set; or folder of class folders, or folder or .zip archive of images."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The .npz file to write."""
    split: str = "train"
    """Which split of a prepared data set."""
    num_images: int = 10_000
    """Images in the file, drawn from the set, for precision and recall; all of a smaller set."""
    resolution: int | None = None
    """Side of the images in pixels; for a folder of images of various sizes, which are cropped to it."""
    transform: Literal["center-crop-dhariwal", "center-crop", "none"] = "center-crop-dhariwal"
    """How a folder's images are cropped: as ADM; crop, then Lanczos; or none, where they have one size already."""
    statistics: bool = True
    """Store Inception's statistics of the whole set; without, evaluate computes them from the file's images."""
    inception_weights: Path | None = None
    """File with Inception's weights. Default: downloaded once."""
    seed: int = 0
    """Seed of the draw and order of the images, 0 or more."""
    batch_size: int = 64
    """Images per forward pass, 1 or more. It changes speed and memory alone."""
    cache_dir: Path | None = None
    """Folder of features that were computed before. Default: stablevm/features in the user's cache folder."""
    cache_gigabytes: float = 20.0
    """Space for them: files used longest ago are removed beyond it."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(
            self,
            [
                ("num_images", self.num_images >= 1, "at least 1"),
                ("resolution", self.resolution is None or self.resolution >= 1, "at least 1"),
                ("seed", self.seed >= 0, "0 or more"),
                ("batch_size", self.batch_size >= 1, "at least 1"),
                ("cache_gigabytes", self.cache_gigabytes >= 0, "0 or more"),
                writable("cache_dir", self.cache_dir),
                writable("output", self.output, is_folder=False),
            ],
        )
        if self.output.suffix != ".npz":
            raise UserError(f"--output {self.output}: expected a name that ends in .npz")

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect with the others."""
        idle = dict.fromkeys(("inception_weights", "batch_size", "cache_dir", "cache_gigabytes"), "--no-statistics")
        return [] if self.statistics else idle_warnings(self, idle)
