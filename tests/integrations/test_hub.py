"""Checkpoints on the Hugging Face Hub: saved, pushed to a stand-in for it, and loaded from there again."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard as HubCard
from huggingface_hub import ModelCardData
from huggingface_hub.utils import _http
from safetensors.torch import load_file

from stablevm import cli
from stablevm.commands.option_files import read_options
from stablevm.commands.table import COMMANDS
from stablevm.integrations.hub import from_pretrained, save_pretrained
from stablevm.networks.snapshot import load_card, load_model
from stablevm.support.errors import UserError
from stablevm.support.files import sha256
from stablevm.support.images import save_png
from tests.helpers import runs
from tests.helpers.checkpoints import save_checkpoint, tiny_card
from tests.helpers.hub import READS, WRITES, stand_in, use

FLOATS = ("accuracy", "frechet_test", "frechet_floor", "precision", "recall", "density", "coverage", "memorisation")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with stand_in() as hub:
        use(monkeypatch, hub.address, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", WRITES)
        yield hub


@pytest.fixture(scope="module")
def run(root):
    """A run of two steps with a grid of samples, whose bank and classes are those of `runs`."""
    options = {"max_train_steps": 2, "sampling_steps": 2, "loss_type": "stablevm", "learning_rate": 2e-3}
    return runs.run(runs.config(root, "pushed", **options))


def push(*words):
    return cli.main(["push", *map(str, words)])


def page_of(hub, name="me/net", branch="main"):
    return hub.repositories[name].files(branch)[1]["README.md"].decode()


def results(weights, **more):
    """What `stablevm evaluate` writes about digits that these weights made."""
    made = {
        "num_fid_samples": 500,
        "mode": "ode",
        "solver": "euler",
        "num_steps": 40,
        "cfg_scale": 1.5,
        "weights": "ema",
    }
    made |= {"guidance_low": 0.0, "guidance_high": 0.4, "global_seed": 7, "weights_sha256": weights, "step": 2}
    nearest = {name: {"min": 1.0, "median": 2.0} for name in ("nearest_train", "nearest_train_of_test")}
    about = {"samples": "x", "reference": "/home/me/data/digits", "num_samples": 500, "extractor": "digits-cnn"}
    numbers = dict.fromkeys(FLOATS, 0.25) | {"extractor_test_accuracy": 0.99, "frechet_test": 1.875}
    return about | numbers | nearest | {"protocol": made} | more


def test_saving_and_loading_gives_the_same_network(tmp_path):
    card = tiny_card()
    model = load_model(save_checkpoint(tmp_path / "made", card), card)
    folder = save_pretrained(model, card, tmp_path / "saved")
    again, known = from_pretrained(folder)
    assert known == card and not again.training
    inputs = torch.ones(2, 1, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([0, 3])
    assert torch.equal(again(*inputs), model(*inputs))
    page = HubCard.load(folder / "README.md")
    assert isinstance(page.data, ModelCardData) and page.data.library_name == "stablevm"
    assert sha256(folder / "ema.safetensors") in page.text and "How it was trained is not recorded" in page.text


def test_a_run_is_pushed_with_recipe_and_picture_and_loaded(hub, run, capsys):
    assert push(run, "me/net", "--license", "apache-2.0") == 0
    (commit,) = re.findall(r"hf:me/net: commit (\w{40}); stablevm generate --ckpt hf:me/net\n", capsys.readouterr().out)
    assert hub.repositories["me/net"].refs["main"] == commit
    files = hub.repositories["me/net"].files("main")[1]
    grid = "pictures/step-0000002.png"
    assert files.keys() == {".gitattributes", "README.md", "model.json", "ema.safetensors", grid}
    assert files[grid] == (run / "samples" / "step-0000002.png").read_bytes()
    model, card = from_pretrained("hf:me/net")
    made = load_file(run / "checkpoints" / "0000002" / "ema.safetensors")
    assert card == load_card(run / "checkpoints" / "0000002")
    assert all(torch.equal(value, made[name]) for name, value in model.state_dict().items())
    page = HubCard(page_of(hub))
    assert page.data.license == "apache-2.0" and {"sit", "stable-velocity"} <= set(page.data.tags)
    assert f"]({grid})" in page.text and "stablevm generate --" in page.text and "--ckpt hf:me/net" in page.text
    assert "It has not been evaluated" in page.text and "zero, one, two" in page.text
    assert str(run.parents[2]) not in str(page), "no path of the trainer's machine"


def test_the_recipe_is_a_file_of_options(hub, run, tmp_path):
    assert push(run, "me/net") == 0
    (recipe,) = re.findall(r"```toml\n(.*?)```", page_of(hub), re.DOTALL)
    (tmp_path / "recipe.toml").write_text(recipe)
    command = next(command for command in COMMANDS if command.name == "train")
    options = read_options(str(tmp_path / "recipe.toml"), command)
    known = json.loads((run / "config.json").read_text())
    assert options.keys() >= {"loss_type", "learning_rate", "model", "batch_size"}
    assert all(known[name] == value for name, value in options.items())
    assert not {"data_dir", "output_dir", "exp_name", "encoder_weights"} & tomllib.loads(recipe)["train"].keys()


def test_numbers_and_pictures_of_the_pushed_weights_alone(hub, run, tmp_path, capsys):
    weights = sha256(run / "checkpoints" / "0000002" / "ema.safetensors")
    (tmp_path / "good.json").write_text(json.dumps(results(weights)))
    (tmp_path / "bad.json").write_text(json.dumps(results("0" * 64)))
    (tmp_path / "other.json").write_text(json.dumps({"reference": "x", "protocol": {}}))
    picture = np.zeros((4, 4, 3), np.uint8)
    save_png(tmp_path / "mine.png", picture, {"protocol": json.dumps(results(weights)["protocol"])})
    save_png(tmp_path / "strange.png", picture, {"protocol": json.dumps({"weights_sha256": "1" * 64})})
    assert push(run, "me/net", "--evaluations", "good.json", "--pictures", "mine.png") == 0
    page = HubCard(page_of(hub))
    assert "| Fréchet distance | 1.88 | to the test digits; lower is closer |" in page.text
    told = "500 images by the ode (euler in 40 steps), guidance 1.5 at times 0.0 to 0.4, seed 7, weights ema."
    assert (
        f"against digits. {told}" in page.text and "](pictures/mine.png)" in page.text and "/home/me" not in page.text
    )
    assert {each.metric_type: each.metric_value for each in page.data.eval_results}["frechet_test"] == 1.875
    hub.log.clear()
    capsys.readouterr()
    for words, fault in {
        ("--evaluations", "bad.json"): "bad.json: is of other weights",
        ("--evaluations", "other.json"): "not the results of stablevm evaluate",
        ("--evaluations", "none.json"): "no file none.json",
        ("--pictures", "strange.png"): "strange.png: is of other weights",
        ("--pictures", "none.png"): "none.png: no such file",
        ("--pictures", "mine.jpg"): "expected PNG files",
    }.items():
        assert push(run, "me/net", *words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and fault in error
    assert not hub.log, "all is checked before the hub is asked"


def test_the_runs_own_evaluation_is_on_the_page(hub, run, tmp_path):
    copy = tmp_path / "copy"
    for path in (p for p in run.rglob("*") if p.is_file()):
        (target := copy / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text()) | {
        "eval_reference": "/home/me/digits-ref",
        "eval_samples": 64,
    }
    (copy / "config.json").write_text(json.dumps(config))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "eval_frechet_test": 3.5, "eval_accuracy": None}) + "\n")
    assert push(copy, "me/net") == 0
    page = HubCard(page_of(hub))
    assert "**During the training**, against digits-ref. 64 images by the ode (euler in 40 steps)" in page.text
    assert "| Fréchet distance to the test split | 3.5 |" in page.text and "/home/me" not in page.text
    assert [each.metric_type for each in page.data.eval_results] == ["frechet_test"]


def test_another_push_replaces_what_it_made_and_nothing_else(hub, capsys):
    save_checkpoint(Path("one"), tiny_card())
    assert push("one", "me/net") == 0
    repository = hub.repositories["me/net"]
    edited = {**repository.files("main")[1], "README.md": b"mine", "notes.txt": b"n", "pictures/old.png": b"o"}
    repository.commit(edited)
    assert push("one", "me/secret", "--private") == 0
    assert hub.repositories["me/secret"].private and not repository.private
    assert push("one", "me/net@last", "--weights", "both", "--no-readme") == 0
    assert repository.files("last")[1].keys() == {*edited, "model.safetensors"} - {"pictures/old.png"}
    assert push("one", "hf:me/net", "--weights", "model", "--no-readme", "--message", "Last weights") == 0
    files = repository.files("main")[1]
    assert files.keys() == {*edited, "model.safetensors"} - {"ema.safetensors", "pictures/old.png"}
    assert files["README.md"] == b"mine"
    with pytest.raises(UserError, match=r"holds no ema.safetensors"):
        from_pretrained("hf:me/net")
    one, two = from_pretrained("hf:me/net@last", weights="model"), from_pretrained("one", weights="model")
    assert all(torch.equal(value, two[0].state_dict()[name]) for name, value in one[0].state_dict().items())


def test_the_files_can_be_looked_at_first(hub, run, capsys):
    assert push(run, "me/net", "--output", "look") == 0
    assert not hub.log and "nothing was uploaded" in capsys.readouterr().out
    names = {str(path.relative_to("look")) for path in Path("look").rglob("*") if path.is_file()}
    assert names == {"README.md", "model.json", "ema.safetensors", "pictures/step-0000002.png"}
    assert from_pretrained("look")[1] == load_card(run / "checkpoints" / "0000002")
    assert push(run, "me/net", "--output", "look") == 0, "again, after an interruption"
    Path("look/mine.txt").write_text("mine")
    assert push(run, "me/net", "--output", "look") == 2
    assert "look: holds mine.txt; give a new folder" in capsys.readouterr().err


def test_every_refusal_is_one_line(hub, monkeypatch, capsys):
    save_checkpoint(Path("one"), tiny_card())
    damaged = save_checkpoint(Path("damaged"), tiny_card())
    (damaged / "ema.safetensors").write_bytes(b"damaged")

    def told(*words):
        assert push(*words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if not line.startswith("warning: ")] == lines[-1:]
        return lines[-1]

    assert "is on the hub already" in told("hf:me/net", "me/other")
    assert "expected hf:OWNER/NAME" in told("one", "net")
    assert "expected OWNER/NAME" in told("one", "me/net/file")
    assert "ema.safetensors is damaged" in told("damaged", "me/net")
    assert "no such folder" in told("nowhere", "me/net")
    assert not hub.log
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its client's attempts
    hub.failing = ("/large/", 500)
    assert "hf:me/net: the transfer broke off" in told("one", "me/net")
    assert "model.json" not in hub.repositories["me/net"].files("main")[1], "no commit without the weights"
    hub.failing = None
    assert 'Invalid metadata in README.md. - "license" must be known' in told("one", "me/net", "--license", "nonsense")
    hub.failing = ("/commit/", 404)
    assert told("one", "me/net").startswith("error: hf:me/net: ")
    hub.failing = None
    monkeypatch.setenv("HF_TOKEN", READS)
    assert "the hub refuses it (403)" in told("one", "me/net")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "the hub refuses it (401)" in told("one", "you/net")
    monkeypatch.delenv("HF_TOKEN")
    assert "uploads need a token: log in (hf auth login), or set HF_TOKEN" in told("one", "me/net")
    with monkeypatch.context() as patch:
        use(patch, "http://127.0.0.1:9", Path("cache"))
        assert "the hub does not answer" in told("one", "me/net")
