"""LightningDiT, written from its paper with the parameter names of the published checkpoints: a stand-in for
those.

It shares nothing with stablevm.networks: positions are rotated as complex numbers, attention is written out.
"""

import math

import torch
from torch import nn

from tests.helpers.published import holder, modulated

WIDTH, DEPTH, HEADS, CHANNELS, SIDE, CLASSES = 64, 2, 2, 4, 4, 5
HEAD = WIDTH // HEADS
INNER = 170  # int(2/3 * 4 * 64)


def rms(x, gain, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def turned(x, side):
    """x (B, heads, T, HEAD): pair k of the first half is turned by row * 10000^(-k/pairs), of the second by column."""
    pairs = HEAD // 4
    frequencies = [10000.0 ** (-k / pairs) for k in range(pairs)]
    angles = torch.tensor(
        [
            [place * frequency for place in (row, column) for frequency in frequencies]
            for row in range(side)
            for column in range(side)
        ],
        dtype=x.dtype,
    )
    spun = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(spun).flatten(-2)


class PublishedLightningDiT(nn.Module):
    """Gives its own output, in its own time, which runs from noise to data.

    tables: whether the cosines and sines of the rotation are among its tensors, as in the published files.
    """

    def __init__(self, *, qk_norm=False, patch=1, tables=True, seed=0):
        super().__init__()
        self.patch, self.grid, self.qk_norm = patch, SIDE // patch, qk_norm
        self.x_embedder = holder(proj=nn.Conv2d(CHANNELS, WIDTH, patch, patch))
        self.t_embedder = holder(mlp=nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)))
        self.y_embedder = holder(embedding_table=nn.Embedding(CLASSES + 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList(
            holder(
                norm1=gain(WIDTH),
                attn=holder(qkv=nn.Linear(WIDTH, 3 * WIDTH), proj=nn.Linear(WIDTH, WIDTH)),
                norm2=gain(WIDTH),
                mlp=holder(w12=nn.Linear(WIDTH, 2 * INNER), w3=nn.Linear(INNER, WIDTH)),
                adaLN_modulation=modulated(WIDTH, 6),
            )
            for _ in range(DEPTH)
        )
        for block in self.blocks if qk_norm else ():
            block.attn.q_norm, block.attn.k_norm = gain(HEAD), gain(HEAD)
        self.final_layer = holder(
            norm_final=gain(WIDTH), linear=nn.Linear(WIDTH, patch**2 * CHANNELS), adaLN_modulation=modulated(WIDTH, 2)
        )
        stream = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=stream))
        if tables:
            self.feat_rope = nn.Module()
            ones = turned(torch.tensor([1.0, 0.0]).repeat(HEAD // 2).expand(1, 1, self.grid**2, HEAD), self.grid)[0, 0]
            cosines, sines = (ones.unflatten(1, (-1, 2))[..., i].repeat_interleave(2, dim=1) for i in (0, 1))
            self.feat_rope.register_buffer("freqs_cos", cosines.clone())
            self.feat_rope.register_buffer("freqs_sin", sines.clone())
        self.eval()

    def attention(self, attn, x):
        rows, tokens, _ = x.shape
        q, k, v = attn.qkv(x).view(rows, tokens, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = rms(q, attn.q_norm.weight), rms(k, attn.k_norm.weight)
        q, k = turned(q, self.grid), turned(k, self.grid)
        weights = (q @ k.mT / math.sqrt(HEAD)).softmax(-1)
        return attn.proj((weights @ v).transpose(1, 2).reshape(rows, tokens, WIDTH))

    @torch.no_grad()
    def forward(self, x, t, y):
        tokens = self.x_embedder.proj(x).flatten(2).mT + self.pos_embed
        angles = t[:, None] * 10000.0 ** (-torch.arange(128, dtype=t.dtype) / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1)) + self.y_embedder.embedding_table(y)
        self.seen = []
        for block in self.blocks:
            b1, s1, g1, b2, s2, g2 = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
            tokens = tokens + g1 * self.attention(block.attn, rms(tokens, block.norm1.weight) * (1 + s1) + b1)
            a, b = block.mlp.w12(rms(tokens, block.norm2.weight) * (1 + s2) + b2).split(INNER, dim=-1)
            tokens = tokens + g2 * block.mlp.w3(a * a.sigmoid() * b)
            self.seen.append(tokens)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        patches = self.final_layer.linear(rms(tokens, self.final_layer.norm_final.weight) * (1 + scale) + shift)
        cells = patches.view(len(x), self.grid, self.grid, self.patch, self.patch, CHANNELS)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(x), CHANNELS, SIDE, SIDE)


def gain(width):
    """A normalisation's weight, without its arithmetic."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(width))
    return module
