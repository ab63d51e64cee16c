"""The host does not wait for the device where a step draws, computes the network, and follows it with the average.

Shown on the "meta" device, whose tensors have no values: whoever reads one, or asks how many are not 0, fails.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stablevm.bank import ClassBank
from stablevm.networks.sit import SiT
from stablevm.networks.sit_config import sit_config
from stablevm.objective import FlowMatching, ObjectiveSettings, StableTargetField, StableVM, squared_error
from stablevm.support import rng
from stablevm.training.weights import MovingAverage

CLASSES, ROWS, SHAPE = 5, 12, (4, 8, 8)
NULL = ObjectiveSettings(null_class=CLASSES, label_dropout=0.4)


class BlockingCopies(TorchDispatchMode):
    """Notes copies from the host that the host waits for: a GPU would have to finish what is in its queue first."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.ops.aten._to_copy.default and options.get("device") is not None:
            crosses = arguments[0].device.type != torch.device(options["device"]).type
            if crosses and not options.get("non_blocking"):
                self.found.append(tuple(arguments[0].shape))
        return function(*arguments, **options)


def batch():
    latents = torch.empty(ROWS, *SHAPE, device="meta")
    labels = torch.empty(ROWS, dtype=torch.int64, device="meta")
    return latents, labels, rng.RowGenerators.for_keys(0, "waiting", positions=range(ROWS))


def test_the_device_notices_who_waits():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(3, device="meta").nonzero()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty((), device="meta").item()
    with BlockingCopies() as copies:
        torch.ones(2).to("meta")
        torch.ones(3).to("meta", non_blocking=True)
    assert copies.found == [(2,)]


@pytest.mark.parametrize("anchors", ["bank", "batch"])
@pytest.mark.parametrize(
    "protocol", [ObjectiveSettings(), NULL, ObjectiveSettings(prediction="x", weighting="logit_normal")]
)
def test_stablevm_draws_without_waiting(anchors, protocol):
    objective = StableVM(ClassBank(CLASSES, 6, SHAPE, device="meta"), protocol, anchors=anchors)
    latents, labels, streams = batch()
    with BlockingCopies() as copies:
        draw = objective.draw(latents, labels, streams, ids=labels, pool_generator=rng.generator(0))
    assert copies.found == []
    assert draw.target.shape == latents.shape and draw.target.device.type == "meta" and draw.host_t.device.type == "cpu"


@pytest.mark.parametrize("references_from", [0.5, 1.0])
def test_rows_without_references_are_found_without_waiting(references_from):
    bank = ClassBank(CLASSES, 6, SHAPE, device="meta")
    objective = StableVM(bank, NULL, references_from=references_from)
    latents, labels, streams = batch()
    with BlockingCopies() as copies:
        slots = bank.insert(latents, labels, ids=labels)
        objective.draw(latents, labels, streams, ids=labels, slots=slots, pool_generator=rng.generator(0))
        field = StableTargetField(NULL, references_from=references_from)
        field.draw(latents, labels, streams, anchors=torch.empty(ROWS, dtype=torch.int64, device="meta"))
    assert copies.found == []


@pytest.mark.parametrize("protocol", [ObjectiveSettings(), NULL])
def test_flow_matching_draws_without_waiting(protocol):
    latents, labels, streams = batch()
    with BlockingCopies() as copies:
        draw = FlowMatching(protocol).draw(latents, labels, streams)
    assert copies.found == [] and draw.x_t.device.type == "meta"


def test_the_network_and_its_average_without_waiting():
    config = sit_config(
        "SiT-XXS/2", input_size=8, in_channels=4, num_classes=CLASSES, qk_norm=True, fused_attn=True, encoder_depth=1,
        projector_kind="mlp",
    )  # fmt: skip
    model = SiT(config).to("meta")
    latents, labels, streams = batch()
    average = MovingAverage(model, 0.9)
    with BlockingCopies() as copies:
        draw = FlowMatching(NULL).draw(latents, labels, streams)
        loss = squared_error(model(draw.x_t, draw.t, draw.labels), draw.target).mean()
        loss.backward()
        average.update(model, 3, loss.detach().isfinite())
    assert copies.found == []
