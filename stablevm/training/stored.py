"""Alignment with tokens that were stored before the training, in place of a frozen encoder."""

from collections.abc import Sequence

from torch import Tensor, nn

from stablevm.data.dataset import PreparedDataset
from stablevm.data.features import StoredFeatures
from stablevm.networks.encoders import Encoder, load_encoder
from stablevm.support.errors import UserError
from stablevm.support.precision import DTYPES
from stablevm.training.config import TrainConfig


class StoredEncoder(Encoder):
    """In place of images it takes their stored tokens, which the loader reads."""

    def __init__(self, features: StoredFeatures) -> None:
        super().__init__(nn.Identity(), dim=features.card.dim, grid_size=features.card.grid_size)
        self.features = features

    def _tokens(self, images: Tensor) -> Tensor:
        return images

    def _pooled(self, images: Tensor) -> Tensor:
        raise UserError("stored tokens hold no feature vector of the whole image; run the encoder")


def open_features(config: TrainConfig, dataset: PreparedDataset, grid_size: int) -> StoredFeatures:
    """The stored tokens that the options name; UserError unless they are those of this run's encoder and data."""
    assert config.features_dir is not None
    features = StoredFeatures(config.features_dir)
    expected: dict[str, object] = {"encoder": config.enc_type, "resize": config.encoder_resize, "grid_size": grid_size}
    if config.encoder_weights is not None:
        expected["weights"] = _fingerprint_of(config, grid_size, features)
    features.check(dataset, len(dataset), expected)
    return features


def _fingerprint_of(config: TrainConfig, grid_size: int, features: StoredFeatures) -> str:
    """The fingerprint of the encoder whose weights the options name, which is loaded for that alone."""
    encoder = load_encoder(
        config.enc_type,
        grid_size=grid_size,
        weights=config.encoder_files[0],
        device="cpu",
        dtype=DTYPES[features.card.precision],
        antialias=config.encoder_resize == "antialiased",
    )
    return encoder.fingerprint()


def stored_features(encoders: Sequence[Encoder]) -> StoredFeatures | None:
    """The stored tokens that the loader reads in place of images; None where encoders run on images."""
    return next((each.features for each in encoders if isinstance(each, StoredEncoder)), None)
