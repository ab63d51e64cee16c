"""JiT (Li and He, 2025, "Back to Basics: Let Denoising Generative Models Denoise"): a transformer on patches of pixels.

Large patches have more values than a token. A narrow layer embeds them, and the network is meant to predict the data,
which lie near a surface of few dimensions, while noise and velocity do not. Parameters have the published names.
"""

import torch
from torch import Tensor, nn

from stablevm.networks.initialisation import normal
from stablevm.networks.jit_config import JiTConfig
from stablevm.networks.lightning_dit import LightningDiT
from stablevm.networks.transformer import EMBEDDING_STD


class JiT(LightningDiT):
    """LightningDiT's blocks with a bottleneck before them, and tokens of the label among those of the patches."""

    config: JiTConfig

    def _build(self) -> None:
        super()._build()
        self.in_context_posemb = nn.Parameter(torch.empty(1, self.config.label_tokens, self.config.hidden_size))

    def _embedder(self) -> nn.Module:
        return BottleneckEmbed(self.config)

    def _initialise(self, generator: torch.Generator) -> None:
        super()._initialise(generator)
        normal(self.in_context_posemb, EMBEDDING_STD, generator)

    def _run_blocks(self, tokens: Tensor, condition: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        context, extended = self._context(tokens.device), self._context(tokens.device, config.label_tokens)
        extra, seen = 0, tokens
        for number, block in enumerate(self.blocks, start=1):
            if number == config.labels_from:
                extra, context = config.label_tokens, extended
                tokens = torch.cat([label[:, None] + self.in_context_posemb, tokens], dim=1)
            tokens = self._through(block, tokens, condition, *context)
            if number == config.encoder_depth:
                seen = tokens[:, extra:]
        return tokens[:, extra:], seen


class BottleneckEmbed(nn.Module):
    """The embedding of images (B, C, H, W) as tokens (B, T, hidden), row by row, by two linear layers of each patch."""

    def __init__(self, config: JiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj1 = nn.Conv2d(config.in_channels, config.bottleneck, kernel_size=patch, stride=patch, bias=False)
        self.proj2 = nn.Conv2d(config.bottleneck, config.hidden_size, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.proj2(self.proj1(images)).flatten(2).transpose(1, 2)
        return tokens
