"""Terms of the loss beside the velocity's: what they need, and their value. `setup.TERMS` lists them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stablevm.objective import Draw


@dataclass(frozen=True)
class Output:
    """What the network made of one micro-batch."""

    prediction: Tensor  # (b, *shape)
    tokens: list[Tensor]  # (b, T, D) of each projector; empty where no term needs them


# From the output for a micro-batch to its share of the term: over micro-batches and processes the shares add up.
Share = Callable[[Output], Tensor]


class Term(ABC):
    """A term of the loss, which is `velocity_loss + sum of coefficient * value`."""

    name: str  # of its column in metrics.jsonl
    coefficient: float
    needs_images = False  # of the samples that are perturbed
    needs_tokens = False  # of the network's projectors

    @abstractmethod
    def begin(self, draw: Draw, images: Tensor | None, total: Callable[[Tensor], Tensor]) -> Callable[[slice], Share]:
        """Called once a step, on the process's samples; returns what is called for each micro-batch before the network
        runs.

        images: (B, 3, H, W) uint8 on the device, None unless needed. total: the sum of a tensor over all processes.
        """

    def frozen(self) -> Sequence[tuple[nn.Module, float]]:
        """Networks that the term runs on images, each with the share of images that it sees on average."""
        return ()
