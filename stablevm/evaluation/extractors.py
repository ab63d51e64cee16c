"""Networks that extract features from images: Inception as in ADM's suite, and timm's encoders.

FID, sFID and the Inception score use Inception, the graph of 2015-12-05. Its network, resizing and weights are those of
torch-fidelity's `FeatureExtractorInceptionV3`; this module adds the spatial features.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stablevm.networks.encoders import Encoder, load_encoder
from stablevm.support.errors import UserError
from stablevm.support.extras import need
from stablevm.support.files import sha256
from stablevm.support.foreign_weights import read_weights
from stablevm.support.precision import full_precision, tf32


class FeatureExtractor(Protocol):
    """Maps uint8 images (B, 3, H, W) to features by name, float32 (B, width) each, which include `pool`."""

    @property
    def name(self) -> str:
        """The name shown beside every number."""

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the weights, in hexadecimal; features with equal fingerprints can be compared."""

    @property
    def feature_names(self) -> tuple[str, ...]: ...

    @property
    def section(self) -> str:
        """The section of the results that holds its numbers."""

    @property
    def published(self) -> bool:
        """Whether it is the published Inception; only its distances are called FID, sFID and KID."""

    @property
    def has_stored_statistics(self) -> bool:
        """Whether reference files store statistics of its features (`Reference.check_extractor`)."""

    @property
    def logits(self) -> Callable[[Tensor], Tensor] | None:
        """A function from pool features (n, width) to logits (n, classes), both on the CPU; None if it has none."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]: ...


class EncoderExtractor:
    """Features of a frozen encoder, one vector per image: its class token, or its mean over patches."""

    feature_names = ("pool",)
    section = "encoder"
    published = has_stored_statistics = False
    logits = None

    def __init__(self, encoder: Encoder, name: str, device: torch.device | str) -> None:
        self.name = name
        self.fingerprint = fingerprint(encoder)
        self._encoder = encoder
        self._device = device

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with full_precision(torch.device(self._device)), tf32(False):
            return {"pool": self._encoder.pooled(images.to(self._device))}


def load_encoder_extractor(name: str, weights: Path | None, device: torch.device | str) -> EncoderExtractor:
    """Load an encoder by the name for --enc-type; images are scaled to 224 x 224 pixels with antialiasing.

    This is the resizing of FD-DINOv2. Raises UserError as `load_encoder` does.
    """
    encoder = load_encoder(name, grid_size=None, weights=weights, device=device, antialias=True)
    return EncoderExtractor(encoder, name, device)


def fingerprint(network: nn.Module) -> str:
    """The SHA-256 of the network's parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.ndim else b"")
    return digest.hexdigest()


BLOCK_ROWS = 4096  # pool features multiplied at once: 32 MiB
WIDTH = 2048  # of the pool features
SPATIAL_CHANNELS = 7  # the first ones of 17 x 17 positions
SPATIAL_WIDTH = SPATIAL_CHANNELS * 17 * 17
PUBLISHED_NAME = "Inception 2015-12-05"
# The published file's name ends in the first digits of its SHA-256, by which torch.hub checks the download.
PUBLISHED_SHA256 = "6726825d"


class InceptionExtractor:
    """Inception: from uint8 images to `pool` (B, 2048) and `spatial` (B, 2023), float32, and from `pool` to logits."""

    feature_names = ("pool", "spatial")
    section = "inception"
    has_stored_statistics = True

    def __init__(self, network: Any, *, published: bool, device: torch.device | str) -> None:
        self.fingerprint = fingerprint(network)
        self.published = published
        self.name = PUBLISHED_NAME if published else f"Inception with other weights ({self.fingerprint[:8]})"
        self._network = network.to(device)
        self._device = device
        self._branch: Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: object, inputs: object, output: Tensor) -> None:
        self._branch = output

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """The features of uint8 images (B, 3, H, W) of any size, which the network resizes as TensorFlow 1 does."""
        with full_precision(torch.device(self._device)), tf32(False):
            (pool,) = self._network(images.to(self._device))
        assert self._branch is not None
        spatial = self._branch[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # height, width, channel
        self._branch = None
        return {"pool": pool, "spatial": spatial}

    @torch.no_grad()
    def logits(self, pool: Tensor) -> Tensor:
        """The logits (n, 1008), float32 on the CPU, of pool features (n, 2048), without the bias."""
        weights = self._network.fc.weight
        with full_precision(weights.device):
            return torch.cat([(block.to(weights.device) @ weights.T).cpu() for block in pool.split(BLOCK_ROWS)])


def load_inception(weights: Path | None, device: torch.device | str = "cpu") -> InceptionExtractor:
    """Load Inception with the weights in a file, or with the published ones, which are downloaded once.

    weights: the published file, or a torch file (of only tensors) or safetensors with the same names. UserError if the
    file does not fit, or the download fails.
    """
    FeatureExtractorInceptionV3 = _torch_fidelity().FeatureExtractorInceptionV3
    path = weights if weights is not None else _download()
    state = io.BytesIO()  # the network unpickles its weights itself, so it gets only a pickle that was written here
    torch.save(read_weights(path, "--inception-weights"), state)
    state.seek(0)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # for initial values, which the weights replace
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=state)
    except RuntimeError:
        raise UserError(
            f"--inception-weights {path}: not the weights of torch-fidelity's Inception; give "
            f"{_file_name(_torch_fidelity().URL_INCEPTION_V3)}"
        ) from None
    return InceptionExtractor(network, published=sha256(path).startswith(PUBLISHED_SHA256), device=device)


def _torch_fidelity() -> Any:
    need("FID (or else --no-inception with --enc-type)", "torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3

    return feature_extractor_inceptionv3


def _download() -> Path:
    """The published file in torch.hub's folder, downloaded if it is missing; UserError if that fails."""
    url = _torch_fidelity().URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / _file_name(url)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=PUBLISHED_SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Inception's weights can't be downloaded from {url} ({' '.join(str(error).split())}); download that "
                "file elsewhere and give it with --inception-weights, or leave FID out: --no-inception --enc-type NAME "
                "--encoder-weights FILE, such as the extractor that stablevm extractor trains"
            ) from None
    if not sha256(path).startswith(PUBLISHED_SHA256):
        raise UserError(f"{path}: damaged, its SHA-256 does not begin with {PUBLISHED_SHA256}; remove it")
    return path


def _file_name(url: str) -> str:
    return url.rsplit("/", 1)[-1]
