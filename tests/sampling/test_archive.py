"""The file of generated images: written in bounded memory, read back, and refused when damaged."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from stablevm.sampling.archive import read_provenance, write_archive
from stablevm.support.errors import UserError


def test_archive_reads_back_and_depends_on_its_contents_alone(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    labels = np.array([3, 1, 2, 0, 1])
    protocol = {"mode": "sde", "classes": [1, 2], "name": "ä"}
    for name in ("a.npz", "b.npz"):
        write_archive(tmp_path / name, [images[:2], images[2:]], labels, protocol)
        monkeypatch.setattr("time.localtime", lambda *_: (2000, 2, 3, 4, 5, 6, 0, 0, 0))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as archive:
        assert sorted(archive) == ["arr_0", "labels", "protocol"]
        assert np.array_equal(archive["arr_0"], images) and archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["labels"], labels) and archive["labels"].dtype == np.int64
        assert json.loads(archive["protocol"].item()) == protocol
    assert read_provenance(tmp_path / "a.npz") == protocol


def test_archive_is_written_in_bounded_memory(tmp_path):
    chunk = np.zeros((16, 64, 64, 3), dtype=np.uint8)
    tracemalloc.start()
    write_archive(tmp_path / "a.npz", (chunk for _ in range(100)), np.zeros(1600, dtype=np.int64), {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * chunk.nbytes < (tmp_path / "a.npz").stat().st_size / 40


def test_files_of_others_are_not_taken_for_archives(tmp_path):
    np.savez(tmp_path / "foreign.npz", arr_0=np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("foreign.npz", "text.npz"):
        with pytest.raises(UserError, match=f"{name} exists and was not made by this command"):
            read_provenance(tmp_path / name)


def member(descr, shape, content):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


# What a foreign archive may hold as its protocol, and how it is compressed.
DAMAGED = {
    "a header that claims all memory": (member("<i8", (10**13,), b"1234567"), zipfile.ZIP_STORED),
    "a negative shape": (member("<i8", (-3,), b"1234567"), zipfile.ZIP_STORED),
    "a broken header": (b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((,", zipfile.ZIP_STORED),
    "no array": (b"hello", zipfile.ZIP_STORED),
    "a bomb": (bytes(2**25), zipfile.ZIP_DEFLATED),
    "damaged LZMA": (member("<U2", (), "{}".encode("utf-32le")), zipfile.ZIP_LZMA),
    "damaged bzip2": (member("<U2", (), "{}".encode("utf-32le")), zipfile.ZIP_BZIP2),
}


@pytest.mark.parametrize("content, method", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_protocol_is_an_error_of_one_line(content, method, tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("protocol.npy", content)
    if method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        damaged = bytearray(path.read_bytes())
        damaged[60] ^= 255
        damaged[66] ^= 255
        path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.npz: .* is damaged or can't be read \(.*\); move it away") as error:
        read_provenance(path)
    assert "\n" not in str(error.value)
