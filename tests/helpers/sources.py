"""Synthetic sources of images: class folders of JPEGs, and the unusual files that occur among a million of them.

Run as a script it writes one: python -m tests.helpers.sources FOLDER [--images 2000] [--classes 20] [--hostile]
"""

import argparse
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def write_source(folder, images=2000, classes=20, shortest=180, longest=640, seed=0):
    """`images` JPEGs of varied sizes in `classes` folders; every tenth is grey, as some of ImageNet's are."""
    stream = np.random.default_rng(seed)
    for number in range(images):
        size = tuple(int(side) for side in stream.integers(shortest, longest, 2))
        picture = scene(stream, size, hue=number % classes / classes)
        if number % 10 == 9:
            picture = picture.convert("L")
        path = Path(folder) / f"n{number % classes:08d}" / f"n{number % classes:08d}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=int(stream.integers(70, 96)))
    return Path(folder)


def scene(stream, size, hue=0.5):
    """A picture with edges, gradients and fine grain, so that every filter of a crop shows in it."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    fx, fy, phase = stream.uniform(2, 12, 3)
    waves = 0.5 + 0.25 * np.sin(fx * x * 6 + phase) + 0.25 * np.cos(fy * y * 6)
    disc = ((x - stream.uniform(0.2, 0.8)) ** 2 + (y - stream.uniform(0.2, 0.8)) ** 2) < stream.uniform(0.01, 0.1)
    grain = stream.normal(0, 0.04, (height, width))
    shades = np.stack([waves * (0.3 + 0.7 * abs(np.sin(np.pi * (hue + k / 3)))) for k in range(3)], axis=-1)
    shades = np.where(disc[..., None], 1 - shades, shades) + grain[..., None]
    return Image.fromarray((shades.clip(0, 1) * 255).astype(np.uint8))


def write_hostile(folder, seed=1):
    """40 files, two of each kind, in the first class folders; returns {relative name: what is to become of it}."""
    folder, stream, expected = Path(folder), np.random.default_rng(seed), {}
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    for copy in (0, 1):
        for name, (write, fate) in HOSTILE.items():
            path = classes[(2 * len(expected) + copy) % len(classes)] / name.format(copy)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, scene(stream, (300, 260)))
            expected[str(path.relative_to(folder))] = fate
    return expected


def _jpeg(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", **options)
    return buffer.getvalue()


def _truncated(path, picture):
    content = _jpeg(picture)
    path.write_bytes(content[: len(content) // 2])


def _oriented(path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)


def _deep_grey(path, picture):
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path)


def _clear_palette(path, picture):
    picture.quantize(16).save(path, transparency=0)


def _see_through(path, picture):
    picture = picture.convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(path)


def _bomb(path, picture):
    """A PNG of 60,000 x 60,000 black pixels in a few kilobytes: 3.6 gigapixels, cut short after the first rows."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(60_001) * 64)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    )


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _flipped_bytes(path, picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _link_to_itself(path, picture):
    path.symlink_to(path.name)


def _loop_of_folders(path, picture):
    """A folder that holds a picture and a link to the folder above it."""
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    (path.parent / "up").symlink_to("..")


KEPT, HANDLED, SKIPPED = "kept", "handled", "skipped"
# Names sort after the ordinary ones, which begin with "n".
HOSTILE = {
    "z{}_truncated.JPEG": (_truncated, SKIPPED),
    "z{}_text.jpg": (lambda path, picture: path.write_text("no picture\n"), SKIPPED),
    "z{}_empty.jpg": (lambda path, picture: path.write_bytes(b""), SKIPPED),
    "z{}_header only.png": (lambda path, picture: path.write_bytes(b"\x89PNG\r\n\x1a\n"), SKIPPED),
    "z{}_flipped bytes.png": (_flipped_bytes, SKIPPED),
    "z{}_bomb.png": (_bomb, SKIPPED),
    "z{}_one pixel wide.png": (lambda path, picture: picture.resize((1, 5000)).save(path), SKIPPED),
    "z{}_float.tiff": (lambda path, picture: picture.convert("F").save(path), SKIPPED),
    "z{}_loop.jpg": (_link_to_itself, SKIPPED),
    "z{}_dangling.jpg": (lambda path, picture: path.symlink_to("nowhere.jpg"), SKIPPED),
    "z{}_cmyk.jpg": (lambda path, picture: picture.convert("CMYK").save(path), HANDLED),
    "z{}_16 bit.png": (_deep_grey, HANDLED),
    "z{}_palette.png": (_clear_palette, HANDLED),
    "z{}_alpha.png": (_see_through, HANDLED),
    "z{}_upright.jpg": (_oriented, HANDLED),
    "z{}_30 megapixels.jpg": (lambda path, picture: picture.resize((6000, 5000)).save(path), KEPT),
    "z{}_pälette été 図.png": (lambda path, picture: picture.quantize(64).save(path), KEPT),
    "z{} with spaces.gif": (lambda path, picture: picture.save(path), KEPT),
    "z{}_below/a folder.webp": (_loop_of_folders, KEPT),
    "z{}_one bit.png": (lambda path, picture: picture.convert("1").save(path), KEPT),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--hostile", action="store_true")
    options = parser.parse_args()
    write_source(options.folder, options.images, options.classes)
    if options.hostile:
        write_hostile(options.folder)
