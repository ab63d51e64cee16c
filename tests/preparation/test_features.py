"""`stablevm prepare features`: stored tokens of an encoder, and training with them in place of the encoder."""

import dataclasses
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from stablevm.data import features as stored
from stablevm.data.digits import prepare_digits
from stablevm.data.features import CARD_FILE, StoredFeatures
from stablevm.data.opening import open_dataset
from stablevm.networks.encoders import load_encoder
from stablevm.networks.small_net import SmallNet
from stablevm.preparation import features as making
from stablevm.preparation.config import FeaturesConfig
from stablevm.support.errors import UserError
from stablevm.training.config import TrainConfig
from stablevm.training.trainer import train
from tests.helpers.data_sets import one_line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits, and an encoder's weights."""
    folder = tmp_path_factory.mktemp("features")
    prepare_digits(folder / "data")
    for seed in (0, 1):
        net = SmallNet(torch.Generator().manual_seed(seed))
        save_file(net.state_dict(), folder / f"encoder{seed}.safetensors")
    return folder


@pytest.fixture(scope="module")
def made(folder):
    config = FeaturesConfig(
        folder / "data", folder / "tokens", 4, enc_type="digits", encoder_weights=folder / "encoder0.safetensors",
        batch_size=50, num_workers=0,
    )  # fmt: skip
    assert making.features(config) is not None
    return config


def test_the_tokens_are_the_encoder_s_rounded(made, folder):
    tokens, dataset = StoredFeatures(made.dest), open_dataset(folder / "data")
    encoder = load_encoder("digits", grid_size=4, weights=made.encoder_weights, device="cpu")
    rows = [1346, 0, 511, 512, 3]  # of several files
    torch.testing.assert_close(tokens(rows).float(), encoder(dataset.images(rows)), rtol=1e-3, atol=1e-4)
    assert tokens(rows).dtype == torch.float16 and tokens.card.weights == encoder.fingerprint()
    assert torch.equal(pickle.loads(pickle.dumps(tokens))(rows), tokens(rows))
    with pytest.raises(IndexError):
        tokens([1347])


def test_a_second_command_finds_them_complete_and_others_are_refused(made, folder, capsys):
    assert making.features(made) is not None
    assert "1,347 x 16 tokens of digits, 0.00 GB" in capsys.readouterr().out
    with pytest.raises(UserError) as error:
        making.features(dataclasses.replace(made, encoder_weights=folder / "encoder1.safetensors"))
    assert "was started with weights" in one_line(error)


def test_an_interrupted_command_resumes(made, tmp_path, monkeypatch):
    again, calls = dataclasses.replace(made, dest=tmp_path / "again"), []
    write = making.write_streamed

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(making, "write_streamed", killed)
    with pytest.raises(KeyboardInterrupt):
        making.features(again)
    with pytest.raises(UserError, match="holds no complete features"):
        StoredFeatures(again.dest)
    with pytest.raises(UserError, match="was started with batch size 50"):
        making.features(dataclasses.replace(again, batch_size=25))
    making.features(again)
    assert len(calls) == 4  # three files, one of them twice
    names = sorted(path.name for path in again.dest.iterdir())
    assert names == sorted(path.name for path in made.dest.iterdir())
    for name in names:
        assert (again.dest / name).read_bytes() == (made.dest / name).read_bytes()


def run_config(folder, name, **options):
    shared = {
        "exp_name": name, "output_dir": folder / "exps", "data_dir": folder / "data", "model": "SiT-XXS/2",
        "batch_size": 16, "max_train_steps": 6, "log_steps": 1, "sampling_steps": 0, "num_workers": 0,
        "report_to": "none", "use_proj_loss": True, "proj_weight_schedule": "sigmoid", "enc_type": "digits",
        "encoder_depth": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    return TrainConfig(**shared | options)


def losses(config):
    train(config)
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return torch.tensor([[row["velocity_loss"], row["alignment_loss"]] for row in rows if "velocity_loss" in row])


@pytest.mark.parametrize("loss", [{}, {"loss_type": "stablevm", "bank_capacity_per_class": 8}])
def test_training_with_them_has_the_numbers_of_the_encoder(made, folder, loss):
    name = loss.get("loss_type", "si")
    live = losses(run_config(folder, f"live-{name}", encoder_weights=str(made.encoder_weights), **loss))
    read = losses(run_config(folder, f"read-{name}", features_dir=made.dest, num_workers=2, **loss))
    assert len(live) == 6
    torch.testing.assert_close(read, live, rtol=2e-3, atol=2e-4)


def test_mirrored_images_have_tokens_of_their_own(made, folder, tmp_path):
    with pytest.raises(UserError, match="no latents of mirrored images"):
        making.features(dataclasses.replace(made, dest=tmp_path / "flips", flip=True))
    card = StoredFeatures(made.dest).card
    with pytest.raises(UserError, match=r"holds none of mirrored images; .* --flip"):
        StoredFeatures(made.dest).check(open_dataset(folder / "data"), 2 * card.rows, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enc_type": "dinov2-vit-s"}, "made with encoder digits, this run has dinov2-vit-s"),
        ({"encoder_resize": "antialiased"}, "made with resize bicubic, this run has antialiased"),
        ({"model": "SiT-XXS/4"}, "made with grid size 4, this run has 2"),
        ({"encoder_weights": "encoder1.safetensors"}, "made with weights"),
        ({"enc_type": "digits,digits", "encoder_weights": None}, "only with one --enc-type"),
        ({"features_dir": "nowhere"}, "holds no complete features; make them again with stablevm prepare features"),
    ],
)
def test_features_of_something_else_are_one_clear_line(made, folder, options, message):
    if options.get("encoder_weights"):
        options = options | {"encoder_weights": str(folder / options["encoder_weights"])}
    if "features_dir" in options:
        options = options | {"features_dir": folder / options["features_dir"]}
    with pytest.raises(UserError) as error:
        train(run_config(folder, "refused", **{"features_dir": made.dest} | options))
    assert message in one_line(error) and not (folder / "exps/refused").exists()


def test_features_of_other_data_are_refused(made, folder):
    with pytest.raises(UserError, match="of another data set"):
        StoredFeatures(made.dest).check(open_dataset(folder / "data", "test"), 450, {})


def test_the_same_images_beside_other_latents_share_their_tokens(made, folder):
    dataset = open_dataset(folder / "data")
    known = dataset.fingerprint(with_images=True)

    def check(**changes):
        other = dataclasses.replace(known, **changes)
        StoredFeatures(made.dest).check(SimpleNamespace(fingerprint=lambda with_images: other), known.rows, {})

    check(latents="those of another autoencoder", class_names="other names")
    for changes in ({"images": "others"}, {"rows": known.rows + 1}):
        with pytest.raises(UserError, match="of another data set"):
            check(**changes)


@pytest.mark.parametrize("damage", ["missing", "short", "other"])
def test_damaged_files_are_named(made, tmp_path, damage):
    import shutil

    copy = shutil.copytree(made.dest, tmp_path / "copy")
    path = copy / stored.file_name(512)
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        save_file({"tokens": torch.zeros(3, 2)}, path)
    with pytest.raises(UserError) as error:
        StoredFeatures(copy)
    assert str(path) in one_line(error)
    (copy / CARD_FILE).write_text("{")
    with pytest.raises(UserError, match=CARD_FILE):
        StoredFeatures(copy)
