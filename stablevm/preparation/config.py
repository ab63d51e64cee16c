"""The options of the commands that prepare data. Free of torch, so that `--help` stays quick."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stablevm.choices import EncoderPrecision, Resize, Transform
from stablevm.support.errors import UserError
from stablevm.support.files import check_output
from stablevm.support.options import require, writable
from stablevm.support.ranges import Chance, Count, Natural

MAX_SIDE = 16_384  # pixels of a result


def is_archive(dest: Path) -> bool:
    """Whether a result is a ZIP archive instead of a folder."""
    return dest.suffix.lower() == ".zip"


@dataclass(frozen=True)
class ConvertConfig:
    """Crop the images of a source to one size. To resume after an interruption, run the same command again.

    Exit status: 0, all images are converted; 3, some were skipped and are listed with their causes in report.json.
    """

    source: Path
    """Folder of class folders; or folder or .zip archive with dataset.json; or folder or archive of images; or file or
    folder of IDX (MNIST's), binary CIFAR, Parquet or tar files."""
    dest: Path
    """Folder for the result, or a name that ends with .zip for an uncompressed archive."""
    split: str | None = None
    """Split of a source that has several, such as test. Default: train, or the only one."""
    class_names: str | None = None
    """Names of the classes in the order of their numbers: separated by commas, or a text file with a name on each line.
    Default: the source's."""
    resolution: str | None = None
    """Width x height of the result, such as 256x256 or 256,256. With scale and none it may be left out: then all images
    must have the size of the first."""
    transform: Transform = "scale"
    """scale: bring the whole image to --resolution by Lanczos; center-crop-dhariwal: halve by a box filter, then
    bicubic, then crop, as ADM; center-crop: the middle square, then Lanczos; center-crop-wide: the middle rows, then
    Lanczos, black bars above and below; pad: the whole image in the middle of black, scaled down if it is larger;
    none: no change of size."""
    part: str = "1/1"
    """Only a part of the images: 2/3 is every third image by name, beginning with the second; 2-10/10 is all but every
    tenth, so that 1/10 and 2-10/10 divide a source into a tenth and the rest."""
    max_images: Count | None = None
    """Only this many images of these, the first ones by name. Default: all."""
    num_workers: Natural = 8
    """Processes that convert images; 0: this one."""
    batch_size: Count = 8
    """Images per request to a worker."""

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels; None where the images' own size is kept."""
        if self.resolution is None:
            return None
        match = re.fullmatch(r"(\d+)(?:[x,](\d+))?", self.resolution)
        if match is None:
            raise UserError(f"--resolution {self.resolution}: expected WIDTHxHEIGHT or WIDTH,HEIGHT, such as 256x256")
        return int(match[1]), int(match[2] or match[1])

    @property
    def part_of_whole(self) -> tuple[range, int]:
        """The numbers of the parts that are taken, from 1, and the number of all parts."""
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?/(\d{1,9})", self.part)
        first, last, parts = (0, 0, 0) if match is None else (int(found) for found in match.groups(match[1]))
        if not 1 <= first <= last <= parts:
            raise UserError(
                f"--part {self.part}: expected NUMBER/PARTS or FIRST-LAST/PARTS with numbers of 1 to PARTS, such as "
                "1/2 or 2-10/10"
            )
        return range(first, last + 1), parts

    def names_of_classes(self) -> tuple[str, ...] | None:
        """The names in `class_names`, or in the file that it names; None without."""
        if self.class_names is None:
            return None
        if Path(self.class_names).is_file():
            lines = Path(self.class_names).read_text(encoding="utf-8", errors="replace").splitlines()
            names = [line.strip() for line in lines if line.strip()]
        else:
            names = [name.strip() for name in self.class_names.split(",")]
        if not all(names) or len(set(names)) != len(names):
            raise UserError(f"--class-names {self.class_names}: expected different names, or a file with one per line")
        return tuple(names)

    def validate(self) -> None:
        """Raise UserError for the first option outside its range or in conflict with another."""
        size = self.size
        _ = self.part_of_whole, self.names_of_classes()
        square = size is not None and size[0] == size[1]
        require(
            self,
            [
                writable("dest", self.dest, is_folder=not is_archive(self.dest)),
                ("resolution", size is None or min(size) >= 1, "a positive width and height"),
                ("resolution", size is None or max(size) <= MAX_SIDE, f"at most {MAX_SIDE:,} x {MAX_SIDE:,}"),
                ("resolution", size is not None or self.transform in ("scale", "none"),
                 f"a size such as 256x256 with --transform {self.transform}"),
                ("resolution", square or self.transform != "center-crop-dhariwal",
                 "as wide as high with --transform center-crop-dhariwal"),
                ("resolution", self.transform != "center-crop-wide" or size is None or size[0] >= size[1],
                 "at least as wide as high with --transform center-crop-wide"),
            ],
        )  # fmt: skip


@dataclass(frozen=True)
class ConvertShardsConfig(ConvertConfig):
    """Crop the images of a source to one size and write them into shards: the first of two steps; then encode.

    To resume after an interruption, run the same command again. Exit status: 0, all images are converted; 3, some were
    skipped and are listed with their causes in report.json.
    """

    transform: Transform = "center-crop-dhariwal"
    """center-crop-dhariwal: halve by a box filter, then bicubic, then crop, as ADM; center-crop: the middle square,
    then Lanczos; center-crop-wide: the middle rows, then Lanczos, black bars above and below; scale: bring the whole
    image to --resolution by Lanczos; pad: the whole image in the middle of black, scaled down
    if it is larger; none: no change of size."""
    compress: bool = False
    """Store the images losslessly compressed (PNG): about 60 % of the space, and slower to read."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range or in conflict with another."""
        super().validate()
        require(
            self, [("dest", not is_archive(self.dest), "a folder: shards are no archive, dataset_tools.py makes one")]
        )


@dataclass(frozen=True)
class EncodeConfig:
    """Encode images into latents, one .npy file each. To resume after an interruption, run the same command again.

    Exit status: 0, all images are encoded; 3, some were skipped and are listed with their causes in report.json.
    """

    source: Path
    """Converted images: the --dest of convert."""
    dest: Path
    """Folder for the latents, or a name that ends with .zip for an uncompressed archive."""
    vae: Annotated[str, tyro.conf.arg(aliases=["--model-url"])] = "mse"
    """Autoencoder: mse or ema (Stability AI's), one of diffusers by name or folder (AutoencoderKL, AutoencoderDC,
    AutoencoderRAE, Qwen-Image's, Flux 2's), identity (pixels), or grey (grey pixels, one channel)."""
    precision: EncoderPrecision = "fp32"
    """Arithmetic of the autoencoder."""
    max_images: Count | None = None
    """Only this many images, the first ones by name. Default: all."""
    batch_size: Count = 16
    """Images encoded at a time by each process."""
    num_workers: Natural = 8
    """Processes that read images, for each encoding process."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("dest", self.dest, is_folder=not is_archive(self.dest))])


@dataclass(frozen=True)
class EncodeShardsConfig:
    """Encode converted shards, which completes the data set. To resume after an interruption, run the same again."""

    data_dir: Path
    """Folder of converted shards: the --dest of convert."""
    vae: str = "mse"
    """Autoencoder: mse or ema (Stability AI's), one of diffusers by name or folder (AutoencoderKL, AutoencoderDC,
    AutoencoderRAE, Qwen-Image's, Flux 2's), identity (pixels), or grey (grey pixels, one channel)."""
    precision: EncoderPrecision = "fp32"
    """Arithmetic of the autoencoder."""
    flip: bool = False
    """Encode each mirrored image too: a latent can't be mirrored."""
    keep_images: bool = True
    """Keep the images, which representation alignment and references need; otherwise they are removed at the end."""
    batch_size: Count = 16
    """Images encoded at a time by each process."""
    num_workers: Natural = 4
    """Processes that read images, for each encoding process."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("data_dir", self.data_dir)])


@dataclass(frozen=True)
class FeaturesConfig:
    """Compute an encoder's tokens of all images once, so that training with alignment need not run the encoder.

    For an encoder that costs more than the network, and for data that are passed over several times. To resume after an
    interruption, run the same command again.
    """

    data_dir: Path
    """Prepared data set, with images."""
    dest: Path
    """Folder for the tokens: 2 bytes for each value, so 504 GB for ImageNet and dinov2-vit-b with 16 x 16 tokens."""
    grid_size: Count
    """Tokens along a side, those of the network: the side of the latents over its patch, 16 for SiT-XL/2 at 256."""
    enc_type: str = "dinov2-vit-b"
    """Frozen encoder, as in train."""
    encoder_weights: Path | None = None
    """File of the encoder's weights. Default: downloaded by timm."""
    encoder_resize: Resize = "bicubic"
    """How images are resized, as in train."""
    precision: EncoderPrecision = "fp32"
    """Arithmetic of the encoder."""
    flip: bool = False
    """Of mirrored images too, for train --horizontal-flips."""
    batch_size: Count = 64
    """Images per forward pass."""
    num_workers: Natural = 4
    """Processes that read images; 0: this one."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("dest", self.dest)])


@dataclass(frozen=True)
class EncoderConfig:
    """Train an encoder for alignment on the images of a data set, without their labels: a masked autoencoder.

    A small vision transformer learns to predict most patches of an image from the others. Use it as --enc-type masked
    with the file that this writes as --encoder-weights.
    """

    data_dir: Path
    """Prepared data set with images; with a split test, the encoder is tried on it."""
    output_dir: Path
    """Folder for encoder.safetensors and encoder.json."""
    patch_size: Count = 4
    """Side of a patch in pixels: one that gives as many tokens as the network has that is to be aligned."""
    mask_share: Chance = 0.75
    """Share of patches that are to be predicted, in (0, 1)."""
    steps: Count = 2000
    """Steps of training, each on 64 images."""
    seed: Natural = 0
    """Seed of weights, batches and masks."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(
            self,
            [
                writable("output_dir", self.output_dir),
                ("mask_share", 0 < self.mask_share < 1, "a share in (0, 1)"),
            ],
        )


@dataclass(frozen=True)
class PackConfig:
    """Pack a folder in the layout of REPA (images/ and vae-sd/) into shards, pairing images and latents by name.

    To resume after an interruption, run the same command again. Exit status as for convert.
    """

    source: Path
    """Folder with vae-sd (or vae-sd.zip), which holds dataset.json, and images (or images.zip)."""
    dest: Path
    """Folder for the shards."""
    vae: str | None = None
    """Autoencoder that made the latents, if they do not record it. Default: mse."""
    images: bool = True
    """Pack the images too; representation alignment and references need them."""
    compress: bool = False
    """Store the images losslessly compressed (PNG): about 60 % of the space, and slower to read."""
    num_workers: Natural = 8
    """Processes that read files; 0: this one."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("dest", self.dest)])


@dataclass(frozen=True)
class DigitsConfig:
    """Write scikit-learn's handwritten digits (1,797 scans of 8 x 8) as a prepared data set."""

    folder: tyro.conf.Positional[Path]
    """Folder for the splits train and test."""

    def validate(self) -> None:
        """Raise UserError for a folder that can't be written."""
        check_output(f"FOLDER {self.folder}", self.folder, is_folder=True)


@dataclass(frozen=True)
class VerifyConfig:
    """Reread a prepared data set: checksums, counts, pairs, ranges. Exit status 1 if anything is wrong."""

    data_dir: tyro.conf.Positional[Path]
    """Folder of the data set: shards, or the layout of REPA."""
    num_workers: Natural = 4
    """Processes that read; 0: this one."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self)


@dataclass(frozen=True)
class StatisticsConfig:
    """Measure mean and deviation of each channel of the latents in one pass, and record them with the data: from then
    on each channel is trained on with mean 0 and deviation 1, which latents of 16 channels and more need."""

    data_dir: tyro.conf.Positional[Path]
    """Folder of the data set: shards, or the layout of LightningDiT."""
    record: bool = True
    """Record them; otherwise they are only printed."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("data_dir", self.data_dir)] if self.record else [])


@dataclass(frozen=True)
class InfoConfig:
    """Print facts about a prepared data set, and make a picture of some images with the names of their classes."""

    data_dir: tyro.conf.Positional[Path]
    """Folder of the data set: shards, or the layout of REPA."""
    picture: Path | None = None
    """The picture, a PNG file. Default: NAME-examples.png in this folder."""
    classes: Count = 8
    """Number of classes shown, evenly spaced."""
    per_class: Count = 8
    """Images shown of each class."""

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(self, [writable("picture", self.picture, is_folder=False)])
