"""Launching: the accelerator and its precision, agreement between processes, and interruption by signals."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather_object
from torch import Tensor

from stablevm.support.errors import UserError
from stablevm.support.launcher import Place
from stablevm.support.options import as_typed
from stablevm.training.config import TrainConfig

Result = TypeVar("Result")

# Requests of `accelerate launch` in the environment that are not supported, with what to do instead.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported; launch with --use_fsdp, or plainly",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; launch with --use_fsdp, or plainly",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context and sequence parallelism are not supported; launch plainly",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's own processes are not supported; launch with torchrun",
}
DYNAMO, PRECISION = "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_MIXED_PRECISION"
ACCUMULATION, CPU = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_USE_CPU"


def as_launched(config: TrainConfig) -> TrainConfig:
    """The options, completed by those of `accelerate launch` that the command does not give itself.

    A precision "no" in the environment counts as not given, because accelerate passes it on by default. UserError if
    both give different values, and for requests that are not supported.
    """
    for variable, remedy in REFUSED.items():
        if _is_on(variable):
            raise UserError(f"accelerate launch ({variable}): {remedy}")
    if os.environ.get(DYNAMO, "no").lower() != "no":
        raise UserError(f"accelerate launch --dynamo_backend {os.environ[DYNAMO].lower()}: give --compile instead")
    told: dict[str, Any] = {}
    words = launchers_words()
    precision = os.environ.get(PRECISION, "no").lower()
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"accelerate launch --mixed_precision {precision}: expected bf16, fp16 or no")
    if precision != "no" or _said(words, "mixed_precision") == "no":
        told["mixed_precision"] = precision
    parts = os.environ.get(ACCUMULATION, _said(words, "gradient_accumulation_steps"))
    if parts is not None:
        if not (parts.isascii() and parts.isdecimal() and int(parts[:9]) >= 1):
            raise UserError(
                f"accelerate launch --gradient_accumulation_steps {parts[:40]} ({ACCUMULATION}): expected a number "
                "from 1; leave it out"
            )
        told["gradient_accumulation_steps"] = int(parts[:9])
    for option, value in told.items():
        given = getattr(config, option)
        if given not in (None, value):
            raise UserError(
                f"{as_typed(option, given)}: accelerate launch says {value} (--{option}); give one of them, or the same"
            )
    return replace(config, **{"gradient_accumulation_steps": config.accumulation_steps, **told})


def launchers_words() -> list[str]:
    """The arguments of `accelerate launch` before those of this program; empty if something else started it.

    accelerate passes --gradient_accumulation_steps only to DeepSpeed, and not whether its precision was given.
    """
    parent = psutil.Process().parent()
    try:
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:  # it has ended, or may not be looked at
        return []
    ours = sys.argv[1:]
    first = len(words) - len(ours) - 1  # the script's name, or the module's
    is_ours = first > 0 and words[first + 1 :] == ours
    return words[:first] if is_ours and any("accelerate" in Path(word).name for word in words[:3]) else []


def _said(words: Sequence[str], option: str) -> str | None:
    """The value of an option of the launcher in its arguments; None if it is not given."""
    said = None
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == f"__{option}":
            said = value if equals else following
    return said


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on", "y", "t")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Make the accelerator; UserError if the options do not fit the machine, or the number of processes."""
    Place.from_environment()  # checks variables that accelerate would read without a clear error
    cpu = not torch.cuda.is_available() or _is_on(CPU)
    precision = config.mixed_precision or ("no" if cpu else "fp16")
    if precision == "fp16" and cpu:
        raise UserError("--mixed-precision fp16: there is no GPU here; give bf16 or no")
    # With cpu=True, accelerate connects several processes through gloo; without it, each would run alone.
    # Gradients that are views of the buckets in which they are reduced need neither memory of their own nor a copy.
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    # The step divides the losses of its parts itself; accelerate would divide again, by the launcher's number.
    undivided = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(
        mixed_precision=precision, cpu=cpu, kwargs_handlers=[buckets], gradient_accumulation_plugin=undivided
    )
    _check_sharding(accelerator)
    parts = accelerator.num_processes * config.accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size}: expected a multiple of {accelerator.num_processes} processes x "
            f"{config.accumulation_steps} accumulation steps"
        )
    return accelerator


def check_same_options(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise UserError in all processes, naming the first option that differs between them."""
    if accelerator.num_processes > 1:
        compare_options(gather_object([config.to_dict()]))


def compare_options(found: Sequence[dict[str, Any]]) -> None:
    """Raise UserError for the first option that differs between processes; found: their options, by rank."""
    for rank, theirs in enumerate(found):
        for option, value in found[0].items():
            if theirs[option] != value:
                raise UserError(
                    f"the processes of one run need the same options: process 0 has {as_typed(option, value)}, "
                    f"process {rank} has {as_typed(option, theirs[option])}; start all with the same command"
                )


def _check_sharding(accelerator: Accelerator) -> None:
    """Raise UserError if accelerate's configuration requests FSDP in a way that would be ignored or wrong."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("FSDP: accelerate shards only over several GPUs; launch without --use_fsdp")
    if not accelerator.is_fsdp2:
        raise UserError("FSDP of version 1 hides the weights' names; set fsdp_version: 2 (--fsdp_version 2)")
    if accelerator.mixed_precision == "fp16":
        raise UserError("--mixed-precision fp16: its scaler does not support FSDP; give bf16 or no")


def told_by_main(accelerator: Accelerator, task: Callable[[], Result]) -> Result:
    """Run `task` in the main process and return its result in all processes; errors as in `on_main`."""
    result = on_main(accelerator, task)
    if accelerator.num_processes > 1:
        (result,) = broadcast_object_list([result])
    return cast(Result, result)


def on_main(accelerator: Accelerator, task: Callable[[], Result]) -> Result | None:
    """Run `task` in the main process and return its result there, None in the others, which wait for it.

    A UserError or OSError, such as of a full disk, is raised in all processes, which would otherwise wait forever.
    """
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = task()
        except (UserError, OSError) as error:
            failure = error
    if accelerator.num_processes > 1:
        (failure,) = broadcast_object_list([failure])
    if failure is not None:
        raise failure
    return result


class Interruption:
    """Inside the block, the first signal is only recorded; a second one ends the program as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was told to stop; all processes must call it at the same step."""
        if accelerator.num_processes == 1:
            return self.signal is not None
        mine = torch.tensor(self.signal or 0, device=accelerator.device)
        received = accelerator.reduce(mine, reduction="sum")
        assert isinstance(received, Tensor)
        agreed = bool(received.item())  # not the signal itself, which may have arrived since, unknown to the others
        if agreed and self.signal is None:
            self.signal = signal.SIGTERM
        return agreed

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
