"""Projectors: from the tokens of a block to the feature width of a frozen encoder."""

from torch import Tensor, nn


def build_projector(
    kind: str, *, hidden_size: int, projector_hidden: int, feature_dim: int, grid_size: int
) -> nn.Module:
    """Build a module that maps tokens (B, grid_size^2, hidden_size) to (B, grid_size^2, feature_dim).

    kind: one of `stablevm.networks.network_config.PROJECTOR_KINDS`.
    """
    if kind == "mlp":
        return mlp_projector(hidden_size, projector_hidden, feature_dim)
    return ConvProjector(hidden_size, feature_dim, grid_size)


def mlp_projector(hidden_size: int, projector_hidden: int, feature_dim: int) -> nn.Sequential:
    """REPA's projector (Yu et al., 2024): three linear layers with SiLU between, applied to each token."""
    return nn.Sequential(
        nn.Linear(hidden_size, projector_hidden),
        nn.SiLU(),
        nn.Linear(projector_hidden, projector_hidden),
        nn.SiLU(),
        nn.Linear(projector_hidden, feature_dim),
    )


class ConvProjector(nn.Module):
    """iREPA's projector (Singh et al., 2025): one zero-padded 3 x 3 convolution on the grid of tokens."""

    def __init__(self, hidden_size: int, feature_dim: int, grid_size: int) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.projection_layer = nn.Conv2d(hidden_size, feature_dim, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T, hidden_size) in row-major order to (B, T, feature_dim)."""
        grid = tokens.transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))
        return self.projection_layer(grid).flatten(2).transpose(1, 2)
