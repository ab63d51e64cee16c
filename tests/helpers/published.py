"""SiT, written from its paper with the parameter names of the published checkpoints: a stand-in for those.

It shares nothing with stablevm.networks: neither layers nor formulas.
"""

import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, DEPTH, HEADS, CHANNELS, PATCH, SIDE, CLASSES = 64, 2, 2, 4, 2, 8, 5


def holder(**children):
    """A module that only gives its children a name."""
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def modulated(width, parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def normalise(x, gain=None, bias=None, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], gain, bias, eps)


class Attention(nn.Module):
    def __init__(self, qk_norm):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        if qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x):
        rows, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        weights = (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(rows, tokens, WIDTH))


class Block(nn.Module):
    def __init__(self, qk_norm):
        super().__init__()
        self.attn = Attention(qk_norm)
        self.mlp = holder(fc1=nn.Linear(WIDTH, 4 * WIDTH), fc2=nn.Linear(4 * WIDTH, WIDTH))
        self.adaLN_modulation = modulated(WIDTH, 6)

    def forward(self, x, c):
        b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + g1 * self.attn(normalise(x) * (1 + s1) + b1)
        return x + g2 * self.mlp.fc2(F.gelu(self.mlp.fc1(normalise(x) * (1 + s2) + b2), approximate="tanh"))


class PublishedSiT(nn.Module):
    """Gives its own output, in its own time. `learn_sigma` doubles the channels; the second half is dropped.

    projectors: widths of the encoders' features; kind mlp (REPA) or conv (StableVelocity's iREPA).
    """

    def __init__(self, *, learn_sigma=False, qk_norm=False, projectors=(), kind="mlp", seed=0):
        super().__init__()
        self.out_channels = CHANNELS * (2 if learn_sigma else 1)
        self.x_embedder = holder(proj=nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH))
        self.t_embedder = holder(mlp=nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)))
        self.y_embedder = holder(embedding_table=nn.Embedding(CLASSES + 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIDE // PATCH) ** 2, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList(Block(qk_norm) for _ in range(DEPTH))
        self.projectors = nn.ModuleList(self._projector(width, kind) for width in projectors)
        self.final_layer = holder(
            linear=nn.Linear(WIDTH, PATCH**2 * self.out_channels), adaLN_modulation=modulated(WIDTH, 2)
        )
        stream = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=stream))
            if learn_sigma:  # no gradient reaches the dropped half, which stays at the zeros it begins with
                for value in (self.final_layer.linear.weight, self.final_layer.linear.bias):
                    value.unflatten(0, (-1, 2 * CHANNELS))[:, CHANNELS:] = 0
        self.eval()

    @staticmethod
    def _projector(width, kind):
        if kind == "conv":
            return holder(conv=nn.Conv2d(WIDTH, width, 3, padding=1))
        layers = nn.Linear(WIDTH, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, width)
        return nn.Sequential(*layers)

    def _through_blocks(self, tokens, t, y):
        """The inputs of the last linear layer; `seen` holds the tokens after each block."""
        frequencies = 10000.0 ** (-torch.arange(128) / 128)
        angles = t[:, None] * frequencies
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1)) + self.y_embedder.embedding_table(y)
        self.seen = []
        for block in self.blocks:
            tokens = block(tokens, c)
            self.seen.append(tokens)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return normalise(tokens) * (1 + scale) + shift

    @torch.no_grad()
    def forward(self, x, t, y):
        tokens = self._through_blocks(self.x_embedder.proj(x).flatten(2).mT + self.pos_embed, t, y)
        patches = self.final_layer.linear(tokens)
        grid = SIDE // PATCH
        cells = patches.view(len(x), grid, grid, PATCH, PATCH, self.out_channels)
        image = cells.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, SIDE, SIDE)
        return image[:, :CHANNELS]


def built(make, *arguments, **options):
    """Modules draw first values from the global random state, which tests must leave as it is."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):  # of a layer of width 0
        return make(*arguments, **options)


class PublishedREG(PublishedSiT):
    """REG's SiT, which also denoises a class token of width `token`: `forward` gives the image's output and its."""

    def __init__(self, token=9, **options):
        super().__init__(**options)
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIDE // PATCH) ** 2 + 1, WIDTH), requires_grad=False)
        self.cls_projectors2, self.wg_norm = nn.Linear(token, WIDTH), nn.LayerNorm(WIDTH, eps=1e-6)
        self.final_layer.linear_cls = nn.Linear(WIDTH, token)
        stream = torch.Generator().manual_seed(1)
        with torch.no_grad():
            added = (self.pos_embed, self.cls_projectors2, self.wg_norm, self.final_layer.linear_cls)
            for part in added:
                for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=stream))
        self.eval()

    @torch.no_grad()
    def forward(self, x, t, y, cls_token):
        first = normalise(self.cls_projectors2(cls_token), self.wg_norm.weight, self.wg_norm.bias)
        tokens = torch.cat([first[:, None], self.x_embedder.proj(x).flatten(2).mT], dim=1) + self.pos_embed
        tokens = self._through_blocks(tokens, t, y)
        grid = SIDE // PATCH
        cells = self.final_layer.linear(tokens[:, 1:]).view(len(x), grid, grid, PATCH, PATCH, CHANNELS)
        image = cells.permute(0, 5, 1, 3, 2, 4).reshape(len(x), CHANNELS, SIDE, SIDE)
        return image, self.final_layer.linear_cls(tokens[:, 0])
