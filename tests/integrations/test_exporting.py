"""`stablevm export` as users start it: what it writes, what it refuses, and interruptions."""

import json
import re
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline

from stablevm import StableVMPipeline, StableVSFlowMatchScheduler, cli
from stablevm.networks.autoencoder import latent_spec_of
from stablevm.networks.registry import network_config
from stablevm.networks.snapshot import ModelCard
from tests.helpers import hub
from tests.helpers.checkpoints import save_checkpoint, tiny_card
from tests.helpers.tiny_vae import save_tiny_vae

ROOT = Path(__file__).parents[2]
PARTS = ["model_index.json", "scheduler", "transformer"]


@pytest.fixture
def run(tmp_path):
    """A run of pixels with one checkpoint."""
    save_checkpoint(tmp_path / "exps" / "run" / "checkpoints" / "0000120", tiny_card())
    return tmp_path / "exps" / "run"


def export(*words):
    return cli.main(["export", *map(str, words)])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_becomes_a_pipeline_and_once_more_changes_nothing(run, tmp_path, capsys):
    folder = tmp_path / "new" / "pipeline"
    assert export(run, folder) == 0
    assert capsys.readouterr().out == (
        f"{folder}: SiT-XXS/4 of step 120, pixels, FlowMatchEulerDiscreteScheduler with shift 1; load it with "
        "StableVMPipeline.from_pretrained\n"
    )
    assert sorted(path.name for path in folder.iterdir()) == PARTS
    before = contents(folder)
    assert export(run, folder) == 0 and contents(folder) == before
    assert export(run, folder, "--weights=model") == 2
    assert f"{folder}: holds another pipeline; give a new folder" in capsys.readouterr().err
    assert contents(folder) == before
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is StableVMPipeline and pipe.card == tiny_card()


def test_what_others_wrote_stays(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert export(run, tmp_path / "full") == 2
    assert "full: holds notes.txt; give a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_bad_input_is_one_line_and_leaves_no_folder(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "without")
    (tmp_path / "without" / "checkpoints" / "0000120" / "ema.safetensors").unlink()
    for words, told in [
        ((tmp_path / "gone", tmp_path / "out"), "no such folder"),
        ((tmp_path / "without", tmp_path / "out"), "ema.safetensors is missing"),
        ((run, run / "checkpoints" / "0000120" / "model.json"), "expected a folder that can be written"),
        ((run, tmp_path / "out", "--vae", tmp_path / "gone"), "can't be loaded|no such folder|no config.json"),
    ]:
        assert export(*words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and any(part in error for part in told.split("|")), error
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_is_completed(run, tmp_path, monkeypatch):
    folder = tmp_path / "pipeline"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("diffusers.FlowMatchEulerDiscreteScheduler.save_pretrained", full)
        assert export(run, folder) != 0
    assert not folder.exists(), "nothing is left of it"
    assert export(run, folder) == 0
    whole = contents(folder)
    (folder / "model_index.json").unlink()  # as a kill leaves it between two parts
    (folder / "transformer" / "config.json").write_text("half")
    (folder / ".tmp-export" / "vae").mkdir(parents=True)
    assert export(run, folder) == 0 and contents(folder) == whole


def test_the_code_that_the_documents_show_runs(run, tmp_path, monkeypatch):
    """The blocks of the last section of docs/diffusers.md, with a checkpoint that knows nothing."""
    monkeypatch.chdir(tmp_path)
    card = tiny_card(num_classes=10)
    save_checkpoint(tmp_path / "exps" / "digits" / "checkpoints" / "0000001", card)
    section = (ROOT / "docs" / "diffusers.md").read_text().partition("## A checkpoint of ours")[2]
    (command,) = re.findall(r"```bash\nstablevm (.*?)\n```", section)
    assert cli.main(command.split()) == 0
    sampled = ["--mode=ode", "--num-steps=40", "--num-fid-samples=9", "--name=digits"]
    assert cli.generate(["--ckpt=exps/digits", *sampled]) == 0
    names = {}
    with torch.random.fork_rng():
        for block in re.findall(r"^ *```python\n(.*?)```", section, flags=re.DOTALL | re.MULTILINE):
            exec(textwrap.dedent(block), names)
    assert (tmp_path / "three.png").is_file()
    with np.load("samples/digits.npz") as made:
        theirs = made["arr_0"][:8].astype(int)
    assert np.abs(np.stack([np.asarray(image) for image in names["images"]]) - theirs).max() <= 1


def test_no_path_of_this_machine_is_written(tmp_path):
    latent = latent_spec_of(str(save_tiny_vae(tmp_path / "vae")), 32)
    model = network_config("SiT-XXS/2", input_size=4, in_channels=4, num_classes=2)
    card = ModelCard(model, latent, "linear", "v", ("0", "1"), step=1)
    folder = tmp_path / "pipeline"
    assert export(save_checkpoint(tmp_path / "run", card), folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == [*PARTS, "vae"]
    assert not any(str(tmp_path).encode() in content for content in contents(folder).values())
    folder.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "vae")
    pipe = StableVMPipeline.from_pretrained(tmp_path / "moved")
    assert replace(pipe.card.latent, autoencoder=latent.autoencoder) == latent
    assert pipe([0], num_inference_steps=1, latents=torch.zeros(1, 4, 4, 4)).images[0].size == (32, 32)
    # Weights of another autoencoder with the same latents can take its place.
    save_tiny_vae(tmp_path / "tuned", widths=(4, 4, 8, 8))
    assert export(tmp_path / "run", tmp_path / "other", "--vae", tmp_path / "tuned") == 0
    config = json.loads((tmp_path / "other" / "vae" / "config.json").read_text())
    assert config["block_out_channels"] == [4, 4, 8, 8]


def test_a_pipeline_on_the_hub_is_loaded_without_running_its_code(run, tmp_path, monkeypatch):
    from huggingface_hub import hf_api

    pipe = StableVMPipeline.from_checkpoint(run)
    pipe.scheduler = StableVSFlowMatchScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "pipeline")
    ran = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    theirs = {"pipeline.py": ran, "diffusers_model.py": ran, "transformer/diffusers_model.py": ran}
    with hub.stand_in() as there:
        hub.use(monkeypatch, there.address, tmp_path / "cache")
        monkeypatch.setattr(hf_api.api, "endpoint", there.address)
        there.repositories["me/net"] = hub.Repository()
        there.repositories["me/net"].commit({**contents(tmp_path / "pipeline"), **theirs})
        for kind in (DiffusionPipeline, StableVMPipeline):
            loaded = kind.from_pretrained("me/net", cache_dir=tmp_path / "cache")
            assert type(loaded) is StableVMPipeline and type(loaded.scheduler) is StableVSFlowMatchScheduler
            assert loaded.card == pipe.card
        there.repositories["me/run"] = hub.Repository()
        there.repositories["me/run"].commit(contents(run / "checkpoints" / "0000120"))
        assert export("hf:me/run", tmp_path / "fetched") == 0
        assert StableVMPipeline.from_pretrained(tmp_path / "fetched").card == pipe.card
    assert not (tmp_path / "ran").exists()
