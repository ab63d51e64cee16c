"""Sources in tar archives: WebDataset's shards and archives of class folders, whole, damaged and hostile."""

import pickle
import tarfile
from functools import partial

import numpy as np
import pytest

from stablevm.preparation.config import ConvertShardsConfig
from stablevm.preparation.pictures import read_picture
from stablevm.preparation.shards import convert
from stablevm.preparation.sources import ONE_CLASS, open_source
from stablevm.support.errors import UserError
from tests.helpers.data_sets import one_line
from tests.helpers.packed import pictures_of, png, write_tar

PICTURES = pictures_of(6, 9, 8, 3)


def samples(numbers, classes):
    found = {}
    for number, kind in zip(numbers, classes, strict=True):
        found |= {f"{number:04d}.png": png(PICTURES[number]), f"{number:04d}.cls": str(kind).encode(),
                  f"{number:04d}.json": b"{}"}  # fmt: skip
    return found


def read(source, row):
    return np.asarray(read_picture(partial(source.storage.open, source.names[row]))[0])


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "wds"
    folder.mkdir()
    write_tar(folder / "pets-train-000000.tar", samples([0, 1, 2], [1, 0, 2]))
    write_tar(folder / "pets-train-000001.tar", samples([0, 1], [2, 2]))  # keys are unique within a shard only
    write_tar(folder / "pets-val-000000.tar", samples([5], [0]))
    return folder


def test_samples_of_several_shards(shards):
    source = open_source(shards)
    assert source.names[0] == "pets-train-000000.tar/0000.png" and source.names == sorted(source.names)
    assert source.labels.tolist() == [1, 0, 2, 2, 2] and source.class_names == ("0", "1", "2") and source.ignored == 5
    assert "leaves out validation" in source.warnings[0]
    for row, number in enumerate([0, 1, 2, 0, 1]):
        assert np.array_equal(read(source, row), PICTURES[number])
    assert open_source(shards, "validation").labels.tolist() == [0]
    again = pickle.loads(pickle.dumps(source))  # as for a worker that is not forked
    assert np.array_equal(read(again, 4), PICTURES[1])


def test_names_of_classes_beside_the_shards_or_as_classes(shards, tmp_path):
    (shards / "classnames.txt").write_text("cat\ndog\nowl\nfox\n")
    assert open_source(shards).class_names == ("cat", "dog", "owl", "fox")
    (shards / "classnames.txt").write_text("cat\n")
    with pytest.raises(UserError) as error:
        open_source(shards)
    assert "1 names of classes, but class 2 occurs" in one_line(error)
    source = open_source(write_tar(tmp_path / "a.tar", samples([0, 1, 2], ["dog", "cat", "dog"])))
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [1, 0, 1]


def test_an_archive_of_class_folders(tmp_path):
    contents = {f"pets/{kind}/{number}.png": png(PICTURES[number]) for number, kind in enumerate(["cat", "dog", "cat"])}
    source = open_source(write_tar(tmp_path / "pets.tar", contents | {"pets/notes.txt": b""}))
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [0, 0, 1] and source.ignored == 1
    assert np.array_equal(read(source, 2), PICTURES[1])
    flat = open_source(write_tar(tmp_path / "flat.tar", {"0.png": png(PICTURES[0])}))
    assert flat.class_names == ONE_CLASS


def test_converted_by_workers(shards, tmp_path):
    config = ConvertShardsConfig(shards, tmp_path / "made", resolution="8", num_workers=2, batch_size=2)
    assert convert(config) == 0


def made_link(kind):
    def change(info):
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    return change


@pytest.mark.parametrize(
    ("contents", "change", "message"),
    [
        ({"../x.png": b"x"}, None, "member ../x.png leaves the archive"),
        ({"a/../../x.png": b"x"}, None, "leaves the archive"),
        ({"/etc/x.png": b"x"}, None, "leaves the archive"),
        ({"x.png": b""}, made_link(tarfile.SYMTYPE), "is a link to /etc/passwd"),
        ({"x.png": b""}, made_link(tarfile.LNKTYPE), "is a link to /etc/passwd"),
        ({"x.png": b"x", "\x1b[31mred.cls": b"0"}, None, "has no class"),
        ({"x.png": b"x", "x.cls": b"123456789"}, None, "class 123456789 would make 123,456,790 classes"),
    ],
)
def test_hostile_members_are_one_clear_line(contents, change, message, tmp_path):
    with pytest.raises(UserError) as error:
        open_source(write_tar(tmp_path / "x.tar", contents, change))
    assert message in one_line(error) and "\x1b" not in one_line(error)


def test_devices_are_not_opened(tmp_path):
    def device(info):
        if info.name == "tty.png":
            info.type = tarfile.CHRTYPE

    source = open_source(write_tar(tmp_path / "x.tar", {"a.png": png(PICTURES[0]), "tty.png": b""}, device))
    assert source.names == ["a.png"]


def damaged(change):
    def applied(path):
        path.write_bytes(change(path.read_bytes()))

    return applied


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:700],
        lambda content: content[:1536],
        lambda content: content[: content.rindex(b"0002.png") + 20],
        lambda content: content.replace(b"0001.png", b"0001.pnq"),  # a header that does not match its checksum
        lambda content: b"\x1f\x8b" + content[2:],
        lambda content: bytes(10_000),
    ],
)
def test_damaged_archives_are_one_clear_line(damage, shards):
    path = shards / "pets-train-000000.tar"
    damaged(damage)(path)
    with pytest.raises(UserError) as error:
        open_source(path)
    assert f"{path}:" in one_line(error)


def test_a_member_larger_than_the_archive(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.png": b"x"})
    info = tarfile.TarInfo("b.png")
    info.size = 2**40
    path.write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(UserError, match="download it again"):
        open_source(path)


def test_compressed_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    for path in (tmp_path / "x.tar.gz", tmp_path):
        with pytest.raises(UserError) as error:
            open_source(path)
        assert "can't be reached one by one; unpack it" in one_line(error)


def test_an_archive_that_shrinks_is_no_bad_picture(shards):
    source = open_source(shards / "pets-train-000000.tar")
    with (shards / "pets-train-000000.tar").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(OSError, match="has become shorter"):
        read(source, 2)
