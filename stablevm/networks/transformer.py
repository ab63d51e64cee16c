"""The diffusion transformer (DiT: Peebles and Xie, 2023), the common part of SiT, LightningDiT and JiT.

Patches with fixed position embeddings pass through blocks modulated by time and label (adaLN-zero). REPA's projectors
(Yu et al., 2024) read the tokens of one block. Parameters have the same names as in the published checkpoints.
"""

import math
from abc import abstractmethod

import torch
from timm.models.vision_transformer import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stablevm.networks.backbone import Backbone
from stablevm.networks.initialisation import materialize, normal, xavier_uniform
from stablevm.networks.joint_state import joined, parted
from stablevm.networks.projectors import build_projector
from stablevm.networks.transformer_config import TransformerConfig
from stablevm.support.precision import without_autocast

MAX_PERIOD = 10_000.0  # longest wavelength of a sinusoidal embedding / 2 pi (Vaswani et al., 2017, section 3.5)
TIME_WAVES = 256  # cosines and sines in the embedding of t (DiT's and SiT's code)
# Layers of a block whose weights hold several matrices, one below the other: queries, keys and values; six modulations;
# the gates and the values of SwiGLU.
FUSED = {"attn.qkv": 3, "adaLN_modulation.1": 6, "mlp.w12": 2}
EMBEDDING_STD = 0.02  # initial standard deviation of the label table and the time embedder (DiT's code)


class DiffusionTransformer(Backbone):
    """A transformer that predicts the velocity (or another target) from a noisy latent, a time and a label.

    A subclass defines the blocks, the normalisation, and further inputs of the blocks besides the condition.
    """

    config: TransformerConfig
    _saves_inputs_only = False  # for the backward pass, as `checkpoint_activations` asks

    def __init__(self, config: TransformerConfig, generator: torch.Generator | None = None) -> None:
        """Build the network on the default device.

        All parameters are drawn from `generator`, a CPU generator, or if None, from one seeded 0.
        """
        super().__init__()
        self.config = config
        with torch.device("meta"):  # these layers neither take memory nor draw from the global random state
            self._build()
        self._initialise(generator or torch.Generator().manual_seed(0))

    @abstractmethod
    def _block(self) -> nn.Module:
        """A new block, which maps tokens (B, T, hidden), the condition (B, hidden) and `_context` to tokens."""

    @abstractmethod
    def _norm(self) -> nn.Module:
        """A new normalisation layer for tokens."""

    def _embedder(self) -> nn.Module:
        """The layer from latents (B, C, H, W) to tokens (B, T, hidden)."""
        config = self.config
        return PatchEmbed(config.input_size, config.patch_size, config.in_channels, config.hidden_size)

    def _context(self, device: torch.device) -> tuple[Tensor, ...]:
        """The inputs of all blocks besides tokens and condition."""
        return ()

    def _build(self) -> None:
        config, hidden = self.config, self.config.hidden_size
        self.x_embedder = self._embedder()
        self.t_embedder = TimeEmbedder(hidden, config.time_scale)
        if config.intervals:
            self.r_embedder = TimeEmbedder(hidden, config.time_scale)
        self.y_embedder = LabelEmbedder(config.num_classes, hidden)
        self.pos_embed = nn.Parameter(torch.empty(1, self._prefix + config.grid_size**2, hidden), requires_grad=False)
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
        patch_values = config.patch_size**2 * config.in_channels
        self.final_layer = FinalLayer(self._norm(), hidden, patch_values, config.cls_token_dim)
        if config.cls_token_dim:  # the names are those of REG's checkpoints
            self.cls_projectors2 = nn.Linear(config.cls_token_dim, hidden)
            self.wg_norm = nn.LayerNorm(hidden, eps=1e-6)

    def _initialise(self, generator: torch.Generator) -> None:
        """Initialise as DiT does; adaLN and the output layer stay zero, so that each block starts as the identity."""
        materialize(self)
        xavier_uniform(self.x_embedder, generator)
        xavier_uniform(self.blocks, generator)
        for name, parameter in self.blocks.named_parameters():
            if "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
        for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
            normal(self.get_parameter(f"{name}.weight"), EMBEDDING_STD, generator)
        if self.config.intervals:
            for name in ("r_embedder.mlp.0", "r_embedder.mlp.2"):
                normal(self.get_parameter(f"{name}.weight"), EMBEDDING_STD, generator)
        xavier_uniform(self.projectors, generator)  # last, so that all else is the same with and without projectors
        if self.config.cls_token_dim:
            xavier_uniform(self.cls_projectors2, generator)
        with torch.no_grad():  # the class token has no position: its row stays zero
            positions = position_embedding(self.config.grid_size, self.config.hidden_size)
            self.pos_embed[:, self._prefix :].copy_(positions)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, r: Tensor | None = None, features: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Predict, and with `features` project the tokens after block `encoder_depth`: see `Backbone.forward`."""
        tokens = self._embedded(x) + self.pos_embed
        label = self.y_embedder(y)
        condition = self.t_embedder(t) + label
        if self.config.intervals:
            condition = condition + self.r_embedder(torch.zeros_like(t) if r is None else t - r)
        tokens, seen = self._run_blocks(tokens, condition, label)
        patches, cls_token = self.final_layer(tokens, condition)
        prediction = self._unpatchify(patches)
        if cls_token is not None:
            prediction = joined(prediction, cls_token)
        if not features:
            return prediction
        seen = seen if self.config.projector_kind == "mlp" else seen[:, self._prefix :]
        return prediction, [projector(seen) for projector in self.projectors]

    def _run_blocks(self, tokens: Tensor, condition: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, T, hidden) after all blocks, and after block `encoder_depth`; label: (B, hidden), embedded."""
        context, seen = self._context(tokens.device), tokens
        for number, block in enumerate(self.blocks, start=1):
            tokens = self._through(block, tokens, condition, *context)
            if number == self.config.encoder_depth:
                seen = tokens
        return tokens, seen

    def compile_blocks(self) -> None:
        """Compile the blocks, which share one compiled function, without changing the names of parameters."""
        for block in self.blocks:
            block.compile()

    def checkpoint_activations(self) -> None:
        """Save only each block's input for the backward pass (Chen et al., 2016): less memory, a third more work."""
        self._saves_inputs_only = True

    def _through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self._saves_inputs_only and torch.is_grad_enabled():
            tokens: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing random
            return tokens
        return block(*inputs)

    @property
    def _prefix(self) -> int:
        """The number of tokens before those of the patches."""
        return 1 if self.config.cls_token_dim else 0

    def _embedded(self, x: Tensor) -> Tensor:
        """The tokens (B, T, hidden) of inputs (B, *state_shape), without positions; the class token comes first."""
        config = self.config
        if not config.cls_token_dim:
            tokens: Tensor = self.x_embedder(x)
            return tokens
        latents, token = parted(x, (config.in_channels, config.input_size, config.input_size))
        return torch.cat([self.wg_norm(self.cls_projectors2(token))[:, None], self.x_embedder(latents)], dim=1)

    def hidden_matrices(self) -> dict[str, int]:
        """The matrices of the blocks: see `Backbone.hidden_matrices`."""
        weights = {name: module for name, module in self.blocks.named_modules() if isinstance(module, nn.Linear)}
        return {f"blocks.{name}.weight": FUSED.get(name.partition(".")[2], 1) for name in weights}

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Arrange patches (B, T, p * p * C), each row by row with channels last, as (B, C, H, W)."""
        grid, patch = self.config.grid_size, self.config.patch_size
        cells = patches.reshape(-1, grid, grid, patch, patch, self.config.in_channels)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.in_channels, *2 * (grid * patch,))


class Block(nn.Module):
    """A block of attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero; DiT, section 3.2)."""

    def __init__(
        self, hidden_size: int, *, norms: tuple[nn.Module, nn.Module], attn: nn.Module, mlp: nn.Module
    ) -> None:
        """Combine two normalisations, attn (from tokens (B, T, hidden) and context) and mlp (from tokens only)."""
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
    """The output layer, from tokens (B, T, hidden) to patches (B, T, patch_values), and to a class token (B, D)."""

    def __init__(self, norm: nn.Module, hidden_size: int, patch_values: int, cls_token_dim: int = 0) -> None:
        """cls_token_dim: the width D of the class token, whose token is the first; 0 without."""
        super().__init__()
        self.norm_final = norm
        self.linear = nn.Linear(hidden_size, patch_values)
        self.linear_cls = nn.Linear(hidden_size, cls_token_dim) if cls_token_dim else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, tokens: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        tokens = modulate(self.norm_final(tokens), shift, scale)
        if self.linear_cls is None:
            return self.linear(tokens), None
        return self.linear(tokens[:, 1:]), self.linear_cls(tokens[:, 0])


class TimeEmbedder(nn.Module):
    """The embedding of times (B,) as vectors (B, hidden), by an MLP on sines and cosines of 128 frequencies."""

    def __init__(self, hidden_size: int, time_scale: float) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.mlp = nn.Sequential(nn.Linear(TIME_WAVES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times (B,); float32 even under autocast, because half precision can't resolve neighbouring times."""
        with without_autocast(t.device):
            angles = (self.time_scale * t.float())[:, None] * time_frequencies(t.device)
            waves = torch.cat([angles.cos(), angles.sin()], dim=1)
            return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """The embedding of labels (B,) as vectors (B, hidden), with a row for each class and one for the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


def time_frequencies(device: torch.device) -> Tensor:
    """The frequencies (128,) of the sines and cosines in the embedding of a time, float32, decreasing from 1."""
    count = TIME_WAVES // 2
    return torch.exp(-math.log(MAX_PERIOD) * torch.arange(count, dtype=torch.float32, device=device) / count)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x (1 + scale) + shift`, the modulation of adaLN."""
    return x * (1 + scale) + shift


def position_embedding(grid_size: int, dim: int) -> Tensor:
    """The fixed position embedding (grid_size^2, dim), float64: sines and cosines of a token's column and row.

    The first half is for the column, the second for the row. `dim` is a multiple of 4. The values are those of DiT's
    `get_2d_sincos_pos_embed`.
    """
    with torch.device("cpu"):
        frequencies = MAX_PERIOD ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        angles = torch.outer(torch.arange(grid_size, dtype=torch.float64), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, dim=0)], dim=1)
