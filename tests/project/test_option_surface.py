"""The options of every command, frozen: a change of a name, a type or a default must be made on purpose.

python -m tests.project.test_option_surface --write
"""

import dataclasses
import functools
import json
import operator
import runpy
import sys
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

from stablevm import cli
from stablevm.evaluation.config import EvaluateCheckpointConfig, EvaluateConfig, ExtractorConfig, ReferenceConfig
from stablevm.integrations.config import ImportConfig
from stablevm.preparation.config import (
    ConvertConfig,
    ConvertShardsConfig,
    EncodeConfig,
    EncodeShardsConfig,
    InfoConfig,
    PackConfig,
    VerifyConfig,
)
from stablevm.profiling.config import BenchmarkConfig
from stablevm.quickstart.config import QuickstartConfig
from stablevm.sampling.config import GenerateConfig
from stablevm.study.config import VarianceConfig
from stablevm.support.ranges import Range
from stablevm.toy.config import ToyConfig
from stablevm.training.config import TrainConfig

FROZEN = Path(__file__).parents[1] / "golden" / "options.json"
COMMANDS = {
    "train": TrainConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "import": ImportConfig,
    "evaluate --ckpt": EvaluateCheckpointConfig,
    "reference": ReferenceConfig,
    "extractor": ExtractorConfig,
    "quickstart": QuickstartConfig,
    "toy": ToyConfig,
    "convert": ConvertConfig,
    "encode": EncodeConfig,
    "prepare convert": ConvertShardsConfig,
    "prepare encode": EncodeShardsConfig,
    "prepare pack": PackConfig,
    "data verify": VerifyConfig,
    "data info": InfoConfig,
    "variance": VarianceConfig,
    "benchmark": BenchmarkConfig,
}


def plain(hint):
    """The type without the ranges beside it."""
    if any(isinstance(note, Range) for note in getattr(hint, "__metadata__", ())):
        return plain(get_args(hint)[0])
    if get_origin(hint) in (UnionType, Union):
        return functools.reduce(operator.or_, map(plain, get_args(hint)))
    if get_origin(hint) is tuple:
        return tuple[tuple(map(plain, get_args(hint)))]
    return hint


def surface():
    def default(field):
        return "required" if field.default is dataclasses.MISSING else repr(field.default)

    def kind(field):
        # What tyro holds about other names prints differently from version to version; a range is no part of a type.
        aliases = [
            name for each in getattr(field.type, "__metadata__", ()) for name in getattr(each, "aliases", None) or ()
        ]
        return f"{field.type.__origin__} or {', '.join(aliases)}" if aliases else plain(field.type)

    return {
        command: {field.name: f"{kind(field)} = {default(field)}" for field in dataclasses.fields(config)}
        for command, config in COMMANDS.items()
    }


def test_options_are_the_frozen_ones():
    # Paths have another repr on another system; types are compared as their text.
    assert json.loads(json.dumps(surface(), default=str)) == json.loads(FROZEN.read_text())


def test_no_command_is_forgotten():
    """Neither here nor in docs/options.md."""
    public = {name: value for name, value in vars(cli).items() if not name.startswith("_")}
    known = {value for value in public.values() if dataclasses.is_dataclass(value)}
    page = runpy.run_path(Path(__file__).parents[2] / "docs" / "options.py")
    assert known == set(COMMANDS.values()) == set(page["COMMANDS"].values())


def test_every_option_is_documented():
    page = runpy.run_path(Path(__file__).parents[2] / "docs" / "options.py")
    for config in COMMANDS.values():
        text = page["docstrings"](config)
        for field in dataclasses.fields(config):
            assert text.get(field.name), f"{config.__name__}.{field.name} has no docstring"


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    FROZEN.write_text(json.dumps(surface(), indent=1, default=str) + "\n")
