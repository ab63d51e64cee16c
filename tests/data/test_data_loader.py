"""The stateless sampler and the loader on top of it."""

import multiprocessing
import os
import random
import signal
from dataclasses import replace
from itertools import chain, count
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch

from stablevm.data import loader as loader_module
from stablevm.data.loader import StepSampler, training_loader
from stablevm.data.mirrored import MirroredDataset
from stablevm.data.opening import open_dataset
from stablevm.data.workers import Calls
from stablevm.support.errors import UserError
from tests.helpers.data_sets import COUNT, one_line


def global_batches(world, *, num_samples=10, global_batch=4, seed=0, start_step=0, num_steps=10):
    ranks = [StepSampler(num_samples, global_batch, rank, world, seed, start_step, num_steps) for rank in range(world)]
    return [list(chain(*parts)) for parts in zip(*ranks, strict=True)]


class TestSampler:
    @pytest.mark.parametrize("global_batch", [4, 20, 28])  # straddles epochs, two epochs, more than two
    def test_each_epoch_holds_every_sample_once(self, global_batch):
        stream = np.concatenate(global_batches(1, global_batch=global_batch, num_steps=10))
        assert len(stream) == 10 * global_batch
        epochs = stream[: len(stream) // 10 * 10].reshape(-1, 10)
        assert (np.sort(epochs, axis=1) == np.arange(10)).all()
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)

    @pytest.mark.parametrize("global_batch", [4, 28])
    def test_any_number_of_processes_sees_the_same_global_batches(self, global_batch):
        one = global_batches(1, global_batch=global_batch)
        assert global_batches(2, global_batch=global_batch) == global_batches(4, global_batch=global_batch) == one

    def test_resuming_is_starting_at_another_step(self):
        whole = global_batches(2, num_steps=20)
        assert global_batches(2, start_step=13, num_steps=7) == whole[13:]

    def test_the_seed_decides_the_order(self):
        assert global_batches(1, seed=0) == global_batches(1, seed=0) != global_batches(1, seed=1)

    @pytest.mark.parametrize("global_batch", [6, 0])
    def test_a_batch_that_the_processes_can_not_share(self, global_batch):
        with pytest.raises(
            UserError, match=f"global_batch {global_batch}: expected a positive multiple of the number of processes, 4"
        ) as error:
            StepSampler(10, global_batch, 0, 4, 0, 0, 1)
        one_line(error)


def read(data, **options):
    return list(training_loader(data, **{"global_batch": 8, "seed": 3, "num_steps": 4, **options}))


def same(left, right):
    pairs = [
        (getattr(a, name), getattr(b, name))
        for a, b in zip(left, right, strict=True)
        for name in ("moments", "labels", "rows", "images")
    ]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


class TestLoader:
    def test_batches_hold_the_rows_they_name(self, dataset_dir, dataset_rows):
        data = open_dataset(dataset_dir)
        batches = read(data, with_images=True)
        assert [batch.rows.tolist() for batch in batches] == list(StepSampler(COUNT, 8, 0, 1, 3, 0, 4))
        for batch in batches:
            for name in ("moments", "labels", "images"):
                assert torch.equal(getattr(batch, name), dataset_rows[name][batch.rows])
        loader = training_loader(data, global_batch=8, seed=3, num_steps=4)
        assert len(loader) == 4

    def test_workers_change_nothing(self, dataset_dir):
        data = open_dataset(dataset_dir)
        options = {"with_images": True, "start_step": 5}
        assert same(read(data, **options), read(data, workers=2, **options))

    def test_two_processes_read_the_halves_of_one(self, dataset_dir):
        data = open_dataset(dataset_dir)
        whole = read(data, with_images=True)
        for rank in range(2):
            half = slice(4 * rank, 4 * rank + 4)
            for batch, part in zip(whole, read(data, with_images=True, rank=rank, world=2), strict=True):
                for name in ("moments", "labels", "rows", "images"):
                    assert torch.equal(getattr(batch, name)[half], getattr(part, name))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_mirrored_samples_are_rows_of_their_own(self, dataset_dir, dataset_rows, workers):
        """Row N + i is row i mirrored: its latent, its image, its label; each epoch holds all 2N."""
        data = MirroredDataset(open_dataset(dataset_dir))
        assert len(data) == 2 * COUNT and data.num_classes == 3
        batches = read(data, with_images=True, global_batch=COUNT // 4, num_steps=8, workers=workers)
        seen = torch.cat([batch.rows for batch in batches])
        assert torch.equal(seen.sort().values, torch.arange(2 * COUNT))
        for batch in batches[:2]:
            own, mirrored = batch.rows % COUNT, batch.rows >= COUNT
            assert 0 < mirrored.sum() < len(mirrored)
            for found, plain, flipped in (
                (batch.moments, dataset_rows["moments"], dataset_rows["moments_flip"]),
                (batch.images, dataset_rows["images"], dataset_rows["images"].flip(-1)),
            ):
                assert torch.equal(found[~mirrored], plain[own[~mirrored]])
                assert torch.equal(found[mirrored], flipped[own[mirrored]])
            assert torch.equal(batch.labels, dataset_rows["labels"][own])
        assert torch.equal(data.moments_flip([COUNT + 5]), data.moments([5]))
        assert data.describe(COUNT + 5).startswith(f"row {COUNT + 5}, the mirror image of row 5 (image 38 of")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_images_of_other_rows(self, dataset_dir, dataset_rows, workers):
        """They are requested step by step, as a plan may be endless."""
        data = open_dataset(dataset_dir)
        wanted = ([step, 19_999, 7 * step] for step in count(1))
        batches = read(data, with_images=True, image_rows=wanted, workers=workers)
        assert len(batches) == 4
        for step, batch in enumerate(batches, start=1):
            assert batch.image_rows.tolist() == [step, 19_999, 7 * step]
            assert torch.equal(batch.images, dataset_rows["images"][batch.image_rows])
        assert same(read(data), [replace(batch, images=None) for batch in batches])

    def test_files_of_images_are_not_needed_without_alignment(self, dataset_copy):
        for path in dataset_copy.glob("images-*"):
            path.unlink()
        data = open_dataset(dataset_copy)
        assert all(batch.images is None for batch in read(data))
        with pytest.raises(UserError, match=r"images-00000\.safetensors is missing"):
            training_loader(data, global_batch=8, seed=0, num_steps=1, with_images=True)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_global_random_states_stay_as_they_were(self, dataset_dir, workers):
        data = open_dataset(dataset_dir)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        read(data, with_images=True, workers=workers)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
        assert before[2] == random.getstate()

    def test_ctrl_c_does_not_end_workers(self, dataset_dir):
        loader = training_loader(open_dataset(dataset_dir), global_batch=8, seed=3, num_steps=20, workers=2)
        batches = iter(loader)
        next(batches), next(batches)  # one of each worker: both have started
        started = multiprocessing.active_children()
        assert len(started) == 2
        for worker in started:
            os.kill(worker.pid, signal.SIGINT)
        assert len(list(batches)) == 18

    @pytest.mark.parametrize(
        ("number", "text"),
        [
            (signal.SIGKILL, "was killed, usually because memory ran out; run the same command again; .*num_workers 0"),
            (
                signal.SIGBUS,
                "was killed by SIGBUS, usually because shared memory is full; give num_workers 0.*--shm-size",
            ),
            (signal.SIGTERM, "exited with status 0; run the same command again"),  # torch takes it for an order
        ],
    )
    def test_a_worker_that_dies_is_one_line_where_its_result_is_waited_for(self, dataset_dir, number, text):
        others = set(multiprocessing.active_children())
        loader = training_loader(open_dataset(dataset_dir), global_batch=8, seed=3, num_steps=20, workers=2)
        batches = iter(loader)
        next(batches), next(batches)
        worker = (set(multiprocessing.active_children()) - others).pop()
        os.kill(worker.pid, number)
        worker.join()  # whatever else the program does meanwhile is left alone
        with pytest.raises(UserError, match=f"^a process that reads data .pid {worker.pid}. {text}") as error:
            list(batches)
        one_line(error)

    def test_a_worker_that_dies_in_the_midst_of_a_result(self):
        """Also while the parent waits for it, and after half a message, for whose end the parent would wait forever."""
        for how in ("at once", "half a message"):
            with pytest.raises(UserError, match="was killed"):
                list(Calls(_Dies(how), [1, 2, 3], 1))

    def test_results_that_do_not_fit_into_shared_memory(self, monkeypatch, dataset_dir):
        def full(tensor):
            raise RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device (28)")

        monkeypatch.setattr(torch.Tensor, "share_memory_", full)
        loader = training_loader(open_dataset(dataset_dir), global_batch=8, seed=3, num_steps=20, workers=2)
        with pytest.raises(UserError, match=r"shared memory failed .*give num_workers 0.*--shm-size") as error:
            list(loader)
        one_line(error)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_damaged_shard_is_one_line_in_the_main_process(self, dataset_copy, workers):
        data = open_dataset(dataset_copy)
        loader = training_loader(data, global_batch=COUNT, seed=0, num_steps=1, with_images=True, workers=workers)
        (dataset_copy / "images-00001.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match=r"^folder.*images-00001") as error:
            list(loader)
        one_line(error)

    def test_pin_memory_pins_every_tensor(self, monkeypatch, dataset_dir):
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
        batch = loader_module.TrainingBatch(*(torch.zeros(2) for _ in range(3)), images=None)
        pinned = batch.pin_memory()
        assert pinned.images is None and pinned.image_rows is None
        assert all(getattr(pinned, name).eq(1).all() for name in ("moments", "labels", "rows"))
        pinned = loader_module.TrainingBatch(*(torch.zeros(2) for _ in range(5))).pin_memory()
        assert pinned.images.eq(1).all() and pinned.image_rows.eq(1).all()


class _Dies:
    """Work during which its process is killed, or while half of the result has been sent."""

    def __init__(self, how):
        self.how = how

    def __call__(self, request):
        if self.how == "half a message":
            Connection._send = _send_half
        else:
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes(10_000_000)


def _send_half(connection, message):
    if len(message) < 1000:  # its length goes first
        os.write(connection.fileno(), message)
    else:
        os.write(connection.fileno(), message[: len(message) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
