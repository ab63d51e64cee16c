"""Checkpoints as the Hugging Face Hub keeps them: saving one with its page, loading one, and uploading the files."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from stablevm.choices import Weights
from stablevm.integrations.model_page import Page, written
from stablevm.networks.backbone import Backbone
from stablevm.networks.snapshot import CARD_FILE, ModelCard, checkpoint_in, load_card, load_model, save
from stablevm.support.errors import UserError
from stablevm.support.extras import need
from stablevm.support.files import sha256, write_text
from stablevm.support.hub import LOG_IN, HubName, answered, unanswered
from stablevm.support.version import __version__

PAGE_FILE = "README.md"
PICTURES = "pictures"  # the folder of the page's pictures
Files = Mapping[str, Path | bytes]  # by their names in the repository


def from_pretrained(
    name: str | Path, *, weights: Weights = "ema", device: torch.device | str = "cpu"
) -> tuple[Backbone, ModelCard]:
    """Load a network and its card: float32, in evaluation mode, without gradients.

    name: hf:OWNER/NAME, or hf:OWNER/NAME@REVISION with a branch, tag or commit, of which only safetensors and JSON are
    fetched; or the folder of a checkpoint or run. UserError, in one line, where it can't be had or is damaged.
    """
    folder = checkpoint_in(name, weights)
    card = load_card(folder)
    return load_model(folder, card, weights=weights, device=device), card


def save_pretrained(model: nn.Module, card: ModelCard, folder: str | Path, *, page: Page | None = None) -> Path:
    """Write a network as `ema.safetensors`, its card and its page into a folder, which `from_pretrained` reads.

    page: what README.md is to say; its card and weights are replaced by these. Existing files are replaced.
    """
    need("a page for the hub", "huggingface_hub")
    folder, state = Path(folder), model.state_dict()
    save(folder, card, {"ema": state})
    weights = {"ema.safetensors": sha256(folder / "ema.safetensors")}
    known = page or Page(card, 0, {})
    write_text(
        folder / PAGE_FILE,
        written(replace(known, card=card, parameters=parameters_of(state), weights=weights)),
    )
    return folder


def parameters_of(state: Mapping[str, torch.Tensor]) -> int:
    """The number of a network's weights."""
    return sum(math.prod(value.shape) for value in state.values())


def upload(name: HubName, files: Files, *, private: bool = False, message: str = "Upload a checkpoint") -> str:
    """Put files into a repository of the hub, which is made if it is missing, in one commit; returns its name.

    Weights and pictures of an earlier upload that are not among `files` are removed by the same commit, so that the
    card never stands beside other weights. private: whether a new repository is. UserError where this is not possible.
    """
    with answered(name):
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, get_token

        if fault := unanswered():
            raise UserError(f"{name}: {fault}; run the command again with a connection")
        if get_token() is None:
            raise UserError(f"{name}: uploads need a token: {LOG_IN}")
        api = HfApi(library_name="stablevm", library_version=__version__)
        api.create_repo(name.repository, private=private, exist_ok=True)
        if name.revision is not None:
            api.create_branch(name.repository, branch=name.revision, exist_ok=True)
        there = api.list_repo_files(name.repository, revision=name.revision)
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationDelete(path_in_repo=file) for file in there if _is_stale(file, files)),
            *(CommitOperationAdd(path_in_repo=file, path_or_fileobj=content) for file, content in files.items()),
        ]
        done = api.create_commit(name.repository, operations, commit_message=message, revision=name.revision)
    return str(done.oid)


def _is_stale(file: str, files: Files) -> bool:
    ours = file in ("ema.safetensors", "model.safetensors", CARD_FILE) or file.startswith(f"{PICTURES}/")
    return ours and file not in files
