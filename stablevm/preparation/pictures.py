"""Reading an image file and scaling it to the requested size, with Pillow and NumPy only, as it runs in workers.

Images become upright by their EXIF orientation, transparent parts become white, grey values of more than 8 bits are
scaled by their stated depth, and all colours are converted to RGB. `BadPictureError` gives the cause if this fails.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from stablevm.data.storage import READ_ERRORS, is_fault_of_file

Size = tuple[int, int]  # width, height

# Pillow knows more formats: EPS, for which it would start another program, and some that no data set uses. A format
# that an older Pillow lacks (AVIF) is left out. TGA has no signature at its beginning, so it comes last.
FORMATS = (
    *("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "PPM", "JPEG2000"),
    *("ICO", "PCX", "SGI", "DDS", "QOI", "PSD", "SUN", "TGA"),
)
# Suffixes of images. An image that can't be read is skipped, with its cause.
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2",
     ".avif", ".heic", ".heif", ".jxl", ".tga"]
)  # fmt: skip
_MARK = 16  # bytes at the beginning by which a format is recognised
# An image with more pixels is treated as a decompression bomb; Pillow itself warns from this number on.
MAX_PIXELS = 2**30 // 12
_ORIENTATION = 0x0112  # EXIF tag
# Tags of TIFF, and the names of its sample formats.
_SUBFILE, _BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 254, 258, 262, 339
_SAMPLE_FORMATS = {2: "signed", 3: "floats", 5: "complex", 6: "complex"}
_WHITE = (255, 255, 255, 255)


@cache
def _formats() -> tuple[str, ...]:
    """The formats of `FORMATS` that this version of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class BadPictureError(Exception):
    """Raised for a file that can't be read as an image; its text is the cause, for the report."""


def is_picture(file: IO[bytes]) -> bool:
    """Whether a file begins like an image, whatever its name; a damaged image does too."""
    mark = file.read(_MARK)
    tests = (Image.OPEN[name][1] for name in _formats())
    return len(mark) >= 4 and any(accepts is not None and accepts(mark) is True for accepts in tests)


def read_picture(open_file: Callable[[], IO[bytes]]) -> tuple[Image.Image, list[str]]:
    """Read an image as RGB, with a note about each conversion that was necessary; raises BadPictureError."""
    try:
        file = open_file()
    except OSError as error:
        if not is_fault_of_file(error):
            raise
        raise BadPictureError((error.strerror or str(error)).lower()) from None
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata; only the pixels matter
        try:
            picture = Image.open(file, formats=_formats())
            _check_pixels(picture.size)
            picture.load()
            return _settled(picture)
        except READ_ERRORS as error:
            if isinstance(error, OSError) and not is_fault_of_file(error):
                raise
            raise BadPictureError(_cause(error, file)) from None
        except Image.DecompressionBombError as error:
            raise BadPictureError(f"decompression bomb: {error}") from None


def dhariwal(picture: Image.Image, size: Size) -> Image.Image:
    """ADM's crop (Dhariwal and Nichol, 2021) to a square `size`.

    The image is halved with a box filter while its short side is at least twice the target, scaled with a bicubic
    filter until its short side has the target's length, and cropped to the centre.
    """
    target = size[0]
    while min(picture.size) >= 2 * target:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = target / min(picture.size)
    scaled = round(picture.width * scale), round(picture.height * scale)
    _check_pixels(scaled, f"too narrow: {picture.width} x {picture.height} pixels would be scaled to")
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    return _middle(picture, size)


def scale(picture: Image.Image, size: Size) -> Image.Image:
    """Scale the whole image to `size` with a Lanczos filter, without keeping its aspect ratio."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def center_crop(picture: Image.Image, size: Size) -> Image.Image:
    """Crop the largest central square and scale it to `size` with a Lanczos filter, as the published script does
    (Karras et al., StyleGAN 2 and 3, EDM); if the target is not square, the image is distorted.
    """
    side = min(picture.size)
    return _middle(picture, (side, side)).resize(size, Image.Resampling.LANCZOS)


def center_crop_wide(picture: Image.Image, size: Size) -> Image.Image:
    """Crop the middle rows, as many as the image would have at the target's width, scale them to the target with a
    Lanczos filter, and centre the result on a black square as wide as the target.

    These are the rows of the published script (Karras et al., 2020 to 2022). Their number refers to the target's width,
    but they are taken from the original image, so the crop depends on its resolution, and a tall image is distorted.
    BadPictureError if the image is smaller than the target.
    """
    width, height = size
    rows = round(width * picture.height / picture.width)
    if picture.width < width or rows < height:
        raise BadPictureError(
            f"{picture.width} x {picture.height} pixels: too small or too wide for {width} x {height}"
        )
    cut = _middle(picture, (picture.width, rows))
    canvas = Image.new("RGB", (width, width))
    canvas.paste(cut.resize(size, Image.Resampling.LANCZOS), (0, (width - height) // 2))
    return canvas


def pad(picture: Image.Image, size: Size) -> Image.Image:
    """Place the whole image in the middle of black; a larger one is scaled down first, in proportion, by Lanczos.

    Odd pixels are added on the right and below.
    """
    width, height = size
    ratio = max(picture.width / width, picture.height / height)
    if ratio > 1:
        smaller = max(1, round(picture.width / ratio)), max(1, round(picture.height / ratio))
        picture = picture.resize(smaller, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", size)
    canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return canvas


def unchanged(picture: Image.Image, size: Size) -> Image.Image:
    """Return the image itself; BadPictureError if it does not have this size."""
    if picture.size != size:
        raise BadPictureError(f"{picture.width} x {picture.height} pixels instead of {size[0]} x {size[1]}")
    return picture


TRANSFORMS: dict[str, Callable[[Image.Image, Size], Image.Image]] = {
    "scale": scale,
    "center-crop-dhariwal": dhariwal,
    "center-crop": center_crop,
    "center-crop-wide": center_crop_wide,
    "pad": pad,
    "none": unchanged,
}


def result_size(transform: str, size: Size) -> Size:
    """The width and height of the result of a transform."""
    return (size[0], size[0]) if transform == "center-crop-wide" else size


def pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """The pixels of an image: uint8 (H, W, 3)."""
    return np.asarray(picture, np.uint8)


def _settled(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    notes = []
    depth = _stated_depth(picture)
    orientation = _orientation(picture)
    if orientation in range(2, 9):
        notes.append(f"EXIF orientation {orientation}, turned upright")
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        notes.append("more than 8 bits per pixel, scaled to 8")
        return _from_deep_grey(picture, depth, notes), notes
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent, laid on white")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture)
    elif picture.mode not in ("RGB", "L", "P", "1"):
        notes.append(f"{picture.mode}, turned to RGB")
    return picture.convert("RGB"), notes


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except READ_ERRORS:  # damaged metadata is ignored
        return 1


@dataclass(frozen=True)
class _Depth:
    """What the file states about the values of a grey image: the largest value, and whether that is black."""

    white: int = 65_535  # Pillow scales grey of more than 8 bits to this in all formats except TIFF
    is_inverted: bool = False


def _stated_depth(picture: Image.Image) -> _Depth:
    """The depth that the file states; BadPictureError for a TIFF file whose values Pillow would misinterpret."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return _Depth()
    tags = picture.tag_v2
    if tags.get(_SUBFILE, 0) & 1:
        raise BadPictureError("a preview of a larger picture, as in the raw files of cameras; develop it first")
    kinds = set(np.ravel(tags.get(_SAMPLE_FORMAT, 1)).tolist())
    if not kinds <= {1, 4}:  # unsigned, or not said
        raise BadPictureError(f"pixels that are {_SAMPLE_FORMATS.get(max(kinds), 'unknown')}, without a known range")
    bits = int(np.ravel(tags.get(_BITS_PER_SAMPLE, 1))[0])
    return _Depth(2**bits - 1, tags.get(_PHOTOMETRIC) == 0)


def _from_deep_grey(picture: Image.Image, depth: _Depth, notes: list[str]) -> Image.Image:
    """Scale the image by its stated depth; Pillow would clip it at 255."""
    values = np.asarray(picture)
    if picture.mode == "F" or depth.white > 65_535 or values.min() < 0 or values.max() > depth.white:
        raise BadPictureError(f"pixels of mode {picture.mode} without a known range")
    grey = np.round(values * (255 / depth.white)).astype(np.uint8)
    if depth.is_inverted:
        grey = 255 - grey
    clear = picture.info.get("transparency")  # a value of PNG that stands for no colour
    if isinstance(clear, int) and (values == clear).any():
        notes.append("transparent, laid on white")
        grey = np.where(values == clear, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _middle(picture: Image.Image, size: Size) -> Image.Image:
    left, top = (picture.width - size[0]) // 2, (picture.height - size[1]) // 2
    return picture.crop((left, top, left + size[0], top + size[1]))


def _check_pixels(size: Size, what: str = "decompression bomb:") -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise BadPictureError(f"{what} {size[0]} x {size[1]}, more than {MAX_PIXELS:,} pixels")


def _cause(error: BaseException, file: IO[bytes]) -> str:
    if isinstance(error, UnidentifiedImageError):
        try:
            return _unidentified(file)
        except READ_ERRORS:
            return "damaged, or no image"
    text = " ".join(str(error).split())
    return f"damaged: {text}" if text else f"damaged ({type(error).__name__})"


def _unidentified(file: IO[bytes]) -> str:
    """The cause for a file that Pillow can't identify."""
    file.seek(0)
    start = file.read(_MARK)
    if not start:
        return "empty file"
    if start[:4] in (b"II*\0", b"MM\0*"):
        tags = TiffImagePlugin.ImageFileDirectory_v2(start[:8])
        file.seek(tags.next)
        tags.load(file)
        bits = np.ravel(tags.get(_BITS_PER_SAMPLE, 1)).tolist()
        return f"a TIFF of {', '.join(map(str, bits))} bits per sample of a kind that Pillow can't read, or damaged"
    file.seek(0)
    return "damaged, or of a kind that Pillow can't read" if is_picture(file) else "not an image"
