"""What a source holds, in which order, and which sources are refused."""

import json
import os
import shutil
import zipfile
from functools import partial

import numpy as np
import pytest
from PIL import Image, features

from stablevm.preparation.pictures import BadPictureError, read_picture
from stablevm.preparation.sources import ONE_CLASS, open_source
from stablevm.support.errors import UserError
from tests.helpers.data_sets import one_line
from tests.helpers.sources import write_source


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
    assert source.stray == ("stray.jpg",) and (source.ignored, source.hidden) == (1, 1)
    assert source.warnings == (
        f"{folder}: 1 images are in no class folder and are left out, the first is stray.jpg",
        f"{folder}: 1 of 4 classes have no image (a empty)",
    )


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


def test_a_listing_without_labels_is_one_class_whatever_the_folders(folder, tmp_path):
    (folder / "dataset.json").write_text('{"labels": null}')
    for source in (open_source(folder), open_source(zipped(folder, tmp_path / "source.zip"))):
        assert source.class_names == ONE_CLASS and source.labels.tolist() == [0] * 6 and source.ignored == 0


def test_single_folders_above_the_classes_are_passed(folder, tmp_path):
    classes = open_source(folder)
    (tmp_path / "top/pets").mkdir(parents=True)
    moved = folder.rename(tmp_path / "top/pets/all")
    (tmp_path / "top/README").write_text("about them")
    for source in (open_source(tmp_path / "top"), open_source(zipped(tmp_path / "top", tmp_path / "top.zip"))):
        assert source.class_names == classes.class_names and source.labels.tolist() == classes.labels.tolist()
        assert source.names == [f"pets/all/{name}" for name in classes.names] and source.ignored == 1
    for name in ("n00000001", "n00000002"):
        shutil.rmtree(moved / name)
    assert open_source(tmp_path / "top").class_names == ("n00000000",)  # it holds images: a class, the only one


def test_unlisted_images_are_counted_and_reported(folder):
    names = open_source(folder).names
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, 0] for name in names[:2]]}))
    source = open_source(folder)
    assert len(source) == 2 and source.unlisted == 4
    assert source.warnings == (
        f"{folder}: 4 images are not in its dataset.json and are left out, the first is {names[2]}",
    )


@pytest.mark.parametrize("written", [lambda name: name.replace("/", "\\"), "./{}".format, ".//{}".format])
def test_names_as_other_systems_write_them(folder, written, tmp_path):
    names = open_source(folder).names
    listing = json.dumps({"labels": [[written(name), number] for number, name in enumerate(names)]})
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        archive.writestr(written("dataset.json"), listing)
        for name in names:
            archive.writestr(written(name), (folder / name).read_bytes())
        archive.writestr("../outside.png", (folder / names[0]).read_bytes())
    (folder / "dataset.json").write_text(listing)
    for source in (open_source(folder), open_source(tmp_path / "source.zip")):
        assert source.names == names and source.labels.tolist() == list(range(6)) and source.unlisted == 0
        read(source, names[3])


def test_a_backslash_that_belongs_to_a_name_stays(folder):
    odd = "n00000000/a\\b.png"
    Image.new("RGB", (8, 8)).save(folder / odd)
    (folder / "dataset.json").write_text(json.dumps({"labels": [[odd, 0]]}))
    assert open_source(folder).names == [odd]


JUNK = (
    *("__MACOSX/n00000000/._0.jpg", "__macosx/x.png", ".DS_Store", "n00000000/.DS_Store", "n00000000/._1.JPEG"),
    *("n00000000/Thumbs.db", "a/@eaDir/x.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/x.png", "$RECYCLE.BIN/S-1/x.png"),
    *("desktop.ini", "System Volume Information/x.jpg", "lost+found/x.png", ".ipynb_checkpoints/x.png", "Icon\r"),
    "n00000001/.thumbnails/x.png",
)


def test_what_systems_leave_makes_no_class_and_no_image(folder, tmp_path):
    before = open_source(folder)
    for name in JUNK:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((folder / before.names[0]).read_bytes())
    for source in (open_source(folder), open_source(zipped(folder, tmp_path / "source.zip"))):
        assert source.names == before.names and source.hidden == len(JUNK) and source.ignored == 0
        assert [name for name in source.class_names if name != "a"] == list(before.class_names)


def test_folders_without_an_image_are_no_class_and_are_named(folder, tmp_path):
    (folder / "Annotations" / "n1").mkdir(parents=True)
    (folder / "Annotations" / "n1" / "x.xml").write_text("<annotation/>")
    (folder / "a video").mkdir()
    (folder / "a video" / "x.mp4").write_bytes(b"moving pictures")
    for source in (open_source(folder), open_source(zipped(folder, tmp_path / "source.zip"))):
        assert source.class_names == ("n00000000", "n00000001", "n00000002") and source.ignored == 2
        (line,) = source.warnings
        assert line.endswith(": no image in Annotations, a video, so no class of that name")


@pytest.mark.parametrize("names", [("train", "val"), ("Test", "training", "valid"), ("train2017", "val_images")])
def test_splits_that_pass_for_classes_get_a_warning(folder, names, tmp_path):
    (tmp_path / "both").mkdir()
    for number, name in enumerate(names):
        shutil.copytree(folder / f"n0000000{number}", tmp_path / "both" / name)
    (line,) = open_source(tmp_path / "both").warnings
    assert "sound like splits of a data set; give the folder of one" in line
    (tmp_path / "both" / names[0]).rename(tmp_path / "both" / "freight train")
    assert not open_source(tmp_path / "both").warnings


def test_pictures_are_known_by_their_content_where_names_do_not_tell(folder):
    shutil.rmtree(folder)
    picture = Image.new("RGB", (16, 16), (200, 10, 10))
    (folder / "cat").mkdir(parents=True)
    formats = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "ICO", "PCX", "SGI", "DDS"]
    formats += ["QOI"] * ("QOI" in Image.SAVE)  # which Pillow writes from version 11.3 on
    for number, kind in enumerate(formats):
        picture.save(folder / "cat" / f"{number:02d}", format=kind)
    picture.save(folder / "cat" / "photo.dat", format="PNG")
    picture.save(folder / "cat" / "picture.tga")
    if features.check("avif"):
        picture.save(folder / "cat" / "x.avif")
        picture.save(folder / "cat" / "y", format="AVIF")
    (folder / "cat" / "notes").write_text("P is for picture")
    (folder / "cat" / "link").symlink_to("nowhere")
    source = open_source(folder)
    assert len(source) == len(formats) + 2 + 2 * features.check("avif") and source.ignored == 2
    for name in source.names:
        assert np.asarray(read(source, name)[0]).mean() > 30


def test_a_class_that_nothing_can_read_is_still_a_class(folder):
    (folder / "owl").mkdir()
    (folder / "owl" / "x.heic").write_bytes(b"\0\0\0\x18ftypheic")
    source = open_source(folder)
    assert source.class_names[3] == "owl" and source.labels.tolist()[-1] == 3


def test_gaps_in_labels_are_reported_and_huge_labels_refused(folder):
    names = open_source(folder).names
    listing = {"labels": [[name, 101 if number % 2 else 205] for number, name in enumerate(names)]}
    (folder / "dataset.json").write_text(json.dumps(listing))
    source = open_source(folder)
    assert len(source.class_names) == 206 and len(source.empty_classes()) == 204
    assert source.warnings[0].endswith("204 of 206 classes have no image (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)")
    for label in (20_230_101, 2**40, 2**70):
        (folder / "dataset.json").write_text(json.dumps({"labels": [[names[0], label]]}))
        with pytest.raises(UserError) as error:
            open_source(folder)
        assert f"class {label} would make {label + 1:,} classes for 1 images" in one_line(error)


def test_a_listing_that_unpacks_to_more_than_its_images_explain(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(next(folder.rglob("*.JPEG")), "a.jpg")
        archive.writestr("dataset.json", '{"labels": [["a.jpg", 0]], "x": "' + " " * 2**25 + '"}')
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "bomb.zip")
    assert "too large for a listing" in one_line(error)


def test_half_prepared_and_misplaced_folders(folder, tmp_path):
    data = tmp_path / "DATA"
    images = data / "images"
    shutil.copytree(folder / "n00000000", images / "00000")
    (images / ".prepare").mkdir()
    (images / ".prepare" / "plan.json").write_text("{}")
    for path in (images, data):
        with pytest.raises(UserError) as error:
            open_source(path)
        assert f"{images}" in one_line(error) and "run the same command again" in one_line(error)
    shutil.rmtree(images / ".prepare")
    (images / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError) as error:
        open_source(data)
    assert f"no dataset.json here, but in {images}" in one_line(error)
    with pytest.raises(UserError) as error:
        open_source(zipped(data, tmp_path / "DATA.zip"))
    assert "in " + str(tmp_path / "DATA.zip/images") in one_line(error) and "unpack the archive" in one_line(error)
    assert len(open_source(images)) == 2


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
        ("{}", "found another kind of file"),
        ('{"format_version": 1, "shards": []}', "a prepared data set in shards"),
        ('{"labels": [["a.npy", 0]]}', "lists latents, such as a.npy"),
        ("[" * 100_000, "nested more than"),
        ('{"labels": [["a.png", ' + "1" * 5_000 + "]]}", "digits"),
        ('{"format_version": 1}', "found another kind of file"),
        ('{"labels": []}', "lists no images"),
        ('{"labels": 3}', "are not a list"),
        ('{"labels": [["a.png", 0]], "class_names": 3}', "are not a list"),
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
        (tmp_path / "nothing", "it does not exist"),
        (tmp_path / "file.txt", "it is a file"),
        (tmp_path / "empty", "no images found"),
        (tmp_path / "bad.zip", "not a readable ZIP archive"),
        (folder, "holds latents already"),
    ]:
        with pytest.raises(UserError) as error:
            open_source(path)
        assert message in one_line(error)
