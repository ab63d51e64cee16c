"""Words and ranges that options and library share: each word works, and each number is checked once."""

import math
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from stablevm import AlignmentSchedule, ObjectiveSettings, SamplerSettings, UserError, choices
from stablevm.integrations.stablevs import DEFAULTS
from stablevm.interpolant import INTERPOLANTS
from stablevm.preparation.pictures import TRANSFORMS
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.guidance import GuidanceSettings
from stablevm.solvers.settings import SAMPLER_RANGES, SamplerOptions, settings_of
from stablevm.support.precision import DTYPES
from stablevm.support.ranges import ABOVE_0, AT_LEAST_1, BELOW_1, TIME_BETWEEN, Count, ranges_in
from stablevm.times import LOG_RATIO_MOMENTS
from stablevm.training.config import TrainConfig
from stablevm.training.objectives import OBJECTIVES


@pytest.mark.parametrize(
    "words, table",
    [
        (choices.PathName, INTERPOLANTS),
        (choices.LossName, OBJECTIVES),
        (choices.TimeName, {"uniform", *LOG_RATIO_MOMENTS}),
        (choices.Transform, TRANSFORMS),
        (choices.Precision, {*DTYPES} - {"no"}),
    ],
)
def test_every_word_has_something_behind_it(words, table):
    assert set(get_args(words)) <= set(table)


def test_ranges_have_the_ends_that_they_say_and_nothing_endless():
    assert 1 in AT_LEAST_1 and 0 not in AT_LEAST_1
    assert 0 not in ABOVE_0 and 1e-300 in ABOVE_0 and math.inf not in ABOVE_0
    assert 0 in BELOW_1 and 1 not in BELOW_1
    assert 0 not in TIME_BETWEEN and 1 not in TIME_BETWEEN
    assert all(math.nan not in each for each in (AT_LEAST_1, ABOVE_0, BELOW_1, TIME_BETWEEN))
    assert ranges_in(Count | None) == [AT_LEAST_1]


@pytest.mark.parametrize(
    "option, value, library",
    [
        ("proj_tau", 0.0, lambda value: AlignmentSchedule("sigmoid", tau=value)),
        ("proj_k", 0.0, lambda value: AlignmentSchedule("sigmoid", steepness=value)),
        ("cfg_prob", 1.5, lambda value: ObjectiveSettings(label_dropout=value, null_class=1)),
    ],
)
def test_options_and_library_refuse_the_same_in_the_same_words(option, value, library):
    with pytest.raises(UserError) as by_library:
        library(value)
    with pytest.raises(UserError) as by_option:
        TrainConfig(exp_name="run", data_dir=Path("data"), **{option: value}).validate()
    assert str(by_library.value).partition(": ")[2] == str(by_option.value).partition(": ")[2]


def test_the_sampler_is_a_part_of_the_options_of_generate():
    assert issubclass(GenerateConfig, SamplerOptions)
    assert {field.name for field in fields(SamplerSettings)} == {field.name for field in fields(SamplerOptions)}
    given = GenerateConfig(ckpt=Path("x"), mode="ode", num_steps=7, solver="heun")
    assert settings_of(given) == SamplerSettings("ode", num_steps=7, solver="heun")
    with pytest.raises(UserError, match=r"rtol 1\.0 has no effect"):
        settings_of(GenerateConfig(ckpt=Path("x"), rtol=1.0))
    assert {name: getattr(SamplerSettings(), name) for name in DEFAULTS} == DEFAULTS and DEFAULTS
    numbers = {f.name for f in fields(SamplerOptions) if type(f.default) in (int, float)}
    assert set(SAMPLER_RANGES) == numbers | {"time_shift"}, "whose default is the network's"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"cfg_scale": -1.0}, "cfg_scale -1.0: expected 0 or more"),
        ({"guidance_low": 1.5}, r"guidance_low 1.5: expected a time in \[0, 1\]"),
        ({"guidance_low": 0.5, "guidance_high": 0.4}, "guidance_high 0.4: expected at least 0.5"),
        ({"precision": "fp8"}, "precision 'fp8': expected one of fp32, bf16, fp16"),
    ],
)
def test_guidance_that_cannot_be_honoured_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        GuidanceSettings(**given)
