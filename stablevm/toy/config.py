"""The options of `stablevm toy`. Free of torch, so that `--help` stays quick."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from stablevm.support.errors import UserError
from stablevm.support.options import idle_warnings, require, writable
from stablevm.support.ranges import TIME_ABOVE_0, Count, Decay, Natural, Positive, Range

Method = Literal["cfm", "stf", "stable_vm", "stable_vm_efficient"]
METHODS: tuple[Method, ...] = get_args(Method)
_TWO = Range("at least 2", 2)
_TIMES = replace(TIME_ABOVE_0, words="times in (0, 1]")

# The options that a result depends on; the others choose what is run and plotted.
RESULT_FIELDS = (
    "vector_field", "components", "dimension", "batch_size", "references", "updates", "learning_rate", "max_grad_norm",
    "ema_decay", "ema_warmup", "network", "width", "depth", "dropout", "loss_reduction", "eval_every", "eval_samples",
    "eval_times",
)  # fmt: skip


@dataclass(frozen=True)
class ToyConfig:
    """Learn the field of a Gaussian mixture, where the exact one is known, with different training targets.

    Each method trains on the same mixture from the same initial weights; the Fisher divergence is the mean of
    |predicted - exact field|^2, summed over dimensions, against the closed form. Results go to OUTPUT_DIR/data, one
    file for each method, field and seed; finished ones are not computed again.
    """

    exp: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-e"])] = ("stable_vm",)
    """Methods: cfm, stf, stable_vm, stable_vm_efficient (never holds the references at once); several, or all."""
    vector_field: Literal["velocity", "score"] = "velocity"
    """The field that is learnt. The score is multiplied by sigma(t), in training, evaluation and figures."""
    seeds: Count = 1
    """Number of repetitions, with the seeds SEED, SEED + 1, and so on."""
    seed: Natural = 0
    """Seed of mixture, evaluation points, initial weights and training; 0 or more."""
    only_plot: bool = False
    """Plot the existing results and the variance curves, without training."""
    no_plot_variance: bool = False
    """Do not plot variance curves."""
    enable_visualization: bool = False
    """Also make PNG frames and GIFs: predicted, exact and difference fields, and trajectories from noise to data."""
    use_wandb: bool = False
    """Send metrics to wandb as well."""
    use_tensorboard: bool = False
    """Send metrics to TensorBoard as well."""
    imagenet_data_path: Path | None = None
    """A prepared data set whose variance curve is plotted too."""
    cifar10_data_path: Path | None = None
    """Folder of CIFAR-10's binary version (data_batch_1.bin, ...), whose variance curve is plotted too."""
    output_dir: Path = Path("plots")
    """Folder for figures; results go to its folder data."""
    components: Count = 100
    """Components of the mixture."""
    dimension: Count = 10
    """Dimensions of the mixture."""
    batch_size: Count = 256
    """Samples per update."""
    references: Count = 2048
    """References per update, drawn for each update and shared by the batch; stf needs BATCH_SIZE or more."""
    updates: Count = 20_000
    """Updates of Adam."""
    learning_rate: Positive = 1e-4
    """Adam's rate."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm, for all methods alike."""
    ema_decay: Decay = 0.999
    """Decay of the moving average of the weights, which is evaluated; in [0, 1)."""
    ema_warmup: bool = False
    """Let the moving average forget its first updates faster, as in `stablevm train`; the published study does not."""
    network: Literal["adaptive", "perceptron"] = "adaptive"
    """The published network, modulated by the time (14,634 parameters in 10 dimensions), or a plain perceptron."""
    width: Count = 32
    """Width of the network's hidden layers."""
    depth: Count = 4
    """Number of the network's hidden layers."""
    dropout: Decay = 0.1
    """Share of hidden values that training sets to 0; in [0, 1)."""
    loss_reduction: Literal["sum", "mean"] = "sum"
    """Sum squared errors over dimensions, as published, or average them; Adam hides the factor, clipping does not."""
    eval_every: Count = 500
    """Updates between evaluations; there is one before the first update as well."""
    eval_samples: Annotated[int, _TWO] = 10_000
    """Samples at each time of evaluation."""
    eval_times: tuple[Annotated[float, _TIMES], ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    """Times of evaluation, in (0, 1]; the first four are the published ones."""
    variance_dimensions: tuple[Count, ...] = (10, 100, 500)
    """Dimensions of the mixtures whose variance curves are plotted."""
    variance_samples: Annotated[int, _TWO] = 1000
    """Samples at each time of a variance curve."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that --exp names, in the order of METHODS."""
        names = [name for word in self.exp for name in word.split(",") if name]
        for name in names:
            if name not in (*METHODS, "all"):
                raise UserError(f"--exp {name}: expected {', '.join(METHODS)} or all")
        return METHODS if "all" in names else tuple(method for method in METHODS if method in names)

    def validate(self) -> None:
        """Raise UserError for the first option outside its range."""
        enough_for_stf = "stf" not in self.methods or self.references >= self.batch_size
        require(
            self,
            [
                ("exp", bool(self.methods), f"some of {', '.join(METHODS)}, or all"),
                ("references", enough_for_stf, f"at least --batch-size {self.batch_size} for stf"),
                ("eval_times", bool(self.eval_times), _TIMES.words),
                writable("output_dir", self.output_dir),
                ("dimension", self.dimension >= 2 or not self.enable_visualization, "at least 2 to draw a plane"),
            ],
        )

    def warnings(self) -> list[str]:
        """One line for each option that was given and has no effect with the others."""
        idle: dict[str, str] = {}
        if self.no_plot_variance:
            curve = ("variance_dimensions", "variance_samples", "imagenet_data_path", "cifar10_data_path")
            idle |= dict.fromkeys(curve, "--no-plot-variance")
        if self.only_plot:
            idle |= dict.fromkeys(("use_wandb", "use_tensorboard"), "--only-plot")
        return idle_warnings(self, idle)

    def result_settings(self) -> dict[str, Any]:
        """The options that a result depends on, as JSON holds them."""
        values = {name: value for name, value in asdict(self).items() if name in RESULT_FIELDS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


assert set(RESULT_FIELDS) <= {field.name for field in fields(ToyConfig)}
