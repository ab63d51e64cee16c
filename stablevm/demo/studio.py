"""What the page does, without the page: from the state of its controls to a picture and the command that repeats it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablevm.demo.config import DemoConfig
from stablevm.figures import sheets
from stablevm.networks.snapshot import checkpoint_in, load_card, title_of
from stablevm.sampling.config import GenerateConfig
from stablevm.sampling.image_sampler import ImageSampler
from stablevm.sampling.provenance import check_claims, labels_of
from stablevm.support.errors import UserError
from stablevm.support.options import command_line

SAMPLERS: dict[str, dict[str, Any]] = {
    "ODE, Euler": {"mode": "ode", "solver": "euler"},
    "ODE, Heun": {"mode": "ode", "solver": "heun"},
    "ODE, dopri5 (finds its own steps)": {"mode": "ode", "solver": "dopri5"},
    "SDE, Euler-Maruyama": {"mode": "sde", "solver": "euler"},
    "SDE, stochastic Heun": {"mode": "sde", "solver": "heun"},
    "StableVS, Euler": {"mode": "stablevs", "solver": "euler"},
}
ALL_CLASSES, NO_CLASS = "all", "none"
BATCH = 16  # images that the network sees at once
MOST_STEPS_BELOW = GenerateConfig.steps_below  # StableVS's large steps: as published, but at most half of all


@dataclass(frozen=True)
class Controls:
    """What is set on the page. `classes`: ALL_CLASSES, NO_CLASS, or the number of a class."""

    sampler: str = "ODE, Heun"
    steps: int = 20
    guidance: float = 1.0
    guidance_high: float = 1.0
    classes: str = ALL_CLASSES
    images: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """Images laid out as `stablevm generate` does, uint8 (H, W, 3), what they cost, and the command for them."""

    picture: NDArray[np.uint8]
    cost: str
    command: str


class Studio:
    """A checkpoint that is loaded once and generates images many times."""

    def __init__(self, config: DemoConfig, device: torch.device) -> None:
        """UserError where `config.ckpt` holds no checkpoint, or its weights or its autoencoder can't be loaded."""
        ckpt = checkpoint_in(config.ckpt, config.weights)
        self.title = Path(title_of(config.ckpt, ckpt))
        self.base = GenerateConfig(ckpt=ckpt, weights=config.weights, precision=config.precision, vae=config.vae)
        self.card = load_card(ckpt)
        check_claims(replace(self.base, unconditional=not self.card.classes_are_trained), self.card)
        self.sampler = ImageSampler.load(self.base, self.card, device)

    @property
    def can_guide(self) -> bool:
        """Whether the network was trained with classes and without them."""
        return self.card.null_is_trained and self.card.classes_are_trained

    def class_choices(self) -> list[tuple[str, str]]:
        """What `Controls.classes` may be for this network, each with its name."""
        none = [("no class", NO_CLASS)] if self.card.null_is_trained else []
        if not self.card.classes_are_trained:
            return none
        trained = self.card.trained_classes
        names = sheets.captions_of(trained, self.card)
        return [("all classes", ALL_CLASSES), *zip(names, map(str, trained), strict=True), *none]

    def request(self, controls: Controls) -> GenerateConfig:
        """The options of `stablevm generate` for what is set; UserError for what can't be honoured."""
        if controls.sampler not in SAMPLERS:
            raise UserError(f"sampler {controls.sampler!r}: expected one of {'; '.join(SAMPLERS)}")
        kind = SAMPLERS[controls.sampler]
        large_steps = min(MOST_STEPS_BELOW, max(1, controls.steps // 2))
        below: dict[str, Any] = {"steps_below": large_steps} if kind["mode"] == "stablevs" else {}
        one_class = controls.classes not in (ALL_CLASSES, NO_CLASS)
        request = replace(
            self.base,
            **kind,
            **below,
            num_steps=controls.steps,
            cfg_scale=controls.guidance,
            guidance_high=controls.guidance_high,
            num_fid_samples=controls.images,
            classes=controls.classes if one_class else None,
            unconditional=controls.classes == NO_CLASS,
            global_seed=controls.seed,
        )
        request.validate()
        check_claims(request, self.card)
        return request.effective()

    def generate(self, controls: Controls, progress: Callable[[float], object] = lambda share: None) -> Generated:
        """The images; `progress` is told which share of them is done, from 0 to 1."""
        request, started = self.request(controls), time.monotonic()
        labels = labels_of(request, self.card)
        indices, columns = sheets.arrange(labels.numpy())
        sampler, parts, evaluations = replace(self.sampler, config=request), [], 0
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]

            def watch(x: Tensor, t: Tensor, v: Tensor, start: int = start, size: int = len(batch)) -> None:
                progress((start + (1 - float(t)) * size) / len(indices))

            adaptive = request.solver == "dopri5"
            images, evaluations = sampler.sample(batch, labels[batch], None if adaptive else watch)
            parts.append(images)
            progress((start + len(batch)) / len(indices))
        captions = sheets.captions_of(labels[indices].tolist(), self.card)
        return Generated(
            sheets.plot_sheet(np.concatenate(parts), columns, captions),
            f"{len(indices)} images, {evaluations} network evaluations each, {time.monotonic() - started:.1f} s",
            command_line("stablevm generate", replace(request, ckpt=self.title)),
        )
