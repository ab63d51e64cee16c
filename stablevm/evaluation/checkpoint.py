"""The command `stablevm evaluate --ckpt`: images go from the sampler to the judge, without a file in between."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stablevm.autoencoder import Autoencoder, load_autoencoder
from stablevm.errors import UserError
from stablevm.evaluation.config import EvaluateCheckpointConfig
from stablevm.evaluation.evaluate import Results, begin, compare, finish_digits
from stablevm.evaluation.samples import Samples
from stablevm.precision import tf32
from stablevm.rng import RowGenerators
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.protocol import (
    Protocol,
    check_claims,
    default_name,
    labels_of,
    protocol_of,
    sampler_settings,
)
from stablevm.sampling.sampler import draw_latents
from stablevm.snapshot import ModelCard, load_card, load_model


@dataclass(frozen=True)
class CheckpointSource:
    """The images that `generate` would write: functions of the protocol and their index, drawn when they are asked for.

    So their key needs no drawing, and features that are in the cache cost nothing.
    """

    config: GenerateConfig
    card: ModelCard
    protocol: Protocol
    device: torch.device

    def __len__(self) -> int:
        return self.config.num_fid_samples

    def key(self, part: range) -> str:
        return hashlib.sha256(f"{json.dumps(self.protocol)} {part}".encode()).hexdigest()

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, 3); UserError for an image that is not finite."""
        batches = torch.tensor(list(indices)).split(self.config.per_proc_batch_size)
        return np.concatenate([self._draw(batch.tolist()) for batch in batches])

    def _draw(self, batch: list[int]) -> NDArray[np.uint8]:
        model, autoencoder = self._networks
        streams = RowGenerators.for_keys("generate", self.config.global_seed, positions=batch)
        settings = sampler_settings(self.config)
        with tf32(self.config.tf32):
            latents, _ = draw_latents(model, self.card, self.labels[batch], streams, settings, self.device)
            if not latents.isfinite().all():
                raise UserError(
                    f"--precision {self.config.precision}: images came out with values that are not finite; use fp32, "
                    "or a checkpoint from before the training diverged"
                )
            return autoencoder.decode(latents).permute(0, 2, 3, 1).numpy()

    @cached_property
    def labels(self) -> Tensor:
        return labels_of(self.config, self.card)

    @cached_property
    def _networks(self) -> tuple[nn.Module, Autoencoder]:
        model = load_model(self.config.ckpt, self.card, weights=self.config.weights, device=self.device)
        return model, load_autoencoder(self.card.latent, name=self.config.vae, device=self.device)


def evaluate_checkpoint(config: EvaluateCheckpointConfig) -> Results:
    """Judge what a checkpoint generates; otherwise as `evaluate.evaluate`."""
    config.sampling.validate()
    process = begin(config.judging, config.warnings())
    sampling = config.sampling.effective()
    card = load_card(sampling.ckpt)
    if sampling.fused_attn is not None:  # any kernel computes the same function
        card = replace(card, model=replace(card.model, fused_attn=sampling.fused_attn))
    check_claims(sampling, card)
    source = CheckpointSource(sampling, card, protocol_of(sampling, card), process.device)
    name = sampling.name or default_name(source.protocol)
    output = config.judging.output or sampling.sample_dir / f"{name}.json"
    if config.judging.extractor is not None:
        if not process.is_first:
            return {}
        images = torch.from_numpy(source.images(range(len(source))))
        return finish_digits(images, source.labels, str(sampling.ckpt), config.judging, output)
    labels = None if sampling.unconditional else source.labels.numpy()
    size = _size(source)
    return compare(Samples(str(sampling.ckpt), source, size, labels), config.judging, process, output)


def _size(source: CheckpointSource) -> tuple[int, int]:
    height, width = source.images([0]).shape[1:3]
    return height, width
