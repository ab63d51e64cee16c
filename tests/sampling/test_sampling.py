"""Guidance, labels, options, claims and the archive of the sampling room."""

import dataclasses
import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stablevm.interpolant import COSINE, INTERPOLANTS, LINEAR, get_interpolant
from stablevm.sampling.archive import read_provenance, write_archive
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.guidance import UNGUIDED, GuidanceSettings, GuidedVelocity, sample_latents
from stablevm.sampling.labels import balanced_labels, random_labels
from stablevm.sampling.provenance import check_claims
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.errors import UserError
from stablevm.support.rng import RowGenerators
from tests.helpers.checkpoints import tiny_card


class Recorder(nn.Module):
    """Predicts the label as a number, and remembers how it was asked."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, labels):
        self.calls.append((x.dtype, tuple(t.shape), len(x), torch.is_autocast_enabled("cpu")))
        self.labels = labels.tolist()
        return labels.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)


def guided(model, **options):
    return GuidedVelocity(model, LINEAR, "v", torch.tensor([2, 3]), null_class=10, **options)


def at(value):
    return torch.tensor(value, dtype=torch.float64)


# Guidance


@pytest.mark.parametrize(
    ("dropout", "label", "scale", "told"),
    [
        (
            0.0,
            1,
            1.5,
            r"cfg_scale 1.5: .* label_dropout 0, .* null class is untrained; sample classes",
        ),
        (0.0, 4, 1.0, "labels of the null class: .* label_dropout 0"),
        (1.0, 1, 1.0, "labels: .* label_dropout 1, so its classes are untrained; sample the null class, 4"),
    ],
)
def test_labels_that_training_never_showed_are_refused(dropout, label, scale, told):
    card = tiny_card(label_dropout=dropout)
    settings, guidance = SamplerSettings(mode="ode", num_steps=1), GuidanceSettings(cfg_scale=scale)
    streams = RowGenerators.for_keys("x", positions=[0])
    with pytest.raises(UserError, match=told):
        sample_latents(Recorder(), card, torch.tensor([label]), streams, settings, "cpu", guidance=guidance)


@pytest.mark.parametrize("dropout", [None, 0.1])
def test_cards_that_do_not_know_their_label_dropout_are_guided_as_before(dropout):
    settings, guidance = SamplerSettings(mode="ode", num_steps=1), GuidanceSettings(cfg_scale=1.5)
    streams = RowGenerators.for_keys("x", positions=[0])
    drawn = sample_latents(
        Recorder(), tiny_card(label_dropout=dropout), torch.tensor([1]), streams, settings, "cpu", guidance=guidance
    )
    assert drawn[1] == 2, "evaluations of a guided step"


def test_guidance_extrapolates_from_the_null_class_inside_the_interval_alone():
    model = Recorder()
    velocity = guided(model, scale=1.8, low=0.2, high=0.7)
    x = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    seen = {time: velocity(x, at(time)).flatten().tolist() for time in (0.1, 0.2, 0.5, 0.7, 0.8)}
    inside = [10 + 1.8 * (2 - 10), 10 + 1.8 * (3 - 10)]
    assert seen[0.1] == seen[0.8] == [2, 3]
    assert seen[0.2] == seen[0.5] == seen[0.7] == pytest.approx(inside)
    assert [rows for _, _, rows, _ in model.calls] == [2, 4, 4, 4, 2], "one batch holds both halves"
    assert velocity.evaluations == 8


def test_scale_one_evaluates_no_null_class():
    model = Recorder()
    velocity = guided(model, scale=1.0)
    velocity(torch.zeros(2, 1, 1, 1, dtype=torch.float64), at(0.5))
    assert velocity.evaluations == 1 and model.calls[0][2] == 2


def test_rows_with_times_of_their_own_are_guided_one_by_one():
    model = Recorder()
    velocity = guided(model, scale=1.8, low=0.2, high=0.7)
    x = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    seen = velocity(x, at([0.1, 0.5, 0.9]), rows=torch.tensor([0, 1, 1])).flatten().tolist()
    assert seen == pytest.approx([2, 10 + 1.8 * (3 - 10), 3])
    assert model.labels == [2, 3, 3, 10], "one batch, and the null class for the guided row alone"
    assert velocity.evaluations == 4 / 2


def test_legacy_guides_three_channels():
    x = torch.zeros(2, 5, 1, 1, dtype=torch.float64)
    seen = guided(Recorder(), scale=1.8, legacy=True)(x, at(0.5))
    inside = [10 + 1.8 * (2 - 10)] * 3 + [2] * 2
    assert seen[0].flatten().tolist() == pytest.approx(inside)


def test_the_null_class_is_the_checkpoints():
    model = Recorder()
    draw(
        model,
        SamplerSettings(mode="ode", num_steps=1),
        tiny_card(num_classes=7),
        guidance=GuidanceSettings(cfg_scale=2),
    )
    assert model.labels == [1, 1, 1, 7, 7, 7]


@pytest.mark.parametrize("precision, autocast", [("fp32", False), ("bf16", True), ("fp16", True)])
def test_network_runs_in_the_precision_asked_whatever_surrounds_it(precision, autocast):
    model = Recorder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = guided(model, precision=precision)(torch.zeros(2, 1, 1, 1, dtype=torch.float64), at(0.5))
    assert model.calls == [(torch.float32, (2,), 2, autocast)]
    assert velocity.dtype == torch.float64


# Drawing


def draw(model, settings, card=None, positions=(0, 1, 2), label=1, guidance=UNGUIDED):
    labels = torch.full((len(positions),), label)
    streams = RowGenerators.for_keys("test", positions=positions)
    return sample_latents(model, card or tiny_card(), labels, streams, settings, "cpu", guidance=guidance)


@pytest.mark.parametrize(
    "settings, guidance, expected",
    [
        # 172 of the 250 times from 1 to 0.04 are at most 0.7: 250 + 172, REPA's published count.
        (SamplerSettings(), GuidanceSettings(cfg_scale=1.8, guidance_high=0.7), 422),
        (SamplerSettings(), UNGUIDED, 250),
        (SamplerSettings(), GuidanceSettings(cfg_scale=1.8), 500),
        (SamplerSettings(mode="ode", num_steps=10), UNGUIDED, 10),
        (SamplerSettings(mode="ode", num_steps=10, solver="heun"), UNGUIDED, 19),
        (
            SamplerSettings(mode="ode", num_steps=10),
            GuidanceSettings(cfg_scale=2, guidance_low=0.3, guidance_high=0.7),
            15,
        ),
        (SamplerSettings(mode="ode", num_steps=10, edm_schedule=True), UNGUIDED, 10),
        (SamplerSettings(num_steps=10, edm_schedule=True), UNGUIDED, 10),
        (SamplerSettings(num_steps=10, solver="heun"), UNGUIDED, 19),
        (SamplerSettings(mode="stablevs", num_steps=20), UNGUIDED, 20),
        # Of the nine steps below 0.85 the first two are above 0.7, and the eleven above it too.
        (SamplerSettings(mode="stablevs", num_steps=20), GuidanceSettings(cfg_scale=2, guidance_high=0.7), 27),
        (SamplerSettings(mode="stablevs", num_steps=20, solver="heun"), UNGUIDED, 31),
    ],
)
def test_network_evaluations(settings, guidance, expected):
    model = Recorder()
    _, evaluations = draw(model, settings, guidance=guidance)
    assert evaluations == expected == sum(rows for _, _, rows, _ in model.calls) / 3


class GaussianNetwork(nn.Module):
    """The exact prediction for pixels from N(0.3, 0.25), as velocity or as data."""

    def __init__(self, path, prediction):
        super().__init__()
        self.path, self.kind = path, {"v": "velocity", "x": "x0"}[prediction]

    def forward(self, x, t, labels):
        x, t = x.double(), t.double()
        c = self.path.coefficients(t, x)
        gain = c.alpha * 0.25 / (c.alpha**2 * 0.25 + c.sigma**2)
        return self.path.convert(0.3 + gain * (x - c.alpha * 0.3), x, t, "x0", self.kind)


@pytest.mark.parametrize(
    "settings",
    [
        SamplerSettings(num_steps=50),
        SamplerSettings(num_steps=2),  # half of the way is the last step
        SamplerSettings(num_steps=20, solver="heun"),
        SamplerSettings(mode="ode", num_steps=20, solver="heun"),
        SamplerSettings(mode="ode", num_steps=20, edm_schedule=True),
        SamplerSettings(mode="ode", solver="dopri5", rtol=1e-6),
        SamplerSettings(mode="stablevs", num_steps=20, noise_factor=0.5, above_split="sde"),
    ],
    ids=lambda settings: f"{settings.mode}-{settings.solver}-{settings.num_steps}",
)
@pytest.mark.parametrize("path_type", INTERPOLANTS)
def test_data_prediction_samples_as_velocity_prediction_does(path_type, settings):
    path = get_interpolant(path_type)
    by_velocity, by_data = (
        draw(GaussianNetwork(path, prediction), settings, tiny_card(prediction=prediction, path_type=path_type))[0]
        for prediction in ("v", "x")
    )
    assert by_velocity.std() > 0.2
    assert torch.allclose(by_velocity, by_data, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        SamplerSettings(num_steps=9),
        SamplerSettings(mode="stablevs", num_steps=9, steps_below=4, noise_factor=1.0),
        SamplerSettings(mode="ode", solver="dopri5"),
    ],
    ids=lambda settings: settings.solver + "-" + settings.mode,
)
def test_an_image_depends_on_its_own_stream_alone(settings):
    network = GaussianNetwork(COSINE, "v")
    card = tiny_card(path_type="cosine")
    together, _ = draw(network, settings, card, positions=(4, 5, 6))
    alone, _ = draw(network, settings, card, positions=(6,))
    assert torch.allclose(together[2:], alone, rtol=0, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=0.1)


# Labels


@pytest.mark.parametrize("num_samples", [3, 30, 1003])
def test_balanced_labels_are_exact_to_one_and_shuffled(num_samples):
    classes = (7, 1, 4, 9)
    labels = balanced_labels(num_samples, classes, seed=5)
    counts = Counter(labels.tolist())
    assert len(labels) == num_samples and labels.dtype == torch.int64 and set(counts) <= set(classes)
    floor = num_samples // 4
    assert {counts[label] for label in classes} <= {floor, floor + 1}
    assert torch.equal(labels, balanced_labels(num_samples, classes, seed=5))
    if num_samples > 3:
        runs = (labels.diff() == 0).sum().item()
        assert 0 < runs < num_samples / 2, "neither in turn nor class by class"
        assert not torch.equal(labels, balanced_labels(num_samples, classes, seed=6))


def test_the_seed_picks_the_classes_that_get_one_more():
    extras = {balanced_labels(1, range(10), seed).item() for seed in range(60)}
    assert len(extras) >= 8


def test_random_labels_are_uniform():
    counts = Counter(random_labels(4000, (2, 5, 8, 11), seed=0).tolist())
    z = [(counts[label] - 1000) / (4000 * 0.25 * 0.75) ** 0.5 for label in (2, 5, 8, 11)]
    assert max(map(abs, z)) < 3.5, z  # seed 0


# Options


def options(**given):
    return GenerateConfig(ckpt=Path("ckpt"), **given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_fid_samples": 0}, "--num-fid-samples 0: expected at least 1"),
        ({"per_proc_batch_size": 0}, "--per-proc-batch-size 0"),
        ({"num_steps": 0, "mode": "ode"}, "--num-steps 0"),
        ({"num_steps": 1}, "--num-steps 1: expected at least 2 with --mode sde"),
        ({"cfg_scale": float("nan")}, "--cfg-scale nan"),
        ({"guidance_low": -0.1}, "--guidance-low -0.1"),
        ({"guidance_high": 1.5}, "--guidance-high 1.5"),
        ({"guidance_low": 0.8, "guidance_high": 0.7}, "--guidance-high 0.7: expected at least --guidance-low 0.8"),
        ({"global_seed": -1}, "--global-seed -1"),
        ({"diffusion_scale": -1.0}, "--diffusion-scale -1.0"),
        ({"last_time": 0.0}, "--last-time 0.0"),
        ({"solver": "dopri5"}, "--solver dopri5: expected euler or heun with --mode sde"),
        ({"solver": "dopri5", "mode": "stablevs"}, "--solver dopri5: expected euler or heun with --mode stablevs"),
        ({"solver": "dopri5", "mode": "ode", "heun": True}, "--heun: expected no --solver dopri5"),
        ({"rtol": 0.0}, "--rtol 0.0"),
        ({"atol": float("inf")}, "--atol inf"),
        ({"edm_schedule": True, "mode": "stablevs"}, "--edm-schedule: expected --mode ode or sde"),
        ({"edm_schedule": True, "mode": "ode", "num_steps": 1}, "--num-steps 1: expected at least 2 with --edm"),
        ({"split_time": 1.0}, "--split-time 1.0"),
        ({"steps_below": 0}, "--steps-below 0"),
        ({"mode": "stablevs", "num_steps": 9}, "--steps-below 9: expected fewer than --num-steps 9"),
        ({"noise_factor": 1.5}, "--noise-factor 1.5"),
        ({"name": "a/b"}, "--name a/b"),
        ({"name": "a.npz"}, "--name a.npz"),
        ({"classes": "3,x"}, "--classes 3,x"),
        ({"classes": "3,3"}, "--classes 3,3"),
        ({"mode": "euler"}, "--mode euler: expected one of ode, sde, stablevs, meanflow"),
        ({"precision": "tf32"}, "--precision tf32: expected one of fp32, bf16, fp16"),
    ],
)
def test_options_out_of_range_are_refused(given, message):
    with pytest.raises(UserError) as caught:
        options(**given).validate()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_options_without_effect_are_named_and_neutralised():
    config = options(heun=True, guidance_high=0.7, unconditional=True, classes="1")
    config.validate()
    assert config.warnings() == [
        "--heun has no effect with --mode sde",
        "--guidance-high 0.7 has no effect with --unconditional",
        "--classes 1 has no effect with --unconditional",
    ]
    assert config.effective() == options(unconditional=True)
    assert options(mode="ode", last_time=0.1).warnings() == ["--last-time 0.1 has no effect with --mode ode"]
    assert options(mode="ode", solver="dopri5", num_steps=40, atol=1e-5).warnings() == [
        "--num-steps 40 has no effect with --solver dopri5"
    ]
    assert options(rtol=1e-4, split_time=0.6, legacy=True, edm_schedule=True, last_time=0.1).warnings() == [
        "--split-time 0.6 has no effect with --mode sde",
        "--last-time 0.1 has no effect with --edm-schedule",
        "--rtol 0.0001 has no effect with --solver euler",
        "--legacy has no effect with --cfg-scale 1",
    ]
    assert options(mode="stablevs", diffusion_scale=2.0, last_time=0.1, noise_factor=0.1).warnings() == [
        "--last-time 0.1 has no effect with --mode stablevs",
        "--diffusion-scale 2.0 has no effect with --above-split ode",
    ]
    assert options(mode="stablevs", heun=True, above_split="sde").warnings() == [
        "--heun has no effect with --above-split sde"
    ]
    published = options(cfg_scale=1.8, guidance_high=0.7)
    assert published.warnings() == [] and published.effective() == published


def test_heun_is_the_solver_it_names():
    assert options(mode="ode", heun=True).effective() == options(mode="ode", solver="heun").effective()


def test_options_import_without_torch():
    code = "import sys, stablevm.sampling.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


CARD = tiny_card(projector_dims=(16, 32), encoder_depth=2)


def test_claims_that_agree_with_the_checkpoint_pass():
    check_claims(options(), CARD)
    check_claims(
        options(
            model="SiT-XXS/4",
            path_type="linear",
            prediction_type="v",
            resolution=8,
            encoder_depth=2,
            projector_embed_dims="16,32",
            use_projector=True,
            use_irepa=False,
            qk_norm=False,
            vae="identity",
            classes="0,3",
        ),
        CARD,
    )


@pytest.mark.parametrize(
    "given, message",
    [
        ({"model": "SiT-B/2"}, r"--model SiT-B/2: .* records --model SiT-XXS/4"),
        ({"path_type": "cosine"}, r"--path-type cosine: .* records --path-type linear"),
        ({"prediction_type": "x"}, r"--prediction-type x: .* records --prediction-type v"),
        ({"resolution": 16}, r"--resolution 16: .* 16 x 16, .* 8 x 8"),
        ({"encoder_depth": 1}, r"--encoder-depth 1: .* records --encoder-depth 2"),
        ({"projector_embed_dims": "768"}, r"--projector-embed-dims 768: .* records --projector-embed-dims 16,32"),
        ({"use_projector": False}, r"--no-use-projector: .* records --use-projector"),
        ({"use_irepa": True}, r"--use-irepa: .* records --no-use-irepa"),
        ({"qk_norm": True}, r"--qk-norm: .* records --no-qk-norm"),
        ({"vae": "mse"}, r"--vae mse: .* records identity"),
        ({"classes": "1,4"}, r"--classes 1,4: .* 0 to 3"),
    ],
)
def test_claims_against_the_checkpoint_name_both_values(given, message):
    with pytest.raises(UserError, match=message):
        check_claims(options(**given), CARD)


def test_decoding_with_an_autoencoder_from_a_folder(tmp_path):
    """A folder may be a copy of the recorded autoencoder, so it is no contradiction; pixels need none."""
    latent = CARD.latent.__class__(shape=(4, 8, 8), scale=0.18215, shift=0.0, autoencoder="stabilityai/sd-vae-ft-mse")
    card = CARD.__class__(dataclasses.replace(CARD.model, in_channels=4), latent, "linear", "v", CARD.class_names, 1)
    check_claims(options(vae=str(tmp_path)), card)
    check_claims(options(vae="mse"), card)
    with pytest.raises(UserError, match=r"--vae ema: .* records stabilityai/sd-vae-ft-mse"):
        check_claims(options(vae="ema"), card)
    with pytest.raises(UserError, match="records identity"):
        check_claims(options(vae=str(tmp_path)), CARD)


# The archive


def test_archive_reads_back_and_depends_on_its_contents_alone(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    labels = np.array([3, 1, 2, 0, 1])
    protocol = {"mode": "sde", "classes": [1, 2], "name": "ä"}
    for name in ("a.npz", "b.npz"):
        write_archive(tmp_path / name, [images[:2], images[2:]], labels, protocol)
        monkeypatch.setattr("time.localtime", lambda *_: (2000, 2, 3, 4, 5, 6, 0, 0, 0))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as archive:
        assert sorted(archive) == ["arr_0", "labels", "protocol"]
        assert np.array_equal(archive["arr_0"], images) and archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["labels"], labels) and archive["labels"].dtype == np.int64
        assert json.loads(archive["protocol"].item()) == protocol
    assert read_provenance(tmp_path / "a.npz") == protocol


def test_archive_is_written_in_bounded_memory(tmp_path):
    chunk = np.zeros((16, 64, 64, 3), dtype=np.uint8)
    tracemalloc.start()
    write_archive(tmp_path / "a.npz", (chunk for _ in range(100)), np.zeros(1600, dtype=np.int64), {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * chunk.nbytes < (tmp_path / "a.npz").stat().st_size / 40


def test_files_of_others_are_not_taken_for_archives(tmp_path):
    np.savez(tmp_path / "foreign.npz", arr_0=np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("foreign.npz", "text.npz"):
        with pytest.raises(UserError, match=f"{name} exists and was not made by this command"):
            read_provenance(tmp_path / name)


def member(descr, shape, content):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


# What a foreign archive may hold as its protocol, and how it is compressed.
DAMAGED = {
    "a header that claims all memory": (member("<i8", (10**13,), b"1234567"), zipfile.ZIP_STORED),
    "a negative shape": (member("<i8", (-3,), b"1234567"), zipfile.ZIP_STORED),
    "a broken header": (b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((,", zipfile.ZIP_STORED),
    "no array": (b"hello", zipfile.ZIP_STORED),
    "a bomb": (bytes(2**25), zipfile.ZIP_DEFLATED),
    "damaged LZMA": (member("<U2", (), "{}".encode("utf-32le")), zipfile.ZIP_LZMA),
    "damaged bzip2": (member("<U2", (), "{}".encode("utf-32le")), zipfile.ZIP_BZIP2),
}


@pytest.mark.parametrize("content, method", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_protocol_is_an_error_of_one_line(content, method, tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("protocol.npy", content)
    if method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        damaged = bytearray(path.read_bytes())
        damaged[60] ^= 255
        damaged[66] ^= 255
        path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.npz: .* is damaged or can't be read \(.*\); move it away") as error:
        read_provenance(path)
    assert "\n" not in str(error.value)


def test_samplers_and_the_command_have_the_same_defaults():
    options = {field.name: field.default for field in dataclasses.fields(GenerateConfig)}
    for setting in (*dataclasses.fields(SamplerSettings), *dataclasses.fields(GuidanceSettings)):
        assert setting.default == options[setting.name], setting.name


@pytest.mark.parametrize(("scale", "said"), [(4.0, "guides the first three channels only"), (1.0, "has no effect")])
def test_legacy_says_that_it_is_not_repas(scale, said):
    (line,) = GenerateConfig(ckpt=Path("checkpoint"), cfg_scale=scale, legacy=True).warnings()
    assert line.startswith("--legacy ") and said in line
