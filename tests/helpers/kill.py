"""Kill a command at its k-th file operation, run it again, and compare its files with those of an undisturbed run.

    python -m tests.helpers.kill --command train --every 7            every seventh operation
    python -m tests.helpers.kill --command all --every 5 --twice      also kill the second run, somewhere
    python -m tests.helpers.kill --command generate --processes 2     two processes, as torchrun starts them
    python -m tests.helpers.kill --command convert --workers 2        with processes that read and crop

A file operation is one that Python reports to audit hooks: opening for writing, renaming, linking, removing, making a
folder; below the folder that the command writes to. The kill is a SIGKILL right before it, of all processes of the
command at once, wherever the others are. Commands run in forked processes, so that nothing is imported twice. Seconds
and memory, which no two runs share, are left out of the comparison; everything else has to be equal byte by byte, and
nothing may be left over.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads would not survive the fork

import torch

from stablevm import cli
from tests.helpers.checkpoints import save_checkpoint, tiny_card
from tests.helpers.runs import as_arguments, config, write_data, write_encoder

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EVENTS = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
TIMES = ("seconds", "memory", "images_per_second", "minutes of work")  # begin names of what no two runs share
SKIPPED = ("tensorboard", "logs", "report.html")  # what trackers of others write, and what repeats the seconds


@dataclass(frozen=True)
class Case:
    """A command to kill: `prepare(root)` once, then `run()` in `root`, which writes into the folder `output`."""

    prepare: object
    run: object
    output: str = "out"
    before: str | None = None  # a folder that `output` is a copy of in the beginning


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--command", default="all", help=f"one of {', '.join(CASES)}, or all")
    parser.add_argument("--every", type=int, default=1, help="kill at each so many-th operation")
    parser.add_argument("--first", type=int, default=1, help="the first operation to kill at")
    parser.add_argument("--limit", type=int, default=10**6, help="at most so many kills of a command")
    parser.add_argument("--processes", type=int, default=1, help="so many processes, of which each is counted in turn")
    parser.add_argument("--workers", type=int, default=0, help="so many readers in each, for commands that prepare")
    parser.add_argument("--twice", action="store_true", help="kill the second run too, at a random operation")
    options = parser.parse_args()
    COMMON[:] = [f"--num-workers={options.workers}"]
    failures = 0
    for name in CASES if options.command == "all" else [options.command]:
        with tempfile.TemporaryDirectory() as scratch:
            found = harass(
                CASES[name],
                Path(scratch),
                options.every,
                options.first,
                options.limit,
                options.twice,
                options.processes,
            )
        failures += len(found.differences)
        print(
            f"{name}: {found.operations} operations, {found.kills} kills, {len(found.differences)} differ", flush=True
        )
        for line in found.differences:
            print(f"  {line}", flush=True)
    return min(failures, 1)


@dataclass
class Outcome:
    operations: int
    kills: int
    differences: list


def harass(case, root, every=1, first=1, limit=10**6, twice=False, processes=1):
    """Kill a command repeatedly; returns the number of kills, and how the results differ."""
    os.chdir(root)
    case.prepare(root)
    stream, output = random.Random(0), root / case.output
    _renew(case, root)
    statuses, counts = _run(case, output, processes)
    assert not any(statuses), _said(root, statuses)
    expected = output.rename(root / "expected")
    points = [(rank, number) for rank in range(processes) for number in range(first, counts[rank] + 1, every)]
    outcome = Outcome(sum(counts), 0, [])
    for rank, number in points[:limit]:
        _renew(case, root)
        kills = [(rank, number)]
        if twice:
            kills.append((rank, stream.randint(1, max(1, counts[rank] - number))))
        for kill in kills:
            statuses, _ = _run(case, output, processes, kill)
            outcome.kills += -signal.SIGKILL in statuses
        statuses, _ = _run(case, output, processes)
        faults = [f"exit status {_said(root, statuses)}"] if any(statuses) else []
        faults += differences(expected, output)
        outcome.differences += [f"kill at {kills}: {fault}" for fault in faults]
    return outcome


def _said(root, statuses):
    texts = [(root / f"said-{rank}").read_text()[-600:] for rank in range(len(statuses))]
    return " | ".join(f"{status}: {text}" for status, text in zip(statuses, texts, strict=True))


def _renew(case, root):
    shutil.rmtree(root / case.output, ignore_errors=True)
    shutil.rmtree(root / "cache", ignore_errors=True)
    if case.before:
        shutil.copytree(root / case.before, root / case.output)


def _run(case, output, processes, kill=(0, 0)):
    """The exit statuses of the command's processes, and the number of file operations of each.

    kill: (rank, number) of the file operation before which all of them end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children, pipes = [], []
    for rank in range(processes):
        reading, writing = os.pipe()
        child = os.fork()
        os.setpgid(child, children[0] if children else child)
        if child == 0:
            os.close(reading)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _child(case, Counter(output, kill[1] if rank == kill[0] else 0), Path(f"said-{rank}"), writing)
        os.close(writing)
        children.append(child)
        pipes.append(reading)
    counts = []
    for pipe in pipes:
        with os.fdopen(pipe, "rb") as file:
            content = file.read()
        counts.append(struct.unpack("i", content)[0] if content else 0)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], counts


def _child(case, counter, said, writing):
    """Run the command in this process, write the number of its file operations, and end."""
    status = 1
    try:
        with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            sys.addaudithook(counter)
            status = case.run() or 0
            counter.kill_at = 0
            os.write(writing, struct.pack("i", counter.count))
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        with said.open("a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(status)


class Counter:
    """An audit hook that counts file operations below `folder`, and kills the whole group right before one of them."""

    def __init__(self, folder, kill_at):
        self.folder, self.kill_at, self.count = folder, kill_at, 0
        self.process = os.getpid()

    def __call__(self, event, arguments):
        if os.getpid() != self.process or not self._is_operation(event, arguments):
            return
        self.count += 1
        if self.count == self.kill_at:
            os.killpg(0, signal.SIGKILL)

    def _is_operation(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            return bool((flags or 0) & WRITING) and self._inside(path)
        if event not in EVENTS:
            return False
        paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
        directory = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
        if isinstance(directory, int) and directory >= 0:  # shutil.rmtree names files relative to a folder
            return self._inside(Path(f"/proc/self/fd/{directory}").readlink())
        return any(map(self._inside, paths))

    def _inside(self, path):
        try:
            return (Path.cwd() / os.fsdecode(path)).is_relative_to(self.folder)
        except TypeError:  # a descriptor
            return False


def differences(expected, found):
    """How two results differ, one line each."""
    one, two = contents(expected), contents(found)
    lines = [f"{name} is missing" for name in sorted(one.keys() - two.keys())]
    lines += [f"{name} is left over" for name in sorted(two.keys() - one.keys())]
    return lines + [f"{name} differs" for name in sorted(one.keys() & two.keys()) if one[name] != two[name]]


def contents(folder):
    return {
        str(path.relative_to(folder)): comparable(path)
        for path in folder.rglob("*")
        if not path.is_dir() and not any(part.startswith(SKIPPED) for part in path.relative_to(folder).parts)
    }


def comparable(path):
    """The content of a file without the seconds in it."""
    if path.name == "seconds.json":
        return None
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "SHA256SUMS":
        return [line for line in path.read_text().splitlines() if not line.endswith("training.json")]
    return path.read_bytes()


def without_times(values):
    if isinstance(values, dict):
        return {name: without_times(value) for name, value in values.items() if not name.startswith(TIMES)}
    return [without_times(value) for value in values] if isinstance(values, list) else values


def _prepare_training(root):
    write_data(root / "data")
    write_encoder(root / "encoder.safetensors")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    from stablevm.evaluation.config import ReferenceConfig
    from stablevm.evaluation.reference import reference

    with redirect_stdout(None):
        reference(ReferenceConfig(source=root / "data", output=root / "ref.npz", statistics=False))


def _train(**options):
    root = Path.cwd()
    settings = {"max_train_steps": 9, "checkpointing_steps": 3, "log_steps": 2, "checkpoints_kept": 2} | options
    name = settings.pop("exp_name", "out")
    return cli.train(as_arguments(config(root, name, **(settings | {"output_dir": root}))))


def _train_evaluated():
    extractor = {"eval_enc_type": "digits", "eval_weights": str(Path.cwd() / "encoder.safetensors")}
    return _train(eval_every=3, eval_samples=20, eval_reference=str(Path.cwd() / "ref.npz"), **extractor)


def _prepare_run(root):
    _prepare_training(root)
    with redirect_stdout(None), redirect_stderr(None):
        _train(exp_name="run", max_train_steps=4, average_every=2)


def _sweep():
    extractor = ["--no-inception", "--enc-type=digits", "--encoder-weights=encoder.safetensors"]
    few = ["--num-fid-samples=10", "--mode=ode", "--num-steps=2", "--cfg-scale=1,2", "--average=ema,0.1"]
    return cli.main(["sweep", "--ckpt=run", "--reference=ref.npz", "--output-dir=out", *extractor, *few])


def _prepare_checkpoint(root):
    save_checkpoint(root / "checkpoint", tiny_card())


def _prepare_export(root):
    from stablevm.integrations import exporting as exporting  # diffusers with it, once for all runs

    _prepare_checkpoint(root)


def _generate():
    return cli.generate(["--ckpt=checkpoint", "--num-fid-samples=50", "--num-steps=2", "--sample-dir=out",
                         "--trajectory"])  # fmt: skip


def _prepare_images(root):
    from tests.helpers.sources import write_source
    from tests.helpers.tiny_vae import save_tiny_vae

    write_source(root / "source", images=12, classes=3, shortest=40, longest=60)
    save_tiny_vae(root / "vae")
    crop = ["--source=source", "--resolution=32x32", "--num-workers=0"]
    with redirect_stdout(None), redirect_stderr(None):
        cli.dataset_tools(["convert", *crop, "--dest=repa/images"])
        cli.dataset_tools(["encode", "--source=repa/images", "--dest=repa/vae-sd", "--vae=vae", "--num-workers=0"])
        cli.prepare(["convert", *crop, "--dest=converted"])


COMMON = ["--num-workers=0"]  # options of all commands that prepare
CROP = ["--source=source", "--resolution=32x32", "--batch-size=2", "--dest=out"]
ENCODE = ["--vae=vae", "--batch-size=2"]


def _prepare_digits(root):
    from stablevm.quickstart import recipe

    recipe.NUM_SAMPLES, recipe.EXTRACTOR_STEPS = 20, 5
    with redirect_stdout(None), redirect_stderr(None):
        cli.prepare(["digits", str(root / "digits")])
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")


def _prepare_evaluation(root):
    import numpy as np

    from tests.helpers import inception

    for number, name in enumerate(("samples", "real"), start=1):
        np.savez(root / f"{name}.npz", arr_0=inception.smooth_images(12, 12, number).numpy())
    torch.save(inception.random_weights(), root / "weights.pth")
    write_data(root / "data")


def _prepare_published(root):
    from tests.helpers import published

    model = published.built(published.PublishedSiT, learn_sigma=True)
    torch.save({"ema": model.state_dict()}, root / "published.pt")


def _prepare_toy(root):
    from stablevm.toy import films

    films.FRAME_TIMES = films.FRAME_TIMES[:2]  # each takes a second
    films.PATH_STEPS, films.SHOWN_STEPS = 4, 2


TOY = ["--updates=4", "--eval-every=2", "--batch-size=8", "--references=16", "--components=3", "--dimension=3",
       "--eval-samples=20", "--variance-samples=10", "--variance-dimensions", "2", "5", "--output-dir=out",
       "-e", "cfm"]  # fmt: skip
INCEPTION = ["--inception-weights=weights.pth", "--cache-dir=cache"]

CASES = {
    "train": Case(_prepare_training, lambda: _train(keep_best="loss", sampling_steps=3, loss_type="stablevm")),
    "train-evaluated": Case(_prepare_training, _train_evaluated),
    "train-averaged": Case(_prepare_training, lambda: _train(average_every=2)),
    "average": Case(_prepare_run, lambda: cli.main(["average", "run", "--width=0.15", "--output=out"])),
    "sweep": Case(_prepare_run, _sweep),
    "generate": Case(_prepare_checkpoint, _generate),
    "convert": Case(_prepare_images, lambda: cli.dataset_tools(["convert", *CROP, *COMMON])),
    "encode": Case(
        _prepare_images, lambda: cli.dataset_tools(["encode", "--source=repa/images", "--dest=out", *ENCODE, *COMMON])
    ),
    "convert-shards": Case(_prepare_images, lambda: cli.prepare(["convert", *CROP, *COMMON])),
    "encode-shards": Case(
        _prepare_images, lambda: cli.prepare(["encode", "--data-dir=out", *ENCODE, *COMMON]), "out", "converted"
    ),
    "pack": Case(_prepare_images, lambda: cli.prepare(["pack", "--source=repa", "--dest=out", *COMMON])),
    "digits": Case(lambda root: None, lambda: cli.prepare(["digits", "out"])),
    "extractor": Case(_prepare_digits, lambda: cli.extractor(["--data-dir=digits", "--output-dir=out", "--steps=5"])),
    "quickstart": Case(_prepare_digits, lambda: cli.quickstart(["--output-dir=out", "--steps=4"])),
    "toy": Case(_prepare_toy, lambda: cli.toy([*TOY, "--enable-visualization"])),
    "evaluate": Case(
        _prepare_evaluation,
        lambda: cli.evaluate(["samples.npz", "--reference=real.npz", "--output=out/r.json", "--report", *INCEPTION]),
    ),
    "reference": Case(_prepare_evaluation, lambda: cli.reference(["data", "--output=out/ref.npz", *INCEPTION])),
    "variance": Case(
        _prepare_evaluation,
        lambda: cli.main(
            ["variance", "--data-dir=data", "--output-dir=out", "--rows=20", "--references=5", "--times=4"]
        ),
    ),
    "import": Case(
        _prepare_published,
        lambda: cli.import_checkpoint(
            ["published.pt", "--output=out", "--source=sit", "--path-type=linear", "--prediction=v"]
        ),
    ),
    "export": Case(_prepare_export, lambda: cli.main(["export", "checkpoint", "out"])),
}

if __name__ == "__main__":
    sys.exit(main())
