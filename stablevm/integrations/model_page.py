"""The page of a checkpoint on the Hugging Face Hub (README.md): what it is, its use, recipe, numbers and pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stablevm.choices import Weights
from stablevm.networks.snapshot import ModelCard
from stablevm.sampling.config import GenerateConfig
from stablevm.support.hub import PREFIX
from stablevm.support.options import command_line
from stablevm.support.text import brief, caption
from stablevm.support.version import __version__

TASK = "unconditional-image-generation"  # the hub's task of images that no text describes
NAMES_SHOWN = 10  # classes


@dataclass(frozen=True)
class Numbers:
    """An evaluation: rows (measure, value, meaning), the numbers by name, the reference, and the images' protocol."""

    title: str
    rows: Sequence[tuple[str, str, str]]
    values: Mapping[str, float]
    reference: str
    made: str  # how the images were made, in words
    protocol: Mapping[str, Any] | None = None  # all that they depend on, where it is recorded


@dataclass(frozen=True)
class Picture:
    """A picture, by its file in the repository."""

    file: str
    caption: str


@dataclass(frozen=True)
class Page:
    """All that the page says. recipe: TOML; without it nothing is known of the training."""

    card: ModelCard
    parameters: int
    weights: Mapping[str, str]  # the SHA-256 of each file of weights
    repository: str | None = None  # OWNER/NAME
    recipe: str = ""
    trained: Sequence[str] = ()  # sentences about the training
    numbers: Sequence[Numbers] = ()
    pictures: Sequence[Picture] = ()
    license: str | None = None
    tags: Sequence[str] = field(default=())

    @property
    def title(self) -> str:
        return self.repository.split("/")[1] if self.repository else self.card.model.name


def written(page: Page) -> str:
    """The page as Markdown, with the metadata that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData
    from huggingface_hub import ModelCard as HubCard

    found = [
        EvalResult(TASK, each.reference, each.reference, name, round(value, 6), metric_name=name)
        for each in page.numbers
        for name, value in each.values.items()
        if math.isfinite(value)
    ]
    data = ModelCardData(
        license=page.license,
        library_name="stablevm",
        pipeline_tag=TASK,
        tags=["flow-matching", "stablevm", page.card.model.kind, *page.tags],
        model_name=page.title,
        eval_results=found or None,
    )
    parts = [*_introduction(page), *_pictures(page), *_use(page), *_facts(page), *_training(page), *_numbers(page)]
    return str(HubCard(f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _introduction(page: Page) -> list[str]:
    card, latent = page.card, page.card.latent
    of = f"latents of {' x '.join(map(str, latent.shape))} by the autoencoder {_autoencoder(card)}"
    if latent.autoencoder in ("identity", "grey"):
        of = f"pixels, {' x '.join(map(str, latent.shape))}"
    return [
        f"# {page.title}",
        f"A {card.model.name} of {page.parameters / 1e6:,.1f} million parameters that generates images of "
        f"{card.model.num_classes:,} classes ({of}) by flow matching, made with stablevm {__version__}.",
    ]


def _autoencoder(card: ModelCard) -> str:
    """Its name on the hub; of a folder on somebody's machine no more than that."""
    name = card.latent.autoencoder
    return "in a folder of its maker's" if card.latent.fingerprint is not None else name


def _pictures(page: Page) -> list[str]:
    return [f"![{each.caption}]({each.file})\n\n*{each.caption}*" for each in page.pictures]


def _use(page: Page) -> list[str]:
    name = f"{PREFIX}{page.repository}" if page.repository else "FOLDER"
    weights: Weights = "ema" if "ema.safetensors" in page.weights else "model"
    request = GenerateConfig(ckpt=Path(name), weights=weights, mode="ode", num_steps=40, grid=True)
    if page.card.model.intervals:
        request = replace(request, mode="meanflow", num_steps=1)
    shape = "(B, " + ", ".join(map(str, page.card.latent.shape)) + ")"
    predicts = "the velocity" if page.card.prediction == "v" else "the data"
    named = "" if weights == "ema" else f', weights="{weights}"'
    return [
        "## Use",
        f"```bash\npip install 'stablevm[train,hub]'\n{command_line('stablevm generate', request)}\n```",
        f"```python\nfrom stablevm.integrations.hub import from_pretrained\n\n"
        f'model, card = from_pretrained("{name}"{named})\n'
        f"prediction = model(x_t, t, labels)  # {predicts} at x_t {shape} and times t (B,); t = 1 is noise\n```",
        "The files are safetensors and JSON; nothing in them is executed.",
    ]


def _facts(page: Page) -> list[str]:
    card = page.card
    names = [caption(name) for name in card.class_names[:NAMES_SHOWN]]
    more = ", ..." if len(card.class_names) > NAMES_SHOWN else ""
    rows = [
        ("network", card.model.name),
        ("training steps", f"{card.step:,}"),
        ("latents", " x ".join(map(str, card.latent.shape))),
        ("autoencoder", _autoencoder(card)),
        ("path, prediction", f"{card.path_type}, {card.prediction}"),
        ("classes", f"{card.model.num_classes:,}" + (f": {', '.join(names)}{more}" if card.names_classes else "")),
        ("trained without labels", "not recorded" if card.label_dropout is None else f"{card.label_dropout:.0%}"),
        *((f"SHA-256 of {file}", f"`{digits}`") for file, digits in page.weights.items()),
    ]
    return ["## Facts", _table(["", ""], rows)]


def _training(page: Page) -> list[str]:
    if not page.recipe:
        return ["## Training", "How it was trained is not recorded here."]
    return [
        "## Training",
        *page.trained,
        "All options that are not stablevm's defaults, as a file for `stablevm train --config FILE --exp-name RUN "
        "--data-dir DATA`, without those of the machine and the places of files:",
        f"```toml\n{page.recipe.strip()}\n```",
    ]


def _numbers(page: Page) -> list[str]:
    if not page.numbers:
        return ["## Numbers", "It has not been evaluated."]
    parts = ["## Numbers"]
    for each in page.numbers:
        parts += [f"**{each.title}**, against {each.reference}. {each.made}", _table(_HEAD, each.rows)]
        if each.protocol is not None:
            facts = json.dumps(each.protocol, indent=2, ensure_ascii=False)
            parts.append(f"<details><summary>The whole protocol</summary>\n\n```json\n{facts}\n```\n\n</details>")
    return parts


_HEAD = ["measure", "value", "meaning"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(brief(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def in_words(protocol: Mapping[str, Any]) -> str:
    """How images were made, by what `generate` recorded of them."""
    known = {name: brief(value, 40) for name, value in protocol.items()}
    steps = "" if protocol.get("solver") == "dopri5" else f" in {known.get('num_steps')} steps"
    guidance = "without guidance"
    if protocol.get("cfg_scale") not in (None, 1):
        guidance = f"guidance {known['cfg_scale']} at times {known.get('guidance_low')} to {known.get('guidance_high')}"
    if "guide_scale" in known:
        guidance += f", and {known['guide_scale']} by a weaker network"
    return (
        f"{known.get('num_fid_samples')} images by the {known.get('mode')} ({known.get('solver')}{steps}), {guidance}, "
        f"seed {known.get('global_seed')}, weights {known.get('weights')}."
    )
