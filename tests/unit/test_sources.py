"""What a source holds, in which order, and which sources are refused."""

import json
import os
import shutil
import zipfile
from functools import partial

import numpy as np
import pytest
from data_sets import one_line
from sources import write_source

from stablevm.errors import UserError
from stablevm.preparation.pictures import BadPictureError, read_picture
from stablevm.preparation.sources import ONE_CLASS, open_source


@pytest.fixture
def folder(tmp_path):
    return write_source(tmp_path / "source", images=6, classes=3, shortest=8, longest=12)


def zipped(folder, target, names=None):
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    return target


def test_class_folders_in_the_order_of_their_names(folder):
    (folder / "a empty").mkdir()
    (folder / ".git").mkdir()
    (folder / ".git/x.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    (folder / "stray.jpg").write_bytes(b"")
    source = open_source(folder)
    assert source.class_names == ("a empty", "n00000000", "n00000001", "n00000002")
    assert source.names == sorted(source.names) and len(source) == 6
    assert source.labels.tolist() == [1, 1, 2, 2, 3, 3]
    assert source.stray == ("stray.jpg",) and source.ignored == 2


def test_a_listing_decides_and_its_names_are_sorted(folder, tmp_path):
    names = open_source(folder).names
    listing = {"labels": [[name, number] for number, name in enumerate(reversed(names))], "resolution": [12, 12]}
    (folder / "dataset.json").write_text(json.dumps(listing))
    for source in (open_source(folder), open_source(zipped(folder, tmp_path / "source.zip"))):
        assert source.names == names and source.labels.tolist() == [5, 4, 3, 2, 1, 0]
        assert source.class_names == ("0", "1", "2", "3", "4", "5") and source.facts == {"resolution": [12, 12]}
        with source.storage.open(names[0]) as file:
            assert file.read(2) == b"\xff\xd8"
    assert open_source(folder).fingerprint == open_source(tmp_path / "source.zip").fingerprint


def test_a_folder_without_classes_is_one_class(folder):
    flat = folder / "n00000000"
    source = open_source(flat)
    assert source.class_names == ONE_CLASS and source.labels.tolist() == [0, 0]
    (flat / "dataset.json").write_text('{"labels": null}')
    assert np.array_equal(open_source(flat).labels, source.labels)


def test_links_are_followed_once(folder):
    (folder / "n00000000" / "up").symlink_to("..")
    (folder / "n00000003").symlink_to("n00000001")
    source = open_source(folder)
    assert len(source) == 6  # the linked class is the same folder again, and the loop ends


def test_names_of_any_bytes(folder):
    odd = os.fsdecode(b"n00000000/\xff\xfe.jpg")
    (folder / odd).write_bytes(b"")
    source = open_source(folder)
    assert odd in source.names and len(source.fingerprint) == 64


def read(source, name):
    return read_picture(partial(source.storage.open, name))


def test_damaged_members_of_an_archive_are_bad_pictures(folder, tmp_path):
    archive = zipped(folder, tmp_path / "source.zip")
    content = bytearray(archive.read_bytes())
    members = zipfile.ZipFile(archive).infolist()
    content[members[0].header_offset] ^= 0xFF  # its own header
    end = members[2].header_offset
    content[end - 3] ^= 0xFF  # the picture's last bytes: the checksum tells
    entry = content.rindex(b"PK\x01\x02")
    for flags in (entry + 8, members[-1].header_offset + 6):
        content[flags] |= 1  # encrypted
    archive.write_bytes(content)
    source = open_source(archive)
    for number, cause in ((0, "bad magic number"), (1, "CRC"), (len(members) - 1, "encrypted")):
        with pytest.raises(BadPictureError, match=cause):
            read(source, members[number].filename)
    read(source, members[2].filename)


def test_pipes_and_devices_are_not_waited_for(folder):
    os.mkfifo(folder / "n00000000" / "pipe.jpg")
    (folder / "n00000000" / "zero.jpg").symlink_to("/dev/zero")
    source = open_source(folder)
    for name in ("n00000000/pipe.jpg", "n00000000/zero.jpg"):
        with pytest.raises(BadPictureError, match="not a regular file"):
            read(source, name)


@pytest.mark.parametrize("mount_point", [False, True])
def test_a_source_that_vanishes_is_no_bad_picture(folder, mount_point):
    source = open_source(folder)
    (folder / source.names[0]).unlink()
    with pytest.raises(BadPictureError, match="no such file"):
        read(source, source.names[0])
    shutil.rmtree(folder)
    if mount_point:
        folder.mkdir()
    with pytest.raises(OSError, match="vanished"):
        read(source, source.names[1])


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "found another kind of file"),
        ('{"format_version": 1}', "found another kind of file"),
        ('{"labels": []}', "lists no images"),
        ('{"labels": 3}', "are no list"),
        ('{"labels": [["a.png", 0]], "class_names": 3}', "are no list"),
        ('{"labels": [["a.png", 0], ["a.png", 1]]}', "lists a.png twice"),
        ('{"labels": [["../a.png", 0]]}', 'expected ["RELATIVE/NAME", CLASS]'),
        ('{"labels": [["/etc/passwd", 0]]}', 'expected ["RELATIVE/NAME", CLASS]'),
        ('{"labels": [["a.png", -1]]}', "the class 0 or more"),
        ('{"labels": [["a.png", 0.5]]}', "the class 0 or more"),
        ('{"labels": [["a.png", 2]], "class_names": ["x", "y"]}', "2 class_names, but class 2 occurs"),
    ],
)
def test_faulty_listings_are_one_clear_line(folder, listing, message):
    (folder / "dataset.json").write_text(listing)
    with pytest.raises(UserError) as error:
        open_source(folder)
    assert message in one_line(error)


def test_other_things_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"PK no archive")
    (tmp_path / "file.txt").write_text("")
    (folder / "vae-sd").mkdir()
    for path, message in [
        (tmp_path / "nothing", "there is nothing"),
        (tmp_path / "file.txt", "it is a file"),
        (tmp_path / "empty", "no images found"),
        (tmp_path / "bad.zip", "not a readable ZIP archive"),
        (folder, "holds latents already"),
    ]:
        with pytest.raises(UserError) as error:
            open_source(path)
        assert message in one_line(error)
