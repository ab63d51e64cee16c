"""The options of `train`. Free of torch, so that `--help` stays quick."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from stablevm.choices import (
    Anchors,
    LossName,
    MixedPrecision,
    PathName,
    Prediction,
    Resize,
    TimeName,
    WeightName,
    Weights,
)
from stablevm.support.cards import card_of, read_object
from stablevm.support.errors import UserError
from stablevm.support.options import as_typed, idle_warnings, require, some_of, writable
from stablevm.support.ranges import (
    FINITE_ABOVE_0,
    TIME_ABOVE_0,
    Chance,
    Count,
    Decay,
    Natural,
    NotNegative,
    Positive,
    Range,
    Time,
)

CONFIG_FILE = "config.json"
# The published intervals, in steps, of checkpoints and of grids. A run of fewer than five of them has ten of its own.
CHECKPOINT_INTERVAL, PREVIEW_INTERVAL = 50_000, 10_000
FEWEST_INTERVALS, SHARES_OF_SHORT_RUNS = 5, 10
_REMEDY = "restore it, or start over under another --exp-name"
# What aligned runs of version 0.1 did, whose files do not know the option.
BEFORE = {"encoder_resize": "antialiased"}
TRACKERS = ("tensorboard", "wandb", "none")

# Options of StableVelocity's train.py that are taken so that its commands run, and why nothing hangs on them.
_NOT_NEEDED = {
    "logging_dir": "logs are in OUTPUT_DIR/EXP_NAME",
    "legacy": "stablevm import knows the names of early checkpoints",
    "bank_chunk_size": "references are processed in blocks that fit into memory, with the same result",
}

# May differ between a run and its continuation: they change neither the batches nor the network.
FREE_ON_RESUME = frozenset(
    {
        "resume", "resume_step", "exp_name", "output_dir", "report_to", "num_workers", "max_train_steps", "epochs",
        "data_dir",  # of the data's content `start.check_data` knows
        "checkpointing_steps", "checkpoints_kept", "keep_best", "max_bad_steps", "sampling_steps", "log_steps",
        "prefill_batch_size", "prefill_workers", "bank_on_gpu", "compile", "vae",
        "proj_stop_step",  # `start.changes` tells of it
        *_NOT_NEEDED, "eval_every", "eval_samples", "eval_reference", "eval_extractor", "eval_enc_type", "eval_weights",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The prepared data, and how it is read."""

    GROUP: ClassVar[str] = "data"

    data_dir: Path
    """Prepared data set: a folder with dataset.json, or one whose folder train holds it."""
    resolution: int | None = None
    """Side of the images in pixels, checked against the data set. Default: the data set's."""
    num_classes: int | None = None
    """Number of classes, at least those of the data set. Default: the data set's."""
    horizontal_flips: bool = False
    """Train on each image's mirror image too, as a separate sample; the data must be prepared with encode --flip."""
    num_workers: Natural = 4
    """Processes that read data."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The network, and the weights that it starts from."""

    GROUP: ClassVar[str] = "network"

    model: str = "SiT-XL/2"
    """SiT-{S,B,L,XL}/{1,2,4,8}, LightningDiT-{B,L,XL}/{1,2}; for small images SiT-{XXS,XS}/{1,2,4},
    LightningDiT-{XXS,XS}/{1,2}."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    init_from: Path | None = None
    """Start from the weights of this checkpoint folder, or of the newest one of this run's folder, instead of random
    ones: fine-tuning, also after an import."""
    init_weights: Weights = "ema"
    """Which of its weights: ema, the moving average; model, those of the last step."""


@dataclass(frozen=True, kw_only=True)
class OptimisationOptions:
    """The length of training, and the optimiser."""

    GROUP: ClassVar[str] = "optimisation"

    epochs: Count = 1400
    """Stop after this many passes over the data, unless --max-train-steps is reached first."""
    max_train_steps: Count = 400_000
    """Stop after this many steps."""
    batch_size: Count = 256
    """Samples per step over all processes; a multiple of processes x accumulation steps."""
    gradient_accumulation_steps: Count | None = None
    """Parts into which each process splits its share of a step, to save memory. Default: as
    accelerate launch says (--gradient_accumulation_steps), else 1."""
    learning_rate: Positive = 1e-4
    """Rate of AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """constant, or falling along a half cosine to 5 % at the last step."""
    lr_warmup_steps: Natural = 0
    """Steps over which the rate rises linearly from 0."""
    adam_beta1: Decay = 0.9
    """AdamW's decay of the mean gradient, in [0, 1)."""
    adam_beta2: Decay = 0.999
    """AdamW's decay of the mean squared gradient, in [0, 1)."""
    adam_weight_decay: NotNegative = 0.0
    """AdamW's weight decay, 0 or more."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon, above 0."""
    max_grad_norm: Annotated[float, Range("0 or more; 0 does not clip", 0)] = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    ema_decay: Decay = 0.9999
    """Decay d of the weights' moving average, in [0, 1); after n steps min(d, (1 + n) / (10 + n)) is used."""
    max_bad_steps: Count = 10
    """End the run after this many steps in a row whose loss or gradient is not finite; fewer are skipped."""
    seed: Natural = 0
    """Seed of weights, batches, times and noise; 0 or more."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The targets on which the network is trained."""

    GROUP: ClassVar[str] = "objective"

    loss_type: LossName = "si"
    """si: flow matching, targets of one sample. stablevm: targets averaged over the bank's references."""
    path_type: PathName = "linear"
    """Path between data and noise."""
    prediction: Prediction = "v"
    """What the network predicts: v, the velocity; x, the data."""
    weighting: TimeName = "uniform"
    """Distribution of training times: uniform; lognormal: EDM's noise levels, ln(sigma/alpha) ~ N(-1.2, 1.2^2);
    logit_normal: ln(sigma/alpha) ~ N(0, 1)."""
    time_shift: Annotated[float, Range("a finite number above 0, or auto", 0, without_low=True)] | Literal["auto"] = 1.0
    """Shift of training times, and of sampling's grids, towards noise: sigma / alpha of each time is multiplied by it.
    auto: sqrt(values of a latent / 4096), 1 for Stable Diffusion's of 32 x 32. Checkpoints record it."""
    cfg_prob: Chance = 0.1
    """Probability that a label is dropped, in [0, 1]."""
    bank_capacity_per_class: Annotated[int, Range("at least 1, or all", 1)] | Literal["all"] = 256
    """Samples of each class in the bank. all: every latent of the data, sampled once, from the first step on."""
    prefill_bank_fully: bool = False
    """Fill the whole bank before the first step; otherwise it starts with one sample per class."""
    prefill_batch_size: Count = 1024
    """Latents read at a time while the bank is filled."""
    prefill_workers: Natural | None = None
    """Threads that read latents while the bank is filled. Default: --num-workers."""
    bank_on_gpu: bool = True
    """Keep the bank in the GPU's memory; otherwise in the host's memory, and its arithmetic runs there too."""
    bank_anchors: Anchors = "bank"
    """The samples that are perturbed: bank, drawn from the bank (as published); batch, the fresh ones."""
    references_from: Time = 0.0
    """Time in [0, 1] below which targets are those of si, without references."""
    contrastive_coeff: Annotated[float, Range("a weight in [0, 1)", 0, 1, without_high=True)] = 0.0
    """Weight of contrastive flow matching in [0, 1), 0.05 as published: it drives predictions away from the targets of
    other samples. It also shifts the optimum away from the mean target, by the factor 1 / (1 - weight)."""


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions:
    """Alignment of the network's tokens with those of a frozen encoder."""

    GROUP: ClassVar[str] = "alignment"

    use_proj_loss: bool = False
    """Align the network's hidden tokens with those of a frozen encoder (VA-REPA)."""
    proj_coeff: NotNegative = 0.5
    """Weight of the alignment loss, 0 or more."""
    proj_stop_step: Natural = 0
    """Align only in this many first steps (HASTE); afterwards no encoder runs and no image is read. 0: in all steps.
    It may change when a run is resumed."""
    proj_weight_schedule: WeightName = "hard"
    """How alignment fades with time; constant is plain REPA."""
    proj_tau: Annotated[float, TIME_ABOVE_0] = 0.7
    """Time around which alignment fades, in (0, 1]."""
    proj_k: Annotated[float, FINITE_ABOVE_0] = 20.0
    """Steepness of the sigmoid, more than 0."""
    encoder_depth: int = 8
    """Block, counted from 1, whose tokens are aligned."""
    enc_type: str = "dinov2-vit-b"
    """Frozen encoders separated by commas: dinov2-vit-b and the other published names, any timm name, or digits."""
    encoder_weights: str | None = None
    """Files of the encoders' weights separated by commas, for machines without a network connection."""
    encoder_resize: Resize = "bicubic"
    """How images are resized for encoders: bicubic, without antialiasing, as published; antialiased, with it."""
    use_irepa: bool = False
    """iREPA: a convolutional projector, and encoder features normalised over space."""
    irepa_gamma: Annotated[float, Range("a share in [0, 1]", 0, 1)] = 0.6
    """Share of the mean over patches that iREPA subtracts from the encoder's features, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What is written, and where a run resumes."""

    GROUP: ClassVar[str] = "checkpoints"

    resume: bool = False
    """Resume OUTPUT_DIR/EXP_NAME from its newest checkpoint; needs no options except those two."""
    resume_step: Natural = 0
    """Resume from the checkpoint of this step instead of the newest."""
    checkpointing_steps: Count | None = None
    """Write a checkpoint every this many steps, and at the end. Default: 50,000, or a tenth of a run of fewer than
    250,000 steps; of those between multiples of 50,000 the newest two are kept, to resume from."""
    checkpoints_kept: Natural = 0
    """Keep only this many of the newest checkpoints; 0 keeps all."""
    keep_best: Literal["loss", "velocity_loss", "alignment_loss"] | None = None
    """Also keep, as checkpoints/best, the checkpoint with the lowest mean of this metric over the steps before it."""
    log_steps: Count = 10
    """Write metrics every this many steps."""
    sampling_steps: Natural | None = None
    """Make a grid of samples every this many steps, and at the end; 0: never. Default: 10,000, or a tenth of a run of
    fewer than 50,000 steps."""
    vae: str | None = None
    """Autoencoder that decodes samples: ema, mse, or a folder (without a network connection). Default: the data's."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation of samples during training."""

    GROUP: ClassVar[str] = "evaluation"

    eval_every: Natural = 0
    """Evaluate samples of the moving average every this many steps, and at the end, and keep the checkpoint with the
    lowest Fréchet distance as checkpoints/best; 0: never."""
    eval_samples: Annotated[int, Range("at least 4", 4)] = 1000
    """Samples that are evaluated, 4 or more: always with the same noise, 40 Euler steps, no guidance."""
    eval_reference: str | None = None
    """Reference file to evaluate against (stablevm reference); with --eval-extractor, the digits' folder."""
    eval_extractor: str | None = None
    """Evaluate digits: folder of the extractor that was trained on them."""
    eval_enc_type: str | None = None
    """Evaluate by the features of this encoder instead of Inception's."""
    eval_weights: str | None = None
    """File with the weights of Inception or of --eval-enc-type. Default: downloaded once."""


@dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """Arithmetic and kernels."""

    GROUP: ClassVar[str] = "hardware"

    mixed_precision: MixedPrecision | None = None
    """Arithmetic of the network. Default: as accelerate launch says (--mixed_precision), else fp16 on a GPU, no on a
    CPU."""
    allow_tf32: bool = False
    """Let a GPU round the factors of the network's float32 products to TF32, but never those for references."""
    fused_attn: bool = True
    """Compute attention with the fused kernel."""
    compile: bool = False
    """Compile the network's blocks: the first step takes a minute, later ones less time and memory."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    DataOptions,
    NetworkOptions,
    OptimisationOptions,
    ObjectiveOptions,
    AlignmentOptions,
    CheckpointOptions,
    EvaluationOptions,
    HardwareOptions,
):
    """Train a network into OUTPUT_DIR/EXP_NAME. To resume after an interruption, run the same command again."""

    GROUP: ClassVar[str] = "run"

    exp_name: str
    """Name of the run; logs, samples and checkpoints go to OUTPUT_DIR/EXP_NAME."""
    output_dir: Path = Path("exps")
    """Folder of all runs."""
    report_to: str = "tensorboard"
    """wandb, tensorboard, none; several separated by commas. Metrics always go to metrics.jsonl as well."""

    logging_dir: str | None = None
    """StableVelocity's; not needed: logs are in OUTPUT_DIR/EXP_NAME."""
    legacy: bool = False
    """StableVelocity's; not needed: stablevm import knows the names of early checkpoints."""
    bank_chunk_size: int | None = None
    """StableVelocity's; not needed: references are processed in blocks that fit into memory, with the same result."""

    @property
    def folder(self) -> Path:
        return self.output_dir / self.exp_name

    @property
    def accumulation_steps(self) -> int:
        """Parts of a step."""
        return 1 if self.gradient_accumulation_steps is None else self.gradient_accumulation_steps

    @property
    def bank_is_fixed(self) -> bool:
        """Whether the bank holds all of the data, so that no step changes it and no checkpoint needs it."""
        return self.bank_capacity_per_class == "all"

    @property
    def encoder_names(self) -> list[str]:
        return [name.strip() for name in self.enc_type.split(",")] if self.use_proj_loss else []

    @property
    def encoder_files(self) -> list[Path | None]:
        """One weights file per encoder; None where timm downloads them."""
        if self.encoder_weights is None:
            return [None] * len(self.encoder_names)
        return [Path(part.strip()) for part in self.encoder_weights.split(",")]

    @property
    def trackers(self) -> list[str]:
        names = [name.strip() for name in self.report_to.split(",")]
        return [name for name in names if name != "none"]

    def epoch_steps(self, samples: int) -> int:
        """Steps of all --epochs on a data set of `samples`."""
        return math.ceil(self.epochs * samples / self.batch_size)

    def total_steps(self, samples: int) -> int:
        """Steps until the first of --epochs and --max-train-steps ends, on a data set of `samples`."""
        return min(self.max_train_steps, self.epoch_steps(samples))

    def checkpoint_interval(self, total_steps: int) -> int:
        """Steps from one checkpoint to the next, in a run of `total_steps`."""
        return _interval(self.checkpointing_steps, CHECKPOINT_INTERVAL, total_steps, self.log_steps)

    def preview_interval(self, total_steps: int) -> int:
        """Steps from one grid of samples to the next, in a run of `total_steps`; 0 without any."""
        return _interval(self.sampling_steps, PREVIEW_INTERVAL, total_steps, self.log_steps)

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        require(
            self,
            [
                ("exp_name", self.exp_name not in ("", "..") and Path(self.exp_name).name == self.exp_name,
                 "a folder's name"),
                writable("output_dir", self.output_dir),
                writable("exp_name", self.folder),
                ("report_to", set(self.trackers) <= set(TRACKERS), f"of {', '.join(TRACKERS)}, comma-separated"),
                ("contrastive_coeff", self.contrastive_coeff == 0 or self.batch_size > 1,
                 "0 with --batch-size 1: there is no other sample"),
                ("eval_reference", self.eval_every == 0 or self.eval_reference is not None,
                 "a reference to evaluate against with --eval-every"),
                ("keep_best", self.eval_every == 0 or self.keep_best is None,
                 "none with --eval-every, which keeps the checkpoint of the lowest distance"),
                ("keep_best", self.use_proj_loss or self.keep_best != "alignment_loss",
                 "a loss that is computed; add --use-proj-loss or give velocity_loss"),
                ("encoder_weights", len(self.encoder_files) == len(self.encoder_names) or not self.use_proj_loss,
                 f"one file for each of --enc-type {self.enc_type}"),
            ],
        )  # fmt: skip

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect, at all or with the others."""
        idle: dict[str, str] = {} if self.init_from else {"init_weights": "no --init-from"}
        if self.eval_every == self.sampling_steps == 0:
            idle["vae"] = "--eval-every 0 and --sampling-steps 0"
        if self.eval_every == 0:
            idle_alone = ("eval_samples", "eval_reference", "eval_extractor", "eval_enc_type", "eval_weights")
            idle |= dict.fromkeys(idle_alone, "--eval-every 0")
        elif self.eval_extractor is not None:
            idle |= dict.fromkeys(("eval_enc_type", "eval_weights"), "--eval-extractor")
        if self.loss_type == "si":
            bank = ("bank_capacity_per_class", "prefill_bank_fully", "prefill_batch_size", "prefill_workers")
            idle |= dict.fromkeys((*bank, "bank_on_gpu", "bank_anchors", "references_from"), "--loss-type si")
        if not self.use_proj_loss:
            projection = ("proj_coeff", "proj_weight_schedule", "proj_tau", "proj_k", "enc_type", "encoder_weights")
            more = ("encoder_depth", "encoder_resize", "use_irepa", "irepa_gamma", "proj_stop_step")
            idle |= dict.fromkeys((*projection, *more), "--no-use-proj-loss")
        if self.use_proj_loss and self.proj_weight_schedule != "sigmoid":
            idle["proj_k"] = f"--proj-weight-schedule {self.proj_weight_schedule}"
        if self.use_proj_loss and self.proj_weight_schedule == "constant":
            idle["proj_tau"] = "--proj-weight-schedule constant"
        if self.use_proj_loss and not self.use_irepa:
            idle["irepa_gamma"] = "--no-use-irepa"
        given = [(option, getattr(self, option)) for option in _NOT_NEEDED]
        not_needed = [
            f"{as_typed(option, value)} is not needed: {_NOT_NEEDED[option]}"
            for option, value in given
            if value is not None and value is not False
        ]
        return idle_warnings(self, idle) + not_needed

    def to_dict(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """UserError for a field of another type, or that this version does not know; `validate` knows the ranges."""
        return card_of(cls, values, CONFIG_FILE, finite=False, remedy=_REMEDY)

    @classmethod
    def read(cls, run: Path) -> "TrainConfig":
        """The options that the run in the folder `run` was started with; UserError for a damaged file."""
        path = run / CONFIG_FILE
        values = read_object(path, "run", remedy=_REMEDY)
        if values.get("use_proj_loss"):
            values = BEFORE | values
        return card_of(cls, values, f"run: {path}", finite=False, remedy=_REMEDY)

    @classmethod
    def resumed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """With `resume`, the options of the run that is resumed, to stand in for those that are not given; else none.

        UserError, naming the runs that there are, where there is none of the name and no data are given for a new one.
        """
        if not given.get("resume") or "exp_name" not in given:
            return {}
        output_dir = given.get("output_dir", cls.output_dir)
        folder = output_dir / given["exp_name"]
        if (folder / CONFIG_FILE).exists():
            run = cls.read(folder)
            return {field.name: getattr(run, field.name) for field in fields(cls)} | {"resume_step": 0}
        if "data_dir" in given:
            return {}
        runs = sorted(path.parent.name for path in output_dir.glob(f"*/{CONFIG_FILE}"))
        there = f"the runs in {output_dir} are {some_of(runs)}" if runs else f"{output_dir} has no runs"
        raise UserError(f"--resume: {folder} is no run; {there}")

    @classmethod
    def of_run(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What a run's own file says, as options: not from which step its last command resumed."""
        known = {name: value for name, value in values.items() if name not in ("resume", "resume_step")}
        return BEFORE | known if values.get("use_proj_loss") else known

    def check_continues(self, earlier: "TrainConfig") -> None:
        """UserError naming the first option that contradicts the run which this one continues."""
        free = FREE_ON_RESUME - ({"max_train_steps", "epochs"} if self.lr_schedule == "cosine" else set())
        mine, theirs = self.to_dict(), earlier.to_dict()
        for option, value in mine.items():
            if option not in free and value != theirs[option]:
                raise UserError(
                    f"{self.folder} holds a run with {as_typed(option, theirs[option])}, this command says "
                    f"{as_typed(option, value)}: give that, or another --exp-name"
                )


def _interval(given: int | None, published: int, total_steps: int, log_steps: int) -> int:
    """The steps that were given, or else the published ones where they fit into the run five times."""
    if given is not None:
        return given
    if total_steps >= FEWEST_INTERVALS * published:
        return published
    share = math.ceil(total_steps / SHARES_OF_SHORT_RUNS)
    return share - share % log_steps if share >= log_steps else share  # where metrics are due as well
