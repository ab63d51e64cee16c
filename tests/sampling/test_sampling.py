"""Sampling latents: guidance, precision, network evaluations, predictions of data, independence of the batch."""

import pytest
import torch
from torch import nn

from stablevm.interpolant import COSINE, INTERPOLANTS, LINEAR, get_interpolant
from stablevm.sampling.guidance import UNGUIDED, GuidanceSettings, GuidedVelocity, sample_latents
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
