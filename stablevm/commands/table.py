"""The list of commands, with their names, options and functions, which help, documents and tests follow."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from stablevm.commands import work
from stablevm.commands.config import CompletionConfig, RecipesConfig
from stablevm.evaluation.config import EvaluateCheckpointConfig, EvaluateConfig, ExtractorConfig, ReferenceConfig
from stablevm.integrations.config import ImportConfig
from stablevm.preparation.config import (
    ConvertConfig,
    ConvertShardsConfig,
    DigitsConfig,
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
from stablevm.support.errors import UserError
from stablevm.support.options import Group, groups_of, is_positional
from stablevm.toy.config import ToyConfig
from stablevm.training.config import TrainConfig

Config = TypeVar("Config")


@dataclass(frozen=True)
class Use(Generic[Config]):
    """A use of a command, with options of one kind and the function that is called with them."""

    options: type[Config]
    work: Callable[[Config], object]
    given: str = ""  # the option that requests this use, if a command has several
    # From the options that were given to those of the run that is resumed, which stand in for the others.
    resumed: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None

    @cached_property
    def fields(self) -> dict[str, "Field[Any]"]:
        """The options by name, including those of dataclasses inside the options."""
        return {field.name: field for group in groups_of(self.options) for field in group.fields}

    @property
    def required(self) -> list[str]:
        """The options without a default."""
        return [name for name, field in self.fields.items() if field.default is MISSING]


@dataclass(frozen=True)
class Command:
    """A command of `stablevm`, or of a script of the published code."""

    name: str  # as it is typed: "prepare encode"
    purpose: str
    uses: tuple[Use[Any], ...]
    script: str = ""  # the script that calls it too
    returns_status: bool = False  # whether the result of the work is the exit status
    resumes: bool = True  # whether it resumes when it is run again

    @property
    def description(self) -> str:
        return " ".join((self.uses[0].options.__doc__ or "").split())

    @cached_property
    def groups(self) -> list[Group]:
        """The options of all uses in groups, each option once."""
        found: list[Group] = []
        seen: set[str] = set()
        for group in (group for use in self.uses for group in groups_of(use.options)):
            new = tuple(field for field in group.fields if field.name not in seen)
            seen.update(field.name for field in new)
            if new:
                found.append(Group(group.title, group.purpose, group.kind, new))
        return found

    @cached_property
    def fields(self) -> dict[str, "Field[Any]"]:
        """The options of all uses by name."""
        return {field.name: field for group in self.groups for field in group.fields}

    def use_of(self, values: Mapping[str, Any]) -> Use[Any]:
        """The use whose option is given, else the first; UserError if two are given."""
        asked = [use for use in self.uses if use.given in values]
        if len(asked) > 1:
            raise UserError(f"give {' or '.join(self.spelt(use.given) for use in asked)}, not both")
        return asked[0] if asked else self.uses[0]

    def spelt(self, name: str) -> str:
        """An option as it is typed, such as --data-dir, or FOLDER for one without a name."""
        return name.upper() if is_positional(self.fields[name]) else f"--{name.replace('_', '-')}"


def _command(name: str, options: type[Config], do: Callable[[Config], object], purpose: str, **facts: Any) -> Command:
    return Command(name, purpose, (Use(options, do),), **facts)


def _preparing(name: str, options: type[Config], do: Callable[[Config], int], purpose: str) -> Command:
    return Command(name, purpose, (Use(options, do),), returns_status=True)


TRAIN = Command(
    "train", "train a network", (Use(TrainConfig, work.train, resumed=TrainConfig.resumed),), script="train.py"
)
EVALUATE = Command(
    "evaluate",
    "evaluate a file of generated images, or a checkpoint",
    (
        Use(EvaluateConfig, work.evaluate, given="samples"),
        Use(EvaluateCheckpointConfig, work.evaluate_checkpoint, given="ckpt"),
    ),
    script="evaluate.py",
)
COMMANDS = (
    _command(
        "quickstart", QuickstartConfig, work.quickstart,
        "prepare, train, sample and evaluate handwritten digits, into one folder with a report",
    ),
    _preparing(
        "prepare convert", ConvertShardsConfig, work.convert, "crop images to one size, into shards",
    ),
    _preparing(
        "prepare encode", EncodeShardsConfig, work.encode, "encode the images in shards, which completes the data set"
    ),
    _preparing("prepare pack", PackConfig, work.pack, "pack a folder in the layout of REPA into shards"),
    _command("prepare digits", DigitsConfig, work.prepare_digits, "write scikit-learn's handwritten digits"),
    _preparing("data verify", VerifyConfig, work.verify, "reread a prepared data set and list its faults"),
    _preparing("data info", InfoConfig, work.info, "print facts about a prepared data set, and draw examples"),
    TRAIN,
    _command(
        "import", ImportConfig, work.import_checkpoint,
        "convert a published checkpoint of SiT, REPA, LightningDiT and others",
    ),
    _command("generate", GenerateConfig, work.generate, "sample images from a checkpoint", script="generate.py"),
    _command("extractor", ExtractorConfig, work.extractor, "train the network that evaluates generated digits"),
    EVALUATE,
    _command("reference", ReferenceConfig, work.reference, "write a reference file to evaluate against"),
    _command(
        "variance", VarianceConfig, work.variance,
        "measure the variance of the targets on your data, and recommend tau and xi", resumes=False,
    ),
    _command(
        "benchmark", BenchmarkConfig, work.benchmark,
        "measure training steps on this machine, phase by phase", resumes=False,
    ),
    _command(
        "toy", ToyConfig, work.toy, "experiments on a Gaussian mixture, where the exact field is known",
        script="gmm_exp.py",
    ),
    _command(
        "recipes", RecipesConfig, work.recipes,
        "list the files of options for published and measured settings, or show one",
        resumes=False,
    ),
    _command(
        "completion", CompletionConfig, work.completion, "print a script with which a shell completes these commands",
        resumes=False,
    ),
)  # fmt: skip
# The steps of preprocessing/dataset_tools.py, in the layout of REPA.
FOLDER_STEPS = (
    _preparing("convert", ConvertConfig, work.convert_to_folder, "crop images to one size, one PNG file each"),
    _preparing("encode", EncodeConfig, work.encode_to_folder, "encode such images into latents, one .npy file each"),
)
# What the steps behind a word have in common.
PURPOSES = {"prepare": "write a prepared data set", "data": "verify or show a prepared data set"}
