"""The configuration and sizes that SiT, LightningDiT and JiT share, without importing torch, so that help is fast."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

from stablevm.networks.network_config import LARGEST_WIDTH, NetworkConfig, check_within
from stablevm.support.errors import UserError, arg


@dataclass(frozen=True)
class Size:
    """A row of the table of sizes.

    time_scale: multiplies t before its sinusoidal embedding. projector_hidden: the width inside REPA's projectors.
    """

    depth: int
    hidden_size: int
    num_heads: int
    time_scale: float = 1.0
    projector_hidden: int = 2048


# SiT (Ma et al., 2024), table 1. Those networks embed t in [0, 1] with frequencies chosen for [0, 1000]. The small
# sizes, for 8-pixel images, multiply t by 1000, which trains much faster (docs/experiments.md).
SIZES = {
    "XL": Size(depth=28, hidden_size=1152, num_heads=16),
    "L": Size(depth=24, hidden_size=1024, num_heads=16),
    "B": Size(depth=12, hidden_size=768, num_heads=12),
    "S": Size(depth=12, hidden_size=384, num_heads=6),
    "XS": Size(depth=4, hidden_size=128, num_heads=4, time_scale=1000.0, projector_hidden=256),
    "XXS": Size(depth=2, hidden_size=64, num_heads=2, time_scale=1000.0, projector_hidden=128),
}

# Far above any real network: a file with larger values is damaged, or meant to exhaust the machine.
_LARGEST = {"patch_size": 4096, "hidden_size": LARGEST_WIDTH, "num_heads": 1024}
# With intervals the loss holds the derivative by t, which grows with the scale: at 1000 training diverges, at 10 it
# does not (docs/experiments.md).
LARGEST_INTERVAL_SCALE = 10.0
_LARGEST_POSITIONS = 2**28  # values of the position embedding


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(NetworkConfig):
    """The configuration of a transformer whose tokens are square patches of the latent, with fixed positions."""

    takes_intervals: ClassVar[bool] = True
    takes_cls_token: ClassVar[bool] = True

    patch_size: int
    hidden_size: int
    num_heads: int
    mlp_ratio: float = 4.0
    time_scale: float = 1.0

    @property
    def grid_size(self) -> int:
        """The number of tokens per side."""
        return self.input_size // self.patch_size

    def __post_init__(self) -> None:
        """Raise UserError for an impossible network, or one so large that building it would exhaust the machine."""
        super().__post_init__()
        for name, largest in _LARGEST.items():
            check_within(self, name, largest)
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(
                f"hidden_size {self.hidden_size}, expected a multiple of 4 and of num_heads {self.num_heads}"
            )
        if self.input_size % self.patch_size or self.grid_size**2 * self.hidden_size > _LARGEST_POSITIONS:
            raise UserError(
                f"input_size {self.input_size} with patch_size {self.patch_size}, expected a multiple of it, and at "
                f"most {_LARGEST_POSITIONS // self.hidden_size:,} patches"
            )
        if not 0 < self.mlp_ratio <= 64 or not 0 < self.time_scale <= 1e6:
            raise UserError(
                f"mlp_ratio {self.mlp_ratio}, time_scale {self.time_scale}: expected positive, small numbers"
            )


AnyConfig = TypeVar("AnyConfig", bound=TransformerConfig)


def names_of(family: str, patch_sizes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The names, such as SiT-XL/2, of each size with each of its patch sizes."""
    return tuple(f"{family}-{size}/{patch}" for size, patches in patch_sizes.items() for patch in patches)


def sized_config(
    kind: type[AnyConfig],
    name: str,
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    sizes: Mapping[str, Size] = SIZES,
    **options: Any,
) -> AnyConfig:
    """The configuration of the network called `name` (FAMILY-SIZE/PATCH), for square latents.

    sizes: the table in which the size is found, whose fields are those of the configuration.
    UserError for a patch that does not divide the latent, or an `encoder_depth` beyond the network's blocks.
    """
    size_name, _, patch = name.partition("-")[2].partition("/")
    if input_size % int(patch):
        raise UserError(
            f"{arg('model')} {name}: a patch of {patch} does not divide the latent of {input_size} x {input_size}; "
            "choose another patch size"
        )
    values: dict[str, Any] = {**asdict(sizes[size_name]), **options}
    if values.get("intervals"):
        values["time_scale"] = min(values["time_scale"], LARGEST_INTERVAL_SCALE)
    config = kind(
        name=name,
        input_size=input_size,
        in_channels=in_channels,
        patch_size=int(patch),
        num_classes=num_classes,
        **values,
    )
    if config.projector_dims and not 1 <= config.encoder_depth <= config.depth:
        raise UserError(
            f"{arg('encoder_depth')} {config.encoder_depth}: {name} has {config.depth} blocks; give 1 to {config.depth}"
        )
    return config
