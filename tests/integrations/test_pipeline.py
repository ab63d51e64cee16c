"""The pipeline of diffusers: the images of `generate`, any scheduler of flow matching, and what it refuses."""

import inspect
import logging

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline  # noqa: E402

from stablevm import UserError  # noqa: E402
from stablevm.integrations import diffusers_scheduler as ours  # noqa: E402
from stablevm.integrations.diffusers_model import StableVMModel  # noqa: E402
from stablevm.integrations.diffusers_pipeline import StableVMPipeline  # noqa: E402
from stablevm.interpolant import get_interpolant  # noqa: E402
from stablevm.networks.autoencoder import GREY, LatentSpec, latent_spec_of  # noqa: E402
from stablevm.networks.registry import network_config  # noqa: E402
from stablevm.networks.snapshot import ModelCard  # noqa: E402
from stablevm.sampling.config import GenerateConfig  # noqa: E402
from stablevm.sampling.generation import generate  # noqa: E402
from tests.helpers.checkpoints import random_weights, save_checkpoint, tiny_card  # noqa: E402
from tests.helpers.tiny_vae import save_tiny_vae  # noqa: E402

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
GUIDED = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.6)}


def card_of(name, *, side=8, channels=1, latent=None, prediction="v", time_shift=1.0, **options):
    model = network_config(name, input_size=side, in_channels=channels, num_classes=3, **options)
    latent = latent or LatentSpec((channels, side, side), 1.0, 0.0, GREY, deterministic=True)
    names = ("cat", "dog", "tench, Tinca tinca")
    return ModelCard(model, latent, "linear", prediction, names, step=7, label_dropout=0.1, time_shift=time_shift)


def in_latents(folder):
    """Latents of a tiny AutoencoderKL in a folder, with a scale and a shift for each channel."""
    found = latent_spec_of(str(save_tiny_vae(folder)), 32)
    latent = LatentSpec(
        found.shape, (0.3, 0.5, 2.0, 1.0), (0.1, 0.0, -1.0, 0.5), found.autoencoder, found.fingerprint, measured=True
    )
    return card_of("SiT-XXS/2", side=4, channels=4, latent=latent)


CARDS = {
    "SiT, pixels": lambda folder: tiny_card(),
    "SiT, predicts the data": lambda folder: tiny_card(prediction="x"),
    "SiT, class token": lambda folder: tiny_card(cls_token_dim=6),
    "SiT, latents by channel": in_latents,
    "LightningDiT, shifted times": lambda folder: card_of("LightningDiT-XXS/2", time_shift=3.0),
    "JiT, grey pixels": lambda folder: card_of("JiT-XXS/4", prediction="x"),
}


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"), tiny_card())


@pytest.fixture
def pipe(checkpoint):
    pipe = StableVMPipeline.from_checkpoint(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", CARDS)
def test_a_saved_pipeline_makes_the_images_of_generate(tmp_path, kind):
    checkpoint = save_checkpoint(tmp_path / "run", CARDS[kind](tmp_path / "vae"))
    made = generate(
        GenerateConfig(
            ckpt=checkpoint, sample_dir=tmp_path, name="made", mode="ode", num_steps=10, num_fid_samples=5,
            cfg_scale=2.0, guidance_low=0.2, guidance_high=0.6, global_seed=3,
        )
    )  # fmt: skip
    with np.load(made) as archive:
        theirs, labels = archive["arr_0"].astype(int), archive["labels"]
    StableVMPipeline.from_checkpoint(checkpoint).save_pretrained(tmp_path / "saved")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(pipe) is StableVMPipeline
    found = pipe(labels, num_inference_steps=10, generator=pipe.generators(3, range(5)), **GUIDED)
    assert np.abs(pixels(found.images) - theirs).max() <= 1
    assert theirs.std() > 5, "the comparison means something"
    # Its third image alone, by the name of its class.
    name = pipe.card.class_names[labels[2]]
    alone = pipe(name, num_inference_steps=10, generator=pipe.generators(3, [2]), **GUIDED)
    assert np.abs(pixels(alone.images) - theirs[2]).max() <= 1


def test_the_last_weights_make_other_images(checkpoint, pipe):
    last = StableVMPipeline.from_checkpoint(checkpoint, weights="model")
    one, two = (
        each(1, num_inference_steps=2, generator=each.generators(0, [0]), output_type="np").images
        for each in (pipe, last)
    )
    assert np.abs(one - two).max() > 0.05


class ExactMean(torch.nn.Module):
    """E[x0 | x_t] where the data of class k are N(k - 1, SPREAD^2) in each pixel."""

    SPREAD = 0.5

    def __init__(self, path):
        super().__init__()
        self.path, self.unused = get_interpolant(path), torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, labels):
        mean, c = (labels - 1.0)[:, None, None, None], self.path.coefficients(t, x)
        share = c.alpha * self.SPREAD**2 / ((c.alpha * self.SPREAD) ** 2 + c.sigma**2)
        return mean + share * (x - c.alpha * mean)

    def end(self, noise, labels):
        """Where the exact flow ends."""
        return (labels - 1.0)[:, None, None, None] + self.SPREAD * noise


# Each scheduler, and the largest error in a pixel after 40 steps.
SOLVERS = {
    "euler": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), 0.1),
    "heun": (lambda: diffusers.FlowMatchHeunDiscreteScheduler(), 0.002),
    "unipc": (lambda: diffusers.UniPCMultistepScheduler(**FLOW), 0.02),
    "dpm": (lambda: diffusers.DPMSolverMultistepScheduler(**FLOW), 0.02),
    "deis": (lambda: diffusers.DEISMultistepScheduler(**FLOW), 0.12),
    "dynamic": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 0.1),
    "stablevs": (lambda: ours.StableVSFlowMatchScheduler(steps_below=20), 0.15),
    "stablevs dpm": (lambda: ours.StableVSDPMSolverMultistepScheduler(steps_below=20), 0.15),
    "stablevs unipc": (lambda: ours.StableVSUniPCMultistepScheduler(steps_below=20), 0.15),
}


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_solvers_arrive_at_the_end_of_the_exact_flow(path):
    card = tiny_card(path_type=path, prediction="x")
    model = StableVMModel.from_network(ExactMean(path), card)
    noise, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3])
    distances = {}
    for name, (make, _) in SOLVERS.items():
        pipe = StableVMPipeline(model, make())
        pipe.set_progress_bar_config(disable=True)
        end = pipe(labels, num_inference_steps=40, latents=noise, output_type="latent").images
        distances[name] = float((end - model.network.end(noise, labels)).abs().max())
    assert all(distances[name] < allowed for name, (_, allowed) in SOLVERS.items()), distances


def _network(card):
    from stablevm.networks.registry import build_network

    network = build_network(card.model)
    network.load_state_dict(random_weights(card, 0))
    return network.eval().requires_grad_(False)


def test_stochastic_schedulers_draw_from_the_generators(pipe):
    fresh = [  # without Euler's, whose noise does not come from the generator in diffusers 0.37
        diffusers.FlowMatchLCMScheduler(),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
        ours.StableVSFlowMatchScheduler(noise_factor=1.0),
        ours.StableVSUniPCMultistepScheduler(noise_factor=1.0),
    ]
    for scheduler in fresh:
        pipe.scheduler = scheduler
        both, again, alone = (
            pipe([0] * len(rows), num_inference_steps=12, output_type="np", generator=pipe.generators(0, rows)).images
            for rows in ([4, 5], [4, 5], [5])
        )
        assert np.array_equal(both, again) and np.allclose(both[1], alone[0], atol=1 / 255)
        assert np.abs(both[0] - both[1]).max() > 0.1


def test_outputs_have_the_forms_of_diffusers(pipe):
    made = {
        kind: pipe(
            [np.int64(1), None], num_inference_steps=2, generator=pipe.generators(0, [0, 1]), output_type=kind
        ).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert made["np"].shape == (2, 8, 8, 3) and made["np"].dtype == np.float32
    assert made["pt"].shape == (2, 3, 8, 8) and made["latent"].shape == (2, 1, 8, 8)
    assert np.array_equal(pixels(made["pil"]), (made["np"] * 255).round())
    assert np.array_equal(made["pt"].permute(0, 2, 3, 1).numpy(), made["np"])
    (images,) = pipe(torch.tensor([2]), num_inference_steps=1, generator=pipe.generators(0, [0]), return_dict=False)
    assert images[0].size == (8, 8)


def test_a_callback_sees_changes_and_ends_the_steps(pipe):
    seen = []

    def halve(given, step, timestep, values):
        seen.append((step, float(timestep), values["latents"].shape))
        given._interrupt = step == 1
        return {"latents": values["latents"] * 0}

    noise = torch.ones(1, 1, 8, 8)
    images = pipe(0, num_inference_steps=5, latents=noise, callback_on_step_end=halve, output_type="latent").images
    assert [step for step, *_ in seen] == [0, 1] and seen[0][1] == 1000 and pipe.interrupt
    assert not images.any()
    images = pipe(0, num_inference_steps=2, latents=noise, callback_on_step_end=lambda *_: None, output_type="latent")
    assert images.images.any()


def test_parts_wait_on_the_processor_until_they_are_needed(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "run", in_latents(tmp_path / "vae"))
    pipe = StableVMPipeline.from_checkpoint(checkpoint)
    plain, offloaded = [], []
    for made in (plain, offloaded):
        made += pipe([0, 1], num_inference_steps=3, generator=pipe.generators(0, [0, 1])).images
        if made is plain:
            pipe.enable_model_cpu_offload(device="cpu")
            assert {"_hf_hook"} <= vars(pipe.transformer).keys() & vars(pipe.vae).keys()
    assert np.array_equal(pixels(plain), pixels(offloaded))


def test_saving_again_and_half_precision(tmp_path, caplog):
    checkpoint = save_checkpoint(tmp_path / "run", in_latents(tmp_path / "vae"))
    pipe = StableVMPipeline.from_checkpoint(checkpoint)
    pipe.scheduler = ours.StableVSFlowMatchScheduler.from_config(pipe.scheduler.config, steps_below=3)
    pipe.save_pretrained(tmp_path / "one")
    with caplog.at_level(logging.WARNING):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "one")
    assert "Expected types" not in caplog.text and "not expected" not in caplog.text
    assert type(loaded.scheduler) is ours.StableVSFlowMatchScheduler and loaded.scheduler.config.steps_below == 3
    loaded.save_pretrained(tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    half = StableVMPipeline.from_pretrained(tmp_path / "two", torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    one, two = (
        pixels(each([0, 1], num_inference_steps=20, generator=each.generators(0, [0, 1])).images)
        for each in (pipe, half)
    )
    assert np.abs(one - two).mean() < 4


def same_weights(one, other):
    values = other.state_dict()
    return all(torch.equal(value, values[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("name", ["SiT-XXS/4", "LightningDiT-XXS/2", "JiT-XXS/4"])
def test_a_model_is_saved_and_loaded_alone(tmp_path, name):
    card = card_of(name)
    model = StableVMModel.from_network(_network(card), card)
    model.save_pretrained(tmp_path)
    x, t, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.9]), [0, 3]
    before = model(x, t, torch.tensor(labels)).sample
    for sparing in (True, False):
        state = torch.random.get_rng_state()
        loaded = StableVMModel.from_pretrained(tmp_path, low_cpu_mem_usage=sparing)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert loaded.card == card and same_weights(loaded, model)
        # The last bits of a product depend on where in memory the weights lie.
        torch.testing.assert_close(loaded(x, t, torch.tensor(labels)).sample, before, rtol=0, atol=1e-5)
    new = StableVMModel.from_config(StableVMModel.load_config(tmp_path))
    assert not new(x, t, torch.tensor(labels)).sample.any(), "as a new network, whose last layer is zero"


def test_a_configuration_that_was_changed_is_refused(tmp_path):
    config = dict(StableVMModel.from_network(_network(tiny_card()), tiny_card()).config)
    for change, told in [
        ({"format_version": 2}, "format version 2"),
        ({"prediction": "noise"}, "prediction"),
        ({"latent": {**config["latent"], "shape": [1, 4, 4]}}, r"the latent is \[1, 4, 4\]"),
    ]:
        with pytest.raises(UserError, match=told):
            StableVMModel.from_config({**config, **change})


REFUSED = [
    ({"class_labels": "class 9"}, "class class 9: .* the nearest are class 3"),
    ({"class_labels": [5]}, "class_labels 5: .* 0 to 3"),
    ({"class_labels": [True]}, "class_labels True"),
    ({"class_labels": [0.5]}, "class_labels 0.5"),
    ({"class_labels": []}, "for each image"),
    ({"class_labels": 0, "guidance_scale": -1}, "guidance_scale -1: expected 0 or more"),
    ({"class_labels": 0, "guidance_interval": (0.5, 0.1)}, "guidance_interval"),
    ({"class_labels": 0, "output_type": "jpg"}, "output_type 'jpg'"),
    ({"class_labels": 0, "num_inference_steps": 0}, "num_inference_steps 0"),
    ({"class_labels": 0, "latents": torch.zeros(2, 1, 8, 8)}, r"latents \(2, 1, 8, 8\): expected \(1, 1, 8, 8\)"),
    ({"class_labels": 0, "generator": [torch.Generator()] * 2}, "2 of them for 1 images"),
    ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds"),
]


@pytest.mark.parametrize("arguments, told", REFUSED, ids=[told for _, told in REFUSED])
def test_bad_arguments_are_refused_in_one_line(pipe, arguments, told):
    with pytest.raises(UserError, match=told) as error:
        pipe(**arguments)
    assert "\n" not in str(error.value)


def test_what_was_never_trained_is_refused(tmp_path):
    pipe = StableVMPipeline.from_checkpoint(save_checkpoint(tmp_path / "a", tiny_card(label_dropout=0.0)))
    with pytest.raises(UserError, match=r"guidance_scale 2: .* sample classes with guidance_scale 1"):
        pipe(0, guidance_scale=2)
    pipe = StableVMPipeline.from_checkpoint(save_checkpoint(tmp_path / "b", tiny_card(label_dropout=1.0)))
    with pytest.raises(UserError, match="classes are untrained"):
        pipe(0)
    assert pipe(num_inference_steps=1, latents=torch.zeros(1, 1, 8, 8)).images[0].size == (8, 8)


@pytest.mark.parametrize(
    "scheduler, told",
    [
        (diffusers.DDIMScheduler(), "DDIMScheduler: expected one of flow matching"),
        (diffusers.UniPCMultistepScheduler(), "UniPCMultistepScheduler: expected one of flow matching"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    ],
)
def test_schedulers_of_other_processes_are_refused(pipe, scheduler, told):
    pipe.scheduler = scheduler
    with pytest.raises(UserError, match=told):
        pipe(0)


def test_noise_levels_can_be_given_where_the_scheduler_takes_them(pipe):
    noise = torch.ones(1, 1, 8, 8)
    given = pipe(0, sigmas=[1.0, 0.75, 0.5, 0.25], latents=noise, output_type="latent").images
    assert torch.equal(given, pipe(0, num_inference_steps=4, latents=noise, output_type="latent").images)
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    assert "sigmas" not in inspect.signature(pipe.scheduler.set_timesteps).parameters
    with pytest.raises(UserError, match="sigmas: FlowMatchHeunDiscreteScheduler takes none"):
        pipe(0, sigmas=[1.0, 0.5])


def test_latents_without_their_autoencoder_are_not_decoded(tmp_path):
    pipe = StableVMPipeline.from_checkpoint(save_checkpoint(tmp_path / "run", in_latents(tmp_path / "vae")))
    pipe = StableVMPipeline(pipe.transformer, pipe.scheduler)
    options = {"num_inference_steps": 1, "latents": torch.zeros(1, 4, 4, 4)}
    assert pipe(0, output_type="latent", **options).images.shape == (1, 4, 4, 4)
    with pytest.raises(UserError, match="vae: the pipeline has none"):
        pipe(0, **options)
