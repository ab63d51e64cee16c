"""Options of a training run: ranges, options without effect, what may change on resuming, and the last step."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from stablevm.support.errors import UserError
from stablevm.training.config import FREE_ON_RESUME, TrainConfig
from stablevm.training.start import as_started, short_run_warnings
from tests.helpers.data_sets import one_line

PLAIN = TrainConfig(exp_name="run", data_dir=Path("data"))
STABLE = replace(PLAIN, loss_type="stablevm")
ALIGNED = replace(PLAIN, use_proj_loss=True)

AT_LEAST_1 = (
    "batch_size", "gradient_accumulation_steps", "epochs", "max_train_steps", "checkpointing_steps", "log_steps",
    "bank_capacity_per_class", "prefill_batch_size",
)  # fmt: skip
AT_LEAST_0 = (
    "checkpoints_kept", "sampling_steps", "resume_step", "lr_warmup_steps", "seed", "num_workers", "prefill_workers",
    "adam_weight_decay", "max_grad_norm", "proj_coeff",
)  # fmt: skip
EDGES = [  # option, the least and greatest values allowed, and one beyond each
    *((option, (1,), (0, -1)) for option in AT_LEAST_1),
    *((option, (0,), (-1,)) for option in AT_LEAST_0),
    *((option, (0.0, 0.999), (-0.001, 1.0)) for option in ("adam_beta1", "adam_beta2", "ema_decay")),
    *((option, (1e-12,), (0.0, -1.0)) for option in ("learning_rate", "adam_epsilon")),
    *((option, (0.0, 1.0), (-0.001, 1.001)) for option in ("cfg_prob", "irepa_gamma")),
    ("proj_tau", (1e-9, 1.0), (0.0, 1.001)),
    ("proj_k", (1e-9, 1e9), (0.0, -20.0, float("inf"), float("nan"))),
    ("exp_name", ("a-run",), ("", "..", ".", "a/b", "/a", "a/")),
    ("report_to", ("none", "tensorboard", "wandb, tensorboard"), ("", "tensorboard,pigeon")),
    *(
        (option, (), ("neither",))
        for option in (
            "lr_schedule", "path_type", "prediction", "weighting", "loss_type", "bank_anchors", "proj_weight_schedule",
        )
    ),
    ("bank_capacity_per_class", ("all", 7), ("every", "")),
    ("mixed_precision", (None, "no", "fp16", "bf16"), ("fp8",)),
]  # fmt: skip


@pytest.mark.parametrize("option, allowed, _", EDGES)
def test_edges_of_ranges_are_allowed(option, allowed, _):
    for value in allowed:
        replace(PLAIN, **{option: value}).validate()


@pytest.mark.parametrize(
    "option, value", [(option, value) for option, _, forbidden in EDGES for value in forbidden]
)  # fmt: skip
def test_values_outside_are_refused_by_name(option, value):
    with pytest.raises(UserError) as error:
        replace(PLAIN, **{option: value}).validate()
    message = one_line(error)
    assert message.startswith(f"--{option.replace('_', '-')} {value}: expected "), message


@pytest.mark.parametrize("option", ["learning_rate", "cfg_prob", "ema_decay", "proj_tau", "max_grad_norm"])
def test_not_a_number_is_refused(option):
    with pytest.raises(UserError):
        replace(PLAIN, **{option: math.nan}).validate()


@pytest.mark.parametrize(
    "names, files, fits",
    [("digits", "a", True), ("digits,dinov2-vit-b", "a, b", True), ("digits", "a,b", False),
     ("digits,dinov2-vit-b", "a", False), ("digits,dinov2-vit-b", None, True)],
)  # fmt: skip
def test_one_file_for_each_encoder(names, files, fits):
    config = replace(ALIGNED, enc_type=names, encoder_weights=files)
    if fits:
        config.validate()
        assert len(config.encoder_files) == len(config.encoder_names)
    else:
        with pytest.raises(UserError, match=r"--encoder-weights .*--enc-type"):
            config.validate()


def test_defaults_warn_of_nothing():
    assert PLAIN.warnings() == STABLE.warnings() == ALIGNED.warnings() == []


BANK = {
    "bank_capacity_per_class": 2, "prefill_bank_fully": True, "prefill_batch_size": 2, "prefill_workers": 1,
    "bank_on_gpu": False, "bank_anchors": "batch",
}  # fmt: skip
PROJECTION = {
    "proj_coeff": 1.0, "proj_weight_schedule": "snr", "proj_tau": 0.5, "proj_k": 5.0, "enc_type": "digits",
    "encoder_weights": "file", "encoder_depth": 1, "use_irepa": True, "irepa_gamma": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    "base, options, reason",
    [
        *((PLAIN, {option: value}, "--loss-type si") for option, value in BANK.items()),
        *((PLAIN, {option: value}, "--no-use-proj-loss") for option, value in PROJECTION.items()),
        (ALIGNED, {"proj_k": 5.0}, "--proj-weight-schedule hard"),
        (replace(STABLE, bank_capacity_per_class="all"), {"prefill_bank_fully": True}, "--bank-capacity-per-class all"),
        (ALIGNED, {"irepa_gamma": 0.5}, "--no-use-irepa"),
        (replace(ALIGNED, proj_weight_schedule="constant"), {"proj_tau": 0.5}, "--proj-weight-schedule constant"),
    ],
)
def test_an_idle_option_is_named_with_its_reason(base, options, reason):
    (line,) = replace(base, **options).warnings()
    (option,) = options
    assert option.replace("_", "-") in line.split(" has no effect with ")[0] and line.endswith(reason)


@pytest.mark.parametrize("options", [{"logging_dir": "logs"}, {"legacy": True}, {"bank_chunk_size": 1024}])
def test_published_options_that_are_not_needed_say_so(options):
    (line,) = replace(STABLE, **options).warnings()
    assert line.startswith("--" + next(iter(options)).replace("_", "-")) and "is not needed: " in line


def test_options_in_use_are_not_called_idle():
    assert replace(STABLE, **BANK).warnings() == []
    assert replace(ALIGNED, **(PROJECTION | {"proj_weight_schedule": "sigmoid"})).warnings() == []


def test_saved_and_read_again(tmp_path):
    config = replace(ALIGNED, output_dir=Path("a/b"), mixed_precision="bf16", prefill_workers=0, resolution=256)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert TrainConfig.read(tmp_path) == config


@pytest.mark.parametrize(("begun", "resize"), [(ALIGNED, "antialiased"), (PLAIN, "bicubic")])
def test_a_run_of_before_keeps_its_images(begun, resize, tmp_path):
    """Version 0.1 smoothed the images that encoders saw, and had no option for it."""
    values = begun.to_dict()
    del values["encoder_resize"]
    begun = replace(begun, output_dir=tmp_path)
    assert as_started(begun) == begun, "there is no run yet"
    begun.folder.mkdir()
    (begun.folder / "config.json").write_text(json.dumps(values | {"output_dir": str(tmp_path)}))
    assert TrainConfig.read(begun.folder) == as_started(begun) == replace(begun, encoder_resize=resize)
    (begun.folder / "config.json").write_text(json.dumps(begun.to_dict()))
    assert as_started(begun) == begun
    with pytest.raises(UserError, match="holds a run with --encoder-resize bicubic, this command says"):
        replace(begun, encoder_resize="antialiased").check_continues(TrainConfig.read(begun.folder))


def test_a_field_of_another_version_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**PLAIN.to_dict(), "velvet": 1}))
    with pytest.raises(UserError, match="velvet: unknown to this version"):
        TrainConfig.read(tmp_path)


def another(value):
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return Path("elsewhere") if isinstance(value, Path) else "another"


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_only_free_options_may_change(field):
    earlier = getattr(PLAIN, field.name)
    changed = replace(PLAIN, **{field.name: another(earlier)})
    if field.name in FREE_ON_RESUME:
        changed.check_continues(PLAIN)
        return
    with pytest.raises(UserError) as error:
        changed.check_continues(PLAIN)
    message = one_line(error)
    assert message.startswith(f"{changed.folder} holds a run with {typed(field.name, earlier)}, ")
    assert f"this command says {typed(field.name, another(earlier))}: " in message


def typed(option, value):
    """The option as a user gives it, or leaves it out."""
    dashed = option.replace("_", "-")
    if value is None:
        return f"no --{dashed}"
    return f"--{dashed} {value}" if not isinstance(value, bool) else f"--{dashed}" if value else f"--no-{dashed}"


@pytest.mark.parametrize("option", ["max_train_steps", "epochs"])
def test_the_end_of_a_cosine_is_not_free(option):
    cosine = replace(PLAIN, lr_schedule="cosine")
    with pytest.raises(UserError, match=option.replace("_", "-")):
        replace(cosine, **{option: 7}).check_continues(cosine)


@pytest.mark.parametrize(
    "epochs, steps, samples, batch, total",
    [(1, 100, 40, 8, 5), (1, 100, 41, 8, 6), (3, 100, 10, 8, 4), (3, 2, 10, 8, 2), (1, 1, 5, 8, 1), (10, 100, 1, 8, 2)],
)  # fmt: skip
def test_total_steps(epochs, steps, samples, batch, total):
    config = replace(PLAIN, epochs=epochs, max_train_steps=steps, batch_size=batch)
    assert config.total_steps(samples) == total


def test_a_stop_after_the_last_step_is_named_with_the_steps_of_the_run():
    assert short_run_warnings(replace(ALIGNED, proj_stop_step=99), 100) == []
    assert short_run_warnings(replace(PLAIN, proj_stop_step=100), 100) == [], "`warnings` names it"
    (line,) = short_run_warnings(replace(ALIGNED, proj_stop_step=100), 100)
    assert line.startswith("--proj-stop-step 100 has no effect in a run of 100 steps")


def test_lists_take_spaces():
    config = replace(ALIGNED, report_to="none, wandb", enc_type="digits , dinov2-vit-b", encoder_weights="a , b")
    assert config.trackers == ["wandb"]
    assert config.encoder_names == ["digits", "dinov2-vit-b"] and config.encoder_files == [Path("a"), Path("b")]
    assert replace(config, use_proj_loss=False).encoder_names == []
