"""The command `stablevm study`: train, sample and evaluate each arm with each seed, at each point of the training."""

import time
from typing import Any

from stablevm.evaluation.config import EvaluateConfig
from stablevm.evaluation.evaluate import evaluate
from stablevm.evaluation.small_extractor import digits_splits, load_extractor
from stablevm.evaluation.sources import content_sha256
from stablevm.figures.study import plot_comparison
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.generation import generate
from stablevm.study.config import StudyConfig, in_json
from stablevm.study.pictures import draw_samples, samples_path
from stablevm.study.results import Comparison, Result, name_of, path_of, read
from stablevm.support.cards import read_object
from stablevm.support.errors import UserError
from stablevm.support.files import write_json, write_text
from stablevm.support.locks import owned
from stablevm.support.options import as_typed
from stablevm.training.checkpoint import checkpoint_folder, saved_steps
from stablevm.training.config import TrainConfig
from stablevm.training.trainer import train

STUDY_FILE, TABLE_FILE, FIGURE_FILE, SAMPLES_FILE = "study.json", "study.md", "study.png", "samples.png"
WARMUP_STEPS = 100


def study(config: StudyConfig) -> Comparison:
    """Run what is missing of the study, and write its table and pictures after each result.

    UserError, before anything is trained, for options that contradict those of the study in the folder.
    """
    config.validate()
    arms = config.arms_by_name()
    digits_splits(config.data_dir, "data_dir")
    load_extractor(config.extractor)
    with owned(config.output_dir):
        _check_same(config)
        for seed in range(config.seeds):
            for arm, options in arms.items():
                _Run(config, arm, options, seed).finish()
        return summarise(config)


def summarise(config: StudyConfig) -> Comparison:
    """Write the table and the pictures of the results that there are, and return their comparison."""
    arms = config.arms_by_name()
    paths = [
        path_of(config.output_dir, arm, seed, step)
        for arm in arms
        for seed in range(config.seeds)
        for step in config.steps
    ]
    results = [read(path) for path in paths if path.exists()]
    comparison = Comparison(results, list(arms))
    lines = [f"# {len(results)} of {len(paths)} results", *_told(config), *comparison.table()]
    write_text(config.output_dir / TABLE_FILE, "\n".join([*lines, *comparison.equal_time_table()]) + "\n")
    if results:
        plot_comparison(comparison.curves(), config.output_dir / FIGURE_FILE)
        draw_samples(config, arms, config.output_dir / SAMPLES_FILE)
    return comparison


class _Run:
    """One arm with one seed."""

    def __init__(self, config: StudyConfig, arm: str, options: dict[str, Any], seed: int) -> None:
        self.config, self.arm, self.options, self.seed = config, arm, options, seed
        self.name = f"{arm}-seed{seed}"

    def finish(self) -> None:
        """Train up to each point that has no result yet, and evaluate there."""
        before = 0
        for step in self.config.steps:
            path = path_of(self.config.output_dir, self.arm, self.seed, step)
            if not path.exists():
                print(f"\n{self.name}, step {step:,}", flush=True)
                seconds, per_step = self._train(before, step)
                metrics = self._evaluate(step)
                options, shared = in_json(self.options), self.config.fixed
                result = Result(self.arm, self.seed, step, options, metrics, seconds, shared, per_step)
                result.write(self.config.output_dir)
                summarise(self.config)
            before = step

    def _train(self, before: int, step: int) -> tuple[float | None, float | None]:
        """Train from the point `before` to `step`; the processor seconds since step 0, and of each step since `before`.

        None where an interruption hides them.
        """
        config = self._train_config(step)
        saved = saved_steps(config.folder)
        earlier = 0.0 if before == 0 else read(path_of(self.config.output_dir, self.arm, self.seed, before)).seconds
        begins_here = (saved[-1] if saved else 0) == before
        start = time.process_time()
        train(config, is_part=True)
        spent = time.process_time() - start
        if not begins_here:
            return None, None
        return None if earlier is None else earlier + spent, spent / (step - before)

    def _train_config(self, step: int) -> TrainConfig:
        config = self.config
        weights = config.encoder_weights
        if weights is None and config.enc_type == "extractor":
            weights = str(config.extractor / "extractor.safetensors")
        aligned = {
            "enc_type": config.enc_type,
            "encoder_weights": weights,
            "encoder_depth": config.encoder_depth,
            "features_dir": config.features_dir,
        }
        shared: dict[str, Any] = {
            "exp_name": self.name,
            "output_dir": config.output_dir / "runs",
            "data_dir": config.data_dir,
            "max_train_steps": step,
            "epochs": 10**9,
            "seed": self.seed,
            "model": config.model,
            "batch_size": config.batch_size,
            "learning_rate": config.learning_rate,
            "lr_warmup_steps": min(WARMUP_STEPS, config.steps[0]),
            "ema_decay": config.ema_decay,
            "weighting": config.weighting,
            "checkpointing_steps": max(1, min(config.steps) // 2),
            "checkpoints_kept": 2,
            "sampling_steps": 0,
            "num_workers": 0,
            "report_to": "none",
        }
        needs_encoder = aligned if self.options.get("use_proj_loss") else {}
        return TrainConfig(**shared | needs_encoder | self.options)

    def _evaluate(self, step: int) -> dict[str, Any]:
        config = self.config
        sampling = GenerateConfig(
            ckpt=checkpoint_folder(config.output_dir / "runs" / self.name, step),
            num_fid_samples=config.num_fid_samples,
            mode="ode",
            solver="euler",
            num_steps=config.num_steps,
            per_proc_batch_size=config.per_proc_batch_size,
            global_seed=self.seed,
            sample_dir=samples_path(config, self.arm, self.seed, step).parent,
            name=name_of(self.arm, self.seed, step),
        )
        samples = generate(sampling)
        metrics = evaluate(EvaluateConfig(samples=samples, reference=config.data_dir, extractor=config.extractor))
        return {name: value for name, value in metrics.items() if name not in ("samples", "reference")}


def _check_same(config: StudyConfig) -> None:
    """UserError where the folder holds a study with other options, or by other contents of the same folders."""
    path = config.output_dir / STUDY_FILE
    content = {name: content_sha256(getattr(config, name)) for name in ("data_dir", "extractor")}
    if not path.exists():
        write_json(path, {**config.fixed, "sha256": content})
        return
    earlier = read_object(path, "study", remedy="give another folder")
    for name, value in config.fixed.items():
        if earlier.get(name) != value:
            raise UserError(
                f"{config.output_dir}: holds a study with {as_typed(name, earlier.get(name))}, this one has "
                f"{as_typed(name, value)}; give the study's, or another folder"
            )
    known = earlier.get("sha256")
    for name, value in content.items():
        if isinstance(known, dict) and known.get(name) != value:
            raise UserError(
                f"{as_typed(name, getattr(config, name))}: its content has changed since {config.output_dir} began; "
                "restore it, or give another folder"
            )


def _told(config: StudyConfig) -> list[str]:
    """What the numbers of the table are of."""
    return [
        f"\n{config.model}, batches of {config.batch_size}, {config.num_fid_samples:,} samples by {config.num_steps} "
        f"steps of Euler's method, no guidance, evaluated by {config.extractor} on {config.data_dir}. Means over seeds "
        "with standard errors; differences from the first arm are taken seed by seed.",
    ]
