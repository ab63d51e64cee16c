"""Sources in Parquet files, as the Hugging Face hub has them: whole, damaged and hostile."""

import json
import pickle
from functools import partial

import numpy as np
import pytest

from stablevm.preparation.config import ConvertShardsConfig
from stablevm.preparation.pictures import BadPictureError, read_picture
from stablevm.preparation.shards import convert
from stablevm.preparation.sources import ONE_CLASS, open_source
from stablevm.support.errors import UserError
from tests.helpers.data_sets import one_line
from tests.helpers.packed import pictures_of, png

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PICTURES = pictures_of(6, 9, 8, 3)
NAMES = ["cat", "dog", "owl"]
HUB = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}}}


def write(path, numbers, labels=None, *, metadata=HUB, structure=True, rows_per_group=2, **more):
    """A file of images, in groups of a few rows."""
    contents = [None if number is None else png(PICTURES[number]) for number in numbers]
    images = [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(contents)]
    columns = {"image": images if structure else contents}
    columns |= {} if labels is None else {"label": labels}
    table = pa.table(columns | more)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def read(source, row):
    return np.asarray(read_picture(partial(source.storage.open, source.names[row]))[0])


@pytest.fixture
def hub(tmp_path):
    """A repository of the hub, whose files are in data/."""
    write(tmp_path / "pets/data/train-00000-of-00002.parquet", [0, 1, 2], [1, 0, 2])
    write(tmp_path / "pets/data/train-00001-of-00002.parquet", [3, 4], [2, 2])
    write(tmp_path / "pets/data/test-00000-of-00001.parquet", [5], [0])
    (tmp_path / "pets/README.md").write_text("about them")
    return tmp_path / "pets"


def test_a_data_set_of_the_hub(hub):
    for path in (hub, hub / "data"):
        source = open_source(path)
        assert source.labels.tolist() == [1, 0, 2, 2, 2] and source.class_names == tuple(NAMES)
        assert source.names == sorted(source.names) and "leaves out test" in source.warnings[0]
        for row in (4, 0, 3, 2, 1):
            assert np.array_equal(read(source, row), PICTURES[row])
    assert open_source(hub, "test").labels.tolist() == [0]
    again = pickle.loads(pickle.dumps(source))  # as for a worker that is not forked
    assert np.array_equal(read(again, 3), PICTURES[3])


def test_converted_by_workers(hub, tmp_path):
    assert convert(ConvertShardsConfig(hub, tmp_path / "made", resolution="8", num_workers=2, batch_size=2)) == 0


def test_files_without_metadata(tmp_path):
    source = open_source(write(tmp_path / "a.parquet", [0, 1], [4, 0], metadata=None, structure=False))
    assert source.class_names == ("0", "1", "2", "3", "4") and source.labels.tolist() == [4, 0]
    assert np.array_equal(read(source, 1), PICTURES[1])
    source = open_source(write(tmp_path / "b.parquet", [0, 1, 2], ["dog", "cat", "dog"], metadata=None))
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [1, 0, 1]
    source = open_source(write(tmp_path / "c.parquet", [0, 1], None, metadata=None))
    assert source.class_names == ONE_CLASS and "no column of labels" in source.warnings[0]
    source = open_source(write(tmp_path / "d.parquet", [0, 1], [-1, -1]))
    assert source.class_names == ONE_CLASS and "labels are not told" in source.warnings[0]


def test_a_row_without_an_image_is_a_bad_picture(tmp_path):
    source = open_source(write(tmp_path / "a.parquet", [0, None], [0, 1]))
    with pytest.raises(BadPictureError, match="no bytes of an image"):
        read(source, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [0, 3]}, "has the label 3, expected a class of 0 to 2"),
        ({"labels": [0, -1]}, "has the label -1, expected a class of 0 to 2"),
        ({"labels": [0, None]}, "has the label None, expected"),
        ({"labels": [0, 2**40], "metadata": None}, "has the label 1099511627776, expected"),
        ({"labels": [0.5, 1.0]}, "has the label 0.5, expected"),
        ({"mask": [b"x", b"y"], "metadata": None}, "several columns of bytes (image, mask)"),
    ],
)
def test_contents_that_do_not_fit_are_one_clear_line(options, message, tmp_path):
    with pytest.raises(UserError) as error:
        open_source(write(tmp_path / "a.parquet", [0, 1], **{"labels": [0, 1]} | options))
    assert message in one_line(error)


@pytest.mark.parametrize("metadata", [{"info": None}, {"info": {"features": {"label": {"names": 3}}}}, ["x"]])
def test_odd_metadata_are_passed_over(metadata, tmp_path):
    assert open_source(write(tmp_path / "a.parquet", [0, 1], [0, 1], metadata=metadata)).class_names == ("0", "1")


def test_files_of_other_data_sets(hub):
    write(hub / "data/train-00001-of-00002.parquet", [3, 4], None)
    with pytest.raises(UserError) as error:
        open_source(hub)
    assert "other columns than train-00000-of-00002.parquet has" in one_line(error)


def test_files_without_images(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "a.parquet")
    assert "no column of bytes among text, label" in one_line(error)


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:-5], lambda c: c[: len(c) // 2], lambda c: b"x" * 99])
def test_damaged_files_are_one_clear_line(hub, damage):
    path = hub / "data/train-00001-of-00002.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        open_source(hub)
    assert f"{path}: not a readable Parquet file" in one_line(error)


def test_a_damaged_group_is_one_clear_line(hub):
    path = hub / "data/train-00001-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        source = open_source(hub)
        read(source, 3)
    assert f"{path}: damaged" in one_line(error)
