"""Options of sampling: ranges, options without effect, and what they claim of the checkpoint."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.guidance import GuidanceSettings
from stablevm.sampling.provenance import check_claims
from stablevm.solvers.settings import SamplerSettings
from stablevm.support.errors import UserError
from tests.helpers.checkpoints import tiny_card


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


def test_samplers_and_the_command_have_the_same_defaults():
    options = {field.name: field.default for field in dataclasses.fields(GenerateConfig)}
    for setting in (*dataclasses.fields(SamplerSettings), *dataclasses.fields(GuidanceSettings)):
        assert setting.default == options[setting.name], setting.name


@pytest.mark.parametrize(("scale", "said"), [(4.0, "guides the first three channels only"), (1.0, "has no effect")])
def test_legacy_says_that_it_is_not_repas(scale, said):
    (line,) = GenerateConfig(ckpt=Path("checkpoint"), cfg_scale=scale, legacy=True).warnings()
    assert line.startswith("--legacy ") and said in line
