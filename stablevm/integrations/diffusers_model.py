"""A checkpoint's network as a model of diffusers, whose configuration is the checkpoint's card."""

import json
import sys
from typing import Any

import diffusers
import torch

# diffusers loads a class of a saved pipeline by a base class that it finds in the class's module, which is this one.
from diffusers import ConfigMixin
from diffusers import ModelMixin as ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from stablevm.networks.registry import build_network, empty_network
from stablevm.networks.snapshot import FORMAT_VERSION, ModelCard
from stablevm.support.cards import card_of, check_version


class StableVMModel(ModelMixin, ConfigMixin):
    """Any network of stablevm (SiT, LightningDiT, JiT and those that are registered) as a model of diffusers.

    The arguments, which `config.json` holds, are the entries of a checkpoint's `model.json`; `card` has them checked.
    Without weights the network has its initial values. UserError for entries that contradict each other or are unknown.
    """

    card: ModelCard  # all that the weights mean: path, prediction, latents, classes
    _repeated_blocks = ("Block",)  # for compile_repeated_blocks

    @register_to_config
    def __init__(
        self,
        model: dict[str, Any],
        latent: dict[str, Any],
        path_type: str,
        prediction: str,
        class_names: list[str],
        step: int,
        class_counts: list[int] | None = None,
        label_dropout: float | None = None,
        time_shift: float = 1.0,
        format_version: int = FORMAT_VERSION,
    ) -> None:
        super().__init__()
        names = ("model", "latent", "path_type", "prediction", "class_names", "step")
        values = {name: self.config[name] for name in (*names, "class_counts", "label_dropout", "time_shift")}
        check_version({"format_version": format_version}, FORMAT_VERSION, "the model's configuration")
        self.card = card_of(ModelCard, values, "the model's configuration")
        build = empty_network if _builds_empty() else build_network
        self.network = build(self.card.model)

    @classmethod
    def from_network(cls, network: nn.Module, card: ModelCard) -> "StableVMModel":
        """The model of a network that has its weights already, such as one of `snapshot.load_model`."""
        with torch.device("meta"):
            model = cls(**json.loads(json.dumps(card.to_dict())))
        model.network = network
        return model

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict what the network was trained on: the velocity if `card.prediction` is "v", the data if it is "x".

        hidden_states: noisy latents (B, C, h, w), in the scale of `card.latent`; (B, *card.model.state_shape) with a
        class token. timestep: times (B,) from 0, the data, to 1, noise. class_labels: (B,) int64, of which
        `card.model.null_class` means no class. The result has the shape of `hidden_states` and the model's dtype.
        """
        sample = self.network(hidden_states.to(self.dtype), timestep.float(), class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _builds_empty() -> bool:
    """Whether modules are being built without values, as diffusers does before it loads weights."""
    return nn.LayerNorm(1).weight.is_meta


# diffusers takes the parts of a pipeline on the hub from modules that are attributes of its own, as this one is now.
setattr(diffusers.pipelines, __name__, sys.modules[__name__])
