"""Terms of the loss beside the velocity loss: their interface, VA-REPA's alignment, contrastive flow matching."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablevm.alignment import AlignmentSchedule, alignment_loss, normalize_over_space, weighted_alignment
from stablevm.draw import Draw
from stablevm.interpolant import get_interpolant
from stablevm.networks.encoders import Encoder
from stablevm.objective import squared_error
from stablevm.support import rng
from stablevm.support.errors import UserError
from stablevm.training.config import TrainConfig

WEIGHT_GRID = 1000  # times from which the share of images that encoders see is computed


@dataclass(frozen=True)
class Output:
    """The output of the network for one micro-batch."""

    prediction: Tensor  # (b, *shape)
    tokens: list[Tensor]  # (b, T, D) of each projector; empty if no term needs them
    cls_token: Tensor | None = None  # (b, D) of the network, if it has a class token


@dataclass(frozen=True)
class Samples:
    """The samples of one step in this process, which are at `positions` in the global batch."""

    draw: Draw
    images: Tensor | None  # (B, 3, H, W) uint8 of the samples, on the device; None if no term needs them
    positions: range
    total: Callable[[Tensor], Tensor]  # the sum of a tensor over all processes
    gather: Callable[[Tensor], Tensor]  # rows (b, ...) of each process to those of all, (processes * b, ...), in order
    # The class tokens (B, D) of the samples, and the targets for the network's, if it has one. (The draw's target, x0
    # and noise are those of the latents alone.)
    cls_tokens: Tensor | None = None
    cls_target: Tensor | None = None
    weights: Tensor | None = None  # (B,) of the squared errors, where `loss_space` asks for some

    def error(self, prediction: Tensor, target: Tensor, span: slice) -> Tensor:
        """The squared error (b,) of the rows of `span`, weighed for the space of the loss."""
        found = squared_error(prediction, target)
        return found if self.weights is None else found * self.weights[span]


# From the output for a micro-batch to its share of the term; shares add up over micro-batches and processes.
Share = Callable[[Output], Tensor]


class Term(ABC):
    """A term of the loss, which is `velocity_loss + sum of coefficient * value`."""

    name: str  # the column in metrics.jsonl
    coefficient: float
    needs_images = False  # whether it needs the images of the perturbed samples
    needs_tokens = False  # whether it needs the tokens of the network's projectors
    stops_at: int | None = None  # the number of steps after which it no longer belongs to the loss; None: never

    def describe(self) -> str:
        """What it does, in a line for the start of a run; empty where its name says it all."""
        return ""

    @abstractmethod
    def begin(self, samples: Samples) -> Callable[[slice], Share]:
        """Prepare a step, and return a function that is called for each micro-batch before the network runs.

        That function takes the slice of the micro-batch, and returns a function from the network's output to the
        micro-batch's share of the term.
        """

    def is_on(self, step: int) -> bool:
        """Whether the term belongs to the loss after `step` steps."""
        return self.stops_at is None or step < self.stops_at

    def release(self) -> None:  # noqa: B027 (most terms hold nothing)
        """Give back the memory of what a term that has stopped no longer needs."""

    def frozen(self) -> Sequence[tuple[nn.Module, float]]:
        """The networks that the term runs on images, each with the average share of images that it sees."""
        return ()


@dataclass(frozen=True)
class Alignment(Term):
    """The alignment term: the mean over encoders, each with its projector, with weights that depend on the time."""

    encoders: list[Encoder]
    schedule: AlignmentSchedule
    coefficient: float
    irepa_gamma: float | None  # None without iREPA
    summary: str = ""
    stops_at: int | None = None  # HASTE (Wang et al., 2025): alignment helps early in training and hinders later

    name = "alignment_loss"
    needs_images = needs_tokens = True

    def __post_init__(self) -> None:
        if self.irepa_gamma is not None and any(encoder.grid_size == 1 for encoder in self.encoders):
            raise UserError(
                "--use-irepa: the network has one token per image, and iREPA normalises features over tokens; "
                "choose a --model of smaller patches or leave it out"
            )

    def describe(self) -> str:
        return self.summary + (f"; in the first {self.stops_at:,} steps" if self.stops_at else "")

    def features(self, encoder: Encoder, images: Tensor) -> Tensor:
        """The target tokens (B, T, D) for the projector of this encoder."""
        tokens = encoder(images)
        return tokens if self.irepa_gamma is None else normalize_over_space(tokens, self.irepa_gamma)

    def begin(self, samples: Samples) -> Callable[[slice], Share]:
        """Compute the weights of the samples; their zeros are found on the host, without waiting for the GPU."""
        draw, images = samples.draw, samples.images
        assert images is not None
        weights = self.schedule(draw.host_t)
        whole = samples.total(rng.to_device(weights.sum(), draw.t.device))
        return lambda span: _Aim.at(images[span], weights[span], whole, self, self._cls_tokens(samples, span)).share

    def _cls_tokens(self, samples: Samples, span: slice) -> Tensor | None:
        """The class tokens (b, D) that are aligned too, as REG does; a convolution can't read the network's."""
        return None if samples.cls_tokens is None or self.irepa_gamma is not None else samples.cls_tokens[span]

    def release(self) -> None:
        """Let go of the encoders, once."""
        if self.encoders:
            self.encoders.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def frozen(self) -> Sequence[tuple[nn.Module, float]]:
        """The encoders, which see only images whose weight is not 0."""
        seen = float((self.schedule(torch.linspace(0, 1, WEIGHT_GRID)) != 0).float().mean())
        return [(encoder, seen) for encoder in self.encoders]


@dataclass(frozen=True)
class _Aim:
    """The targets for the tokens of one micro-batch."""

    rows: Tensor  # the n samples whose weight is not 0, the only ones that encoders see
    weights: Tensor  # (n,)
    total: Tensor  # sum of the weights over all micro-batches and processes
    features: list[Tensor]  # (n, T, D) for each encoder

    @classmethod
    def at(
        cls, images: Tensor, weights: Tensor, total: Tensor, alignment: Alignment, cls_tokens: Tensor | None
    ) -> "_Aim":
        """Compute the targets of images (b, 3, H, W) on the device with weights (b,) on the host.

        cls_tokens: (b, D) of the first encoder, for the network's class token.
        """
        active = weights.nonzero().squeeze(1)
        rows = rng.to_device(active, images.device)
        seen = images[rows]
        features = [alignment.features(encoder, seen) for encoder in alignment.encoders] if len(active) else []
        if features and cls_tokens is not None:
            features[0] = torch.cat([cls_tokens[rows][:, None], features[0]], dim=1)
        return cls(
            rows=rows,
            weights=rng.to_device(weights[active], images.device),
            total=total,
            features=features,
        )

    def share(self, output: Output) -> Tensor:
        """The micro-batch's share of the alignment loss, averaged over encoders."""
        actives = [tokens[self.rows] for tokens in output.tokens]
        features = self.features or [active.detach() for active in actives]  # no row: a 0 attached to the graph
        # The class token comes first; encoders after the first have none to compare it with.
        losses = [alignment_loss(ours[:, -aim.shape[1] :], aim) for ours, aim in zip(actives, features, strict=True)]
        return torch.stack([weighted_alignment(loss, self.weights, self.total) for loss in losses]).mean()


def alignment_term(config: TrainConfig, encoders: Sequence[Encoder]) -> Alignment | None:
    """The alignment term that the options request, or None; encoders: those that the options name."""
    if not config.use_proj_loss:
        return None
    schedule = config.proj_weight_schedule
    fading = "the same at all times" if schedule == "constant" else f"{schedule} around t = {config.proj_tau:g}"
    projector = f"iREPA, gamma {config.irepa_gamma:g}" if config.use_irepa else "REPA"
    return Alignment(
        encoders=list(encoders),
        schedule=AlignmentSchedule(
            config.proj_weight_schedule, get_interpolant(config.path_type), config.proj_tau, config.proj_k
        ),
        coefficient=config.proj_coeff,
        irepa_gamma=config.irepa_gamma if config.use_irepa else None,
        summary=f"block {config.encoder_depth} with {config.enc_type} ({projector}); weight {fading}",
        stops_at=config.proj_stop_step or None,
    )


@dataclass(frozen=True)
class Contrast(Term):
    """Contrastive flow matching (Stoica et al., 2025): minus the mean squared error to another sample's target.

    With the weight L the loss is `|u - v|^2 - L |u - v'|^2`, where v' belongs to the next sample of the global batch,
    whose order is random. Where E[v | x_t] minimises flow matching's loss, this one has its minimum at
    `(E[v | x_t] - L E[v']) / (1 - L)`: predictions are driven away from the mean of all targets by the factor
    1 / (1 - L). With StableVM's targets, which have the same expectations, it is the same.
    """

    coefficient: float

    name = "contrastive_loss"

    def describe(self) -> str:
        return (
            f"weight {self.coefficient:g}: the optimum is {1 / (1 - self.coefficient):.3g} times as far from the mean"
        )

    def begin(self, samples: Samples) -> Callable[[slice], Share]:
        targets, positions = samples.draw.target, samples.positions
        firsts = samples.gather(targets[:1])  # of each process
        last = positions.stop // len(positions) % len(firsts)
        others = torch.cat([targets[1:], firsts[last : last + 1]])
        count = len(firsts) * len(targets)
        return lambda span: lambda output: -squared_error(output.prediction, others[span]).sum() / count


def contrastive_term(config: TrainConfig, encoders: Sequence[Encoder]) -> Contrast | None:
    """The term that the options ask for."""
    return Contrast(config.contrastive_coeff) if config.contrastive_coeff else None


@dataclass(frozen=True)
class ClsToken(Term):
    """The mean squared error of the class token, which the network denoises beside the image (REG: Wu et al., 2025)."""

    coefficient: float
    encoder: str

    name = "cls_token_loss"

    def describe(self) -> str:
        return f"that of {self.encoder}, denoised as one more token"

    def begin(self, samples: Samples) -> Callable[[slice], Share]:
        target = samples.cls_target
        assert target is not None
        count = samples.total(torch.tensor(float(len(target)), device=target.device))

        def share_of(span: slice) -> Share:
            def share(output: Output) -> Tensor:
                assert output.cls_token is not None
                return samples.error(output.cls_token, target[span], span).sum() / count

            return share

        return share_of


def cls_token_term(config: TrainConfig, encoders: Sequence[Encoder]) -> ClsToken | None:
    """The term that the options ask for."""
    return ClsToken(config.cls_coeff, config.encoder_names[0]) if config.cls_token else None
