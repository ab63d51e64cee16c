"""What all public values promise: they are pickled and copied, print as a line, and no default dtype changes them."""

import copy
import io
import pickle

import pytest
import torch

import stablevm
from stablevm import (
    COSINE,
    LINEAR,
    AlignmentSchedule,
    ClassBank,
    FeatureStatistics,
    FlowMatching,
    MeanFlow,
    ObjectiveSettings,
    SamplerSettings,
    StableTargetField,
    StableVM,
    UserError,
    integrate,
)
from stablevm.posterior import posterior
from stablevm.sampling.guidance import GuidanceSettings, GuidedVelocity
from stablevm.support.rng import RowGenerators, rand, randn

CLASSES, ROWS, SHAPE = 3, 12, (2, 4, 4)
NULL = ObjectiveSettings(label_dropout=0.4, null_class=CLASSES, weighting="logit_normal")


def stream():
    return torch.Generator().manual_seed(5)


def batch():
    return torch.randn(ROWS, *SHAPE, generator=stream(), dtype=torch.float32), torch.arange(ROWS) % CLASSES


def filled_bank():
    bank = ClassBank(CLASSES, 4, SHAPE)
    bank.insert(*batch(), torch.arange(ROWS))
    return bank


def a_posterior():
    latents, _ = batch()
    return posterior(LINEAR, latents, latents.roll(1), torch.full((ROWS,), 0.7, dtype=torch.float32), latents)


def a_curve():
    times = torch.tensor([0.3, 1.0], dtype=torch.float64)
    return stablevm.variance_curve(LINEAR, *batch(), times, references=3, rows=20, generator=stream())


def an_end(settings):
    first = iter([randn((4, 3), stream())] * 999)
    velocity = GuidedVelocity(Shift(), COSINE, "v", torch.arange(4), 9, scale=1.5)
    return integrate(velocity, lambda: next(first).double(), COSINE, settings)


class Shift(torch.nn.Module):
    def forward(self, x, t, labels):
        return x + 0.1 * labels.float()[:, None] + t[:, None]


# By public name: values that it makes, or that what it names is.
MADE = {
    "COSINE": lambda: COSINE,
    "LINEAR": lambda: LINEAR,
    "Interpolant": lambda: LINEAR,
    "AlignmentSchedule": lambda: AlignmentSchedule("snr", COSINE),
    "ClassBank": filled_bank,
    "Draw": lambda: StableVM(filled_bank(), NULL).draw(*batch(), stream()),
    "FeatureStatistics": lambda: FeatureStatistics.from_features(batch()[0].flatten(1)),
    "FlowMatching": FlowMatching,
    "MeanFlow": lambda: MeanFlow(omega=2.0, null_class=CLASSES),
    "Posterior": a_posterior,
    "ObjectiveSettings": lambda: NULL,
    "SamplerSettings": lambda: SamplerSettings("ode", num_steps=7),
    "StableTargetField": lambda: StableTargetField(NULL),
    "StableVM": lambda: StableVM(filled_bank(), NULL, anchors="batch"),
    "UserError": lambda: UserError("a line"),
    "VarianceCurve": a_curve,
}
MORE = {
    "Coefficients": lambda: LINEAR.coefficients(torch.tensor([0.1, 0.7])),
    "GuidanceSettings": lambda: GuidanceSettings(cfg_scale=2),
    "GuidedVelocity": lambda: GuidedVelocity(Shift(), LINEAR, "x", torch.arange(3), 3),
    "RowGenerators": lambda: RowGenerators.for_keys("rows", positions=range(3)),
}
FUNCTIONS = {name: getattr(stablevm, name) for name in stablevm.__all__ if name not in MADE}


def test_the_list_is_complete():
    assert set(MADE) <= set(stablevm.__all__)
    assert all(callable(value) and not isinstance(value, type) for value in FUNCTIONS.values()), "or add it to MADE"


def same(one, other):
    """Whether two values hold the same, tensors and all."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, BaseException):
        return type(one) is type(other) and one.args == other.args
    if hasattr(one, "__dict__") and not callable(one):
        return type(one) is type(other) and same(list(vars(one).values()), list(vars(other).values()))
    return one == other or (type(one) is type(other) and callable(one))


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("through", [pickled, copy.deepcopy, copy.copy, saved_and_loaded])
@pytest.mark.parametrize("make", (MADE | MORE).values(), ids=MADE | MORE)
def test_values_come_back_the_same(make, through):
    value = make()
    assert same(value, through(value))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_are_pickled(function):
    assert pickle.loads(pickle.dumps(function)) is function


def test_a_copy_of_an_objective_draws_what_the_original_draws():
    objective = StableVM(filled_bank(), NULL)
    other = pickle.loads(pickle.dumps(objective))
    for _ in range(2):
        one, two = (each.draw(*batch(), stream()) for each in (objective, other))
        assert torch.equal(one.target, two.target)
    assert same(objective.bank, other.bank)


@pytest.mark.parametrize("make", (MADE | MORE).values(), ids=MADE | MORE)
def test_values_print_as_a_few_lines(make):
    shown = repr(make())
    assert len(shown) < 900 and shown.count("\n") < 5 and "<function" not in shown


def test_a_draw_prints_shapes_types_and_devices():
    shown = repr(MADE["Draw"]())
    assert "\n" not in shown
    assert shown.startswith("Draw(x_t=torch.float32 (12, 2, 4, 4) on cpu, t=torch.float32 (12,) on cpu, ")
    assert "ids=torch.int64 (12,) on cpu" in shown
    assert repr(a_posterior()) == "Posterior(offset=torch.float32 (12, 2, 4, 4) on cpu, ess=torch.float32 (12,) on cpu)"
    assert repr(filled_bank()) == "ClassBank(3 classes of 4, shape (2, 4, 4), torch.float32 on cpu)"


# Default dtypes

RESULTS = {
    "uniform times": lambda: stablevm.draw_times("uniform", LINEAR, 50, stream()),
    "lognormal times": lambda: stablevm.draw_times("lognormal", COSINE, 50, stream()),
    "rand of rows": lambda: rand((3, 5), RowGenerators.for_keys("r", positions=range(3))),
    "randn": lambda: randn((3, 5), stream()),
    "FlowMatching": lambda: FlowMatching(NULL).draw(*batch(), stream()),
    "StableVM": MADE["Draw"],
    "StableVM, batch anchors": lambda: StableVM(filled_bank(), NULL, anchors="batch").draw(*batch(), stream()),
    "StableVM, x-prediction": lambda: StableVM(filled_bank(), ObjectiveSettings(prediction="x")).draw(
        *batch(), stream()
    ),
    "StableTargetField": lambda: StableTargetField(NULL).draw(*batch(), stream()),
    "Posterior": a_posterior,
    "schedules": lambda: [
        AlignmentSchedule(name, COSINE)(torch.linspace(0, 1, 9, dtype=torch.float32))
        for name in ("hard", "hard_high", "sigmoid", "cosine", "snr", "constant")
    ],
    "alignment": lambda: stablevm.weighted_alignment(
        stablevm.alignment_loss(*torch.randn(2, 3, 4, 5, generator=stream(), dtype=torch.float32)),
        torch.linspace(0, 1, 3, dtype=torch.float32),
    ),
    "normalize_over_space": lambda: stablevm.normalize_over_space(batch()[0].flatten(2), 0.6),
    "squared_error": lambda: stablevm.squared_error(batch()[0].half(), batch()[0].bfloat16()),
    "Euler": lambda: an_end(SamplerSettings("ode", num_steps=5)),
    "Heun, EDM": lambda: an_end(SamplerSettings("ode", num_steps=5, solver="heun", edm_schedule=True)),
    "SDE": lambda: an_end(SamplerSettings(num_steps=5)),
    "StableVS": lambda: an_end(SamplerSettings("stablevs", num_steps=12, noise_factor=0.4)),
    "dopri5": lambda: an_end(SamplerSettings("ode", solver="dopri5")),
    "variance_curve": a_curve,
    "precision_recall": lambda: list(stablevm.precision_recall(batch()[0].flatten(1), batch()[0].flatten(1) + 0.1)),
    "coverage": lambda: stablevm.coverage(batch()[0].flatten(1), batch()[0].flatten(1) + 0.1),
    "frechet_distance": lambda: stablevm.frechet_distance(
        *(FeatureStatistics.from_features(part.flatten(1)) for part in batch()[0].split([5, 7]))
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute", RESULTS.values(), ids=RESULTS)
def test_no_default_dtype_changes_a_result(compute, dtype):
    expected = compute()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = compute()
    finally:
        torch.set_default_dtype(before)
    assert same(expected, found)
