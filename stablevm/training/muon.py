"""The optimiser Muon (Jordan et al., 2024) for the matrices of a network's blocks, with AdamW for all other weights.

torch's own `torch.optim.Muon` computes the steps. It makes the update of each matrix orthogonal, so weights that hold
several matrices, such as those of queries, keys and values, are given to it matrix by matrix. Rates are scaled as in
Moonlight (Liu et al., 2025), so that updates are as large as AdamW's and both have the same rate and weight decay.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stablevm.networks.backbone import Backbone
from stablevm.support.errors import UserError, arg
from stablevm.training.config import TrainConfig
from stablevm.training.guard import GuardedAdamW

MOMENTUM = "momentum_buffer"  # in the state of a matrix's weight, as torch's Muon calls it
FIRST_VERSION = "2.9"  # of torch with Muon


class GuardedMuon(GuardedAdamW):
    """Muon for some weights and AdamW for the others; steps for which `skip` is true change neither weights nor state.

    All weights are in one group. The state of a weight of Muon is its momentum, as large as the weight.
    """

    def __init__(
        self, parameters: list[nn.Parameter], matrices: Mapping[nn.Parameter, int], *, momentum: float, **adamw: Any
    ) -> None:
        """matrices: the weights of Muon, each with the number of matrices that lie in it one below the other.

        momentum: Muon's. adamw: the options of AdamW, of which `lr` and `weight_decay` are Muon's too.
        """
        super().__init__(parameters, **adamw)
        self._matrices, self._momentum = dict(matrices), momentum

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state; AdamW, which would look for a count of steps, does not see that of Muon's weights."""
        own = {weight: values for weight, values in state["state"].items() if MOMENTUM in values}
        others = {weight: values for weight, values in state["state"].items() if weight not in own}
        super().__setstate__({**state, "state": defaultdict(dict, others)})
        self.state.update(own)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step, unless `skip` or the fp16 scaler's `found_inf` is true."""
        flags = [each for each in (self.skip, getattr(self, "found_inf", None)) if each is not None]
        skip = torch.stack([each.bool().reshape(()) for each in flags]).any() if flags else None
        gradients = {weight: weight.grad for weight in self._matrices}
        for weight in gradients:  # which AdamW then leaves alone
            weight.grad = None
        result = super().step(closure)
        for weight, gradient in gradients.items():
            weight.grad = gradient
            if gradient is not None:
                self._step_matrices(weight, gradient, skip)
        return result

    @torch.no_grad()
    def _step_matrices(self, weight: nn.Parameter, gradient: Tensor, skip: Tensor | None) -> None:
        """A step of torch's Muon for each matrix in a weight; what it changes is taken back where `skip` is true.

        So only one weight and its momentum are copied at a time, and nothing waits for the device.
        """
        state, (group,), count = self.state[weight], self.param_groups, self._matrices[weight]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(weight)
        changed: list[Tensor] = [weight.detach(), state[MOMENTUM]]
        before = [each.clone() for each in changed]
        parts = weight.detach().chunk(count)  # views: a step of these is a step of the weight
        muon = torch.optim.Muon(
            parts,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=self._momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        for part, of_part, momentum in zip(parts, gradient.chunk(count), state[MOMENTUM].chunk(count), strict=True):
            part.grad = of_part
            muon.state[part][MOMENTUM] = momentum
        muon.step()
        if skip is not None:
            for now, then in zip(changed, before, strict=True):
                now.copy_(torch.where(skip, then, now))


def make_optimizer(config: TrainConfig, model: Backbone) -> GuardedAdamW:
    """The optimiser of the options for the weights of `model` that are trained.

    UserError for Muon with a version of torch, or a kind of network, that has none.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw":
        return GuardedAdamW(parameters, **adamw)
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"{arg('optimizer')} muon: needs torch {FIRST_VERSION} or newer, this is {torch.__version__}")
    matrices = {model.get_parameter(name): count for name, count in muon_weights(config, model).items()}
    return GuardedMuon(parameters, matrices, momentum=config.muon_momentum, **adamw)


def muon_weights(config: TrainConfig, model: Backbone) -> dict[str, int]:
    """The names of the weights of Muon, each with the number of matrices in it; none with AdamW."""
    if config.optimizer == "adamw":
        return {}
    found = model.hidden_matrices()
    if not found:
        raise UserError(f"{arg('optimizer')} muon: a network of kind {model.config.kind} names no matrices for it")
    return found
