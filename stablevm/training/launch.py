"""How this process takes part in a run: alone, with others, in shards; and in which precision."""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType

from stablevm.errors import UserError
from stablevm.training.config import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """UserError where the options do not fit the machine, or the number of processes."""
    precision = config.mixed_precision or ("fp16" if torch.cuda.is_available() else "no")
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16: there is no GPU here; give bf16 or no")
    # Told that there is only a CPU, accelerate joins several processes through gloo; untold, it would leave each alone.
    # Gradients that lie in the buckets they are reduced in need no second place (nor a copy at each step).
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[buckets])
    _check_sharding(accelerator)
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size}: not a multiple of {accelerator.num_processes} processes x "
            f"{config.gradient_accumulation_steps} accumulation steps; give one"
        )
    return accelerator


def _check_sharding(accelerator: Accelerator) -> None:
    """UserError where accelerate's configuration asks for FSDP that would silently be left out, or be wrong."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("FSDP: accelerate shards over several GPUs only; launch without --use_fsdp")
    if not accelerator.is_fsdp2:
        raise UserError("FSDP of version 1 hides the weights' names; set fsdp_version: 2 (--fsdp_version 2)")
    if accelerator.mixed_precision == "fp16":
        raise UserError("--mixed-precision fp16: its scaler does not know of FSDP's shards; give bf16 or no")
