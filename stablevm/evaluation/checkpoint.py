"""The command `stablevm evaluate --ckpt`: images go from the sampler to the metrics, without a file in between."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablevm.evaluation.config import EvaluateCheckpointConfig
from stablevm.evaluation.evaluate import Results, begin, compare, finish_digits, results_owned
from stablevm.evaluation.outputs import check_outputs, inputs_of, outputs_of
from stablevm.evaluation.samples import Samples
from stablevm.networks.snapshot import ModelCard
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.image_sampler import ImageSampler
from stablevm.sampling.protocol import Protocol, checked_card, decoding_notes, default_name, labels_of, protocol_of
from stablevm.support.compiler import check_compiler


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
        return np.concatenate([self._sampler.draw(batch.tolist(), self.labels[batch])[0] for batch in batches])

    @cached_property
    def labels(self) -> Tensor:
        return labels_of(self.config, self.card)

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return self._sampler.image_side

    @cached_property
    def _sampler(self) -> ImageSampler:
        return ImageSampler.load(self.config, self.card, self.device)


def evaluate_checkpoint(config: EvaluateCheckpointConfig) -> Results:
    """Judge what a checkpoint generates; otherwise as `evaluate.evaluate`."""
    config.sampling.validate()
    process = begin(config.judging, config.warnings())
    sampling = config.drawn.effective()
    if sampling.compile:
        check_compiler(process.device)
    card = checked_card(sampling)
    for line in decoding_notes(sampling.vae, card.latent) if process.is_first else ():
        print(f"warning: {line}", file=sys.stderr)
    source = CheckpointSource(sampling, card, protocol_of(sampling, card), process.device)
    name = sampling.name or default_name(source.protocol)
    output = config.judging.output or sampling.sample_dir / f"{name}.json"
    check_outputs(outputs_of(output, config.judging), {"--ckpt": sampling.ckpt} | inputs_of(config.judging))
    with results_owned(output, process):
        if config.judging.extractor is not None:
            if not process.is_first:
                return {}
            images = torch.from_numpy(source.images(range(len(source))))
            return finish_digits(images, source.labels, str(sampling.ckpt), config.judging, output)
        labels = None if sampling.unconditional else source.labels.numpy()
        samples = Samples(str(sampling.ckpt), source, (source.side, source.side), labels)
        return compare(samples, config.judging, process, output)
