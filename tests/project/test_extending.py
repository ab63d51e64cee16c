"""Each block of docs/extending.md, run where it says it stands: what it adds is found and used by everything else."""

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stablevm.data import layouts, opening
from stablevm.evaluation.sample_report import metric_curves
from stablevm.figures.evaluation import plot_metrics
from stablevm.metrics import metric, table
from stablevm.networks import autoencoder, registry
from stablevm.networks.autoencoder import LatentSpec, latent_spec_of, load_autoencoder
from stablevm.networks.snapshot import load_card, load_model
from stablevm.preparation import sources
from stablevm.support.errors import UserError
from stablevm.training import objectives, step
from stablevm.training.config import TrainConfig
from tests.helpers import runs

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


@contextlib.contextmanager
def added(heading, listed):
    """What the block under a heading defines, with no other imports than its own; `listed` is put back afterwards."""
    section = PAGE.split(f"\n## {heading}\n")[1]
    block = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)[1]
    names = {}
    before = listed.copy()
    try:
        exec(block, names)
        yield names
    finally:
        listed.clear()
        listed.update(before) if isinstance(listed, dict) else listed.extend(before)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def root(tmp_path):
    runs.write_data(tmp_path / "data")
    return tmp_path


def test_the_target_that_is_shown_is_trained_on(root, monkeypatch):
    with added("Another target", objectives.OBJECTIVES):
        monkeypatch.setitem(TrainConfig.__annotations__, "loss_type", Literal["si", "stablevm", "antithetic"])
        plain = runs.losses(runs.run(runs.config(root, "plain")))
        paired = runs.losses(runs.run(runs.config(root, "paired", loss_type="antithetic")))
        assert len(paired) == 6 and paired != plain
        with pytest.raises(UserError, match="give the prediction v"):
            runs.run(runs.config(root, "x", loss_type="antithetic", prediction="x"))


def test_the_pairs_that_are_shown_have_opposite_noise():
    with added("Another target", objectives.OBJECTIVES) as names:
        objective = names["Antithetic"](objectives.FlowMatching(), objectives.get_interpolant("linear"))
        stream = torch.Generator().manual_seed(0)
        draw = objective.draw(torch.randn(5, 1, 2, 2, generator=stream), torch.zeros(5, dtype=torch.int64), stream)
    assert torch.equal(draw.noise[2:4], -draw.noise[:2]) and torch.equal(draw.t[2:4], draw.t[:2])
    assert torch.equal(draw.host_t, draw.t) and torch.allclose(draw.target, draw.noise - draw.x0)
    t = draw.t[:, None, None, None]
    assert torch.allclose(draw.x_t, (1 - t) * draw.x0 + t * draw.noise)


def test_the_backbone_that_is_shown_trains_resumes_and_is_loaded(root):
    with added("Another backbone", registry.NETWORKS):
        settings = runs.config(root, "mlp", model="Perceptron-S", checkpointing_steps=3)
        runs.run(replace(settings, max_train_steps=3))
        folder = runs.run(settings) / "checkpoints" / "0000006"
        card = load_card(folder)
        assert (card.model.kind, card.model.hidden_size) == ("perceptron", 64)
        model = load_model(folder, card)
        assert (
            type(model).__name__ == "Perceptron"
            and model.state_dict().keys() == load_file(folder / "ema.safetensors").keys()
        )
        model = registry.build_network(replace(card.model, projector_dims=(5, 6)))
        prediction, tokens = model(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.arange(2), features=True)
        assert prediction.shape == (2, 1, 8, 8) and [each.shape for each in tokens] == [(2, 1, 5), (2, 1, 6)]
        with pytest.raises(UserError, match="Perceptron-S has no queries"):
            runs.run(runs.config(root, "other", model="Perceptron-S", qk_norm=True))
        with pytest.raises(UserError, match="its kind is perceptron, this run's is sit"):
            runs.run(runs.config(root, "tuned", init_from=folder))
    with pytest.raises(UserError, match=r'model.kind: "perceptron", expected one of sit'):
        load_card(folder)


def test_the_term_that_is_shown_is_summed_and_logged(root, monkeypatch):
    monkeypatch.setattr(TrainConfig, "mean_coeff", 0.5, raising=False)
    rows = {}
    with added("Another term of the loss", step.TERMS):
        for parts in (1, 2):
            rows[parts] = metrics(runs.run(runs.config(root, f"parts-{parts}", gradient_accumulation_steps=parts)))
    for row, other in zip(rows[1], rows[2], strict=True):
        assert row["loss"] == pytest.approx(row["velocity_loss"] + 0.5 * row["mean_loss"]) and row["mean_loss"] > 0
        assert other["mean_loss"] == pytest.approx(row["mean_loss"], rel=1e-4)


def test_the_metric_that_is_shown_is_in_table_curves_and_picture(tmp_path):
    stream = torch.Generator().manual_seed(0)
    pools = [{"pool": torch.randn(count, 3, generator=stream)} for count in (64, 50)]
    sets = metric.FeatureSets("x", False, *pools, {}, "exact", torch.device("cpu"))
    with added("Another metric", table.METRICS):
        values = table.results_of(sets)
        expected = (pools[0]["pool"].double().mean(0) - pools[1]["pool"].double().mean(0)).norm()
        assert values["mean_shift"] == pytest.approx(float(expected))
        row = table.result_rows(values, "the reference", "the images")[-1]
        assert row == ("mean shift", f"{values['mean_shift']:.3f}",
                       "between the means of features, to the reference; lower is better")  # fmt: skip
        curves = metric_curves(sets, values)
        assert [point.samples for point in curves["mean_shift"]] == [8, 16, 32, 64]
        panel = table.panels_of(values)[-1]
        plot_metrics(panel, curves, tmp_path / "panel.png")
        assert [each.title for each in panel] == ["mean shift"]
    assert "mean_shift" not in table.results_of(sets)


def test_the_source_that_is_shown_is_read(tmp_path):
    (tmp_path / "classes.csv").write_text("b.png,fox\na.png,owl\n")
    with added("Another source of images", sources.SOURCES):
        source = sources.open_source(tmp_path)
        assert source.names == ["a.png", "b.png"] and source.labels.tolist() == [1, 0]
        assert source.class_names == ("fox", "owl")


def test_the_layout_that_is_shown_is_opened(tmp_path):
    moments, labels = np.zeros((3, 8, 2, 2), np.float16), np.array([0, 1, 1])
    np.savez(tmp_path / "latents.npz", moments=moments, labels=labels)
    with added("Another layout of prepared data", layouts.LAYOUTS):
        dataset = opening.open_dataset(tmp_path.parent, tmp_path.name)
        assert len(dataset) == 3 and dataset.layout == "one file" and dataset.resolution == 16
        assert dataset.moments([2, 0]).shape == (2, 8, 2, 2) and dataset.labels().tolist() == [0, 1, 1]
        assert dataset.fingerprint(with_images=False) == opening.open_dataset(tmp_path).fingerprint(with_images=True)
        with pytest.raises(UserError, match="holds no images"):
            dataset.check_images()
    with pytest.raises(UserError):
        opening.open_dataset(tmp_path)


def test_the_autoencoder_that_is_shown_encodes_and_decodes():
    with added("Another autoencoder", autoencoder.AUTOENCODERS):
        latent = latent_spec_of("pooled", 8)
        assert latent == LatentSpec((3, 4, 4), 1.0, 0.0, "pooled", deterministic=True)
        images = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        images = (16 * images).repeat(1, 3, 1, 1)
        coder = load_autoencoder(latent)
        noise = torch.zeros(1, 3, 4, 4)
        assert torch.equal(coder.decode(latent.from_moments(coder.encode(images), noise)), images)
