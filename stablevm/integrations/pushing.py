"""The command `stablevm push`: a checkpoint and what is known of it, into a repository of the hub or a folder."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from stablevm.choices import Weights
from stablevm.evaluation.digits import digits_rows
from stablevm.integrations.config import PushConfig
from stablevm.integrations.hub import PAGE_FILE, PICTURES, Files, parameters_of, upload
from stablevm.integrations.model_page import Numbers, Page, Picture, in_words, written
from stablevm.metrics.table import METRICS, metrics_in, result_rows
from stablevm.networks.snapshot import CARD_FILE, ModelCard, checkpoint_in, load_card, load_model
from stablevm.support.cards import read_object
from stablevm.support.errors import UserError
from stablevm.support.files import CHECKPOINTS, parse_json, remove_temporary, sha256, write_with
from stablevm.support.hub import is_on_hub
from stablevm.support.images import read_png_text
from stablevm.support.locks import is_foreign, owned
from stablevm.support.text import brief, caption
from stablevm.training.average import AVERAGES
from stablevm.training.config import CONFIG_FILE, TrainConfig
from stablevm.training.evaluation import PREVIEWS, settings_for
from stablevm.training.tracker import evaluated

# Options about the trainer's machine, the places of files, and what does not change the network.
_OF_THE_MACHINE = frozenset(
    {
        "exp_name", "output_dir", "data_dir", "report_to", "logging_dir", "resume", "resume_step", "num_workers",
        "prefill_workers", "prefill_batch_size", "bank_on_gpu", "encoder_weights", "features_dir", "vae",
        "checkpointing_steps", "checkpoints_kept", "keep_best", "log_steps", "sampling_steps", "eval_every",
        "eval_samples", "eval_reference", "eval_extractor", "eval_enc_type", "eval_weights",
    }
)  # fmt: skip
_TITLES = {metric.name: metric.title for metric in METRICS} | {"frechet_test": "Fréchet distance to the test split"}


@dataclass(frozen=True)
class Pushed:
    """The checkpoint that is pushed, its weights by the SHA-256 of their files, and the run that made it, if known."""

    folder: Path
    card: ModelCard
    weights: Mapping[str, str]
    parameters: int
    run: Path | None

    @property
    def is_of_a_step(self) -> bool:
        """Whether its moving average is the one that the run itself evaluates and draws."""
        return self.folder.parent.name == CHECKPOINTS and "ema.safetensors" in self.weights

    def check(self, protocol: Mapping[str, Any], what: Path) -> None:
        """Raise UserError if images were made with other weights than those that are pushed."""
        found = protocol.get("weights_sha256")
        if found is not None and found not in self.weights.values():
            raise UserError(
                f"{what}: is of other weights ({brief(protocol.get('weights'))} of step {brief(protocol.get('step'))}) "
                f"than those that are pushed, of step {self.card.step}; leave it out, or push those"
            )


def push(config: PushConfig) -> None:
    """Upload what the options ask for, or write it into a folder, after all of it has been checked.

    UserError, before anything is uploaded, for a checkpoint, results or pictures that are damaged or don't belong
    together, and in one line for what the hub refuses.
    """
    config.validate()
    pushed = _pushed(config)
    files: dict[str, Path | bytes] = {name: pushed.folder / name for name in pushed.weights}
    pictures = dict(_pictures(config, pushed))
    files |= {picture.file: path for picture, path in pictures.items()}
    if config.readme:
        files[PAGE_FILE] = written(_page(config, pushed, list(pictures))).encode()
    files[CARD_FILE] = pushed.folder / CARD_FILE  # last, so that a folder with it is complete
    for line in _warnings(config, pushed):
        print(f"warning: {line}", file=sys.stderr)
    if config.output is not None:
        _write(config.output, files)
        print(f"{config.output}: {', '.join(files)}; nothing was uploaded")
        return
    name = config.repository
    megabytes = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in files.values()) / 1e6
    print(f"{name}: uploads {len(files)} files, {megabytes:,.1f} MB")
    message = config.message or f"{pushed.card.model.name} after {pushed.card.step:,} steps"
    commit = upload(name, files, private=config.private, message=message)
    print(f"{name}: commit {commit}; stablevm generate --ckpt {name}")


def _pushed(config: PushConfig) -> Pushed:
    if is_on_hub(config.run):
        raise UserError(f"RUN {config.run}: is on the hub already; expected the folder of a checkpoint or run")
    folder = checkpoint_in(config.run)
    card, weights, parameters = load_card(folder), {}, 0
    names: tuple[Weights, ...] = get_args(Weights) if config.weights == "both" else (config.weights,)
    for name in names:
        parameters = parameters_of(load_model(folder, card, weights=name).state_dict())  # it refuses damaged ones
        weights[f"{name}.safetensors"] = sha256(folder / f"{name}.safetensors")
    run = folder.parent.parent
    known = folder.parent.name in (CHECKPOINTS, AVERAGES) and (run / CONFIG_FILE).exists()
    return Pushed(folder, card, weights, parameters, run if known else None)


def _warnings(config: PushConfig, pushed: Pushed) -> Iterator[str]:
    if pushed.card.latent.fingerprint is not None:
        yield (
            f"{CARD_FILE} names the folder {pushed.card.latent.autoencoder} as the autoencoder, which others don't "
            "have: publish it too, so that they can give it as --vae"
        )
    if config.readme and config.license is None:
        yield "the page names no licence of the weights; give --license, such as --license apache-2.0"


def _write(folder: Path, files: Files) -> None:
    """Write the files into a folder of their own, completely or again."""
    with owned(folder):
        for path in folder.iterdir():
            if path.name not in {name.split("/")[0] for name in files} and is_foreign(path):
                raise UserError(f"--output {folder}: holds {path.name}; give a new folder")
        remove_temporary(folder)
        for name, content in files.items():

            def fill(path: Path, content: Path | bytes = content) -> None:
                path.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, path)

            write_with(folder / name, fill)


def _page(config: PushConfig, pushed: Pushed, pictures: list[Picture]) -> Page:
    recipe, trained, tags = _recipe(pushed) if pushed.run is not None else ("", [], [])
    numbers = [*_own_numbers(pushed), *(_numbers(path, pushed) for path in config.evaluations)]
    return Page(
        card=pushed.card,
        parameters=pushed.parameters,
        weights=pushed.weights,
        repository=config.repository.repository,
        recipe=recipe,
        trained=trained,
        numbers=numbers,
        pictures=pictures,
        license=config.license,
        tags=tags,
    )


def _recipe(pushed: Pushed) -> tuple[str, list[str], list[str]]:
    """The options of the training as TOML, sentences about it, and words by which the hub finds it."""
    assert pushed.run is not None
    config = TrainConfig.read(pushed.run)
    lines = []
    for field in fields(TrainConfig):
        value = getattr(config, field.name)
        local = field.name in _OF_THE_MACHINE or (isinstance(value, Path) and not is_on_hub(value))
        if not local and value is not None and value != field.default:
            shown = str(value) if isinstance(value, Path) else value
            lines.append(f"{field.name.replace('_', '-')} = {json.dumps(shown, ensure_ascii=False)}")
    trained = [f"Trained for {pushed.card.step:,} steps of {config.batch_size:,} samples of `{config.data_dir.name}`."]
    if config.init_from is not None:
        source = config.init_from if is_on_hub(config.init_from) else "another checkpoint"
        trained.append(f"It started from the weights of {source}.")
    if pushed.folder.parent.name == AVERAGES:
        trained.append(f"The weights are an average that was made after the training: `{pushed.folder.name}`.")
    stablevm = ["stable-velocity"] if config.loss_type == "stablevm" else []
    return "\n".join(["[train]", *lines]), trained, stablevm + (["repa"] if config.use_proj_loss else [])


def _own_numbers(pushed: Pushed) -> Iterator[Numbers]:
    """The evaluation by the run itself at the step that is pushed, if there was one."""
    if pushed.run is None or not pushed.is_of_a_step or (found := evaluated(pushed.run, pushed.card.step)) is None:
        return
    config, settings = TrainConfig.read(pushed.run), settings_for(pushed.card)
    protocol = {
        "num_fid_samples": config.eval_samples,
        "global_seed": config.seed,
        **asdict(settings),
        "cfg_scale": 1,
        "weights": "ema",
    }
    rows = [(_TITLES.get(name, name.replace("_", " ")), f"{value:.4g}", "") for name, value in found.items()]
    reference = Path(str(config.eval_reference)).name
    yield Numbers("During the training", rows, found, reference, in_words(protocol))


def _numbers(path: Path, pushed: Pushed) -> Numbers:
    """What `stablevm evaluate` wrote into a file; UserError if it is no such file, or of other weights."""
    results = read_object(path, "--evaluations")
    try:
        rows, values = _rows(results)
        reference = Path(results["reference"]).name
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"--evaluations {path}: not the results of stablevm evaluate; give the file it wrote") from None
    protocol = results.get("protocol")
    if not isinstance(protocol, dict):
        print(f"warning: {path} does not say which weights it is of; evaluate again to record it", file=sys.stderr)
        return Numbers("Evaluation", rows, values, reference, "How the images were made is not recorded.")
    pushed.check(protocol, path)
    return Numbers("Evaluation", rows, values, reference, in_words(protocol), protocol)


def _rows(results: Mapping[str, Any]) -> tuple[list[tuple[str, str, str]], dict[str, float]]:
    """The rows of a table, and the numbers by name, of results with sections by extractor or of digits."""
    if "frechet_test" in results:
        names = ("frechet_test", "accuracy", "precision", "recall", "density", "coverage")
        return digits_rows(results)[1:], {name: float(results[name]) for name in names}
    rows = [("samples", f"{results['num_samples']:,}", "generated images")]
    values: dict[str, float] = {}
    images = f"{results['reference_images']:,} reference images" if results["reference_images"] else "none"
    sections = [each for each in results.values() if isinstance(each, dict) and "extractor" in each]
    for section in sections:
        rows.append(("features", section["extractor"], "the network that the numbers below come from"))
        rows += result_rows(section, section["statistics"], images)
        values |= {metric.name: float(section[metric.name]) for metric in metrics_in(section)}
    if not sections:
        raise KeyError("extractor")
    return rows, values


def _pictures(config: PushConfig, pushed: Pushed) -> Iterator[tuple[Picture, Path]]:
    """The run's own grid of the step, and the pictures that were given, with their captions."""
    if pushed.run is not None and pushed.is_of_a_step:
        grid = pushed.run / PREVIEWS / f"step-{pushed.card.step:07d}.png"
        if grid.is_file():
            yield Picture(f"{PICTURES}/{grid.name}", f"Samples after {pushed.card.step:,} steps, unselected"), grid
    for path in config.pictures:
        if not path.is_file():
            raise UserError(f"--pictures {path}: no such file")
        text = read_png_text(path).get("protocol")
        protocol = None if text is None else parse_json(text, f"{path}: its protocol")
        if isinstance(protocol, dict):
            pushed.check(protocol, path)
        words = in_words(protocol) if isinstance(protocol, dict) else caption(path.stem)
        yield Picture(f"{PICTURES}/{path.name}", words), path
