"""The list of commands, with their names, options and functions, which help, documents and tests follow."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from stablevm.commands import work
from stablevm.support.errors import UserError
from stablevm.support.options import Group, groups_of, is_positional

Config = TypeVar("Config")


@dataclass(frozen=True)
class Use(Generic[Config]):
    """A use of a command, with options of one kind and the function that is called with them."""

    options: type[Config]
    work: Callable[[Config], object]
    given: str = ""  # the option that requests this use, if a command has several
    # From the options that were given to those of the run that is resumed, which stand in for the others.
    resumed: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    check_given: Callable[[Mapping[str, Any]], None] | None = None  # UserError for options that contradict each other

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
    make_uses: tuple[Callable[[], Use[Any]], ...]  # called on demand, as most commands are not
    script: str = ""  # the script that calls it too
    returns_status: bool = False  # whether the result of the work is the exit status
    resumes: bool = True  # whether it resumes when it is run again

    @cached_property
    def uses(self) -> tuple[Use[Any], ...]:
        """What the command does, one use for each kind of options."""
        return tuple(make() for make in self.make_uses)

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


def _quickstart() -> Use[Any]:
    from stablevm.quickstart.config import QuickstartConfig

    return Use(QuickstartConfig, work.quickstart)


def _convert() -> Use[Any]:
    from stablevm.preparation.config import ConvertShardsConfig

    return Use(ConvertShardsConfig, work.convert)


def _encode() -> Use[Any]:
    from stablevm.preparation.config import EncodeShardsConfig

    return Use(EncodeShardsConfig, work.encode)


def _features() -> Use[Any]:
    from stablevm.preparation.config import FeaturesConfig

    return Use(FeaturesConfig, work.features)


def _pack() -> Use[Any]:
    from stablevm.preparation.config import PackConfig

    return Use(PackConfig, work.pack)


def _prepare_digits() -> Use[Any]:
    from stablevm.preparation.config import DigitsConfig

    return Use(DigitsConfig, work.prepare_digits)


def _verify() -> Use[Any]:
    from stablevm.preparation.config import VerifyConfig

    return Use(VerifyConfig, work.verify)


def _statistics() -> Use[Any]:
    from stablevm.preparation.config import StatisticsConfig

    return Use(StatisticsConfig, work.statistics)


def _info() -> Use[Any]:
    from stablevm.preparation.config import InfoConfig

    return Use(InfoConfig, work.info)


def _train() -> Use[Any]:
    from stablevm.training.config import TrainConfig

    return Use(TrainConfig, work.train, resumed=TrainConfig.resumed)


def _average() -> Use[Any]:
    from stablevm.training.average_config import AverageConfig

    return Use(AverageConfig, work.average)


def _import_checkpoint() -> Use[Any]:
    from stablevm.integrations.config import ImportConfig

    return Use(ImportConfig, work.import_checkpoint)


def _push() -> Use[Any]:
    from stablevm.integrations.config import PushConfig

    return Use(PushConfig, work.push)


def _export() -> Use[Any]:
    from stablevm.integrations.config import ExportConfig

    return Use(ExportConfig, work.export)


def _generate() -> Use[Any]:
    from stablevm.sampling.config import GenerateConfig

    return Use(GenerateConfig, work.generate, check_given=GenerateConfig.check_given)


def _demo() -> Use[Any]:
    from stablevm.demo.config import DemoConfig

    return Use(DemoConfig, work.demo)


def _extractor() -> Use[Any]:
    from stablevm.evaluation.config import ExtractorConfig

    return Use(ExtractorConfig, work.extractor)


def _encoder() -> Use[Any]:
    from stablevm.preparation.config import EncoderConfig

    return Use(EncoderConfig, work.encoder)


def _evaluate() -> Use[Any]:
    from stablevm.evaluation.config import EvaluateConfig

    return Use(EvaluateConfig, work.evaluate, given="samples")


def _evaluate_checkpoint() -> Use[Any]:
    from stablevm.evaluation.config import EvaluateCheckpointConfig
    from stablevm.sampling.config import GenerateConfig

    check = GenerateConfig.check_given
    return Use(EvaluateCheckpointConfig, work.evaluate_checkpoint, given="ckpt", check_given=check)


def _sweep() -> Use[Any]:
    from stablevm.sweep.config import SweepConfig

    return Use(SweepConfig, work.sweep)


def _reference() -> Use[Any]:
    from stablevm.evaluation.config import ReferenceConfig

    return Use(ReferenceConfig, work.reference)


def _variance() -> Use[Any]:
    from stablevm.advice.config import VarianceConfig

    return Use(VarianceConfig, work.variance)


def _study() -> Use[Any]:
    from stablevm.study.config import StudyConfig

    return Use(StudyConfig, work.study)


def _benchmark() -> Use[Any]:
    from stablevm.profiling.config import BenchmarkConfig

    return Use(BenchmarkConfig, work.benchmark)


def _toy() -> Use[Any]:
    from stablevm.toy.config import ToyConfig

    return Use(ToyConfig, work.toy)


def _recipes() -> Use[Any]:
    from stablevm.commands.config import RecipesConfig

    return Use(RecipesConfig, work.recipes)


def _completion() -> Use[Any]:
    from stablevm.commands.config import CompletionConfig

    return Use(CompletionConfig, work.completion)


def _convert_to_folder() -> Use[Any]:
    from stablevm.preparation.config import ConvertConfig

    return Use(ConvertConfig, work.convert_to_folder)


def _encode_to_folder() -> Use[Any]:
    from stablevm.preparation.config import EncodeConfig

    return Use(EncodeConfig, work.encode_to_folder)


COMMANDS = (
    Command(
        "quickstart",
        "prepare, train, sample and evaluate handwritten digits, into one folder with a report",
        (_quickstart,),
    ),
    Command("prepare convert", "crop images to one size, into shards", (_convert,), returns_status=True),
    Command(
        "prepare encode", "encode the images in shards, which completes the data set", (_encode,), returns_status=True
    ),
    Command("prepare pack", "pack a folder in the layout of REPA into shards", (_pack,), returns_status=True),
    Command("prepare features", "compute an encoder's tokens of all images once, for alignment", (_features,)),
    Command("prepare digits", "write scikit-learn's handwritten digits", (_prepare_digits,)),
    Command("data verify", "reread a prepared data set and list its faults", (_verify,), returns_status=True),
    Command(
        "data statistics",
        "measure the mean and deviation of each channel of the latents, and record them",
        (_statistics,),
        returns_status=True,
        resumes=False,
    ),
    Command("data info", "print facts about a prepared data set, and draw examples", (_info,), returns_status=True),
    Command("train", "train a network", (_train,), script="train.py"),
    Command("average", "make the moving average of any width from a run's snapshots", (_average,)),
    Command("import", "convert a published checkpoint of SiT, REPA, LightningDiT and others", (_import_checkpoint,)),
    Command("push", "upload a checkpoint, with a page about it, to the Hugging Face Hub", (_push,)),
    Command("export", "write a checkpoint as a pipeline of diffusers", (_export,)),
    Command("generate", "sample images from a checkpoint", (_generate,), script="generate.py"),
    Command("demo", "generate images from a checkpoint on a page in the browser", (_demo,), resumes=False),
    Command(
        "extractor", "train the network that evaluates digits and other small images", (_extractor,), resumes=False
    ),
    Command("encoder", "train an encoder for alignment on your images, without labels", (_encoder,), resumes=False),
    Command(
        "evaluate",
        "evaluate a file of generated images, or a checkpoint",
        (_evaluate, _evaluate_checkpoint),
        script="evaluate.py",
    ),
    Command("sweep", "evaluate a checkpoint for all combinations of guidance and averages", (_sweep,)),
    Command("reference", "write a reference file to evaluate against", (_reference,)),
    Command(
        "variance",
        "measure the variance of the targets on your data, and recommend tau and xi",
        (_variance,),
        resumes=False,
    ),
    Command("study", "compare targets and alignment on your data, over seeds and points of the training", (_study,)),
    Command("benchmark", "measure training steps on this machine, phase by phase", (_benchmark,), resumes=False),
    Command("toy", "experiments on a Gaussian mixture, where the exact field is known", (_toy,), script="gmm_exp.py"),
    Command(
        "recipes",
        "list the files of options for published and measured settings, or show one",
        (_recipes,),
        resumes=False,
    ),
    Command("completion", "print a script with which a shell completes these commands", (_completion,), resumes=False),
)
# The steps of preprocessing/dataset_tools.py, in the layout of REPA.
FOLDER_STEPS = (
    Command("convert", "crop images to one size, one PNG file each", (_convert_to_folder,), returns_status=True),
    Command("encode", "encode such images into latents, one .npy file each", (_encode_to_folder,), returns_status=True),
)
# What the steps behind a word have in common.
PURPOSES = {"prepare": "write a prepared data set", "data": "verify, measure or show a prepared data set"}
