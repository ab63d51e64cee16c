"""SiT, the Scalable Interpolant Transformer (Ma et al., 2024): DiT's blocks, and as many output channels as input."""

from functools import partial

from timm.layers import GELUTanh
from timm.models.vision_transformer import Attention, Mlp
from torch import nn

from stablevm.networks.sit_config import SiTConfig
from stablevm.networks.transformer import Block, DiffusionTransformer

_LayerNorm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)  # as in DiT: adaLN supplies the affine part


class SiT(DiffusionTransformer):
    """A SiT network, which predicts the velocity (or another target) from a noisy latent, a time and a label."""

    config: SiTConfig

    def _norm(self) -> nn.Module:
        return _LayerNorm(self.config.hidden_size)

    def _block(self) -> nn.Module:
        config, hidden = self.config, self.config.hidden_size
        attn = Attention(hidden, config.num_heads, qkv_bias=True, qk_norm=config.qk_norm, norm_layer=nn.LayerNorm)
        attn.fused_attn = config.fused_attn  # type: ignore[misc]  # timm marks it final for TorchScript
        mlp = Mlp(hidden, int(hidden * config.mlp_ratio), act_layer=GELUTanh)
        return Block(hidden, norms=(self._norm(), self._norm()), attn=attn, mlp=mlp)
