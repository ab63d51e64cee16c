"""The interface that every network offers to training and sampling."""

from abc import abstractmethod

from torch import Tensor, nn

from stablevm.networks.network_config import NetworkConfig
from stablevm.support.errors import UserError, arg


class Backbone(nn.Module):
    """A network that predicts the velocity, or another regression target, from a noisy latent, a time and a label."""

    config: NetworkConfig

    @abstractmethod
    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, features: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Predict (B, C, H, W) from latents x (B, C, H, W), times t (B,) in [0, 1] and labels y (B,) int64.

        With a class token, x and the prediction are (B, *config.state_shape), as `joint_state.joined` makes them.
        Labels run from 0 to num_classes; the last is the null class, "no label". With `features`, it returns a pair:
        the prediction, and for each projector its tokens (B, T, feature_dim), computed after block `encoder_depth`;
        those of REPA's projectors begin with the class token's, if there is one. Without, the projectors do not run.
        Where the configuration says `intervals`, `forward` also takes r (B,), and predicts the mean velocity between
        the times r <= t (MeanFlow); without r, the velocity at t.
        """

    @abstractmethod
    def compile_blocks(self) -> None:
        """Compile the network's blocks with torch.compile, without changing the names of parameters."""

    def checkpoint_activations(self) -> None:
        """From now on save only each block's input for the backward pass, which computes the rest again.

        UserError for a network that does not support it.
        """
        raise UserError(f"{arg('checkpoint_activations')}: a network of kind {self.config.kind} does not support it")

    def hidden_matrices(self) -> dict[str, int]:
        """The names of the weights between hidden layers, for Muon, each with the number of matrices stacked in it.

        None by default: such a network is trained by AdamW.
        """
        return {}
