"""The function of each command, which checks for its packages and imports its module only when it is called."""

from typing import TYPE_CHECKING

from stablevm.support.extras import need

if TYPE_CHECKING:
    from stablevm.advice.config import VarianceConfig
    from stablevm.commands.config import CompletionConfig, RecipesConfig
    from stablevm.demo.config import DemoConfig
    from stablevm.evaluation.config import EvaluateCheckpointConfig, EvaluateConfig, ExtractorConfig, ReferenceConfig
    from stablevm.integrations.config import ExportConfig, ImportConfig, PushConfig
    from stablevm.preparation.config import (
        ConvertConfig,
        ConvertShardsConfig,
        DigitsConfig,
        EncodeConfig,
        EncoderConfig,
        EncodeShardsConfig,
        FeaturesConfig,
        InfoConfig,
        PackConfig,
        StatisticsConfig,
        VerifyConfig,
    )
    from stablevm.profiling.config import BenchmarkConfig
    from stablevm.quickstart.config import QuickstartConfig
    from stablevm.sampling.config import GenerateConfig
    from stablevm.study.config import StudyConfig
    from stablevm.sweep.config import SweepConfig
    from stablevm.toy.config import ToyConfig
    from stablevm.training.average_config import AverageConfig
    from stablevm.training.config import TrainConfig

TRAINER = ("accelerate", "psutil", "timm")
FIGURES = ("matplotlib", "PIL")


def train(config: "TrainConfig") -> None:
    need("stablevm train", *TRAINER, *FIGURES)
    from stablevm.training.trainer import train

    train(config)


def average(config: "AverageConfig") -> None:
    need("stablevm average", "timm")
    from stablevm.training.average import average

    average(config)


def generate(config: "GenerateConfig") -> None:
    need("stablevm generate", "timm", *FIGURES)
    from stablevm.sampling.generation import generate

    generate(config)


def demo(config: "DemoConfig") -> None:
    need("stablevm demo", "gradio", "timm", *FIGURES)
    from stablevm.demo.page import demo

    demo(config)


def evaluate(config: "EvaluateConfig") -> None:
    if config.report:
        need("--report", *FIGURES)
    from stablevm.evaluation.evaluate import evaluate

    evaluate(config)


def evaluate_checkpoint(config: "EvaluateCheckpointConfig") -> None:
    need("stablevm evaluate --ckpt", "timm", *(FIGURES if config.evaluation.report else ()))
    from stablevm.evaluation.evaluate import evaluate_checkpoint

    evaluate_checkpoint(config)


def sweep(config: "SweepConfig") -> None:
    need("stablevm sweep", *TRAINER, *FIGURES)
    from stablevm.sweep.run import sweep

    sweep(config)


def reference(config: "ReferenceConfig") -> None:
    from stablevm.evaluation.reference import reference

    reference(config)


def import_checkpoint(config: "ImportConfig") -> None:
    need("stablevm import", "timm")
    from stablevm.integrations.importing import import_checkpoint

    import_checkpoint(config)


def push(config: "PushConfig") -> None:
    need("stablevm push", "huggingface_hub")
    need("stablevm push", *TRAINER, *FIGURES)
    from stablevm.integrations.pushing import push

    push(config)


def export(config: "ExportConfig") -> None:
    need("stablevm export", "diffusers", "timm")
    from stablevm.integrations.exporting import export

    export(config)


def quickstart(config: "QuickstartConfig") -> None:
    need("stablevm quickstart", *TRAINER, "tensorboard", "sklearn", *FIGURES)
    from stablevm.quickstart.run import quickstart

    quickstart(config)


def extractor(config: "ExtractorConfig") -> None:
    from stablevm.evaluation.small_extractor import extractor

    extractor(config)


def encoder(config: "EncoderConfig") -> None:
    need("stablevm encoder", "psutil", "timm")
    from stablevm.preparation.masked_encoder import encoder

    encoder(config)


def variance(config: "VarianceConfig") -> None:
    need("stablevm variance", *FIGURES)
    from stablevm.advice.variance import measure_variance

    measure_variance(config)


def benchmark(config: "BenchmarkConfig") -> None:
    need("stablevm benchmark", *TRAINER, *FIGURES)
    from stablevm.profiling.run import benchmark

    benchmark(config)


def toy(config: "ToyConfig") -> None:
    need("stablevm toy", *FIGURES)
    from stablevm.toy.experiment import run

    run(config)


def prepare_digits(config: "DigitsConfig") -> None:
    need("stablevm prepare digits", "sklearn")
    from stablevm.data.digits import prepare_digits

    print(prepare_digits(config.folder))


def recipes(config: "RecipesConfig") -> None:
    from stablevm.recipes.listing import listing, recipe_file

    print(listing() if config.name is None else recipe_file(config.name).read_text(encoding="utf-8").rstrip())


def completion(config: "CompletionConfig") -> None:
    from stablevm.commands.completion import print_script

    print_script(config.shell)


def convert_to_folder(config: "ConvertConfig") -> int:
    from stablevm.preparation.folders import convert

    return convert(config)


def encode_to_folder(config: "EncodeConfig") -> int:
    from stablevm.preparation.folders import encode

    return encode(config)


def convert(config: "ConvertShardsConfig") -> int:
    from stablevm.preparation.shards import convert

    return convert(config)


def encode(config: "EncodeShardsConfig") -> int:
    from stablevm.preparation.shards import encode

    return encode(config)


def pack(config: "PackConfig") -> int:
    from stablevm.preparation.pack import pack

    return pack(config)


def verify(config: "VerifyConfig") -> int:
    from stablevm.preparation.verify import verify

    return verify(config)


def statistics(config: "StatisticsConfig") -> int:
    from stablevm.preparation.statistics import statistics

    return statistics(config)


def info(config: "InfoConfig") -> int:
    need("stablevm data info", *FIGURES)
    from stablevm.preparation.info import info

    return info(config)


def study(config: "StudyConfig") -> None:
    need("stablevm study", *TRAINER, *FIGURES)
    from stablevm.study.run import TABLE_FILE, study

    study(config)
    print((config.output_dir / TABLE_FILE).read_text(encoding="utf-8"))


def features(config: "FeaturesConfig") -> None:
    need("stablevm prepare features", "timm")
    from stablevm.preparation.features import features

    features(config)
