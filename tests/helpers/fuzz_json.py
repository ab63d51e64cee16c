"""Damage every JSON file that a command reads, and read it as the command does.

    python -m tests.helpers.fuzz_json --rounds 200

A damaged file is either read (the damage may be harmless) or refused by a UserError in one line; all else is a
traceback for a user and is counted. The files are those of a tiny data set, run, generation, preparation and toy.
"""

import argparse
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import numpy as np
import torch

from stablevm.data.manifest import ShardFile
from stablevm.data.opening import open_dataset
from stablevm.evaluation.small_extractor import DigitsExtractor, load_extractor, save_extractor
from stablevm.networks.small_net import SmallNet
from stablevm.networks.snapshot import load_card, load_model
from stablevm.preparation.joining import ShardRecord
from stablevm.preparation.outcome import Problem, Report, read_problems
from stablevm.preparation.shards import _Converted
from stablevm.preparation.work import begin_step
from stablevm.quickstart.config import QuickstartConfig
from stablevm.quickstart.run import CONFIG_FILE, Clock, _claim_folder
from stablevm.sampling.archive import read_provenance, write_archive
from stablevm.sampling.parts import PartFolder
from stablevm.support import rng
from stablevm.support.errors import UserError
from stablevm.support.files import write_json, write_with
from stablevm.toy import results
from stablevm.toy.config import ToyConfig
from stablevm.toy.network import make_network
from stablevm.training import checkpoint
from stablevm.training.checkpoint import Record, TrainingState
from stablevm.training.config import TrainConfig
from stablevm.training.tracker import Trackers, read_metrics
from tests.helpers import runs
from tests.helpers.checkpoints import save_checkpoint, tiny_card

STRANGE = [
    None, True, False, -1, 0, 1, 1.5, 1e300, 2**31, 2**63, 10**30, "", "x", "\x1b[31m", "a\nb", "\ud800", "../x",
    "/etc", [], {}, [[]], [None], {"a": 1}, [0, 0, 0], ["x"] * 3,
]  # fmt: skip
LITERALS = ["NaN", "-Infinity", "7" * 5000, "1e400", "[" * 2000 + "]" * 2000, '{"a":' * 200 + "0" + "}" * 200]


def places(value, path=()):
    """The paths to all values within one."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def changed(values, stream):
    """The JSON text with one value replaced, removed, or added."""
    values = json.loads(json.dumps(values))
    path = stream.choice(list(places(values)))
    marker = "the place of the literal"
    action = stream.choice(["replace", "replace", "literal", "remove", "add"])
    new = marker if action == "literal" else stream.choice(STRANGE)
    if not path:
        values = new if action != "remove" else None
    else:
        parent = values
        for key in path[:-1]:
            parent = parent[key]
        if action == "remove":
            del parent[path[-1]]
        elif action == "add" and isinstance(parent, dict):
            parent["velvet"] = new
        else:
            parent[path[-1]] = new
    return json.dumps(values).replace(f'"{marker}"', stream.choice(LITERALS)).encode()


def damaged(content, stream):
    """The bytes of a file, damaged in one way, as by a disk, an editor or a stranger."""
    position = stream.randrange(len(content))
    match stream.randrange(10):
        case 0:
            return content[:position]
        case 1:
            return content[:position] + bytes([stream.randrange(256)]) + content[position + 1 :]
        case 2:
            return content[:position] + content[position + stream.randrange(1, 40) :]
        case 3:
            return content[:position] + stream.randbytes(8) + content[position:]
        case 4:
            return stream.choice(
                [b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\0" * 100, b"\xff\xfe", b'"x"', b"7" * 5000]
            )
    lines = content.split(b"\n")
    try:
        return changed(json.loads(content), stream)
    except ValueError:  # lines of JSON, or none at all
        number = stream.randrange(len(lines))
        try:
            lines[number] = changed(json.loads(lines[number]), stream)
        except ValueError:
            lines[number] = lines[number][::-1]
        return b"\n".join(lines)


def tree(folder):
    """Make one of each file below `folder`; returns, by its name, the file and what reads it."""
    runs.write_data(folder / "data")
    run = folder / "exps" / "run"
    config = runs.config(folder)
    write_json(run / "config.json", config.to_dict())
    card = tiny_card()
    nothing = {"x": torch.zeros(2)}
    weights = {"model": nothing, "ema": nothing, "optimizer": nothing, "bank": {}}
    checkpoint.save(run, TrainingState(card=card, **weights, scaler={"scale": 1.0, "_growth_tracker": 3}))
    checkpoint.keep_if_best(run, Record("velocity_loss", 0.5, card.step))
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(5)))
    save_checkpoint(folder / "model", card)
    net = SmallNet(torch.Generator().manual_seed(0))
    save_extractor(folder / "extractor", DigitsExtractor(net, 0.9, 0, 3, "0" * 64))
    protocol = {"step": 3, "model": "SiT", "cfg_scale": 1.5, "classes": None}
    parts = PartFolder(folder / "parts", 16, protocol)
    parts.open()
    write_with(
        folder / "images.npz",
        lambda path: write_archive(path, [np.zeros((2, 8, 8, 3), np.uint8)], np.zeros(2, np.int64), protocol),
    )
    problems = [Problem(0, "a.png", "skipped", "cut short"), Problem(None, "b.png", "handled", "grey")]
    plan = {"step": "shards", "class names": ["a", "b"], "side": 8, "transform": "none", "compress": False}
    Report(plan, 1, 0, tuple(problems)).write(folder)
    begin_step(folder / "work", plan)
    write_json(folder / "part", [asdict(problem) for problem in problems])
    file = ShardFile("images-00000.safetensors", 10, "0" * 64)
    write_json(folder / "shard.json", asdict(ShardRecord(2, [0, 1], {"images": file}, problems)))
    toy = ToyConfig(output_dir=folder / "toy", eval_times=(0.5, 0.9))
    rows = [{"update": 0, "divergence": [1.0, 2.0]}, {"update": 5, "divergence": [0.5, float("nan")]}]
    results.save(toy, "cfm", 0, rows, make_network(toy, rng.generator(0)), {"train": 1.0})
    quick = QuickstartConfig(output_dir=folder / "quick")
    _claim_folder(quick)
    write_json(folder / "quick" / "seconds.json", {"seconds": 3.0})

    def metrics():
        with redirect_stderr(StringIO()):
            Trackers(run, [], {}, first_step=3).close()
        read_metrics(run / "metrics.jsonl")

    def data():
        dataset = open_dataset(folder / "data")
        dataset.labels(), dataset.moments([0]), dataset.images([0])

    best, newest = run / "checkpoints" / "best", run / "checkpoints" / "0000120"
    model = folder / "model"
    return {
        "model.json": (model / "model.json", lambda: load_model(model, load_card(model))),
        "config.json": (run / "config.json", lambda: TrainConfig.read(run).check_continues(config)),
        "dataset.json": (folder / "data" / "dataset.json", data),
        "best.json": (best / "best.json", lambda: checkpoint.is_best(run, Record("velocity_loss", 0.1, 1))),
        "training.json": (newest / "training.json", lambda: checkpoint.load(run, 120)),
        "SHA256SUMS": (newest / "SHA256SUMS", lambda: checkpoint.damage(newest)),
        "metrics.jsonl": (run / "metrics.jsonl", metrics),
        "extractor.json": (folder / "extractor" / "extractor.json", lambda: load_extractor(folder / "extractor")),
        "protocol.json": (folder / "parts" / "protocol.json", parts.open),
        "archive": (folder / "images.npz", lambda: read_provenance(folder / "images.npz")),
        "report.json": (folder / "report.json", lambda: _Converted.of(Report.read(folder).plan, folder)),
        "plan.json": (folder / "work" / "plan.json", lambda: begin_step(folder / "work", plan)),
        "part": (folder / "part", lambda: read_problems(folder / "part")),
        "shard.json": (folder / "shard.json", lambda: ShardRecord.read(folder / "shard.json")),
        "toy result": (results.result_path(toy, "cfm", 0), lambda: results.table(results.find_all(toy))),
        "quickstart.json": (folder / "quick" / CONFIG_FILE, lambda: _claim_folder(quick)),
        "seconds.json": (folder / "quick" / "seconds.json", lambda: Clock(folder / "quick").__enter__()),
    }  # fmt: skip


def fuzz(folder, seed, rounds):
    """By file: how many damaged copies were read, refused, and ended in a traceback; and one traceback of each kind."""
    counts, seen = {}, {}
    for name, (path, read) in tree(folder).items():
        stream, content = random.Random(f"{seed} {name}"), path.read_bytes()
        read()
        count = counts[name] = Counter()
        for _ in range(rounds):
            path.write_bytes(damaged(content, stream))
            try:
                with redirect_stdout(StringIO()):
                    read()
                count["read"] += 1
            except UserError as error:
                count["refused" if "\n" not in str(error) else "several lines"] += 1
            except Exception as error:
                count["traceback"] += 1
                seen.setdefault((name, type(error).__name__), traceback.format_exc())
            path.write_bytes(content)
    return counts, seen


def main(options):
    with tempfile.TemporaryDirectory() as scratch:
        counts, seen = fuzz(Path(scratch), options.seed, options.rounds)
    for text in seen.values():
        print(text)
    for name, count in counts.items():
        print(f"{name:16} {dict(count)}")
    return 1 if any(count["traceback"] or count["several lines"] for count in counts.values()) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=200)
    sys.exit(main(parser.parse_args()))
