"""The memory of a forward and backward pass, with and without checkpointed activations.

Both sides are computed in one process, on the same input. Kept: the bytes of tensors that autograd holds for the
backward pass when it begins, each storage counted once. Peak: the most that torch had allocated at a time during both
passes, beyond the weights (of the profiler's events on a CPU, of torch's allocator on a GPU).

python benchmarks/activations.py [--model SiT-S/2] [--batch-size 8] [--side 32] [--mixed-precision no]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from common import MEBIBYTE, DeviceName, choose_device, medians, peak_bytes
from torch import Tensor

from stablevm.networks.backbone import Backbone
from stablevm.networks.registry import build_network, network_config
from stablevm.support.machine import describe_machine
from stablevm.support.precision import DTYPES, autocast


@dataclass(frozen=True)
class Activations:
    """Compare the memory of a network's training step with and without checkpointed activations."""

    model: str = "SiT-S/2"
    batch_size: int = 8
    side: int = 32
    """Side of the latents, which have 4 channels."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    repeats: int = 5
    device: DeviceName = "auto"


def main(options: Activations) -> None:
    device = choose_device(options.device)
    config = network_config(options.model, input_size=options.side, in_channels=4, num_classes=1000)
    sides = {"plain": build_network(config).to(device), "checkpointed": build_network(config).to(device)}
    sides["checkpointed"].checkpoint_activations()
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, 4, options.side, options.side)
    x, t = torch.randn(shape, generator=generator), torch.rand(options.batch_size, generator=generator)
    y = torch.randint(1000, (options.batch_size,), generator=generator)
    inputs = tuple(each.to(device) for each in (x, t, y))
    dtype = DTYPES[options.mixed_precision]

    def step(model: Backbone) -> Callable[[], None]:
        def run() -> None:
            for parameter in model.parameters():  # zeros, not None: gradients are not counted as activations
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
            forward(model, inputs, device, dtype).square().mean().backward()

        return run

    steps = {name: step(model) for name, model in sides.items()}
    seconds = medians(steps, repeats=options.repeats, device=device)
    print(f"{options.model}, batch {options.batch_size}, {options.mixed_precision}; {describe_machine(device)}")
    print(f"{'':14}{'kept, MiB':>12}{'peak, MiB':>12}{'ms':>10}")
    for name, model in sides.items():
        kept = kept_bytes(lambda model=model: forward(model, inputs, device, dtype), model)
        peak = peak_bytes(steps[name], device)
        print(f"{name:14}{kept / MEBIBYTE:12.1f}{peak / MEBIBYTE:12.1f}{1e3 * seconds[name]:10.1f}")


def forward(model: Backbone, inputs: tuple[Tensor, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with autocast(device, dtype):
        output = model(*inputs)
    assert isinstance(output, Tensor)
    return output


def kept_bytes(run: Callable[[], Tensor], model: Backbone) -> int:
    """The bytes of the tensors that autograd keeps after `run`, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(found.values())


if __name__ == "__main__":
    main(tyro.cli(Activations))
