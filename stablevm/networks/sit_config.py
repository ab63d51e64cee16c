"""What defines a SiT network, and the table of named sizes. Free of torch, so that a command's help stays quick."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from stablevm.networks.network_config import LARGEST_WIDTH, NetworkConfig, check_within
from stablevm.support.errors import UserError, arg


@dataclass(frozen=True)
class SiTSize:
    """One row of the size table. `time_scale` multiplies t before its sinusoidal embedding; `projector_hidden` is the
    width inside REPA's projectors.
    """

    depth: int
    hidden_size: int
    num_heads: int
    time_scale: float = 1.0
    projector_hidden: int = 2048


# SiT (Ma et al., 2024), table 1. Those networks feed t in [0, 1] to frequencies made for [0, 1000]; the small sizes
# for 8-pixel images scale t by 1000 instead, which trains much faster (docs/experiments.md).
SIZES = {
    "SiT-XL": SiTSize(depth=28, hidden_size=1152, num_heads=16),
    "SiT-L": SiTSize(depth=24, hidden_size=1024, num_heads=16),
    "SiT-B": SiTSize(depth=12, hidden_size=768, num_heads=12),
    "SiT-S": SiTSize(depth=12, hidden_size=384, num_heads=6),
    "SiT-XS": SiTSize(depth=4, hidden_size=128, num_heads=4, time_scale=1000.0, projector_hidden=256),
    "SiT-XXS": SiTSize(depth=2, hidden_size=64, num_heads=2, time_scale=1000.0, projector_hidden=128),
}
PATCH_SIZES = {
    name: (1, 2, 4) if name in ("SiT-XS", "SiT-XXS") else (2, 4, 8)  # latents of 8 x 8 and of 32 x 32 and more
    for name in SIZES
}
MODEL_NAMES = tuple(f"{size}/{patch}" for size in SIZES for patch in PATCH_SIZES[size])


# Far above any network of this kind: a file that says more is damaged, or made to occupy the machine.
_LARGEST = {"patch_size": 4096, "hidden_size": LARGEST_WIDTH, "num_heads": 1024}
_LARGEST_POSITIONS = 2**28  # values of the table of positions


@dataclass(frozen=True, kw_only=True)
class SiTConfig(NetworkConfig):
    """A SiT network."""

    kind: ClassVar[str] = "sit"
    label_table: ClassVar[str] = "y_embedder.embedding_table.weight"

    patch_size: int
    hidden_size: int
    num_heads: int
    mlp_ratio: float = 4.0
    time_scale: float = 1.0

    @property
    def grid_size(self) -> int:
        """Tokens per side."""
        return self.input_size // self.patch_size

    def __post_init__(self) -> None:
        """UserError for a network that can't be, or that nobody has: building it would take the machine down."""
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


def sit_config(name: str, *, input_size: int, in_channels: int, num_classes: int, **options: Any) -> SiTConfig:
    """The configuration of the size called `name` ("SiT-XL/2"), for latents of the given shape.

    Raises UserError for a name outside the table, a patch that does not divide the latent, or an aligned block
    that the network does not have.
    """
    size_name, _, patch = name.partition("/")
    if name not in MODEL_NAMES:
        raise UserError(f"{arg('model')} {name}: expected one of {', '.join(MODEL_NAMES)}")
    size = SIZES[size_name]
    if input_size % int(patch):
        raise UserError(
            f"{arg('model')} {name}: a patch of {patch} does not divide the latent of {input_size} x {input_size}"
        )
    values: dict[str, Any] = {**asdict(size), **options}
    config = SiTConfig(
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
