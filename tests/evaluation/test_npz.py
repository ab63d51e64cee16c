"""evaluation.npz: archives of other programs are read correctly or refused in one line, in the memory of one block."""

import io
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stablevm.evaluation.npz import Archive, ArchiveCard
from stablevm.evaluation.sources import ArraySource, StreamedSource, pixels_key
from stablevm.support import npz
from stablevm.support.errors import UserError
from tests.helpers.data_sets import one_line

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 6, 5, 3), dtype=np.uint8)
KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def npy(array: np.ndarray, **header: object) -> bytes:
    """The bytes of a .npy file; `header` replaces the true header."""
    file = io.BytesIO()
    truth = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, truth | header)
    return file.getvalue() + array.tobytes("F" if truth["fortran_order"] else "C")


def write(path: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        work()
    return one_line(error)


def everything(path: Path) -> np.ndarray:
    """All images, as an evaluation reads them."""
    images = Archive(path).images()
    return images.images(range(len(images)))


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_what_was_written(kind: int, tmp_path: Path) -> None:
    images = Archive(write(tmp_path / "x.npz", {"arr_0": npy(IMAGES)}, kind)).images()
    assert isinstance(images, ArraySource if kind == zipfile.ZIP_STORED else StreamedSource)
    assert len(images) == 24
    for indices in (range(24), range(3, 7), [5, 2, 2, 20], range(8, 12), [23], [0], range(20, 24), []):
        assert np.array_equal(images.images(indices), IMAGES[list(indices)])
    assert images.key(range(4, 9)) == pixels_key(IMAGES[4:9]) == images.key(range(4, 9))


def test_a_stored_array_may_lie_in_fortran_order(tmp_path: Path) -> None:
    content = npy(np.asfortranarray(IMAGES))
    assert np.array_equal(everything(write(tmp_path / "x.npz", {"arr_0": content})), IMAGES)
    compressed = write(tmp_path / "y.npz", {"arr_0": content}, zipfile.ZIP_DEFLATED)
    assert "save np.ascontiguousarray(images)" in refusal(lambda: everything(compressed))


def test_labels_and_moments_may_be_of_any_byte_order(tmp_path: Path) -> None:
    mean, covariance = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    members = {"arr_0": IMAGES, "labels": np.arange(24, dtype=">i2"), "mu": mean.astype(">f8"), "sigma": covariance}
    archive = Archive(write(tmp_path / "x.npz", {name: npy(array) for name, array in members.items()}))
    labels, moments = archive.labels(24), archive.moments("")
    assert labels is not None and labels.dtype == np.int64 and labels.tolist() == list(range(24))
    assert moments is not None and torch.equal(moments.mean, torch.from_numpy(mean))
    assert torch.equal(moments.covariance, torch.from_numpy(covariance))


@pytest.mark.parametrize("kind", KINDS)
def test_any_flipped_bit_is_found(kind: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", {"arr_0": npy(IMAGES)}, kind)
    content = path.read_bytes()
    data = content.index(b"arr_0.npy") + len("arr_0.npy")
    end = content.index(b"PK\x01\x02")
    for where in np.linspace(data, end - 1, 60).astype(int).tolist():
        path.write_bytes(content)
        flip(path, where)
        try:
            found = everything(path)
        except UserError:
            continue
        assert np.array_equal(found, IMAGES), f"byte {where}"  # some bits of compressed data mean nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "content",
    [
        npy(IMAGES[:10], shape=(24, 6, 5, 3)),  # would read the following bytes as pixels
        npy(IMAGES, shape=(10, 6, 5, 3)),
        npy(IMAGES, shape=(10**9, 6, 5, 3)),
        npy(IMAGES, shape=(10**30, 6, 5, 3)),
        npy(IMAGES, shape=(-24, 6, 5, 3)),
        npy(IMAGES, shape=(-24, -6, 5, 3)),
        npy(IMAGES, shape=(24.0, 6, 5, 3)),
        npy(IMAGES, shape="many"),
        npy(IMAGES, descr="|O"),
        npy(IMAGES, descr="nothing"),
        npy(IMAGES, descr=[("a", "<f4", -1)]),
        npy(IMAGES, descr=()),
        npy(IMAGES)[:40],
        npy(IMAGES)[:-1],
        npy(IMAGES) + b"x",
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00" + npy(IMAGES)[8:],
        npy(IMAGES).replace(b"{", b"(" * 200, 1),
        npy(IMAGES).replace(b"False", b"\x1b[2J\n", 1),
        b"text",
    ],
)
def test_a_malformed_array_is_one_line(kind: int, content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", {"arr_0": content}, kind)
    message = refusal(lambda: everything(path))
    assert str(path) in message and message.isprintable()
    assert message.endswith("make it again")


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (IMAGES[0], "one image? give images[None]"),
        (IMAGES.transpose(0, 3, 1, 2), "images.transpose(0, 2, 3, 1)"),
        (np.concatenate([IMAGES, IMAGES[..., :1]], 3), "images[..., :3]"),
        (IMAGES[..., 0], "grey images? repeat the channel three times"),
        (IMAGES[..., :1], "grey images? repeat the channel three times"),
        (IMAGES[:, None, :, :, 0], "grey images? repeat the channel three times"),
        (IMAGES[0, 0], "not a set of colour images"),
        (IMAGES[None], "not a set of colour images"),
        (np.uint8(7), "not a set of colour images"),
        (IMAGES[:0], "no images"),
        (IMAGES.astype(">u2"), "expected uint8"),
    ],
)
def test_images_of_another_shape_get_a_hint(array: np.ndarray, hint: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", {"arr_0": npy(np.ascontiguousarray(array))})
    assert hint in refusal(lambda: everything(path))


def test_unknown_compression_and_encryption_are_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", {"arr_0": npy(IMAGES)}, zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    for offset, value, word in ((8, 97, "compression"), (6, 1, "encrypted")):
        changed = bytearray(content)
        for place in (local + offset, central + offset + 2):
            changed[place : place + 2] = struct.pack("<H", value)
        path.write_bytes(changed)
        assert word in refusal(lambda: everything(path))


def test_no_archive_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", {"arr_0": npy(IMAGES)})
    content = path.read_bytes()
    assert "no such file; give" in refusal(lambda: Archive(tmp_path / "absent.npz"))
    assert "a folder, not an .npz file" in refusal(lambda: Archive(tmp_path))
    for cut in (0, 10, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:cut])
        assert "not an .npz file, or cut short" in refusal(lambda: Archive(path))
    path.write_bytes(content[300:])  # the directory points before the file
    assert refusal(lambda: everything(path))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "mu holds <U1, expected numbers"),
        ({"mu": np.zeros(2), "sigma": np.eye(2) * 1j}, "sigma holds complex128, expected numbers"),
        ({"mu": np.zeros(2), "sigma": np.eye(2, dtype=bool)}, "sigma holds bool, expected numbers"),
        ({"mu": np.zeros(2)}, "holds mu but no sigma"),
        ({"mu": np.zeros((2, 2)), "sigma": np.eye(2)}, "expected (D,) and (D, D)"),
        ({"mu": np.zeros(2), "sigma": np.ones(4)}, "expected (D,) and (D, D)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "mu is of 3 features, Inception's are 2"),
        ({"mu": np.array([0, np.inf]), "sigma": np.eye(2)}, "NaN or infinity"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0], [0.5, 1]])}, "sigma is not symmetric"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [2, 1]])}, "sigma has negative eigenvalues"),
    ],
)
def test_statistics_that_are_none_are_refused(members: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", {name: npy(array) for name, array in members.items()})
    assert message in refusal(lambda: Archive(path).moments("", 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 10_000, "nested"),
        ("[1]", "expected an object, found a list"),
        ('{"class_names": "cat"}', "class_names"),
        ('{"class_names": {"cat": 1}}', "class_names"),
        ('{"class_names": ["cat", 3]}', "class_names[1]"),
        ('{"statistics_of": "many"}', "statistics_of"),
        ('{"extractor": 3}', "extractor"),
    ],
)
def test_a_protocol_that_is_none_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", {"protocol": npy(np.array(text))})
    assert message in refusal(Archive(path).card)
    for array in (np.zeros(3), np.array(["{}"]), np.array(b"{}")):
        write(path, {"protocol": npy(array)})
        assert "expected text" in refusal(Archive(path).card)


def test_a_protocol_is_read_as_far_as_it_is_used(tmp_path: Path) -> None:
    text = json.dumps({"class_names": ["cat", "dog"], "seed": 3, "source": "x", "statistics_of": 7})
    path = write(tmp_path / "x.npz", {"protocol": npy(np.array(text))})
    assert Archive(path).card() == ArchiveCard(("cat", "dog"), 7)
    assert Archive(write(path, {"x": npy(IMAGES)})).card() == ArchiveCard()


def test_a_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of 64 MB of zeros: what says so in its header is streamed; what doesn't is refused before it is read."""
    zeros = np.zeros((64, 1000, 1000), np.uint8)
    count = zeros.size // (100 * 100 * 3)
    honest = npy(zeros.reshape(-1)[: count * 30_000].reshape(count, 100, 100, 3))
    members = {"arr_0": honest, "labels": npy(zeros, shape=(count,)), "mu": npy(zeros), "protocol": npy(zeros)}
    path = write(tmp_path / "x.npz", members, zipfile.ZIP_DEFLATED)
    del zeros, honest, members
    monkeypatch.setattr(npz, "WHOLE_BYTES", 2**20)
    tracemalloc.start()
    archive = Archive(path)
    images = archive.images()
    for start in range(0, count, 16):
        assert not images.images(range(start, min(start + 16, count))).any()
    for work in (lambda: archive.labels(count), lambda: archive.moments(""), archive.card):
        assert refusal(work)
    assert "expected at most 1,048,576" in refusal(lambda: archive.array("arr_0", 2**20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_one_line_or_harmless(kind: int, tmp_path: Path) -> None:
    """200 archives with a few bytes replaced, by seed."""
    members = {"arr_0": IMAGES, "labels": np.arange(24), "mu": np.zeros(2), "sigma": np.eye(2),
               "protocol": np.array("{}")}  # fmt: skip
    path = write(tmp_path / "x.npz", {name: npy(np.asarray(each)) for name, each in members.items()}, kind)
    content, stream = path.read_bytes(), np.random.default_rng(1)
    for _ in range(200):
        changed = bytearray(content)
        for _ in range(int(stream.integers(1, 6))):
            changed[int(stream.integers(len(content)))] = int(stream.integers(256))
        path.write_bytes(changed)
        try:
            archive = Archive(path)
            images = archive.images()
            assert np.array_equal(images.images(range(len(images))), IMAGES)
            archive.labels(24)
            archive.moments("")
            archive.card()
        except UserError as error:
            assert str(error).isprintable()
