"""Conversion of published weights to ours: their names, and the direction of time."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from stablevm.networks.lightning_dit import rotary_angles
from stablevm.networks.lightning_dit_config import lightning_dit_config
from stablevm.networks.registry import empty_network, network_names
from stablevm.networks.sit_config import SiTConfig, sit_config
from stablevm.networks.transformer import time_frequencies
from stablevm.networks.transformer_config import SIZES, TransformerConfig
from stablevm.support.errors import UserError

LABEL_TABLE = SiTConfig.label_table
NAMES_SHOWN = 6  # in the message about tensors that don't fit
_PROJECTOR = re.compile(r"projectors\.(\d+)\.")
_CLS_TOKEN = "cls_projectors2.weight"  # REG's layer that reads the class token
_GATED_MLP = "blocks.0.mlp.w12.weight"  # a LightningDiT has it; a SiT has `mlp.fc1` instead
# The layer that normalises REPA-E's latents, and LightningDiT's tables of rotary positions, which our networks lack.
MEANS, VARIANCES = "bn.running_mean", "bn.running_var"
COSINES, SINES = "feat_rope.freqs_cos", "feat_rope.freqs_sin"
_NO_WEIGHTS = (MEANS, VARIANCES, COSINES, SINES)


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with our names, in float32 if they are stored in lower precision.

    Early REPA checkpoints call the blocks after the aligned one `decoder_blocks`. StableVelocity calls the layer of its
    convolutional projectors `conv`. Projectors for an encoder of width 0 mean that there are none. Tables of positions
    and statistics of latents are left out.
    """
    first_decoder = _count_blocks(state)
    empty = {found[0] for key, value in state.items() if not value.numel() and (found := _PROJECTOR.match(key))}
    renamed = {}
    for key, value in state.items():
        if key.startswith(tuple(empty)) or key in _NO_WEIGHTS:
            continue
        name = key.replace(".conv.", ".projection_layer.") if key.startswith("projectors.") else key
        if key.startswith("decoder_blocks."):
            _, number, rest = key.split(".", 2)
            name = f"blocks.{first_decoder + int(number)}.{rest}"
        renamed[name] = value.float()
    return renamed


def legacy_depth(state: dict[str, Tensor]) -> int | None:
    """The aligned block of an early REPA checkpoint, the last before its `decoder_blocks`; None for all others."""
    if not any(key.startswith("decoder_blocks.") for key in state):
        return None
    return _count_blocks(state)


def is_lightning_dit(state: dict[str, Tensor]) -> bool:
    return _GATED_MLP in state


def infer_config(
    state: dict[str, Tensor], encoder_depth: int | None, num_classes: int | None = None
) -> TransformerConfig:
    """The configuration of the network with these weights (with our names); UserError if it has no known size.

    num_classes: if None, the number of rows of the label table minus one.
    """
    family = "LightningDiT" if is_lightning_dit(state) else "SiT"

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = tuple(state[key].shape) if key in state else ()
        if len(found) != dimensions:
            raise UserError(f"no tensor {key} of {dimensions} dimensions in the checkpoint: it is not a {family}'s")
        return found

    hidden, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    cls_token_dim = shape(_CLS_TOKEN, 2)[1] if _CLS_TOKEN in state else 0
    tokens = shape("pos_embed", 3)[1] - (1 if cls_token_dim else 0)
    options = {
        "input_size": math.isqrt(tokens) * patch,
        "cls_token_dim": cls_token_dim,
        "in_channels": channels,
        "num_classes": shape(LABEL_TABLE, 2)[0] - 1 if num_classes is None else num_classes,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "time_scale": 1.0,  # all published networks embed t itself
        **_projectors(state, encoder_depth),
    }
    name = f"{family}-{_size(state, hidden)}/{patch}"
    if name not in network_names():
        raise UserError(f"the checkpoint has the size of a {name}, which is not among the networks that can be built")
    if family == "LightningDiT":
        return lightning_dit_config(name, **options)
    return sit_config(name, mlp_ratio=shape("blocks.0.mlp.fc1.weight", 2)[0] / hidden, **options)


def _size(state: dict[str, Tensor], hidden: int) -> str:
    depth = _count_blocks(state)
    size = next((name for name, known in SIZES.items() if (known.depth, known.hidden_size) == (depth, hidden)), None)
    if size is None:
        known_sizes = ", ".join(f"{name} {value.depth} x {value.hidden_size}" for name, value in SIZES.items())
        raise UserError(f"the checkpoint has {depth} blocks of width {hidden}; the sizes known are {known_sizes}")
    return size


def _projectors(state: dict[str, Tensor], encoder_depth: int | None) -> dict[str, Any]:
    """The fields of the configuration that describe the projectors."""
    found: dict[str, Any] = {} if encoder_depth is None else {"encoder_depth": encoder_depth}
    last_layers = _projector_outputs(state)
    if not last_layers:
        return found
    convolutional = state[last_layers[0]].ndim == 4
    first = "projectors.0.0.weight"
    if not convolutional and (first not in state or state[first].ndim != 2):
        raise UserError(f"no tensor {first} of 2 dimensions in the checkpoint: its projectors are of another kind")
    return found | {
        "projector_dims": tuple(len(state[key]) for key in last_layers),
        "projector_kind": "conv" if convolutional else "mlp",
        "projector_hidden": 2048 if convolutional else len(state[first]),
    }


def has_projectors(state: dict[str, Tensor]) -> bool:
    return bool(_projector_outputs(state))


def predicts_twice(state: dict[str, Tensor]) -> bool:
    """Whether the network has twice as many output channels as input channels (SiT's `learn_sigma`)."""
    names = ("x_embedder.proj.weight", "final_layer.linear.bias")
    patches, outputs = (state[name].shape if name in state else torch.Size() for name in names)
    return len(patches) == 4 and len(outputs) == 1 and outputs[0] == 2 * math.prod(patches[1:])


def second_half_is_trained(state: dict[str, Tensor]) -> bool:
    """Whether the second half of the outputs was trained, if `predicts_twice`.

    SiT ignores that half, so no gradient reaches its weights, which stay zero. A DiT (Peebles and Xie, 2022), whose
    weights have the same names and shapes, predicts the noise in the first half and the variance in the second.
    """
    patches = state["x_embedder.proj.weight"].shape
    weight, bias = state["final_layer.linear.weight"], state["final_layer.linear.bias"]
    halves = [value.unflatten(0, (-1, 2 * patches[1]))[:, patches[1] :] for value in (weight, bias)]
    return any(bool(half.any()) for half in halves)


def with_null_class(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with a row of zeros for the null class appended to the label table, which has none."""
    table = state[LABEL_TABLE]
    return state | {LABEL_TABLE: torch.cat([table, table.new_zeros(1, table.shape[1])])}


def first_half(state: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The weights without the unused half of the outputs, if `predicts_twice`; each patch has its channels last."""
    kept = {}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        per_pixel = state[name].unflatten(0, (config.patch_size**2, 2 * config.in_channels))
        kept[name] = per_pixel[:, : config.in_channels].flatten(0, 1)
    return state | kept


def turn_time(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reverse time: weights of a network that computes `-v(x, 1 - t)`, from those of one that computes `v(x, t)`.

    SiT's and LightningDiT's times run from noise to data, ours from data to noise. The sign is changed in the last
    layer. Time enters as cos(f t) and sin(f t), and by the addition theorems cos(f (1 - t)) and sin(f (1 - t)) are
    linear combinations of those, so a rotation of the first layer's columns replaces t by 1 - t. This is exact up to
    the rounding of the weights.
    """
    turned = {name: -state[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias")}
    weight = state["t_embedder.mlp.0.weight"].double()
    cosines, sines = weight.chunk(2, dim=1)
    f = time_frequencies(weight.device).double()
    rotated = [cosines * f.cos() + sines * f.sin(), cosines * f.sin() - sines * f.cos()]
    turned["t_embedder.mlp.0.weight"] = torch.cat(rotated, dim=1).to(torch.float32)
    return state | turned


def check_positions(state: dict[str, Tensor], config: TransformerConfig) -> None:
    """Raise UserError if a published LightningDiT has other tables of rotary positions than our network."""
    angles = rotary_angles(config.grid_size, config.hidden_size // config.num_heads, torch.device("cpu"))
    for name, expected in ((COSINES, angles.cos()), (SINES, angles.sin())):
        found = state.get(name)
        if found is not None and (found.shape != expected.shape or not found.float().allclose(expected, atol=1e-4)):
            raise UserError(
                f"{name} in the checkpoint is not the table of rotary positions of a {config.name}: such networks "
                "can't be imported"
            )


def statistics_of_latents(state: dict[str, Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The scale and shift of each channel of the latents, which REPA-E stores with its network; None for others.

    As in its samplers, the running variance is used without the layer's epsilon.
    """
    if MEANS not in state or VARIANCES not in state:
        return None
    means, variances = state[MEANS].double(), state[VARIANCES].double()
    if means.ndim != 1 or means.shape != variances.shape or not bool((variances > 0).all()):
        raise UserError(
            f"{MEANS} {tuple(means.shape)}, {VARIANCES} {tuple(variances.shape)}: expected a mean and a positive "
            "variance of each channel of the latents"
        )
    return tuple(variances.rsqrt().tolist()), tuple(means.tolist())


def check_fits(state: dict[str, Tensor], config: TransformerConfig) -> None:
    """Raise UserError, which lists the tensors, if some are unknown, missing, or of another shape than in `config`."""
    expected = {key: tuple(value.shape) for key, value in empty_network(config).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    faults = {
        "unknown": sorted(found.keys() - expected.keys()),
        "missing": sorted(expected.keys() - found.keys()),
        "of another shape": [
            f"{key} {found[key]} instead of {expected[key]}"
            for key in sorted(found.keys() & expected.keys())
            if found[key] != expected[key]
        ],
    }
    if any(faults.values()):
        raise UserError(
            f"the checkpoint is not a {config.name}'s: "
            + "; ".join(f"{kind}: {_first(names)}" for kind, names in faults.items() if names)
        )


def _count_blocks(state: dict[str, Tensor]) -> int:
    return 1 + max((_number(key) for key in state if key.startswith("blocks.")), default=-1)


def _projector_outputs(state: dict[str, Tensor]) -> list[str]:
    """The weights of the projectors' last layers, in order."""
    last = [key for key in state if re.fullmatch(r"projectors\.\d+\.(4|projection_layer)\.weight", key)]
    return sorted(last, key=_number)


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{shown} and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else shown


def _number(key: str) -> int:
    """The number N in "blocks.N.rest"."""
    return int(key.split(".")[1])
