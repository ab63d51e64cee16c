"""The configuration of JiT networks and the names of their sizes, without importing torch, so that help is fast."""

from dataclasses import dataclass
from typing import Any, ClassVar

from stablevm.networks.lightning_dit_config import LightningDiTConfig
from stablevm.networks.network_config import LARGEST_WIDTH, check_within
from stablevm.networks.transformer_config import SIZES, Size, names_of, sized_config
from stablevm.support.errors import UserError, arg
from stablevm.support.text import one_of


@dataclass(frozen=True)
class JiTSize(Size):
    """A row of JiT's table of sizes.

    bottleneck: the width between a patch's values and its token. label_tokens: how many tokens of the label are put
    before those of the patches. labels_from: the block, counted from 1, before which they are put there.
    """

    bottleneck: int = 128
    label_tokens: int = 32
    labels_from: int = 5


# JiT (Li and He, 2025), table 9 and code. XS and XXS are ours, for images of 8 x 8 to 32 x 32.
JIT_SIZES = {
    "H": JiTSize(depth=32, hidden_size=1280, num_heads=16, bottleneck=256, labels_from=11),
    "L": JiTSize(depth=24, hidden_size=1024, num_heads=16, labels_from=9),
    "B": JiTSize(depth=12, hidden_size=768, num_heads=12),
    "XS": JiTSize(**vars(SIZES["XS"]), bottleneck=16, label_tokens=4, labels_from=2),
    "XXS": JiTSize(**vars(SIZES["XXS"]), bottleneck=8, label_tokens=2, labels_from=2),
}
PATCH_SIZES = {"H": (16, 32), "L": (16, 32), "B": (16, 32), "XS": (2, 4), "XXS": (2, 4)}
MODEL_NAMES = names_of("JiT", PATCH_SIZES)


@dataclass(frozen=True, kw_only=True)
class JiTConfig(LightningDiTConfig):
    """The configuration of a JiT network (Li and He, 2025), for large patches of pixels."""

    kind: ClassVar[str] = "jit"

    bottleneck: int
    label_tokens: int
    labels_from: int

    def __post_init__(self) -> None:
        """Raise UserError also for a bottleneck or tokens of the label that can not be."""
        super().__post_init__()
        check_within(self, "bottleneck", LARGEST_WIDTH)
        check_within(self, "label_tokens", 1024)
        check_within(self, "labels_from", self.depth)


def jit_config(name: str, *, input_size: int, in_channels: int, num_classes: int, **options: Any) -> JiTConfig:
    """The configuration of the JiT network called `name`, such as "JiT-B/16".

    Its queries and keys are always normalised. The other arguments and errors are those of `sit_config`.
    """
    if name not in MODEL_NAMES:
        raise UserError(f"{arg('model')} {name}: expected {one_of(name, MODEL_NAMES)}")
    options["qk_norm"] = True
    return sized_config(
        JiTConfig,
        name,
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        sizes=JIT_SIZES,
        **options,
    )
