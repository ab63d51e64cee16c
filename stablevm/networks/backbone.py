"""What every network offers to training and sampling, whatever its kind."""

from abc import abstractmethod

from torch import Tensor, nn

from stablevm.networks.network_config import NetworkConfig


class Backbone(nn.Module):
    """Predicts a velocity (or whatever the loss asks for) from a noisy latent, its time and its label."""

    config: NetworkConfig

    @abstractmethod
    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, features: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The prediction (B, C, H, W) for latents x (B, C, H, W), times t (B,) in [0, 1] and labels y (B,) int64.

        Labels run from 0 to num_classes; the last one is the null class, "no label". With `features`, returns
        (prediction, one tensor of tokens (B, T, feature_dim) per projector), read after block `encoder_depth`;
        without, the projectors don't run.
        """

    @abstractmethod
    def compile_blocks(self) -> None:
        """Let torch.compile make faster kernels of the network's parts; names of parameters stay."""
