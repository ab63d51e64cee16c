"""The options of every command, frozen: a change of a name, a type or a default must be made on purpose.

python -m tests.project.test_option_surface --write
"""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

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


def surface():
    def default(field):
        return "required" if field.default is dataclasses.MISSING else repr(field.default)

    def kind(field):
        # What tyro holds about other names prints differently from version to version.
        aliases = [
            name for each in getattr(field.type, "__metadata__", ()) for name in getattr(each, "aliases", None) or ()
        ]
        return f"{field.type.__origin__} or {', '.join(aliases)}" if aliases else field.type

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
    for config in COMMANDS.values():
        source = Path(sys.modules[config.__module__].__file__).read_text()
        for field in dataclasses.fields(config):
            declaration = source.split(f"\n    {field.name}: ", 1)[1].split("\n", 2)
            assert declaration[1].strip().startswith('"""'), f"{config.__name__}.{field.name} has no docstring"


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    FROZEN.write_text(json.dumps(surface(), indent=1, default=str) + "\n")
