"""The configuration of SiT networks and the names of their sizes, without importing torch, so that help is fast."""

from dataclasses import dataclass
from typing import Any, ClassVar

from stablevm.networks.transformer_config import SIZES, TransformerConfig, names_of, sized_config
from stablevm.support.errors import UserError, arg
from stablevm.support.text import one_of

PATCH_SIZES = {
    # latents of 8 x 8, and of 16 x 16 to 128 x 128
    size: (1, 2, 4) if size in ("XS", "XXS") else (1, 2, 4, 8)
    for size in SIZES
}
MODEL_NAMES = names_of("SiT", PATCH_SIZES)


@dataclass(frozen=True, kw_only=True)
class SiTConfig(TransformerConfig):
    """The configuration of a SiT network."""

    kind: ClassVar[str] = "sit"
    label_table: ClassVar[str] = "y_embedder.embedding_table.weight"


def sit_config(name: str, *, input_size: int, in_channels: int, num_classes: int, **options: Any) -> SiTConfig:
    """The configuration of the SiT network called `name`, such as "SiT-XL/2".

    Its latents have the shape (in_channels, input_size, input_size). options: other fields of the configuration.
    Raises UserError for an unknown name, a patch that does not divide the latent, or an `encoder_depth` beyond the
    network's blocks.
    """
    if name not in MODEL_NAMES:
        raise UserError(f"{arg('model')} {name}: expected {one_of(name, MODEL_NAMES)}")
    return sized_config(
        SiTConfig, name, input_size=input_size, in_channels=in_channels, num_classes=num_classes, **options
    )
