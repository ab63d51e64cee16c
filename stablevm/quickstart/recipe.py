"""The measured recipe of the quickstart (docs/experiments.md), as configurations of the ordinary commands."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stablevm.evaluation.config import EvaluateConfig, ExtractorConfig
from stablevm.quickstart.config import QuickstartConfig
from stablevm.recipes.listing import recipe_options
from stablevm.sampling.config import GenerateConfig
from stablevm.training.config import TrainConfig


def _options(command: str) -> dict[str, Any]:
    """What the recipe says for a command, by the names of fields."""
    return {name.replace("-", "_"): value for name, value in recipe_options("digits", command).items()}


_SAMPLING = _options("generate")
NUM_SAMPLES: int = _SAMPLING["num_fid_samples"]
EXTRACTOR_STEPS = ExtractorConfig.steps
EULER_STEPS: int = _SAMPLING["num_steps"]


@dataclass(frozen=True)
class Guidance:
    """Guidance of samples by `scale` at times up to `high`."""

    scale: float
    high: float = 1.0

    @property
    def name(self) -> str:
        if self.scale == 1:
            return "no guidance"
        return f"guidance {self.scale:g}" + (f", t <= {self.high:g}" if self.high < 1 else "")

    @property
    def file_name(self) -> str:
        return self.name.replace(" <= ", "").replace(", ", "-").replace(" ", "-")


# The first one is the headline: guidance only near the data keeps the variety that guidance at all times costs.
HEADLINE = Guidance(_SAMPLING["cfg_scale"], _SAMPLING["guidance_high"])
EVERYWHERE, NONE = Guidance(HEADLINE.scale), Guidance(1.0)
GUIDANCES = (HEADLINE, EVERYWHERE, NONE)
NAMES = {"stablevm": "StableVM", "si": "CFM"}


def arms(config: QuickstartConfig) -> list[QuickstartConfig]:
    """What is trained: the method that is asked for, and with `compare` the other one, all else alike."""
    other = replace(config, loss_type="si" if config.loss_type == "stablevm" else "stablevm")
    return [config, other] if config.compare else [config]


def guidances(config: QuickstartConfig, arm: QuickstartConfig) -> list[Guidance]:
    """How an arm is sampled; what guidance at all times does is shown of the method that is asked for alone."""
    return [guide for guide in GUIDANCES if arm.loss_type == config.loss_type or guide != EVERYWHERE]


def data_folder(config: QuickstartConfig) -> Path:
    return config.output_dir / "data"


def extractor_folder(config: QuickstartConfig) -> Path:
    return config.output_dir / "extractor"


def extractor_config(config: QuickstartConfig) -> ExtractorConfig:
    return ExtractorConfig(data_folder(config), extractor_folder(config), config.seed, EXTRACTOR_STEPS)


def train_config(config: QuickstartConfig) -> TrainConfig:
    """Options of training for a network of this size; the references are the whole class, about 135 digits."""
    options = _options("train")
    if config.loss_type != "stablevm":
        options = {name: value for name, value in options.items() if "bank" not in name}
    of_this_run = {
        "exp_name": config.loss_type,
        "output_dir": config.output_dir,
        "data_dir": data_folder(config),
        "max_train_steps": config.steps,
        "lr_warmup_steps": min(options["lr_warmup_steps"], config.steps // 2),
        "seed": config.seed,
        "loss_type": config.loss_type,
        "encoder_weights": str(extractor_folder(config) / "extractor.safetensors"),
    }
    return TrainConfig(**options | of_this_run)


def generate_config(config: QuickstartConfig, checkpoint: Path, guidance: Guidance) -> GenerateConfig:
    """Options of sampling: 50 images per class by Euler's method."""
    of_these_samples = {
        "ckpt": checkpoint,
        "num_fid_samples": NUM_SAMPLES,
        "cfg_scale": guidance.scale,
        "guidance_high": guidance.high,
        "global_seed": config.seed,
        "sample_dir": config.output_dir / "samples",
        "name": f"{config.loss_type}-{guidance.file_name}",
    }
    return GenerateConfig(**_SAMPLING | of_these_samples)


def evaluate_config(config: QuickstartConfig, samples: Path) -> EvaluateConfig:
    return EvaluateConfig(samples=samples, reference=data_folder(config), extractor=extractor_folder(config))
