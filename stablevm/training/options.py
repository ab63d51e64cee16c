"""The options of `train` in the groups in which `--help` lists them. Free of torch, so that help stays quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

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
from stablevm.support.ranges import (
    ABOVE_0,
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
    """SiT-{S,B,L,XL}/{1,2,4,8}, LightningDiT-{B,L,XL}/{1,2}; for pixels JiT-{B,L,H}/{16,32}; for small images
    SiT-{XXS,XS}/{1,2,4}, LightningDiT-{XXS,XS}/{1,2}, JiT-{XXS,XS}/{2,4}."""
    qk_norm: bool = False
    """Normalise queries and keys; JiT always does."""
    cls_token: bool = False
    """Denoise the class token of the first encoder of --enc-type beside the image, as one more token (REG). Those of
    all images are computed once, before the first step. It needs --use-proj-loss."""
    cls_coeff: NotNegative = 0.03
    """Weight of the class token's loss, 0 or more."""
    init_from: Path | None = None
    """Start from the weights of this checkpoint folder, of the newest one of this run's folder, or of
    hf:OWNER/NAME[@REVISION] on the Hugging Face Hub, instead of random ones: fine-tuning, also after an import."""
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
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the matrices of the network's blocks, with AdamW for all else (torch 2.9 or newer)."""
    muon_momentum: Decay = 0.95
    """Muon's decay of the mean gradient, in [0, 1)."""
    learning_rate: Positive = 1e-4
    """Rate of the optimiser; Muon's is scaled so that its steps are as large as AdamW's."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """constant, or falling along a half cosine to 5 % at the last step."""
    lr_warmup_steps: Natural = 0
    """Steps over which the rate rises linearly from 0."""
    adam_beta1: Decay = 0.9
    """AdamW's decay of the mean gradient, in [0, 1)."""
    adam_beta2: Decay = 0.999
    """AdamW's decay of the mean squared gradient, in [0, 1)."""
    adam_weight_decay: NotNegative = 0.0
    """Weight decay of the optimiser, 0 or more."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon, above 0."""
    max_grad_norm: Annotated[float, Range("0 or more; 0 does not clip", 0)] = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    ema_decay: Decay = 0.9999
    """Decay d of the weights' moving average, in [0, 1); after n steps min(d, (1 + n) / (10 + n)) is used."""
    average_every: Natural = 0
    """Also follow two averages of power-function profile (EDM2), and save them every this many steps, and at the end:
    stablevm average makes one of any width from these snapshots. 0: never."""
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
    loss_space: Prediction | None = None
    """Where the squared error is measured: v, with --prediction x, in the velocity that the predicted data imply, as
    in JiT; times below 0.05 count as that. Default: as --prediction says."""
    weighting: TimeName = "uniform"
    """Distribution of training times: uniform; lognormal: EDM's noise levels, ln(sigma/alpha) ~ N(-1.2, 1.2^2);
    logit_normal: ln(sigma/alpha) ~ N(0, 1)."""
    weighting_mean: float | None = None
    """Mean of ln(sigma/alpha) with lognormal or logit_normal times. Default: that of --weighting."""
    weighting_std: Positive | None = None
    """Deviation of ln(sigma/alpha) with them, more than 0. Default: that of --weighting."""
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
class MeanFlowOptions:
    """Training for images in one or a few steps (MeanFlow)."""

    GROUP: ClassVar[str] = "meanflow"

    meanflow: bool = False
    """Learn the mean velocity over intervals of time, for generate --mode meanflow (MeanFlow). The targets are made
    from the velocities of --loss-type: those of one sample, or StableVM's."""
    meanflow_instants: Chance = 0.75
    """Share of samples whose interval is a single time, as in flow matching, in [0, 1]."""
    meanflow_power: NotNegative = 1.0
    """Power p of the adaptive weight 1 / (squared error + 0.001)^p, 0 or more: 1 as published. With StableVM's
    velocities 0.5 was better (docs/results.md)."""
    meanflow_omega: NotNegative = 1.0
    """Guidance inside the target, 0 or more: the weight of the sample's velocity. Images then need no guidance of
    their own; its scale is omega / (1 - kappa), and 1 is none."""
    meanflow_kappa: Decay = 0.0
    """Weight of the network's own velocity with label in that guidance, in [0, 1)."""
    meanflow_guidance_low: Time = 0.0
    """Lowest time with guidance inside the target, in [0, 1]."""
    meanflow_guidance_high: Time = 1.0
    """Highest time with guidance inside the target, in [0, 1]."""


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
    proj_k: Annotated[float, ABOVE_0] = 20.0
    """Steepness of the sigmoid, more than 0."""
    encoder_depth: int = 8
    """Block, counted from 1, whose tokens are aligned."""
    enc_type: str = "dinov2-vit-b"
    """Frozen encoders separated by commas: dinov2-vit-b and the other published names, any timm name,
    digits, extractor (the network of stablevm extractor), or masked (that of stablevm encoder)."""
    encoder_weights: str | None = None
    """Files of the encoders' weights separated by commas, for machines without a network connection."""
    features_dir: Path | None = None
    """Folder of the encoder's tokens (stablevm prepare features), which are read instead of running the encoder; with
    --encoder-weights it is checked that they are of these weights."""
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
    """Write a checkpoint every this many steps, and at the end. Default: 50,000, or about a tenth of a run of
    fewer than 250,000 steps; of those between multiples of 50,000 the newest two are kept, to resume from."""
    checkpoints_kept: Natural = 0
    """Keep only this many of the newest checkpoints; 0 keeps all."""
    keep_best: Literal["loss", "velocity_loss", "alignment_loss"] | None = None
    """Also keep, as checkpoints/best, the checkpoint with the lowest mean of this metric over the steps before it."""
    log_steps: Count = 10
    """Write metrics every this many steps, at each checkpoint, and at the end."""
    sampling_steps: Natural | None = None
    """Make a grid of samples every this many steps, and at the end; 0: never. Default: 10,000, or about a tenth of a
    run of fewer than 50,000 steps."""
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
    """Reference file to evaluate against (stablevm reference); with --eval-extractor, the folder of splits."""
    eval_extractor: str | None = None
    """Evaluate digits or other small images: folder of the extractor that was trained on real ones."""
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
    checkpoint_activations: bool = False
    """Keep only the inputs of the network's blocks for the backward pass, which computes the rest again: the same
    numbers, much less memory, about a third more work."""


@dataclass(frozen=True, kw_only=True)
class UnneededOptions:
    """Options of StableVelocity's train.py that change nothing here, and are taken so that its commands run."""

    GROUP: ClassVar[str] = "unneeded"

    logging_dir: str | None = None
    """Logs are in OUTPUT_DIR/EXP_NAME."""
    legacy: bool = False
    """The names of early checkpoints are known to stablevm import."""
    bank_chunk_size: int | None = None
    """References are processed in blocks that fit into memory, with the same result."""
