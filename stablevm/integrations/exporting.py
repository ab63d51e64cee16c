"""The command `stablevm export`, from a checkpoint to the folder of a pipeline of diffusers."""

import filecmp
import shutil
from pathlib import Path

from stablevm.integrations.config import ExportConfig
from stablevm.integrations.diffusers_pipeline import StableVMPipeline
from stablevm.support.errors import UserError
from stablevm.support.files import sync
from stablevm.support.locks import is_foreign, owned
from stablevm.support.tensor_files import system_errors

_SCRATCH = ".tmp-export"  # inside the folder; an interrupted command leaves it


def export(config: ExportConfig) -> Path:
    """Write the pipeline of a checkpoint into `config.folder`, and return that folder.

    `model_index.json`, without which diffusers loads nothing, comes last. UserError if the folder holds anything else;
    one that already holds this pipeline is left unchanged.
    """
    config.validate()
    with owned(config.folder):
        _check_free(config.folder)
        shutil.rmtree(scratch := config.folder / _SCRATCH, ignore_errors=True)
        pipe = StableVMPipeline.from_checkpoint(config.run, weights=config.weights, vae=config.vae)
        try:
            with system_errors(scratch):
                pipe.save_pretrained(scratch)
            _move(scratch, config.folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    _describe(pipe, config.folder)
    return config.folder


def _check_free(folder: Path) -> None:
    """UserError if the folder holds something that no export writes."""
    ours = {StableVMPipeline.config_name, *StableVMPipeline.component_names()}
    for path in folder.iterdir():
        if path.name not in ours and is_foreign(path):
            raise UserError(f"{folder}: holds {path.name}; give a new folder")


def _move(scratch: Path, folder: Path) -> None:
    """Put the saved parts in their place, the index last; UserError if another pipeline is there."""
    index = StableVMPipeline.config_name
    if (folder / index).exists():
        if not _same(scratch, folder):
            raise UserError(f"{folder}: holds another pipeline; give a new folder")
        return
    for path in scratch.rglob("*"):
        sync(path)
    for part in sorted(scratch.iterdir(), key=lambda part: part.name == index):
        if part.is_dir():
            shutil.rmtree(folder / part.name, ignore_errors=True)
        part.replace(folder / part.name)
        sync(folder)


def _same(ours: Path, theirs: Path) -> bool:
    """Whether the folder holds the same files, besides a lock and what is temporary."""
    found = [[path.relative_to(root) for path in _files_of(root)] for root in (ours, theirs)]
    if sorted(found[0]) != sorted(found[1]):
        return False
    return all(filecmp.cmp(ours / path, theirs / path, shallow=False) for path in found[0])


def _files_of(root: Path) -> list[Path]:
    return [path for part in root.iterdir() if is_foreign(part) for path in (part, *part.rglob("*")) if path.is_file()]


def _describe(pipe: StableVMPipeline, folder: Path) -> None:
    card = pipe.card
    decoder = "pixels" if pipe.vae is None else type(pipe.vae).__name__
    print(
        f"{folder}: {card.model.name} of step {card.step}, {decoder}, {type(pipe.scheduler).__name__} with shift "
        f"{card.time_shift:g}; load it with StableVMPipeline.from_pretrained"
    )
