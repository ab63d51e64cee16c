"""The configuration that all kinds of networks share, without importing torch, so that help is fast."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from stablevm.support.errors import UserError, arg

PROJECTOR_KINDS = ("mlp", "conv")  # REPA's and iREPA's
LARGEST_WIDTH = 65_536
# Far above any real network: a file with larger values is damaged, or meant to exhaust the machine.
_LARGEST = {
    "input_size": 4096,
    "in_channels": 4096,
    "depth": 512,
    "num_classes": 10_000_000,
    "encoder_depth": 512,
    "projector_hidden": 262_144,
}
_MOST_PROJECTORS = 64
# A network may differ in these (other classes, projectors or attention kernel) and still take over the weights.
_FREE = ("name", "num_classes", "fused_attn")
PROJECTOR_FACTS = ("projector_dims", "projector_kind", "projector_hidden", "encoder_depth")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """All that determines a network's shape and arithmetic; saved in each checkpoint.

    A subclass adds the fields of its kind, and raises UserError in `__post_init__` for values it does not support.
    """

    kind: ClassVar[str]  # the name of the class in checkpoints
    label_table: ClassVar[str]  # the weight that has a row for each class and one, the last, for the null class
    takes_intervals: ClassVar[bool] = False  # whether `forward` takes `r`, if `intervals` says so
    takes_cls_token: ClassVar[bool] = False  # whether the kind supports `cls_token_dim`

    name: str
    input_size: int  # side of the latent, in latent pixels
    in_channels: int
    num_classes: int  # without the null class
    depth: int  # blocks
    qk_norm: bool = False
    intervals: bool = False  # it predicts the mean velocity from time r to t, for MeanFlow, and not only that at t
    fused_attn: bool = True
    encoder_depth: int = 8  # 1-based block whose tokens the projectors read
    projector_dims: tuple[int, ...] = ()  # feature widths of the frozen encoders, one projector each
    projector_kind: str = "mlp"  # "mlp" (REPA) or "conv" (iREPA)
    projector_hidden: int = 2048
    cls_token_dim: int = 0  # width of the class token that is denoised with the latent (REG); 0 without

    @property
    def null_class(self) -> int:
        """The label that means "no label", the row after the last class in the label table."""
        return self.num_classes

    @property
    def grid_size(self) -> int:
        """The number of tokens per side."""
        raise NotImplementedError

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of one input: (C, h, w), or (C h w + D,) with a class token of width D (`joint_state`)."""
        shape = (self.in_channels, self.input_size, self.input_size)
        return (math.prod(shape) + self.cls_token_dim,) if self.cls_token_dim else shape

    def __post_init__(self) -> None:
        """Raise UserError for an impossible network, or one so large that building it would exhaust the machine."""
        for name, largest in _LARGEST.items():
            check_within(self, name, largest)
        widths = self.projector_dims
        if len(widths) > _MOST_PROJECTORS or not all(1 <= width <= LARGEST_WIDTH for width in widths):
            raise UserError(
                f"projector_dims {list(widths[:4])}, expected at most {_MOST_PROJECTORS} of 1 to {LARGEST_WIDTH:,}"
            )
        if self.intervals and not self.takes_intervals:
            raise UserError(f"{self.name}: networks of this kind take no start of an interval, which MeanFlow needs")
        if not 0 <= self.cls_token_dim <= LARGEST_WIDTH:
            raise UserError(f"cls_token_dim {self.cls_token_dim}, expected 0 to {LARGEST_WIDTH:,}")
        if self.cls_token_dim and not self.takes_cls_token:
            raise UserError(f"{arg('cls_token')}: a network of kind {self.kind} does not support it")
        if self.projector_kind not in PROJECTOR_KINDS:
            raise UserError(f"projector_kind {self.projector_kind}, expected one of {', '.join(PROJECTOR_KINDS)}")

    def weight_facts(self) -> dict[str, Any]:
        """The facts that determine the meaning of all weights except the label table's and the projectors'."""
        free = {*_FREE, *PROJECTOR_FACTS}
        names = (field.name for field in fields(self))
        return {"kind": self.kind} | {name: getattr(self, name) for name in names if name not in free}

    def to_dict(self) -> dict[str, Any]:
        """The fields as a checkpoint's card holds them, with the kind, by which they are read again."""
        return {"kind": self.kind, **asdict(self)}


def check_within(config: NetworkConfig, name: str, largest: int) -> None:
    """Raise UserError if the field `name` is not between 1 and `largest`."""
    value = getattr(config, name)
    if not 1 <= value <= largest:
        raise UserError(f"{name} {value}, expected 1 to {largest:,}")
