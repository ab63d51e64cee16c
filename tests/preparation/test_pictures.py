"""Crops against a re-derivation of their filters in integers, and the handling of each kind of unusual file."""

import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

from stablevm.preparation.pictures import TRANSFORMS, BadPictureError, pixels, read_picture, result_size
from tests.helpers.sources import HANDLED, HOSTILE, KEPT, SKIPPED, png_chunk, scene

SIZES = [(500, 375), (375, 500), (256, 256), (1031, 513), (120, 97), (64, 300), (2048, 1365)]


def kernel(name, x):
    """Box, and Keys' cubic with a = -1/2."""
    if name == "box":
        return ((x > -0.5) & (x <= 0.5)).astype(float)
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def filtered(image, length, name):
    """Resample the first axis of uint8 (N, ...) to `length`, in fixed point with 22 bits after the point."""
    support, scale = {"box": 0.5, "cubic": 2.0}[name], len(image) / length
    widened = max(scale, 1)
    rows = []
    for centre in (np.arange(length) + 0.5) * scale:
        first = max(int(centre - support * widened + 0.5), 0)
        last = min(int(centre + support * widened + 0.5), len(image))
        weights = kernel(name, (np.arange(first, last) - centre + 0.5) / widened)
        weights = np.trunc(weights / weights.sum() * 2**22 + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
        total = np.tensordot(weights, image[first:last].astype(np.int64), axes=1) + 2**21
        rows.append((total >> 22).clip(0, 255))
    return np.stack(rows).astype(np.uint8)


def resized(image, width, height, name):
    """Along the rows first, rounded to uint8, then along the columns."""
    if width != image.shape[1]:
        image = filtered(image.swapaxes(0, 1), width, name).swapaxes(0, 1)
    return filtered(image, height, name) if height != image.shape[0] else image


def derived_dhariwal(image, target):
    while min(image.shape[:2]) >= 2 * target:
        image = resized(image, image.shape[1] // 2, image.shape[0] // 2, "box")
    scale = target / min(image.shape[:2])
    image = resized(image, round(image.shape[1] * scale), round(image.shape[0] * scale), "cubic")
    top, left = (image.shape[0] - target) // 2, (image.shape[1] - target) // 2
    return image[top : top + target, left : left + target]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dhariwal_is_adms_crop_to_the_last_bit(size):
    picture = scene(np.random.default_rng(3), size)
    for target in (64, 256) if min(size) < 1000 else (256,):
        ours = pixels(TRANSFORMS["center-crop-dhariwal"](picture, (target, target)))
        assert np.array_equal(ours, derived_dhariwal(np.asarray(picture), target))


def test_scale_brings_the_whole_picture_to_the_size():
    picture = scene(np.random.default_rng(0), (64, 100))
    wanted = picture.resize((64, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(TRANSFORMS["scale"](picture, (64, 32))), np.asarray(wanted))
    assert TRANSFORMS["scale"](picture, (64, 100)) is picture


def test_center_crop_takes_the_middle_square():
    picture = scene(np.random.default_rng(0), (301, 200))
    square = pixels(TRANSFORMS["center-crop"](picture, (200, 200)))
    assert np.array_equal(square, np.asarray(picture)[:, 50:250])
    wide = TRANSFORMS["center-crop"](picture, (300, 100))  # the published script squashes the square
    wanted = picture.crop((50, 0, 250, 200)).resize((300, 100), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(wide), np.asarray(wanted))


def source_rows(size, target):
    """About which row of a source picture each row of a wide crop shows, by a ramp of grey from top to bottom."""
    width, height = size
    ramp = np.repeat(np.arange(height, dtype=np.uint8)[:, None, None] * 2, width, axis=1).repeat(3, axis=2)
    result = pixels(TRANSFORMS["center-crop-wide"](Image.fromarray(ramp), target))
    bar = (target[0] - target[1]) // 2
    return result[bar : bar + target[1], target[0] // 2, 0] / 2


def test_wide_crop_takes_the_published_rows():
    """Worked out by hand from the published rule: rows in the middle, as many as the picture has at the new width."""
    rows = source_rows((64, 100), (64, 32))  # all 100 rows, squashed: centres of 100 / 32 rows each
    assert np.abs(rows - ((np.arange(32) + 0.5) * 100 / 32 - 0.5)).max() < 1
    assert (round(rows[0]), round(rows[-1])) == (1, 98)
    rows = source_rows((128, 100), (64, 32))  # 50 of the 100 rows, at the picture's full width
    assert np.abs(rows - (25 + (np.arange(32) + 0.5) * 50 / 32 - 0.5)).max() < 1


def test_wide_crop_lies_between_black_bars():
    picture = scene(np.random.default_rng(0), (400, 300))
    result = pixels(TRANSFORMS["center-crop-wide"](picture, (200, 100)))
    assert result.shape == (200, 200, 3) and result_size("center-crop-wide", (200, 100)) == (200, 200)
    assert not result[:50].any() and not result[150:].any() and result[50:150].any()
    middle = picture.crop((0, 75, 400, 225))
    assert np.array_equal(result[50:150], np.asarray(middle.resize((200, 100), Image.Resampling.LANCZOS)))
    with pytest.raises(BadPictureError, match="too small"):
        TRANSFORMS["center-crop-wide"](picture, (401, 100))


def test_no_transform_wants_the_size():
    picture = scene(np.random.default_rng(0), (40, 30))
    assert TRANSFORMS["none"](picture, (40, 30)) is picture
    with pytest.raises(BadPictureError, match="40 x 30 pixels instead of 30 x 30"):
        TRANSFORMS["none"](picture, (30, 30))


def read(path):
    return read_picture(partial(path.open, "rb"))


@pytest.mark.parametrize("name", HOSTILE)
def test_unusual_files_are_kept_handled_or_refused_with_a_cause(name, tmp_path):
    write, fate = HOSTILE[name]
    path = tmp_path / name.format(0)
    path.parent.mkdir(exist_ok=True)
    write(path, scene(np.random.default_rng(0), (300, 260)))
    if fate == SKIPPED:
        with pytest.raises(BadPictureError) as error:
            TRANSFORMS["center-crop-dhariwal"](read(path)[0], (256, 256))
        assert len(str(error.value)) > 5 and "\n" not in str(error.value)
        return
    picture, notes = read(path)
    assert picture.mode == "RGB"
    assert bool(notes) == (fate == HANDLED), notes
    assert fate in (KEPT, HANDLED)


def saved(tmp_path, picture, name, **options):
    path = tmp_path / name
    picture.save(path, **options)
    return path


def test_sixteen_bits_become_eight_by_scaling(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    picture, _ = read(saved(tmp_path, Image.fromarray(grey), "deep.png"))
    assert np.array_equal(np.asarray(picture)[..., 0], grey // 257)


def tiff(rows, bits, *, order="II", photometric=1, sample_format=1, fill_order=1, tags=()):
    """A TIFF of one uncompressed strip, written byte by byte: unsigned integers of the rows in `bits` bits each."""
    mark = "<" if order == "II" else ">"
    height, width = len(rows), len(rows[0])
    if bits > 8 and bits % 8 == 0:
        strip = b"".join(struct.pack(f"{mark}{'H' if bits == 16 else 'I'}", value) for row in rows for value in row)
    else:
        lines = ["".join(f"{value:0{bits}b}" for value in row) for row in rows]
        lines = [line.ljust(-(-len(line) // 8) * 8, "0") for line in lines]
        strip = b"".join(int(line, 2).to_bytes(len(line) // 8, "big") for line in lines)
    if fill_order == 2:
        strip = bytes(int(f"{byte:08b}"[::-1], 2) for byte in strip)
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (266, fill_order),
               (273, 8), (277, 1), (278, height), (279, len(strip)), (339, sample_format), *tags]  # fmt: skip
    long_ones = {273, 279}
    directory = struct.pack(f"{mark}H", len(entries))
    for tag, value in sorted(entries):
        kind = "I" if tag in long_ones else "HH"
        values = (value,) if tag in long_ones else (value, 0)
        directory += struct.pack(f"{mark}HHI{kind}", tag, 4 if tag in long_ones else 3, 1, *values)
    strip += b"\0" * (len(strip) % 2)
    start = struct.pack(f"{mark}2sHI", order.encode(), 42, 8 + len(strip))
    return start + strip + directory + struct.pack(f"{mark}I", 0)


def of_bytes(content):
    return read_picture(lambda: io.BytesIO(content))


DEPTHS = [(1, "II"), (2, "II"), (4, "MM"), (8, "II"), (12, "II"), (16, "II"), (16, "MM"), (10, "II"), (14, "MM"),
          (12, "MM"), (32, "II")]  # fmt: skip


@pytest.mark.parametrize(("bits", "order"), DEPTHS)
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
@pytest.mark.parametrize("fill_order", [1, 2])
def test_greys_of_every_depth_are_scaled_or_skipped_with_the_cause(bits, order, photometric, fill_order):
    largest = 2**bits - 1
    rows = [[0, largest, largest // 2, largest // 3], [largest, 0, largest // 4, largest // 5]]
    content = tiff(rows, bits, order=order, photometric=photometric, fill_order=fill_order)
    try:
        picture, notes = of_bytes(content)
    except BadPictureError as error:
        assert "bits per sample" in str(error) or "range" in str(error) or fill_order == 2, error
        assert bits > 8 or fill_order == 2
        assert (bits, order, photometric, fill_order) not in {(12, "II", 1, 1), (16, "II", 1, 1), (16, "MM", 1, 1)}
        return
    assert bits not in (10, 14, 32)
    wanted = np.round(np.array(rows) * 255 / largest)
    found = np.asarray(picture)[..., 0]
    assert np.array_equal(found, 255 - wanted if photometric == 0 else wanted)
    assert bool(notes) == (bits > 8)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize(("sample_format", "word"), [(2, "signed"), (3, "floats")])
@pytest.mark.parametrize("order", ["II", "MM"])
def test_signed_and_floating_pixels_are_skipped_with_the_cause(bits, sample_format, word, order):
    if sample_format == 3 and bits == 8:
        pytest.skip("no such floats")
    rows = [[0, 1, 2**bits - 1, 2 ** (bits - 1)]]
    with pytest.raises(BadPictureError) as error:
        of_bytes(tiff(rows, bits, order=order, sample_format=sample_format))
    assert word in str(error.value) or "bits per sample" in str(error.value)


def test_a_palette_gives_its_colours():
    content = io.BytesIO()
    picture = scene(np.random.default_rng(0), (20, 20)).quantize(16)
    picture.save(content, format="TIFF")
    assert np.array_equal(np.asarray(of_bytes(content.getvalue())[0]), np.asarray(picture.convert("RGB")))


def test_a_camera_files_preview_is_not_taken_for_the_picture():
    with pytest.raises(BadPictureError, match="preview of a larger picture"):
        of_bytes(tiff([[0, 255]], 8, tags=[(254, 1)]))


def grey_png(header, line, *others):
    """A PNG of one line, with other chunks between header and line."""
    chunks = [(b"IHDR", header), *others, (b"IDAT", zlib.compress(b"\0" + line)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_png_greys_of_every_depth(bits):
    """Written chunk by chunk: Pillow writes no 2 and 4 bits of grey."""
    largest = 2**bits - 1
    row = [0, largest, largest // 2, largest // 3, 0, largest, 0, 0]
    line = int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(bits, "big")
    header = struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0)
    assert np.asarray(of_bytes(grey_png(header, line))[0])[0, :, 1].tolist() == [
        round(value * 255 / largest) for value in row
    ]


@pytest.mark.parametrize("largest", [255, 1023, 4095, 65535])
def test_pgm_greys_are_scaled_by_their_stated_maximum(largest):
    values = [0, largest, largest // 2, largest // 3]
    content = f"P5 4 1 {largest}\n".encode() + b"".join(
        value.to_bytes(1 if largest < 256 else 2, "big") for value in values
    )
    found = np.asarray(of_bytes(content)[0])[0, :, 0]
    assert np.abs(found - np.array(values) * 255 / largest).max() < 1


def test_a_clear_value_of_a_deep_grey_png_is_white():
    """Written chunk by chunk: Pillow 10 writes no transparency of such pictures."""
    row = np.array([0, 500, 65_535], ">u2").tobytes()
    header = struct.pack(">IIBBBBB", 3, 1, 16, 0, 0, 0, 0)
    picture, notes = of_bytes(grey_png(header, row, (b"tRNS", struct.pack(">H", 500))))
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 255, 255] and "transparent, laid on white" in notes


def test_turned_upright_and_laid_on_white(tmp_path):
    upright = scene(np.random.default_rng(0), (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned by 270 degrees
    path = saved(tmp_path, upright.transpose(Image.Transpose.ROTATE_90), "lying.png", exif=exif)
    assert np.array_equal(np.asarray(read(path)[0]), np.asarray(upright))

    clear = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
    clear.putpixel((0, 0), (200, 10, 10, 255))
    shown = np.asarray(read(saved(tmp_path, clear, "clear.png"))[0])
    assert shown[0, 0].tolist() == [200, 10, 10] and (shown[1:] == 255).all()


def test_opaque_pictures_with_an_alpha_channel_need_no_note(tmp_path):
    picture, notes = read(saved(tmp_path, scene(np.random.default_rng(0), (20, 20)).convert("RGBA"), "opaque.png"))
    assert notes == [] and picture.mode == "RGB"


def test_formats_that_start_other_programs_are_no_images(tmp_path):
    scene(np.random.default_rng(0), (20, 20)).save(tmp_path / "figure.eps")
    (tmp_path / "figure.eps").rename(tmp_path / "figure.jpg")
    with pytest.raises(BadPictureError, match="not an image"):
        read(tmp_path / "figure.jpg")


def test_faults_of_the_machine_are_no_bad_pictures():
    def out_of_handles():
        raise OSError(24, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        read_picture(out_of_handles)

    class FailingDisk(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        read_picture(FailingDisk)
