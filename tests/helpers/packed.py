"""Small files that hold many images each, in the forms that `stablevm prepare convert` reads."""

import gzip
import io
import struct
import tarfile

import numpy as np
from PIL import Image


def pictures_of(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_idx(folder, prefix, pictures, labels, suffix=""):
    """MNIST's two files of a split, packed for the suffix .gz; returns the file of images."""
    folder.mkdir(parents=True, exist_ok=True)
    images = struct.pack(">4B3I", 0, 0, 8, 3, *pictures.shape) + pictures.tobytes()
    numbers = struct.pack(">4B1I", 0, 0, 8, 1, len(labels)) + bytes(labels)
    for kind, content in (("images-idx3", images), ("labels-idx1", numbers)):
        path = folder / f"{prefix}-{kind}-ubyte{suffix}"
        path.write_bytes(gzip.compress(content) if suffix else content)
    return folder / f"{prefix}-images-idx3-ubyte{suffix}"


def write_cifar(folder, names, pictures, labels, coarse=None):
    """CIFAR's binary files with these names, which share images (n, 3, 32, 32); with coarse labels, CIFAR-100's."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [np.asarray(each, np.uint8)[:, None] for each in (coarse, labels) if each is not None]
    rows = np.concatenate([*columns, pictures.reshape(len(pictures), -1)], axis=1)
    for name, part in zip(names, np.array_split(rows, len(names)), strict=True):
        (folder / name).write_bytes(part.tobytes())


def png(picture):
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path, contents, change=None):
    """A tar archive of these contents by name; `change` may alter the header of each."""
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if change is not None:
                change(info)
            archive.addfile(info, io.BytesIO(content))
    return path
