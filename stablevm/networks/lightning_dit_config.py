"""The configuration of LightningDiT networks and the names of their sizes, without torch, so that help is fast."""

from dataclasses import dataclass
from typing import Any, ClassVar

from stablevm.networks.transformer_config import TransformerConfig, names_of, sized_config
from stablevm.support.errors import UserError, arg
from stablevm.support.text import one_of

# XS and XXS are ours, for latents of 8 x 8; the published ones have the depth, width and heads of SiT's.
PATCH_SIZES = {"XL": (1, 2), "L": (1, 2), "B": (1, 2), "XS": (1, 2), "XXS": (1, 2)}
MODEL_NAMES = names_of("LightningDiT", PATCH_SIZES)


@dataclass(frozen=True, kw_only=True)
class LightningDiTConfig(TransformerConfig):
    """The configuration of a LightningDiT network (Yao et al., 2025), with rotary positions, SwiGLU and RMSNorm."""

    kind: ClassVar[str] = "lightning_dit"
    label_table: ClassVar[str] = "y_embedder.embedding_table.weight"

    @property
    def mlp_width(self) -> int:
        """The width inside SwiGLU: 2/3 of `mlp_ratio` times the hidden size, because it has three matrices, not two."""
        return int(2 / 3 * int(self.hidden_size * self.mlp_ratio))

    def __post_init__(self) -> None:
        """Raise UserError also for heads whose width does not suit rotary positions in two dimensions."""
        super().__post_init__()
        if self.hidden_size // self.num_heads % 4:
            raise UserError(
                f"hidden_size {self.hidden_size} with num_heads {self.num_heads}, expected heads whose width is a "
                "multiple of 4, which rotary positions need"
            )


def lightning_dit_config(
    name: str, *, input_size: int, in_channels: int, num_classes: int, **options: Any
) -> LightningDiTConfig:
    """The configuration of the LightningDiT network called `name`, such as "LightningDiT-XL/1".

    The other arguments and errors are those of `sit_config`.
    """
    if name not in MODEL_NAMES:
        raise UserError(f"{arg('model')} {name}: expected {one_of(name, MODEL_NAMES)}")
    return sized_config(
        LightningDiTConfig, name, input_size=input_size, in_channels=in_channels, num_classes=num_classes, **options
    )
