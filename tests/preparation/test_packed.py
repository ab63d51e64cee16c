"""Sources whose files hold many images each: IDX and CIFAR."""

import gzip
import json
import pickle
import struct
from functools import partial

import numpy as np
import pytest
from PIL import Image

from stablevm.data.opening import open_dataset
from stablevm.preparation.config import ConvertConfig, ConvertShardsConfig, EncodeShardsConfig
from stablevm.preparation.folders import convert as convert_to_folder
from stablevm.preparation.pictures import pad, read_picture
from stablevm.preparation.shards import convert, encode
from stablevm.preparation.sources import ONE_CLASS, open_source
from stablevm.support.errors import UserError
from tests.helpers.data_sets import one_line
from tests.helpers.packed import pictures_of, write_cifar, write_idx

LABELS = [3, 0, 9, 1, 1, 2]
CIFAR_10 = [f"data_batch_{number}.bin" for number in range(1, 6)]


def all_of(source):
    """All images (N, H, W, 3) in their order."""
    return np.stack([np.asarray(read_picture(partial(source.storage.open, name))[0]) for name in source.names])


@pytest.fixture
def mnist(tmp_path):
    """Six training images of 5 x 4 pixels and two test images, packed as they are distributed."""
    write_idx(tmp_path / "mnist", "train", pictures_of(6, 5, 4), LABELS, ".gz")
    write_idx(tmp_path / "mnist", "t10k", pictures_of(2, 5, 4, seed=1), [7, 8], ".gz")
    return tmp_path / "mnist"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_give_their_images_and_labels(suffix, tmp_path):
    file = write_idx(tmp_path / "set", "emnist-letters-train", pictures_of(6, 5, 4), LABELS, suffix)
    for path in (file, file.parent):
        source = open_source(path)
        assert source.names == sorted(source.names) and source.labels.tolist() == LABELS
        assert source.class_names == tuple("0123456789") and source.storage.root == path
        assert np.array_equal(all_of(source), np.repeat(pictures_of(6, 5, 4)[..., None], 3, axis=3))
    assert [line for line in source.warnings if "have no image" not in line] == []


def test_a_split_is_chosen_and_the_others_are_told(mnist):
    source = open_source(mnist)
    assert len(source) == 6 and source.warnings[0] == f"{mnist}: takes the split train and leaves out test; give split"
    test = open_source(mnist, "test")
    assert test.labels.tolist() == [7, 8] and "leaves out" not in "".join(test.warnings)
    assert len(open_source(mnist / "t10k-images-idx3-ubyte.gz")) == 2
    with pytest.raises(UserError) as error:
        open_source(mnist, "dev")
    assert f"split dev: {mnist} has test, train; give one of these" in one_line(error)
    for path in mnist.glob("train-*"):
        path.rename(path.with_name(path.name.replace("train", "qmnist-extra")))
    with pytest.raises(UserError) as error:
        open_source(mnist)
    assert "holds the splits qmnist-extra, test; give one as split" in one_line(error)


def test_a_file_of_another_kind_is_told_which_are_read(tmp_path):
    (tmp_path / "pictures.rar").write_bytes(b"Rar!")
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "pictures.rar")
    assert "it is a file of no kind that is read; give a folder, a .zip archive, or a file of IDX" in one_line(error)


def test_a_folder_of_classes_has_no_splits(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/x.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        open_source(tmp_path, "test")
    assert "has no splits that are known" in one_line(error)


def test_an_unpacked_file_stands_for_the_packed_one_beside_it(mnist):
    write_idx(mnist, "train", pictures_of(3, 5, 4), [0, 1, 2])
    assert len(open_source(mnist)) == 3


def test_images_without_labels_are_one_class(mnist):
    (mnist / "train-labels-idx1-ubyte.gz").unlink()
    source = open_source(mnist)
    assert source.class_names == ONE_CLASS and "no labels beside it" in source.warnings[0]


def repacked(path, change):
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


HEADER = struct.pack(">4B3I", 0, 0, 8, 3, 6, 5, 4)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("images-idx3", lambda content: content[:-1], "unpacks to 135 bytes, but to 136 by its header"),
        ("images-idx3", lambda content: content + b"x", "unpacks to more bytes, but to 136 by its header"),
        ("images-idx3", lambda content: content + bytes(2**26), "unpacks to more bytes"),
        ("images-idx3", lambda content: content[:9], "expected"),
        ("images-idx3", lambda content: b"", "begins with nothing, but IDX files of images"),
        ("images-idx3", lambda content: b"\0\0\x0d\x03" + content[4:], "begins with 00 00 0d 03, but IDX files"),
        ("images-idx3", lambda content: HEADER[:4] + b"\xff" * 12, "of 4,294,967,295 x 4,294,967,295 pixels"),
        ("images-idx3", lambda content: HEADER[:4] + bytes(12), "0 images of 0 x 0 pixels by its header"),
        ("images-idx3", lambda content: HEADER[:4] + b"\xff" * 4 + HEADER[8:] + content[16:], "unpacks to 136 bytes"),
        (
            "labels-idx1",
            lambda content: content[:4] + struct.pack(">I", 5) + content[8:13],
            "5 labels, but train-images",
        ),
        ("labels-idx1", lambda content: content[:-1], "unpacks to 13 bytes, but to 14"),
        ("labels-idx1", lambda content: HEADER, "begins with 00 00 08 03, but IDX files of labels"),
    ],
)
def test_damaged_idx_files_are_one_clear_line(mnist, file, change, message):
    repacked(mnist / f"train-{file}-ubyte.gz", change)
    with pytest.raises(UserError) as error:
        open_source(mnist)
    assert (message in one_line(error) or message == "expected") and "download it again" in one_line(error)


@pytest.mark.parametrize("damage", [lambda content: content[:30], lambda content: content[:-6] + b"wrong!"])
def test_files_that_gzip_refuses(mnist, damage):
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        open_source(mnist)
    assert "can't be unpacked" in one_line(error)


def test_an_unpacked_file_of_another_size(tmp_path):
    file = write_idx(tmp_path, "train", pictures_of(6, 5, 4), LABELS)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    assert "has 133 bytes, but 136 by its header" in one_line(error)


def test_a_file_that_shrinks_is_not_a_bad_picture(tmp_path):
    file = write_idx(tmp_path, "train", pictures_of(6, 5, 4), LABELS)
    source = open_source(tmp_path)
    with file.open("r+b") as opened:
        opened.truncate(100)
    with pytest.raises(OSError, match="has become shorter"):
        read_picture(partial(source.storage.open, source.names[5]))


def test_cifar_10_joins_its_batches_and_has_names(tmp_path):
    pictures, labels = pictures_of(10, 3, 32, 32), [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    write_cifar(tmp_path, CIFAR_10, pictures, labels)
    write_cifar(tmp_path, ["test_batch.bin"], pictures[:3], labels[:3])
    (tmp_path / "batches.meta.txt").write_text("\n".join(f"kind{number}" for number in range(10)) + "\n\n")
    source = open_source(tmp_path)
    assert source.labels.tolist() == labels and source.class_names == tuple(f"kind{number}" for number in range(10))
    assert np.array_equal(all_of(source), pictures.transpose(0, 2, 3, 1))
    assert open_source(tmp_path, "test").labels.tolist() == labels[:3]
    assert len(open_source(tmp_path / "data_batch_2.bin")) == 2
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    assert "data_batch_3.bin is missing" in one_line(error)


def test_cifar_100_has_the_fine_labels(tmp_path):
    pictures = pictures_of(4, 3, 32, 32)
    write_cifar(tmp_path, ["train.bin"], pictures, [99, 0, 50, 7], coarse=[19, 1, 2, 3])
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"fine{number}" for number in range(100)))
    source = open_source(tmp_path)
    assert source.labels.tolist() == [99, 0, 50, 7] and source.class_names[99] == "fine99"
    assert np.array_equal(all_of(source), pictures.transpose(0, 2, 3, 1))


def test_damaged_cifar_files(tmp_path):
    pictures = pictures_of(5, 3, 32, 32)
    for change, message in [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "3,072 bytes are no multiple of an image's 3,073"),
        (lambda path: path.write_bytes(b""), "0 bytes are no multiple"),
        (lambda path: path.write_bytes(b"\x0b" + path.read_bytes()[1:]), "the label 11, expected 0 to 9"),
        (lambda path: path.with_name("batches.meta.txt").write_text("cat dog"), "2 names of classes, expected 10"),
    ]:
        write_cifar(tmp_path, CIFAR_10, pictures, range(5))
        change(tmp_path / CIFAR_10[1])
        with pytest.raises(UserError) as error:
            open_source(tmp_path)
        assert message in one_line(error)


@pytest.mark.parametrize("name", ["data_batch_1", "train", "batches.meta"])
def test_pickles_of_cifar_are_refused_unread(name, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    assert "a pickle, which can run any program when it is read; download CIFAR's binary version" in one_line(error)
    assert not (tmp_path / "sprung").exists()


def test_parts_cover_the_source_and_keep_all_classes(mnist):
    source = open_source(mnist)
    parts = [source.part([number], 2) for number in (1, 2)]
    assert [part.labels.tolist() for part in parts] == [LABELS[::2], LABELS[1::2]]
    assert {*parts[0].names, *parts[1].names} == set(source.names)
    rest = source.part(range(2, 4), 3)
    assert rest.labels.tolist() == [label for row, label in enumerate(LABELS) if row % 3]
    assert parts[0].class_names == rest.class_names == source.class_names and source.part([1], 1) is source


@pytest.mark.parametrize("workers", [0, 2])
def test_converted_and_encoded_as_grey_pixels(mnist, workers, tmp_path, monkeypatch):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {number}" for number in range(10)) + "\n")
    config = ConvertShardsConfig(mnist, tmp_path / "made", resolution="8", transform="pad", class_names=str(names),
                                 part="2/2", num_workers=workers, batch_size=2)  # fmt: skip
    assert convert(config) == 0
    for _ in range(2):  # the second time it is complete
        assert encode(EncodeShardsConfig(config.dest, vae="grey", num_workers=0)) == 0
    dataset = open_dataset(config.dest)
    assert dataset.labels().tolist() == LABELS[1::2] and dataset.class_names[3] == "kind 3"
    assert dataset.latent.shape == dataset.latent.moments_shape == (1, 8, 8)
    framed = np.pad(pictures_of(6, 5, 4)[1::2], ((0, 0), (1, 2), (2, 2)))
    assert np.array_equal(dataset.images([0, 1, 2]).numpy(), np.repeat(framed[:, None], 3, axis=1))
    values = dataset.latent.means(dataset.moments([0, 1, 2]))[:, 0].numpy()
    assert np.abs(values - (framed / 127.5 - 1)).max() < 1e-3  # float16


def test_converted_into_a_folder_of_files(mnist, tmp_path):
    config = ConvertConfig(mnist, tmp_path / "images", resolution="4x5", split="test", num_workers=0)
    assert convert_to_folder(config) == 0
    listing = json.loads((tmp_path / "images/dataset.json").read_text())
    assert [label for _, label in listing["labels"]] == [7, 8] and listing["class_names"] == list("012345678")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "0/2"}, "--part 0/2: expected NUMBER/PARTS"),
        ({"part": "3/2"}, "--part 3/2: expected NUMBER/PARTS"),
        ({"part": "2-1/2"}, "--part 2-1/2: expected NUMBER/PARTS"),
        ({"part": "half"}, "--part half: expected NUMBER/PARTS"),
        ({"class_names": "cat,,dog"}, "expected different names"),
        ({"class_names": "cat,dog,cat"}, "expected different names"),
        ({"class_names": "cat,dog"}, "2 names, but"),
    ],
)
def test_options_that_do_not_fit(mnist, options, message, tmp_path):
    with pytest.raises(UserError) as error:
        convert(ConvertShardsConfig(mnist, tmp_path / "made", resolution="8", num_workers=0, **options))
    assert message in one_line(error)


def test_padding_keeps_the_image_whole():
    picture, _ = read_picture(lambda: __import__("io").BytesIO(b"P5 3 2 255\n" + bytes([1, 2, 3, 4, 5, 6])))
    padded = np.asarray(pad(picture, (6, 4)))[..., 0]
    assert padded.tolist() == [[0] * 6, [0, 1, 2, 3, 0, 0], [0, 4, 5, 6, 0, 0], [0] * 6]
    wide = Image.new("RGB", (400, 2), "white")
    made = np.asarray(pad(wide, (8, 6)))[..., 0]
    assert made.shape == (6, 8) and (made == 255).all(1).tolist() == [False, False, True, False, False, False]
