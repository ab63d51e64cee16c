"""What `accelerate launch` says: taken where the command is silent, refused where they differ or it can't be done."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from stablevm.support.errors import UserError
from stablevm.training.config import TrainConfig
from stablevm.training.launch import as_launched, compare_options, make_accelerator

CONFIG = TrainConfig(exp_name="x", data_dir=Path("data"), batch_size=8)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name in ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "DYNAMO_BACKEND", "USE_CPU", "USE_DEEPSPEED"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)


def launched(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


def test_what_the_command_does_not_say_is_the_launchers(monkeypatch):
    launched(monkeypatch, MIXED_PRECISION="bf16", GRADIENT_ACCUMULATION_STEPS="4")
    config = as_launched(CONFIG)
    assert (config.mixed_precision, config.accumulation_steps) == ("bf16", 4)
    assert as_launched(config) == config, "also where the command says the same"


def test_without_a_word_nothing_changes(monkeypatch):
    plain = replace(CONFIG, gradient_accumulation_steps=1)
    assert as_launched(CONFIG) == plain, "which is what earlier versions recorded"
    launched(monkeypatch, MIXED_PRECISION="no", DYNAMO_BACKEND="no", USE_CPU="false", USE_DEEPSPEED="false")
    assert as_launched(CONFIG) == plain
    spoken = replace(plain, mixed_precision="fp16")
    assert as_launched(spoken) == spoken, "accelerate passes no where nobody said it"


@pytest.mark.parametrize(
    ("variables", "options", "told"),
    [
        ({"MIXED_PRECISION": "bf16"}, {"mixed_precision": "fp16"}, "--mixed-precision fp16: .* says bf16"),
        ({"MIXED_PRECISION": "bf16"}, {"mixed_precision": "no"}, "--mixed-precision no: .* says bf16"),
        (
            {"GRADIENT_ACCUMULATION_STEPS": "4"},
            {"gradient_accumulation_steps": 1},
            "--gradient-accumulation-steps 1: .* says 4",
        ),
        ({"GRADIENT_ACCUMULATION_STEPS": "auto"}, {}, "_steps auto .*: expected a number from 1"),
        ({"MIXED_PRECISION": "fp8"}, {}, "--mixed_precision fp8: expected bf16, fp16 or no"),
        ({"DYNAMO_BACKEND": "INDUCTOR"}, {}, "--dynamo_backend inductor: give --compile instead"),
        ({"USE_DEEPSPEED": "true"}, {}, "DeepSpeed is not supported"),
        ({"USE_MEGATRON_LM": "true"}, {}, "Megatron-LM is not supported"),
        ({"USE_PARALLELISM_CONFIG": "true"}, {}, "not supported"),
    ],
)
def test_what_differs_or_can_not_be_done_is_one_line(variables, options, told, monkeypatch):
    launched(monkeypatch, **variables)
    with pytest.raises(UserError, match=told) as error:
        as_launched(replace(CONFIG, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [("--gradient_accumulation_steps", "4"), ("--gradient-accumulation-steps=4",)])
def test_what_accelerate_does_not_pass_on_is_read_off_its_command(given, tmp_path):
    """It passes the number of parts only to DeepSpeed, and a precision of "no" as if it had not been given."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom stablevm.training.config import TrainConfig\n"
        "from stablevm.training.launch import as_launched\n"
        "found = as_launched(TrainConfig(exp_name='x', data_dir=Path('data')))\n"
        "print(found.mixed_precision, found.accumulation_steps)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "no", *given]
    for options in ([], ["--gradient_accumulation_steps", "2"]):
        done = subprocess.run([*launch, str(script), *options], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["no", "4"]
    plain = subprocess.run([sys.executable, str(script), *launch], capture_output=True, text=True, check=True)
    assert plain.stdout.split() == ["None", "1"]


def test_accelerate_does_not_divide_the_loss_once_more(monkeypatch):
    launched(monkeypatch, GRADIENT_ACCUMULATION_STEPS="4", MIXED_PRECISION="bf16")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = make_accelerator(as_launched(CONFIG))
    assert accelerator.gradient_accumulation_steps == 1 and accelerator.mixed_precision == "bf16"
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_processes_with_different_options():
    same = CONFIG.to_dict()
    compare_options([same, dict(same)])
    with pytest.raises(UserError, match=r"process 0 has --seed 0, process 2 has --seed 1; start all"):
        compare_options([same, same, replace(CONFIG, seed=1).to_dict()])
