"""Prompts of GenEval and T2V-CompBench, and the files in which these benchmarks look for what was made from them.

GenEval (Ghosh et al., 2023): a JSONL file with a prompt on each line becomes `00000/samples/0000.png` and so on, with
the line beside them in `00000/metadata.jsonl`. T2V-CompBench (Sun et al., 2024): a file of prompts for each category,
`1_consistent_attr.txt` and so on, becomes `consistent_attr/0001.mp4` and so on.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablevm.support.errors import UserError
from stablevm.support.files import read_json, write_json, write_text
from stablevm.support.launcher import Place

SEED_STEP = 1000  # between the images of a prompt, as in the published script for GenEval
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Sample:
    """An image or a video to generate: its prompt, its seed, and its file within an output folder."""

    prompt: str
    seed: int
    file: Path


def read_geneval(path: Path) -> list[dict[str, Any]]:
    """The prompts of a JSONL file, objects with the key "prompt"; of any other file, each line is a prompt.

    An empty line counts, so that numbers stay those of the file, and has no samples. UserError, which names the
    line, for what is not such an object.
    """
    lines = _read(path).splitlines()
    if path.suffix != ".jsonl":
        return [{"prompt": line.strip()} for line in lines]
    return [_geneval_record(path, number, line) for number, line in enumerate(lines, 1)]


def _geneval_record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line) if line.strip() else {"prompt": ""}
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{path}, line {number}: expected a JSON object with a "prompt", as GenEval has them')
    return record


def geneval_samples(records: Sequence[dict[str, Any]], images: int, seed: int) -> list[Sample]:
    """`images` samples for each prompt, of the same seeds for each: `seed`, `seed` + 1000 and so on."""
    return [
        Sample(record["prompt"], seed + SEED_STEP * image, Path(f"{number:05d}") / "samples" / f"{image:04d}.png")
        for number, record in enumerate(records)
        if record["prompt"]
        for image in range(images)
    ]


def write_geneval_metadata(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the description of each prompt where GenEval's evaluation reads it; existing ones stay."""
    for number, record in enumerate(records):
        path = folder / f"{number:05d}" / "metadata.jsonl"
        if record["prompt"] and not path.exists():
            write_text(path, json.dumps(record) + "\n")


def read_compbench(path: Path) -> dict[str, list[str]]:
    """The prompts of each category, from one file or from all `*.txt` of a folder; empty lines are left out.

    A category is called like its file, without a leading number: `consistent_attr` for `1_consistent_attr.txt`.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    prompts = {
        re.sub(r"^\d+_", "", file.stem): [*filter(None, map(str.strip, _read(file).splitlines()))] for file in files
    }
    if not any(prompts.values()):
        raise UserError(f"{path}: no prompts; expected a file with one on each line, or a folder of such .txt files")
    return prompts


def compbench_samples(prompts: dict[str, list[str]], seed: int) -> list[Sample]:
    """One sample for each prompt, all of the same seed, as in the published script."""
    return [
        Sample(text, seed, Path(category) / f"{number:04d}.mp4")
        for category, texts in prompts.items()
        for number, text in enumerate(texts, 1)
    ]


def missing(samples: Iterable[Sample], folder: Path, place: Place) -> list[Sample]:
    """This process's share of the samples, every `world_size`th, without those whose file is there already."""
    mine = list(samples)[place.rank :: place.world_size]
    return [sample for sample in mine if not (folder / sample.file).exists()]


def record_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Record in the folder what its samples are made with; UserError if it holds samples made with something else."""
    path = folder / _SETTINGS
    if not path.exists():
        write_json(path, settings)
        return
    before = read_json(path, f"the settings of {folder}")
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{folder}: holds samples with {name} {before.get(name)}, not {settings.get(name)}; "
                "name another folder, or remove this one"
            )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise UserError(f"{path}: can't be read: {cause}") from None
