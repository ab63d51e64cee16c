"""The diffusion transformer (DiT: Peebles and Xie, 2023) that SiT and LightningDiT fill with blocks of their own.

Patches with fixed positions go through blocks that time and label modulate (adaLN-zero), with REPA's projectors (Yu et
al., 2024) beside them. Parameters carry the names of the published checkpoints.
"""

import math
from abc import abstractmethod

import torch
from timm.models.vision_transformer import PatchEmbed
from torch import Tensor, nn

from stablevm.networks.backbone import Backbone
from stablevm.networks.initialisation import materialize, normal, xavier_uniform
from stablevm.networks.projectors import build_projector
from stablevm.networks.transformer_config import TransformerConfig
from stablevm.support.precision import without_autocast

MAX_PERIOD = 10_000.0  # longest wave of a sinusoidal embedding, over 2 pi (Vaswani et al., 2017, section 3.5)
TIME_WAVES = 256  # cosines and sines that describe t (DiT's and SiT's code)
EMBEDDING_STD = 0.02  # of label rows and of the time embedder's weights at the start (DiT's code)


class DiffusionTransformer(Backbone):
    """Predicts a velocity (or whatever the loss asks for) from a noisy latent, its time and its label.

    A subclass says which blocks and which normalisation there are, and what the blocks are told besides the condition.
    """

    config: TransformerConfig

    def __init__(self, config: TransformerConfig, generator: torch.Generator | None = None) -> None:
        """Build the network on the default device.

        `generator` is a CPU generator that all first values are drawn from; without one, a generator seeded 0.
        """
        super().__init__()
        self.config = config
        with torch.device("meta"):  # layers made here neither take memory nor draw from the global random state
            self._build()
        self._initialise(generator or torch.Generator().manual_seed(0))

    @abstractmethod
    def _block(self) -> nn.Module:
        """One block: from tokens (B, T, hidden), the condition (B, hidden) and `_context` to tokens."""

    @abstractmethod
    def _norm(self) -> nn.Module:
        """The normalisation of tokens before the output."""

    def _context(self, device: torch.device) -> tuple[Tensor, ...]:
        """What all blocks are given besides tokens and condition."""
        return ()

    def _build(self) -> None:
        config, hidden = self.config, self.config.hidden_size
        self.x_embedder = PatchEmbed(config.input_size, config.patch_size, config.in_channels, hidden)
        self.t_embedder = TimeEmbedder(hidden, config.time_scale)
        self.y_embedder = LabelEmbedder(config.num_classes, hidden)
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid_size**2, hidden), requires_grad=False)
        self.blocks = nn.ModuleList(self._block() for _ in range(config.depth))
        self.projectors = nn.ModuleList(
            build_projector(
                config.projector_kind,
                hidden_size=hidden,
                projector_hidden=config.projector_hidden,
                feature_dim=feature_dim,
                grid_size=config.grid_size,
            )
            for feature_dim in config.projector_dims
        )
        self.final_layer = FinalLayer(self._norm(), hidden, config.patch_size**2 * config.in_channels)

    def _initialise(self, generator: torch.Generator) -> None:
        """DiT's first values; adaLN and the output layer stay zero, so that each block starts as the identity."""
        materialize(self)
        xavier_uniform(self.x_embedder, generator)
        xavier_uniform(self.blocks, generator)
        for name, parameter in self.blocks.named_parameters():
            if "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
        for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
            normal(self.get_parameter(f"{name}.weight"), EMBEDDING_STD, generator)
        xavier_uniform(self.projectors, generator)  # last: the rest is the same with projectors and without
        with torch.no_grad():
            self.pos_embed.copy_(position_embedding(self.config.grid_size, self.config.hidden_size))

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, features: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The prediction (B, C, H, W) for latents x (B, C, H, W), times t (B,) in [0, 1] and labels y (B,) int64.

        Labels run from 0 to num_classes; the last one is the null class, "no label". With `features`, returns
        (prediction, one tensor of tokens (B, T, feature_dim) per projector), read after block `encoder_depth`;
        without, the projectors don't run.
        """
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        context = self._context(x.device)
        projected: list[Tensor] = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, condition, *context)
            if features and number == self.config.encoder_depth:
                projected = [projector(tokens) for projector in self.projectors]
        prediction = self._unpatchify(self.final_layer(tokens, condition))
        return (prediction, projected) if features else prediction

    def compile_blocks(self) -> None:
        """Let torch.compile make faster kernels of the blocks, which all share one; names of parameters stay."""
        for block in self.blocks:
            block.compile()

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, p * p * C), each patch row by row with channels last, to (B, C, H, W)."""
        grid, patch = self.config.grid_size, self.config.patch_size
        cells = patches.reshape(-1, grid, grid, patch, patch, self.config.in_channels)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.in_channels, *2 * (grid * patch,))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero: DiT, section 3.2)."""

    def __init__(
        self, hidden_size: int, *, norms: tuple[nn.Module, nn.Module], attn: nn.Module, mlp: nn.Module
    ) -> None:
        """attn: from tokens (B, T, hidden), and what else the block is given, to tokens; mlp: from tokens alone."""
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn, self.mlp = attn, mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, tokens: Tensor, condition: Tensor, *context: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        tokens = tokens + gate_msa * self.attn(modulate(self.norm1(tokens), shift_msa, scale_msa), *context)
        return tokens + gate_mlp * self.mlp(modulate(self.norm2(tokens), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """From tokens (B, T, hidden) to patches (B, T, patch_values)."""

    def __init__(self, norm: nn.Module, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = norm
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(tokens), shift, scale))


class TimeEmbedder(nn.Module):
    """Times (B,) to vectors (B, hidden), through waves of 128 frequencies."""

    def __init__(self, hidden_size: int, time_scale: float) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.mlp = nn.Sequential(nn.Linear(TIME_WAVES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """In float32 under autocast too: half precision can't tell neighbouring times apart."""
        with without_autocast(t.device):
            angles = (self.time_scale * t.float())[:, None] * time_frequencies(t.device)
            waves = torch.cat([angles.cos(), angles.sin()], dim=1)
            return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) to vectors (B, hidden): a row for each class and one for the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


def time_frequencies(device: torch.device) -> Tensor:
    """Of the cosines and sines that describe a time: (128,) float32, falling from 1."""
    count = TIME_WAVES // 2
    return torch.exp(-math.log(MAX_PERIOD) * torch.arange(count, dtype=torch.float32, device=device) / count)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def position_embedding(grid_size: int, dim: int) -> Tensor:
    """Fixed sines and cosines of a token's column (first half) and row (second half): (grid_size^2, dim), float64.

    `dim` is a multiple of 4. The values are those of DiT's `get_2d_sincos_pos_embed`.
    """
    with torch.device("cpu"):
        frequencies = MAX_PERIOD ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        angles = torch.outer(torch.arange(grid_size, dtype=torch.float64), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, dim=0)], dim=1)
