"""Options of `stablevm evaluate`, `reference` and `extractor`, and checks of what they write. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from stablevm.choices import Arithmetic, SquareTransform
from stablevm.sampling.config import GenerateConfig
from stablevm.support.errors import UserError
from stablevm.support.options import idle_warnings, require, writable
from stablevm.support.ranges import Count, Natural, NotNegative


@dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """The reference for generated images, and the metrics."""

    GROUP: ClassVar[str] = "evaluation"

    reference: Path
    """Reference .npz: images, stored statistics or both, as ADM's suite and stablevm reference write them; or a folder
    or .zip of images of equal size. With --extractor, a prepared data set with the splits train and test."""
    extractor: Path | None = None
    """Evaluate digits or other small images instead: folder of the extractor that was trained on real ones (stablevm
    extractor)."""
    inception: bool = True
    """Compute FID, sFID, inception score, precision, recall and others from Inception's features."""
    inception_weights: Path | None = None
    """File with Inception's weights. Default: downloaded once."""
    enc_type: Annotated[str | None, tyro.conf.arg(aliases=["--encoder"])] = None
    """Also compute the Fréchet distance, precision and recall on this encoder's features: dinov2-vit-l and the other
    names of training, or any vision transformer's name in timm."""
    encoder_weights: Path | None = None
    """File with the encoder's weights. Default: downloaded once by timm."""
    precision_recall: Arithmetic = "exact"
    """exact: distances of float32 features, and density, coverage and memorisation from them. adm: squared distances in
    float16, as ADM's script rounds them."""
    batch_size: Count = 64
    """Images per forward pass, 1 or more. It affects only speed and memory."""
    cache_dir: Path | None = None
    """Cache folder of computed features. Default: stablevm/features in the user's cache folder."""
    cache_gigabytes: NotNegative = 20.0
    """Maximum size of the cache; beyond it the least recently used files are removed."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range or in conflict with another."""
        require(
            self,
            [
                writable("cache_dir", self.cache_dir),
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
            idle |= dict.fromkeys((*features, "batch_size", "cache_dir", "cache_gigabytes"), "--extractor")
        return idle_warnings(self, idle)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(MetricOptions):
    """The files of results."""

    GROUP: ClassVar[str] = "results"

    output: Path | None = None
    """JSON file for the results. Default: the samples' name with .json."""
    report: bool = False
    """Also write an HTML report beside the results: samples, nearest reference images, classes, dependence on the
    number of samples."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range or in conflict with another."""
        super().validate()
        require(self, [writable("output", self.output, is_folder=False)])

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect with the others."""
        idle = {} if self.extractor is None else {"report": "--extractor"}
        return super().warnings() + idle_warnings(self, idle)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationOptions):
    """Evaluate a file of generated images: FID, sFID, inception score, precision and recall, as ADM's suite has them.

    To evaluate a checkpoint without writing its images, give --ckpt and the options of generate instead of SAMPLES.
    Several processes share the work: torchrun --nproc_per_node=4 -m stablevm evaluate ...
    """

    GROUP: ClassVar[str] = "samples"

    samples: tyro.conf.Positional[Path]
    """File of generated images: .npz with arr_0, uint8 (N, H, W, 3), and possibly labels, integers (N,); or a folder or
    .zip of images of equal size."""


@dataclass(frozen=True)
class EvaluateCheckpointConfig:
    """Evaluate the images of a checkpoint without writing them, with the options of generate and those of evaluate.

    Results go to SAMPLE_DIR/NAME.json. Features are cached, so an interrupted evaluation resumes where it stopped.
    """

    evaluation: tyro.conf.OmitArgPrefixes[EvaluationOptions]
    """The reference for the images, and the metrics."""
    sampling: tyro.conf.OmitArgPrefixes[GenerateConfig]
    """How the images are generated."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        self.evaluation.validate()
        self.sampling.validate()

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect with the others."""
        pictures = idle_warnings(self.sampling, {"grid": "evaluate", "trajectory": "evaluate"})
        return [*self.evaluation.warnings(), *self.drawn.warnings(), *pictures]

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
    """Which split of a prepared data set, or of a source of several splits, such as MNIST's files."""
    num_images: Count = 10_000
    """Random images of the set that are stored for precision and recall; all of a smaller set."""
    resolution: Count | None = None
    """Side of the images in pixels; for a folder of images of various sizes, which are cropped to it."""
    transform: SquareTransform = "center-crop-dhariwal"
    """How a folder's images are cropped: as ADM; crop, then Lanczos; or none, if they already have one size."""
    statistics: bool = True
    """Store Inception's statistics of the whole set; otherwise evaluate computes them from the images in the file."""
    inception_weights: Path | None = None
    """File with Inception's weights. Default: downloaded once."""
    seed: Natural = 0
    """Seed for the choice and order of the images, 0 or more."""
    batch_size: Count = 64
    """Images per forward pass, 1 or more. It affects only speed and memory."""
    cache_dir: Path | None = None
    """Cache folder of computed features. Default: stablevm/features in the user's cache folder."""
    cache_gigabytes: NotNegative = 20.0
    """Maximum size of the cache; beyond it the least recently used files are removed."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(
            self,
            [
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


@dataclass(frozen=True)
class ExtractorConfig:
    """Train the network that evaluates generated digits and other small images, on the training split."""

    data_dir: Path
    """Prepared data with the splits train and test: digits of 8 pixels, or images of 28 to 64."""
    output_dir: Path
    """Folder for extractor.safetensors and extractor.json."""
    seed: Natural = 0
    """Seed of weights, batches and augmentation."""
    steps: Count = 1500
    """Steps of training, each on 64 images."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("output_dir", self.output_dir)])


def default_output(samples: Path) -> Path:
    """The default file for results, beside the samples: their name with the suffix .json, appended for a folder."""
    if samples.is_dir():
        return samples.parent / f"{samples.resolve().name}.json"
    return samples.with_suffix(".json")


def outputs_of(output: Path, config: EvaluationOptions) -> dict[str, Path]:
    """The files that an evaluation writes, by the option that requests them."""
    page = {"--report": output.with_suffix(".html")} if config.report and config.extractor is None else {}
    return {"--output": output} | page


def inputs_of(config: EvaluationOptions) -> dict[str, Path | None]:
    """The files that an evaluation reads besides the images, by option."""
    return {
        "--reference": config.reference,
        "--extractor": config.extractor,
        "--inception-weights": config.inception_weights,
        "--encoder-weights": config.encoder_weights,
        "--cache-dir": config.cache_dir,
    }


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, Path | None]) -> None:
    """Raise UserError for outputs that are folders, that are the same file, or that would replace a file that is read.

    Existing files in an input's folder count as read, unless they are results of an earlier command.
    """
    written: dict[Path, str] = {}
    for option, path in outputs.items():
        if path.is_dir():
            raise UserError(f"{option} {path}: is a folder; give the name of a file")
        if (other := written.setdefault(path.resolve(), option)) != option:
            raise UserError(f"{option} would write {path}, which is {other} too; give --output a name in .json")
        for source, read in inputs.items():
            if read is not None and _would_replace(path, read):
                raise UserError(
                    f"{option} would replace {path}, which {source} {read} reads; give --output another name"
                )


def _would_replace(path: Path, read: Path) -> bool:
    if not path.exists() or not read.exists():
        return path.resolve() == read.resolve()
    if path.samefile(read):
        return True
    return read.is_dir() and path.resolve().is_relative_to(read.resolve()) and not _is_result(path)


def _is_result(path: Path) -> bool:
    """Whether the file looks like the output of an evaluation: results, a report, or a reference file."""
    if path.suffix == ".npz":
        return True
    with path.open("rb") as file:
        head = file.read(4096)
    if path.suffix == ".html":
        return b"<title>Evaluation of " in head
    return head.startswith(b"{") and b'"samples"' in head
