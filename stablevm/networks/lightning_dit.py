"""LightningDiT (Yao et al., 2025): DiT with rotary positions, SwiGLU and RMSNorm, on patches of one latent pixel.

Parameters have the same names as in the published checkpoints, whose time runs from noise to data; `stablevm import`
reverses it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevm.networks.lightning_dit_config import LightningDiTConfig
from stablevm.networks.transformer import MAX_PERIOD, Block, DiffusionTransformer

NORM_EPSILON = 1e-6  # of all normalisations (LightningDiT's code)


class LightningDiT(DiffusionTransformer):
    """A LightningDiT network, which predicts the velocity (or another target) from a noisy latent, time and label."""

    config: LightningDiTConfig

    def _norm(self) -> nn.Module:
        return RMSNorm(self.config.hidden_size, eps=NORM_EPSILON)

    def _block(self) -> nn.Module:
        hidden = self.config.hidden_size
        return Block(
            hidden,
            norms=(self._norm(), self._norm()),
            attn=RotaryAttention(self.config),
            mlp=SwiGLU(hidden, self.config.mlp_width),
        )

    def _context(self, device: torch.device, more: int = 0) -> tuple[Tensor, ...]:
        """The cosines and sines of the angles of all tokens; more: tokens before those of a plain input."""
        angles = rotary_angles(self.config.grid_size, self.config.hidden_size // self.config.num_heads, device)
        angles = F.pad(angles, (0, 0, more + self._prefix, 0))  # tokens without a position are not rotated
        return angles.cos(), angles.sin()


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square over the last axis, in float32 even under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """The gated MLP `w3 (silu(a) * b)`, where a and b are the halves of `w12 x` (Shazeer, 2020)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * width)
        self.w3 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class RotaryAttention(nn.Module):
    """Attention with rotary positions: queries and keys are rotated, so that scores depend on relative positions."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.hidden_size // config.num_heads
        self.num_heads, self.fused_attn = config.num_heads, config.fused_attn
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.q_norm = RMSNorm(width, eps=NORM_EPSILON) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, eps=NORM_EPSILON) if config.qk_norm else nn.Identity()

    def forward(self, tokens: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Mix tokens (B, T, hidden); cosines, sines: (T, width of a head), of the angles from `rotary_angles`."""
        parts = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind()  # (B, heads, T, width) each
        q = rotated(self.q_norm(q), cosines, sines)
        k = rotated(self.k_norm(k), cosines, sines)
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


def rotary_angles(grid_size: int, width: int, device: torch.device) -> Tensor:
    """The rotation angles of tokens in row-major order: (grid_size^2, width), float32, one for each value of a head.

    The first half is for the row, the second for the column. Each pair of neighbouring values has one angle, position
    times frequency. Frequencies decrease from 1 towards 1/10,000, as in EVA-02 (Fang et al., 2023).
    """
    pairs = width // 4
    exponents = torch.arange(pairs, dtype=torch.float32, device=device) / pairs
    positions = torch.arange(grid_size, dtype=torch.float32, device=device)
    axis = torch.outer(positions, MAX_PERIOD**-exponents).repeat_interleave(2, dim=1)
    rows, columns = axis.repeat_interleave(grid_size, dim=0), axis.repeat(grid_size, 1)
    return torch.cat([rows, columns], dim=1)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate each pair of neighbouring values of x (..., T, width) by its angle, computed in float32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(dim=-1)
    quarter_turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x.float() * cosines + quarter_turned * sines).to(x.dtype)
