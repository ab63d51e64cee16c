"""The bundled data set: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, as a prepared data set."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stablevm.data.dataset import describe_classes
from stablevm.data.manifest import MANIFEST_FILE, Manifest, ShardKind
from stablevm.data.writer import ShardWriter, shard_name
from stablevm.networks.autoencoder import IDENTITY, LatentSpec, unit_to_pixels
from stablevm.support.errors import UserError
from stablevm.support.locks import is_foreign, owned

SPLITS = ("train", "test")
TEST_FRACTION = 0.25  # 1,347 digits for training, 450 for testing
SPLIT_SEED = 0
DESCRIPTION = Manifest(
    class_names=tuple("0123456789"),
    resolution=8,
    crop="none",
    latent=LatentSpec(shape=(1, 8, 8), scale=1.0, shift=0.0, autoencoder=IDENTITY),
    has_flips=False,
    has_images=True,
)


def prepare_digits(folder: str | Path) -> str:
    """Write `folder`/train and `folder`/test, and return one line that says what was done.

    After an interruption, calling it again completes the work; complete data is left unchanged. Raises UserError, and
    changes nothing, if `folder` holds anything else.
    """
    with owned(folder):
        return _prepare(Path(folder))


def _prepare(folder: Path) -> str:
    splits = _digits()
    for name in SPLITS:
        _check_ours(folder / name, splits[name])
    _check_names(folder, set(SPLITS))
    missing = [name for name in SPLITS if not (folder / name / MANIFEST_FILE).exists()]
    for name in missing:
        writer = ShardWriter(folder / name, DESCRIPTION)
        writer.add(**splits[name])
        writer.finish()
    counts = " and ".join(f"{len(splits[name]['index']):,} for {name}" for name in SPLITS)
    classes = describe_classes(DESCRIPTION.class_names, [1] * len(DESCRIPTION.class_names))[0]
    return f"digits: {counts}, {'written to' if missing else 'complete already in'} {folder}; {classes}"


def _digits() -> dict[str, dict[str, Tensor]]:
    """The tensors of each split, in the order of scikit-learn's file."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)  # values 0..16
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_FRACTION, random_state=SPLIT_SEED, stratify=labels
    )
    mean = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1  # multiples of 1/8: exact in float16
    rows = {
        "moments": torch.cat([mean, torch.zeros_like(mean)], dim=1).half(),
        "labels": torch.from_numpy(labels),
        "index": torch.arange(len(labels)),
        "images": unit_to_pixels(mean).repeat(1, 3, 1, 1),
    }
    chosen = {"train": sorted(train), "test": sorted(test)}
    return {split: {name: tensor[chosen[split]] for name, tensor in rows.items()} for split in SPLITS}


def _check_ours(folder: Path, rows: dict[str, Tensor]) -> None:
    """Raise UserError unless every file in `folder` is what writing `rows` there would produce."""
    kinds: tuple[ShardKind, ...] = ("latents", "images")
    _check_names(folder, {MANIFEST_FILE, *(shard_name(kind, 0) for kind in kinds)})
    for kind in kinds:
        path = folder / shard_name(kind, 0)
        if path.exists() and not _holds(path, {name: rows[name] for name in DESCRIPTION.tensors(kind)}):
            raise _foreign(path)
    if (folder / MANIFEST_FILE).exists():
        manifest = Manifest.read(folder)
        for kind in kinds:
            manifest.check_files(folder, kind)
        if replace(manifest, class_counts=(), shards=()) != DESCRIPTION or manifest.count != len(rows["index"]):
            raise _foreign(folder / MANIFEST_FILE)


def _check_names(folder: Path, expected: set[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise _foreign(folder)
    for path in folder.iterdir() if folder.exists() else ():
        if path.name not in expected and is_foreign(path):
            raise _foreign(path)


def _holds(path: Path, tensors: dict[str, Tensor]) -> bool:
    try:
        found = load_file(path)
    except (SafetensorError, OSError):
        return False
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def _foreign(path: Path) -> UserError:
    return UserError(f"{path}: not a file of the digits data set, nothing was changed; give an empty or new folder")
