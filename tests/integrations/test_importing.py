"""Published checkpoints: the imported network computes what the published one does; foreign files do no harm."""

import os
import re

import pytest
import torch

from stablevm import cli
from stablevm.integrations.config import ImportConfig
from stablevm.integrations.importing import import_checkpoint
from stablevm.networks.snapshot import load_model
from stablevm.sampling.guidance import sample_latents
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.errors import UserError
from stablevm.support.rng import RowGenerators, randn
from tests.helpers import published as pub
from tests.helpers.data_sets import one_line
from tests.helpers.imported import REPA_ARGS, TOLD, difference, imported, inputs, training_file

SIT_ARGS = {"image_size": 64, "path_type": "Linear", "prediction": "velocity", "loss_weight": None}


def sit(**options):
    return pub.built(pub.PublishedSiT, **options)


def legacy(state):
    """Early REPA checkpoints call the blocks after the aligned one decoder blocks and count them from 0."""
    return {key.replace("blocks.1.", "decoder_blocks.0."): value for key, value in state.items()}


FORMS = {
    "sit, bare": (sit(learn_sigma=True), lambda net: net.state_dict(), TOLD, True),
    "sit, training": (sit(), lambda net: training_file(net, SIT_ARGS), {}, True),
    "sit, told": (sit(qk_norm=True), lambda net: {"ema": net.state_dict()}, {**TOLD, "source": "sit"}, True),
    "repa": (sit(projectors=(12, 7)), lambda net: training_file(net, REPA_ARGS, steps=400), {}, False),
    "repa, bare": (sit(projectors=(12,)), lambda net: net.state_dict(), {**TOLD, "encoder_depth": 2}, False),
    "repa, legacy": (sit(projectors=(12,)), lambda net: legacy(net.state_dict()), TOLD, False),
    "repa, no encoder": (sit(projectors=(0,)), lambda net: training_file(net, REPA_ARGS, steps=1), {}, False),
    "stablevelocity": (sit(projectors=(9,), kind="conv"), lambda net: training_file(net, REPA_ARGS, steps=7), {},
                       False),
    "stablevelocity, plain": (sit(), lambda net: {"ema": net.state_dict(), "steps": 7}, TOLD, False),
    "wrapped": (sit(), lambda net: {"ema": {f"module._orig_mod.{k}": v for k, v in net.state_dict().items()}},
                {**TOLD, "source": "stablevelocity"}, False),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_imported_networks_compute_the_same(form, tmp_path):
    """To 1e-5 of the output's size. Without the turn of time and sign, SiT's would differ by the size itself."""
    network, save, options, reverse = FORMS[form]
    card, model = imported(save(network), tmp_path, **options)
    assert difference(network, model, reverse=reverse) < 1e-5
    assert difference(network, model, reverse=not reverse) > 0.1
    assert (card.model.name, card.model.num_classes, card.model.input_size) == ("SiT-XXS/2", pub.CLASSES, pub.SIDE)
    assert card.model.qk_norm == ("told" in form)


@pytest.mark.parametrize("form", ["repa", "repa, bare", "repa, legacy", "stablevelocity"])
def test_projectors_come_along(form, tmp_path):
    network, save, options, _ = FORMS[form]
    card, model = imported(save(network), tmp_path, **options)
    x, t, y = inputs()
    _, found = model(x, t, y, features=True)
    network(x, t, y)
    tokens = network.seen[card.model.encoder_depth - 1]
    for projector, features in zip(network.projectors, found, strict=True):
        if form == "stablevelocity":
            expected = projector.conv(tokens.mT.unflatten(2, (4, 4))).flatten(2).mT
        else:
            expected = projector(tokens)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_what_the_file_records_goes_into_the_card(tmp_path):
    card, _ = imported(FORMS["repa"][1](FORMS["repa"][0]), tmp_path)
    assert (card.path_type, card.prediction, card.step, card.model.encoder_depth) == ("cosine", "v", 400, 1)
    assert card.model.projector_dims == (12, 7) and card.class_names == ("0", "1", "2", "3", "4")
    latent = card.latent
    assert (latent.shape, latent.scale, latent.autoencoder) == ((4, 8, 8), 0.18215, "stabilityai/sd-vae-ft-mse")


def test_both_sets_of_weights_come_along(tmp_path):
    network = sit()
    card, _ = imported(training_file(network, SIT_ARGS), tmp_path)
    model = load_model(tmp_path / "ours", card, weights="model")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.9)
    assert difference(network, model, reverse=True) < 1e-5


@pytest.mark.parametrize("source", ["sit", "repa"])
def test_euler_in_their_time_is_euler_in_ours(source, tmp_path):
    """SiT integrates dx/dt = v from noise at 0 to data at 1, REPA from noise at 1 to data at 0; we do as REPA does."""
    network, labels, steps = sit(), torch.tensor([1, 4]), 10
    card, model = imported({"ema": network.state_dict()}, tmp_path, source=source, **TOLD)
    noise = randn((2, 4, 8, 8), RowGenerators.for_keys("x", positions=range(2)))
    x, h = noise.clone(), 1 / steps
    for step in range(steps):
        t = torch.full((2,), step * h if source == "sit" else 1 - step * h)
        x = x + (h if source == "sit" else -h) * network(x, t, labels)
    streams = RowGenerators.for_keys("x", positions=range(2))
    found, _ = sample_latents(model, card, labels, streams, SamplerSettings(mode="ode", num_steps=steps), "cpu")
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


# --- refusals ---


class Dangerous:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_code_in_a_file_is_named_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": sit().state_dict(), "args": Dangerous()}, tmp_path / "bad.pt")
    with pytest.raises(
        UserError, match=r"bad.pt: refused, because it would load (posix|nt).system, which could run"
    ) as error:
        import_checkpoint(ImportConfig(tmp_path / "bad.pt", tmp_path / "ours", **TOLD))
    one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


STATE = sit().state_dict()
REPA = {"source": "repa", **TOLD}
MISTAKES = {
    "whose": (STATE, TOLD, "does not show which project made it.* give --source sit, repa"),
    "not sit": (sit(projectors=(3,)).state_dict(), {**TOLD, "source": "sit"}, "--source sit: .* is of repa"),
    "not repa": (sit(learn_sigma=True).state_dict(), REPA, "--source repa: .* is of sit"),
    "path": (STATE, {"source": "repa"}, "does not record its path.*; give --path-type cosine or linear"),
    "prediction": (STATE, {"source": "repa", "path_type": "linear"}, "give --prediction v or x"),
    "other path": (training_file(sit(), SIT_ARGS), {"path_type": "cosine"}, "--path-type cosine: .* records Linear"),
    "unknown path": (training_file(sit(), {**SIT_ARGS, "path_type": "VP"}), {}, "trained with --path-type VP; only"),
    "noise": (training_file(sit(), {**SIT_ARGS, "prediction": "noise"}), {}, "trained with --prediction noise"),
    "depth": (sit(projectors=(3,)).state_dict(), TOLD, "has projectors .*; give --encoder-depth"),
    "other depth": (training_file(sit(projectors=(3,)), REPA_ARGS), {"encoder_depth": 2}, "-depth 2.*records 1"),
    "idle depth": (STATE, {**REPA, "encoder_depth": 2}, "--encoder-depth 2: the checkpoint has no projectors"),
    "classes": (STATE, {**REPA, "num_classes": 7}, r"7 classes \(--num-classes\) and 6 rows .* expected 7 or 8"),
    "resolution": (STATE, {**REPA, "resolution": 128}, r"images of 128 pixels, the network takes \(4, 8, 8\)"),
    "missing": (without(STATE, "blocks.1.attn.proj.bias"), REPA, "missing: blocks.1.attn.proj.bias$"),
    "unknown": ({**STATE, "w": STATE["pos_embed"]}, REPA, "unknown: w$"),
    "shape": ({**STATE, "blocks.0.attn.proj.bias": torch.zeros(3)}, REPA, r"proj.bias \(3,\) instead of"),
    "size": ({k: v for k, v in STATE.items() if "blocks.1" not in k}, REPA, "has 1 blocks of width 64; the sizes"),
    "no sit": ({"layer.weight": torch.zeros(3)}, REPA, "no tensor x_embedder.proj.weight of 4 dimensions"),
    "no weights": ({"epoch": 3, "ema": [1]}, REPA, "expected named weights.*found epoch, ema"),
    "a list": ([STATE], REPA, "expected named weights, found list"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, tmp_path):
    content, options, expected = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        imported(content, tmp_path, **options)
    assert re.search(expected, one_line(error)), str(error.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"])
def test_files_that_are_no_checkpoint(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x.pt: not a torch checkpoint"):
        import_checkpoint(ImportConfig(tmp_path / "x.pt", tmp_path / "ours"))


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is a folder; give a published checkpoint"):
        import_checkpoint(ImportConfig(tmp_path, tmp_path / "ours"))


def test_a_file_cut_short(tmp_path):
    torch.save(STATE, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"x.pt: not a torch checkpoint"):
        import_checkpoint(ImportConfig(tmp_path / "x.pt", tmp_path / "ours", **REPA))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_with_wrong_bytes(tmp_path, damaged_torch_files):
    """Most such files can't be read, with any kind of error; those that can be are no checkpoints."""
    for path in damaged_torch_files:
        with pytest.raises(UserError) as error:
            import_checkpoint(ImportConfig(path, tmp_path / "ours", **REPA))
        one_line(error)


def test_the_command_leaves_a_used_folder_alone(tmp_path, capsys):
    torch.save(STATE, tmp_path / "x.pt")
    command = [str(tmp_path / "x.pt"), "--output", str(tmp_path / "ours"), "--source", "repa"]
    command += ["--path-type=linear", "--prediction=v"]
    assert cli.main(["import", *command]) == 0
    assert "ours: SiT-XXS/2, 5 classes, latents of 4 x 8 x 8, path linear, prediction v; weights: ema" in (
        capsys.readouterr().out
    )
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ours").iterdir()}
    assert cli.main(["import", *command]) == 0, "the same once more, as after a kill at its very end"
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ours").iterdir()} == before
    capsys.readouterr()
    assert cli.main(["import", *command[:-1], "--prediction=x"]) == 2
    assert "ours: holds model.json; give a new folder" in capsys.readouterr().err


def test_weights_that_an_interrupted_import_left_do_not_stay(tmp_path):
    torch.save(STATE, tmp_path / "x.pt")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "model.safetensors").write_bytes(b"of another file")
    (tmp_path / "ours" / ".tmp-1-00000000-ema.safetensors").write_bytes(b"half")
    import_checkpoint(ImportConfig(tmp_path / "x.pt", tmp_path / "ours", **REPA))
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"ema.safetensors", "model.json"}


# Classes, DiTs, tensors that are no weights


def warned(capsys):
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "given", "classes", "dropout"),
    [
        ({"num_classes": 5, "cfg_prob": 0.1}, {}, 5, 0.1),
        ({"num_classes": 6, "cfg_prob": 0.0}, {}, 6, 0.0),
        ({"num_classes": 6}, {}, 6, 0.0),
        ({"num_classes": 5}, {}, 5, None),
        ({"cfg_prob": 0.0}, {}, 6, 0.0),
        ({}, {"num_classes": 6}, 6, 0.0),
        ({}, {"num_classes": 5}, 5, None),
    ],
    ids=str,
)
def test_the_number_of_classes_follows_from_table_and_record(args, given, classes, dropout, tmp_path, capsys):
    """The label table has six rows: of six classes, or of five and the null class."""
    card, model = imported(training_file(sit(), {**REPA_ARGS, **args}, steps=1), tmp_path, **given)
    assert (card.model.num_classes, card.label_dropout, len(card.class_names)) == (classes, dropout, classes)
    assert "warning" not in warned(capsys)
    table = model.y_embedder.embedding_table.weight
    assert len(table) == classes + 1 and (classes == 5 or not table[6].any())


def test_a_file_without_its_number_of_classes_is_reported(tmp_path, capsys):
    card, _ = imported({"ema": sit().state_dict()}, tmp_path, source="repa", **TOLD)
    assert card.model.num_classes == 5
    assert "6 rows in the label table are taken for 5 classes and the null class; give" in warned(capsys)


@pytest.mark.parametrize(
    ("args", "given", "told"),
    [
        ({"num_classes": 1000}, {}, r"1,000 classes \(recorded\) and 6 rows in the label table, expected 1000 or 1001"),
        ({"num_classes": 6, "cfg_prob": 0.1}, {}, "6 classes .* expected 7"),
        ({"num_classes": 5, "cfg_prob": 0.0}, {}, "5 classes .* expected 5"),
        ({"num_classes": 5}, {"num_classes": 6}, "--num-classes 6: .* records 5"),
        ({"num_classes": "six"}, {}, "records .*six.* as num_classes"),
    ],
    ids=str,
)
def test_numbers_of_classes_that_contradict_each_other_are_refused(args, given, told, tmp_path):
    with pytest.raises(UserError, match=told) as error:
        imported(training_file(sit(), {**REPA_ARGS, **args}, steps=1), tmp_path, **given)
    one_line(error)


def dit():
    """Its names and shapes are a SiT's; both halves of its outputs are trained: noise and its variance."""
    network = sit(learn_sigma=True)
    with torch.no_grad():
        network.final_layer.linear.bias.add_(0.1)
    return network


def test_a_dit_is_not_a_velocity(tmp_path, capsys):
    for content, options in ((dit().state_dict(), {}), ({"ema": dit().state_dict(), "args": {"image_size": 64}}, {})):
        with pytest.raises(UserError, match=r"second half of its outputs is trained, as a DiT's .* --source sit"):
            imported(content, tmp_path, **{**TOLD, **options})
    with pytest.raises(UserError, match=r"a DiT-XXS/2, which predicts noise"):
        imported({"ema": dit().state_dict(), "args": {"model": "DiT-XXS/2"}}, tmp_path, source="sit", **TOLD)
    imported(dit().state_dict(), tmp_path, source="sit", **TOLD)
    assert "looks like a DiT's; --source sit says that it is a velocity" in warned(capsys)


def spoiled(name, value):
    state = sit().state_dict()
    return {"ema": {**state, name: value(state.get(name))}}


BIAS = "final_layer.linear.bias"
NO_WEIGHTS = {
    "nan": (spoiled(BIAS, lambda v: v * torch.nan), "final_layer.linear.bias.*holds values that are not finite"),
    "infinite": (spoiled(BIAS, lambda v: v / 0), "not finite"),
    "sparse": (spoiled(BIAS, lambda v: v.to_sparse()), "sparse"),
    "meta": (spoiled(BIAS, lambda v: v.to("meta")), "meta"),
    "integers": (spoiled(BIAS, lambda v: v.int()), "a tensor of int32"),
    "complex": (spoiled(BIAS, lambda v: v.to(torch.complex64)), "a tensor of complex64"),
    "a number for a name": (spoiled(3, lambda _: torch.ones(2)), "3.*expected a name"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_tensors_that_are_no_weights_are_one_line(kind, tmp_path):
    content, told = NO_WEIGHTS[kind]
    with pytest.raises(UserError, match=told) as error:
        imported(content, tmp_path, source="repa", **TOLD)
    one_line(error)
    assert not (tmp_path / "ours").exists()


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_one_line(tmp_path):
    content = spoiled(BIAS, lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8))
    with pytest.raises(UserError) as error:
        imported(content, tmp_path, source="repa", **TOLD)
    one_line(error)
