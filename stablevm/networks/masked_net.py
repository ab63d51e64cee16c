"""An encoder that learns without labels: a small vision transformer, trained as a masked autoencoder (MAE)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stablevm.networks.initialisation import materialize, xavier_uniform
from stablevm.networks.transformer import position_embedding
from stablevm.support.errors import UserError

WIDTH, DEPTH, HEAD_WIDTH = 128, 4, 32
DECODER_WIDTH, DECODER_DEPTH = 64, 1
LARGEST_GRID = 64  # tokens along a side
_PATCHES, _POSITIONS = "network.patch_embed.proj.weight", "network.pos_embed"


class MaskedNet(nn.Module):
    """The encoder of MAE (He et al., 2022), for images (B, channels, side, side) in [-1, 1].

    A patch becomes a token of width 128; there is no class token.
    """

    def __init__(
        self, generator: torch.Generator | None = None, *, side: int, patch_size: int, channels: int = 1
    ) -> None:
        """Build the network on the default device; parameters are drawn from a CPU generator, by default seeded 0.

        UserError unless the patches divide the image into a grid of 2 x 2 to 64 x 64.
        """
        super().__init__()
        if side % patch_size or not 2 <= side // patch_size <= LARGEST_GRID:
            raise UserError(
                f"images of {side} pixels and patches of {patch_size}: expected patches that divide the image into "
                f"2 x 2 to {LARGEST_GRID} x {LARGEST_GRID}"
            )
        self.side, self.patch_size, self.channels, self.dim = side, patch_size, channels, WIDTH
        self.grid_size = side // patch_size
        self.network = _transformer(side, patch_size, channels)
        materialize(self)
        xavier_uniform(self, generator or torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.network.pos_embed.copy_(position_embedding(self.grid_size, WIDTH))

    def patches(self, images: Tensor) -> Tensor:
        """The tokens (B, grid_size^2, 128) of images (B, channels, side, side), row by row."""
        return self.network.forward_features(images)

    def features(self, images: Tensor) -> Tensor:
        """The mean token (B, 128) of each image."""
        return self.patches(images).mean(1)

    def visible(self, images: Tensor, kept: Tensor) -> Tensor:
        """The tokens (B, n, 128) of the patches `kept`, int64 (B, n), computed from these patches alone."""
        tokens = self.network.patch_embed(images) + self.network.pos_embed
        return self.network.norm(self.network.blocks(_chosen(tokens, kept)))


class MaskedAutoencoder(nn.Module):
    """The encoder with a decoder of the masked patches' pixels, which nobody needs after the training."""

    positions: Tensor

    def __init__(self, encoder: MaskedNet, generator: torch.Generator) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        values = encoder.patch_size**2 * encoder.channels
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            self.enter = nn.Linear(WIDTH, DECODER_WIDTH)
            blocks = (Block(DECODER_WIDTH, DECODER_WIDTH // HEAD_WIDTH, qkv_bias=True) for _ in range(DECODER_DEPTH))
            self.decoder = nn.Sequential(*blocks, nn.LayerNorm(DECODER_WIDTH), nn.Linear(DECODER_WIDTH, values))
            self.masked = nn.Parameter(torch.empty(1, 1, DECODER_WIDTH))
        materialize(self)
        xavier_uniform(self, generator)
        self.register_buffer("positions", position_embedding(encoder.grid_size, DECODER_WIDTH).float())
        self.encoder = encoder

    def loss(self, images: Tensor, kept: Tensor) -> Tensor:
        """The mean squared error of the pixels of all patches but `kept`, int64 (B, n), for images in [-1, 1]."""
        seen = self.enter(self.encoder.visible(images, kept))
        places = kept.unsqueeze(2).expand(-1, -1, DECODER_WIDTH)
        tokens = self.masked.expand(len(images), len(self.positions), -1).scatter(1, places, seen)
        error = (self.decoder(tokens + self.positions) - self._cut(images)).square().mean(2)
        hidden = torch.ones_like(error).scatter(1, kept, 0.0)
        return (error * hidden).sum() / hidden.sum()

    def _cut(self, images: Tensor) -> Tensor:
        """The pixels of each patch: (B, grid_size^2, channels patch_size^2)."""
        size = self.encoder.patch_size
        return nn.functional.unfold(images, size, stride=size).transpose(1, 2)


def masked_net_for(weights: Mapping[str, Any]) -> MaskedNet | None:
    """A network of the size of these weights, which are not loaded; None if they are not those of such a network."""
    try:
        channels, patch_size = weights[_PATCHES].shape[1:3]
        grid = round(weights[_POSITIONS].shape[1] ** 0.5)
    except (KeyError, AttributeError, IndexError, ValueError):
        return None
    try:
        return MaskedNet(side=grid * patch_size, patch_size=patch_size, channels=channels)
    except (UserError, ZeroDivisionError):
        return None


def _transformer(side: int, patch_size: int, channels: int) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # timm draws from the global random state
        return VisionTransformer(
            img_size=side, patch_size=patch_size, in_chans=channels, num_classes=0, global_pool="avg", fc_norm=False,
            class_token=False, embed_dim=WIDTH, depth=DEPTH, num_heads=WIDTH // HEAD_WIDTH,
        )  # fmt: skip


def _chosen(tokens: Tensor, rows: Tensor) -> Tensor:
    return tokens.gather(1, rows.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
