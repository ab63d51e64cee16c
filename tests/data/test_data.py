"""Prepared data on disk: writing, reading in any order, and every fault in one clear line."""

import json
import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stablevm.data import tensor_file
from stablevm.data.dataset import check_finite
from stablevm.data.loader import training_loader
from stablevm.data.manifest import Manifest, Shard, ShardFile
from stablevm.data.mirrored import MirroredDataset
from stablevm.data.opening import open_dataset
from stablevm.data.png import encode_png
from stablevm.data.shards import ShardDataset
from stablevm.data.writer import ShardWriter
from stablevm.support.errors import UserError
from tests.helpers.data_sets import COUNT, DESCRIPTION, damaged, kill_at_rename, one_line, source, write


class TestShards:
    def test_round_trip_over_several_shards(self, dataset_dir, dataset_rows):
        data = open_dataset(dataset_dir)
        assert [shard.rows for shard in data.manifest.shards] == [8_192, 8_192, 3_616]
        assert len(data) == COUNT and data.num_classes == 3 and data.has_images and data.resolution == 4
        assert data.latent == DESCRIPTION.latent and data.class_names == ("cat", "dog", "owl")
        assert list(data.manifest.class_counts) == dataset_rows["labels"].bincount().tolist()
        every = range(COUNT)
        for read, name in (
            (data.labels(), "labels"),
            (data.index(), "index"),
            (data.moments(every), "moments"),
            (data.moments_flip(every), "moments_flip"),
            (data.images(every), "images"),
        ):
            assert read.dtype == dataset_rows[name].dtype and torch.equal(read, dataset_rows[name])

    def test_random_access_in_any_order_with_repeats_across_shards(self, dataset_dir, dataset_rows):
        data = open_dataset(dataset_dir)
        picks = torch.randint(COUNT, (500,), generator=torch.Generator().manual_seed(2))
        edges = torch.tensor([8_191, 8_192, 8_193, 16_383, 16_384, 0, 19_999, 8_192, 8_192, 7, 6])
        for chosen in (picks, edges, picks.flip(0), torch.empty(0, dtype=torch.int64)):
            assert torch.equal(data.moments(chosen), dataset_rows["moments"][chosen])
            assert torch.equal(data.images(chosen.tolist()), dataset_rows["images"][chosen])
        assert torch.equal(data.moments(range(8_000, 17_000)), dataset_rows["moments"][8_000:17_000])

    @pytest.mark.parametrize("row", [-1, COUNT])
    def test_rows_outside_are_an_error(self, dataset_dir, row):
        with pytest.raises(IndexError, match="20000 rows"):
            open_dataset(dataset_dir).moments([0, row])

    def test_what_was_read_is_a_copy(self, dataset_dir, dataset_rows):
        data = open_dataset(dataset_dir)
        data.moments([4]).zero_()
        assert torch.equal(data.moments([4])[0], dataset_rows["moments"][4])

    def test_survives_fork_and_pickling_with_files_open(self, dataset_dir, dataset_rows):
        data = open_dataset(dataset_dir)
        data.moments([0])
        with multiprocessing.get_context("fork").Pool(2) as pool:
            first, second = pool.map(_Sum(data), [range(100), range(8_190, 8_195)])
        assert first == dataset_rows["moments"][:100].double().sum()
        assert second == dataset_rows["moments"][8_190:8_195].double().sum()
        assert len(pickle.dumps(data)) < 1_000  # the folder, not what is mapped from it

    def test_split_folder_or_the_folder_itself(self, dataset_dir):
        assert open_dataset(dataset_dir.parent).folder == open_dataset(dataset_dir).folder == dataset_dir

    def test_float32_moments_are_stored_as_float16(self, tmp_path):
        few = source(10)
        few["moments"] = few["moments"].float() + 1e-5
        write(tmp_path, few)
        assert torch.equal(open_dataset(tmp_path).moments(range(10)), few["moments"].half())

    def test_a_set_without_images_and_flips(self, tmp_path):
        few = source(10)
        del few["images"], few["moments_flip"]
        description = Manifest(("a", "b", "c"), 4, "none", DESCRIPTION.latent, has_flips=False, has_images=False)
        write(tmp_path, few, description)
        data = open_dataset(tmp_path)
        assert not data.has_images and damaged(tmp_path) == []
        with pytest.raises(UserError, match="prepared without images"):
            training_loader(data, global_batch=2, seed=0, num_steps=1, with_images=True)
        with pytest.raises(UserError, match=r"no latents of mirrored images; prepare shards with them .*encode --flip"):
            MirroredDataset(data)


class _Sum:
    def __init__(self, data):
        self.data = data

    def __call__(self, chosen):
        return self.data.moments(chosen).double().sum()


class TestFingerprint:
    def test_it_is_of_the_content_and_not_of_the_place(self, dataset_dir, dataset_copy, tmp_path):
        one, other = open_dataset(dataset_dir), open_dataset(dataset_copy)
        for with_images in (False, True):
            known = one.fingerprint(with_images=with_images)
            assert other.fingerprint(with_images=with_images) == known
            assert MirroredDataset(one).fingerprint(with_images=with_images) == known
        assert one.fingerprint(with_images=True) != one.fingerprint(with_images=False)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda rows: rows, None),
            (lambda rows: {name: tensor[:90] for name, tensor in rows.items()}, "90 rows instead of 100"),
            (
                lambda rows: {name: tensor.flip(0) for name, tensor in rows.items()},
                "other latents or labels, or the same",
            ),
            (lambda rows: {**rows, "labels": (rows["labels"] + 1) % 3}, "other latents or labels, or the same"),
            (lambda rows: {**rows, "images": 255 - rows["images"]}, "other images"),
        ],
    )
    def test_it_tells_what_differs(self, tmp_path, change, words):
        rows = source(100)
        write(tmp_path / "one", rows)
        write(tmp_path / "other", change(rows))
        known, found = (open_dataset(tmp_path / name).fingerprint(with_images=True) for name in ("one", "other"))
        difference = found.difference(known)
        assert difference is words is None or words in difference

    def test_of_class_names(self, dataset_dir):
        known = open_dataset(dataset_dir).fingerprint(with_images=False)
        assert replace(known, class_names="x").difference(known) == "other class names"


class TestWriter:
    def test_refuses_to_overwrite_a_data_set(self, dataset_dir):
        with pytest.raises(UserError, match="already holds a prepared data set"):
            ShardWriter(dataset_dir, DESCRIPTION)

    @pytest.mark.parametrize("count", [8_191, 16_385])
    def test_rows_per_shard_have_a_range(self, tmp_path, count):
        with pytest.raises(UserError, match=f"{count}: expected 8192 to 16384"):
            ShardWriter(tmp_path, DESCRIPTION, rows_per_shard=count)

    def test_wrong_rows_are_refused(self, tmp_path):
        writer = ShardWriter(tmp_path, DESCRIPTION)
        good = source(4)
        with pytest.raises(ValueError, match="moments_flip"):
            writer.add(**{name: tensor for name, tensor in good.items() if name != "images"})
        with pytest.raises(ValueError, match=r"labels has shape \(3,\), expected \(4,\)"):
            writer.add(**{**good, "labels": good["labels"][:3]})
        with pytest.raises(ValueError, match="but there are 3 classes"):
            writer.add(**{**good, "labels": torch.tensor([0, 1, 2, 3])})

    def test_rows_that_are_not_finite_are_named_when_a_loader_asks(self, tmp_path):
        write(tmp_path, source(20))
        path = tmp_path / "latents-00000.safetensors"
        tensors = load_file(path)
        tensors["moments"][13, 1, 0, 0], tensors["moments_flip"][4] = torch.inf, torch.nan
        save_file(tensors, path)
        data, options = open_dataset(tmp_path), {"global_batch": 40, "seed": 0, "num_steps": 1}
        assert len(list(training_loader(data, **options))) == 1
        for each, words in (
            (data, r"row 13 \(image 94 of the source, in latents-00000.safetensors\) is not finite"),
            (MirroredDataset(data), r"row 24, the mirror image of row 4 \(image 31"),
        ):
            rows = range(20) if each is data else range(14, 40)
            with pytest.raises(UserError, match=words) as error:
                check_finite(each, rows, each.moments(rows))
            one_line(error)
        with pytest.raises(UserError, match="is not finite"):
            list(training_loader(data, finite=True, **options))

    def test_large_values_are_finite(self, dataset_dir):
        moments = torch.full((4, 2, 2, 2), 65_504.0).half()
        check_finite(open_dataset(dataset_dir), range(4), moments)

    def test_moments_that_are_not_finite_name_the_sample(self, tmp_path):
        few = source(4)
        few["moments"] = few["moments"].float()
        few["moments"][2, 0, 0, 0] = 1e6  # infinite in float16
        with pytest.raises(UserError, match="moments of sample 17"):
            write(tmp_path, few)
        assert list(tmp_path.iterdir()) == []

    def test_no_rows_is_an_error(self, tmp_path):
        with pytest.raises(UserError, match="no samples"):
            ShardWriter(tmp_path, DESCRIPTION).finish()

    def test_killed_between_shards_is_ignored_and_completes_when_run_again(self, tmp_path, dataset_rows, monkeypatch):
        with monkeypatch.context() as patch:
            kill_at_rename(patch, 3)
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path, dataset_rows)
        assert {path.name for path in tmp_path.iterdir()} == {
            "latents-00000.safetensors",
            "images-00000.safetensors",
            "latents-00001.safetensors",
        }
        with pytest.raises(UserError, match=r"interrupted; .*run the preparation again"):
            open_dataset(tmp_path)
        (tmp_path / ".tmp-1-abcd-latents-00001.safetensors").write_bytes(b"half")  # left by a kill -9
        write(tmp_path, dataset_rows)
        data = open_dataset(tmp_path)
        assert damaged(tmp_path) == [] and torch.equal(data.moments(range(COUNT)), dataset_rows["moments"])
        assert not list(tmp_path.glob(".tmp-*"))


def changed(path, name, change):
    """Replace a tensor of a shard."""
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, path)


class TestFaults:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(UserError, match="absent: no such folder") as error:
            open_dataset(tmp_path / "absent")
        one_line(error)

    def test_no_manifest(self, tmp_path):
        with pytest.raises(UserError, match=r"no dataset\.json") as error:
            open_dataset(tmp_path)
        one_line(error)

    @pytest.mark.parametrize(
        ("change", "cause"),
        [
            (lambda text: text[:200], "not valid JSON"),
            (lambda text: text.replace('"format_version": 1', '"format_version": 7'), "version 7.*reads 1"),
            (lambda text: json.dumps({"labels": []}), "holds images, not latents"),
            (lambda text: json.dumps({"labels": [["a.npy", 0]]}), "holds latents: give a folder"),
            (lambda text: "{}", "version null"),
            (lambda text: "[1]", "expected an object"),
            (lambda text: text.replace('"crop"', '"crap"'), "crap: unknown"),
            (lambda text: text.replace('"scale"', '"scala"'), "scala"),
            (lambda text: text.replace('"count": 20000', '"count": 20001'), "count 20001"),
            (lambda text: text.replace('"owl"', '"owl", "yak"'), "4 class_names, 3 class_counts"),
            (lambda text: text.replace('"has_images": true', '"has_images": false'), "has_images"),
            (lambda text: json.dumps({**json.loads(text), "shards": []}), "no shards"),
            *(
                (
                    lambda text, name=name: text.replace("latents-00001.safetensors", name),
                    f"'{name}' is not the name of a file",
                )
                for name in ("../latents-00001.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..", ".", "")
            ),
        ],
    )
    def test_bad_manifest(self, dataset_copy, change, cause):
        path = dataset_copy / "dataset.json"
        path.write_text(change(path.read_text()))
        with pytest.raises(UserError, match=cause) as error:
            open_dataset(dataset_copy)
        assert str(dataset_copy) in one_line(error)

    def test_missing_shard(self, dataset_copy):
        (dataset_copy / "latents-00001.safetensors").unlink()
        with pytest.raises(UserError, match=r"latents-00001\.safetensors is missing") as error:
            open_dataset(dataset_copy)
        one_line(error)

    def test_truncated_shard(self, dataset_copy):
        path = dataset_copy / "latents-00002.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-10])
        with pytest.raises(UserError, match=f"latents-00002.* has {len(whole) - 10:,} bytes") as error:
            open_dataset(dataset_copy)
        one_line(error)

    @pytest.mark.parametrize("damage", ["truncated", "empty", "header", "gone"])
    def test_shard_damaged_after_opening(self, dataset_copy, damage):
        path = dataset_copy / "latents-00001.safetensors"
        data = open_dataset(dataset_copy)
        whole = path.read_bytes()
        path.unlink()
        if damage != "gone":
            path.write_bytes({"truncated": whole[:-10], "empty": b"", "header": b"\xff" * len(whole)}[damage])
        data.moments([0])
        with pytest.raises(UserError, match=r"latents-00001\.safetensors can't be read") as error:
            data.moments([8_192])
        one_line(error)

    @pytest.mark.parametrize("kind", ["latents", "images", "compressed"])
    def test_shard_cut_short_while_it_is_read(self, tmp_path, kind):
        """It was mapped into memory, where pages beyond the end of the file end the process by SIGBUS."""
        rows = source(100)
        path = tmp_path / ("latents-00000.safetensors" if kind == "latents" else "images-00000.safetensors")
        if kind == "compressed":
            pictures = [encode_png(image.permute(1, 2, 0).numpy()) for image in rows["images"]]
            sizes = torch.tensor(list(map(len, pictures)))
            png = torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8)
            save_file({"index": rows["index"], "sizes": sizes, "png": png}, path)
            manifest = replace(DESCRIPTION, compressed=True, shards=(Shard(100, None, ShardFile.of(path)),))
            data = ShardDataset(tmp_path, manifest)
        else:
            write(tmp_path, rows)
            data = open_dataset(tmp_path)
        read = data.moments if kind == "latents" else data.images
        before = read(range(100))
        size = path.stat().st_size
        os.truncate(path, size // 2)
        with pytest.raises(
            UserError, match=f"{path.name} can't be read .it ends at byte {size // 2:,} of {size:,}"
        ) as error:
            read(range(100))
        one_line(error)
        assert torch.equal(read([0]), before[:1]), "what is left is still read"

    def test_more_shards_than_files_may_be_open(self, dataset_dir, dataset_rows, monkeypatch):
        monkeypatch.setattr(tensor_file, "MOST_OPEN", 2)
        data = open_dataset(dataset_dir)
        rows = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:500]
        assert torch.equal(data.moments(rows), dataset_rows["moments"][rows])
        assert torch.equal(data.images(rows), dataset_rows["images"][rows])
        if Path("/proc/self/fd").exists():
            opened = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
            assert sum(path.parent == dataset_dir for path in opened) == 2

    def test_shard_with_other_rows_or_types(self, dataset_copy):
        path = dataset_copy / "latents-00000.safetensors"
        manifest, size = dataset_copy / "dataset.json", path.stat().st_size
        save_file({name: tensor[:100] for name, tensor in load_file(path).items()}, path)
        manifest.write_text(manifest.read_text().replace(f'"size": {size}', f'"size": {path.stat().st_size}', 1))
        data = open_dataset(dataset_copy)
        with pytest.raises(UserError, match=r"latents-00000.*instead of int64 \(8192,\)") as error:
            data.moments([0])
        one_line(error)

    def test_images_of_other_samples(self, dataset_copy):
        changed(dataset_copy / "images-00001.safetensors", "index", lambda index: index.flip(0))
        data = open_dataset(dataset_copy)
        data.images([0])
        with pytest.raises(UserError, match=r"images-00001.*does not hold the samples of latents-00001") as error:
            data.images([9_000])
        one_line(error)

    def test_labels_that_the_manifest_does_not_count(self, dataset_copy):
        changed(
            dataset_copy / "latents-00002.safetensors",
            "labels",
            lambda labels: labels.index_fill(0, torch.tensor([len(labels) - 1]), 3),
        )
        with pytest.raises(UserError, match="labels in its shards contradict the counts") as error:
            open_dataset(dataset_copy).labels()
        one_line(error)

    def test_checksums_tell_all_damaged_files(self, dataset_copy):
        assert damaged(dataset_copy) == []
        for name, position in (("latents-00001.safetensors", -5), ("images-00002.safetensors", 5_000)):
            content = bytearray((dataset_copy / name).read_bytes())
            content[position] ^= 1
            (dataset_copy / name).write_bytes(content)
        (dataset_copy / "images-00000.safetensors").unlink()
        assert damaged(dataset_copy) == [
            "images-00000.safetensors",
            "latents-00001.safetensors",
            "images-00002.safetensors",
        ]

    def test_a_compressed_image_that_is_none(self, tmp_path):
        path = tmp_path / "images-00000.safetensors"
        png = torch.frombuffer(bytearray(b"no picture"), dtype=torch.uint8)
        save_file({"index": torch.tensor([7]), "sizes": torch.tensor([len(png)]), "png": png}, path)
        manifest = replace(DESCRIPTION, compressed=True, shards=(Shard(1, None, ShardFile.of(path)),))
        with pytest.raises(UserError, match=f"{path.name} holds an image that can't be read") as error:
            ShardDataset(tmp_path, manifest).images([0])
        one_line(error)
