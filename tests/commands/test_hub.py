"""hf:OWNER/NAME[@REVISION] wherever a command takes a checkpoint, against a stand-in for the Hugging Face Hub."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from stablevm import cli
from stablevm.demo.config import DemoConfig
from stablevm.demo.studio import Controls, Studio
from stablevm.networks.snapshot import load_card, load_weights
from stablevm.support.errors import UserError
from tests.helpers import published, runs
from tests.helpers.checkpoints import save_checkpoint, tiny_card
from tests.helpers.hub import Repository, stand_in, use

FILES = ("model.json", "ema.safetensors", "model.safetensors")
STEPS = ["--num-steps", "2", "--num-fid-samples", "2", "--mode", "ode"]


def publish(hub, name, folder, ref="main"):
    """Put a checkpoint's files, and code that must not run, into a repository; returns the commit."""
    files = {file: (folder / file).read_bytes() for file in FILES}
    repository = hub.repositories.setdefault(name, Repository())
    return repository.commit({**files, "modeling.py": b"raise SystemExit('executed')"}, ref)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with stand_in() as hub:
        use(monkeypatch, hub.address, tmp_path / "cache")
        yield hub


def images(name):
    with np.load(f"samples/{name}.npz") as archive:
        return archive["arr_0"], archive["protocol"].item()


def test_generate_and_its_guide(hub, capsys):
    strong, weak = (save_checkpoint(Path(name), tiny_card(), seed) for name, seed in (("strong", 0), ("weak", 5)))
    commit, earlier = publish(hub, "me/net", strong), publish(hub, "me/net", weak, "weak")
    guided = ["--guide-scale", "2", *STEPS]
    assert cli.generate(["--ckpt", "strong", "--guide-ckpt", "weak", "--name", "local", *guided]) == 0
    capsys.readouterr()
    names = ["--ckpt", "hf:me/net", "--guide-ckpt", "hf:me/net@weak", "--name", "fetched"]
    assert cli.generate([*names, *guided]) == 0
    told = capsys.readouterr()
    assert f"hf:me/net: its commit is {commit}\nhf:me/net@weak: its commit is {earlier}\n" in told.out
    assert "hub" not in told.err and "Fetching" not in told.err
    assert np.array_equal(images("local")[0], images("fetched")[0]) and images("local")[1] == images("fetched")[1]
    assert not hub.asked("modeling.py") and not hub.asked("/model.safetensors"), "only the weights that are used"


def test_other_weights(hub, capsys):
    publish(hub, "me/net", save_checkpoint(Path("net"), tiny_card()))
    assert cli.generate(["--ckpt", "hf:me/net", "--weights", "model", "--name", "last", *STEPS]) == 0
    assert hub.asked("/model.safetensors") and not hub.asked("/ema.safetensors")
    hub.repositories["me/net"].commit({"model.json": Path("net/model.json").read_bytes()})
    assert cli.generate(["--ckpt", "hf:me/net", *STEPS]) == 2
    assert capsys.readouterr().err == "error: hf:me/net: holds no ema.safetensors; choose the other weights\n"


def test_training_starts_from_it(hub, root, capsys):
    first = runs.run(runs.config(root, "first", max_train_steps=1)) / "checkpoints" / "0000001"
    commit = publish(hub, "me/net", first)
    tuned = {"max_train_steps": 1, "seed": 3}
    one = runs.run(runs.config(root, "one", init_from=first, **tuned))
    assert f"of {first}, step 1" in capsys.readouterr().out
    two = runs.run(runs.config(root, "two", init_from=Path("hf:me/net"), **tuned))
    assert f"starts from the weights ema of hf:me/net@{commit}, step 1" in capsys.readouterr().out
    runs.assert_same_checkpoint(one, two, step=1)


def test_the_demo_says_which_commit_made_a_picture(hub):
    commit = publish(hub, "me/net", save_checkpoint(Path("net"), tiny_card()))
    studio = Studio(DemoConfig(ckpt=Path("hf:me/net")), torch.device("cpu"))
    assert f"--ckpt hf:me/net@{commit}" in shlex.join(shlex.split(studio.generate(Controls(steps=2, images=2)).command))


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_import_takes_a_published_file(hub, ending):
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in published.built(published.PublishedSiT).state_dict().items()}
    (torch.save if ending == ".pt" else save_file)(state, f"sit{ending}")
    repository = hub.repositories["me/sit"] = Repository()
    repository.commit({f"old/sit{ending}": Path(f"sit{ending}").read_bytes(), "hubconf.py": b"raise SystemExit"})
    told = ["--source", "sit", "--path-type", "linear", "--prediction", "v"]
    sources = {f"sit{ending}": "file", "hf:me/sit": "only", f"hf:me/sit/old/sit{ending}@main": "named"}
    for source, output in sources.items():
        assert cli.import_checkpoint([source, "--output", output, *told]) == 0
        assert load_card(output) == load_card("file")
        one, two = load_weights(output, "ema"), load_weights("file", "ema")
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not hub.asked("hubconf.py")


def test_each_command_ends_in_one_line_without_the_repository(hub, root, capsys):
    absent, reference = "hf:me/none", ["--reference", "r.npz"]
    commands = {
        cli.generate: ["--ckpt", absent],
        cli.evaluate: ["--ckpt", absent, *reference],
        cli.import_checkpoint: [absent, "--output", "out"],
        cli.train: [f"--init-from={absent}", *runs.as_arguments(runs.config(root, "lost", output_dir=Path("exps")))],
        lambda words: cli.main(["sweep", *words]): ["--ckpt", absent, *reference],
    }
    for command, words in commands.items():
        assert command(words) == 2, words
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("error: hf:me/none: the hub shows no such repository; check the name"), words
    with pytest.raises(UserError, match=r"^hf:me/none: the hub shows no such repository"):
        Studio(DemoConfig(ckpt=Path(absent)), torch.device("cpu"))
    assert not Path("samples").exists() and not Path("exps/lost/checkpoints").exists()


def test_a_repository_of_something_else_is_no_checkpoint(hub, capsys):
    hub.repositories["me/other"] = Repository()
    hub.repositories["me/other"].commit({"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert cli.generate(["--ckpt", "hf:me/other"]) == 2
    assert "hf:me/other: holds no model.json, so it is no checkpoint" in capsys.readouterr().err
    assert cli.generate(["--ckpt", "hf:me"]) == 2
    assert capsys.readouterr().err == "error: hf:me: expected hf:OWNER/NAME, or hf:OWNER/NAME@REVISION\n"
