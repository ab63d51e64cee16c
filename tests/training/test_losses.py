"""Recorded losses of the first steps of a tiny run, for each kind of target: a change of the numbers is noticed.

python -m tests.training.test_losses --write
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.helpers import runs

RECORDED = Path(__file__).parents[1] / "golden" / "losses.json"

STABLEVM = {"loss_type": "stablevm"}
MEANFLOW = {"meanflow": True, "meanflow_instants": 0.25, "meanflow_power": 0.5}
CASES = {
    "si": {},
    "stablevm, bank anchors": STABLEVM,
    "stablevm, batch anchors": {**STABLEVM, "bank_anchors": "batch"},
    "stablevm, full bank": {**STABLEVM, "prefill_bank_fully": True},
    "cosine path": {**STABLEVM, "path_type": "cosine"},
    "data prediction": {**STABLEVM, "prediction": "x"},
    "lognormal times": {**STABLEVM, "weighting": "lognormal"},
    "alignment": {**STABLEVM, **runs.ALIGNED, "proj_weight_schedule": "sigmoid"},
    "contrastive": {**STABLEVM, "contrastive_coeff": 0.05},
    "alignment that stops": {**STABLEVM, **runs.ALIGNED, "proj_weight_schedule": "sigmoid", "proj_stop_step": 2},
    "meanflow": {**STABLEVM, **MEANFLOW},
    "meanflow, guided": {**MEANFLOW, "meanflow_omega": 2.0, "meanflow_kappa": 0.5},
    "class token": {**STABLEVM, **runs.ALIGNED, "proj_weight_schedule": "sigmoid", "cls_token": True},
    "jit": {
        **STABLEVM,
        "model": "JiT-XXS/2",
        "prediction": "x",
        "loss_space": "v",
        "weighting": "logit_normal",
        "weighting_mean": 0.8,
        "weighting_std": 0.8,
    },
    "muon": {**STABLEVM, "optimizer": "muon", "lr_warmup_steps": 2},
    "irepa": {**STABLEVM, **runs.ALIGNED, "use_irepa": True},
}
if not hasattr(torch.optim, "Muon"):  # before torch 2.9
    del CASES["muon"]


def compute(root):
    runs.write_data(root / "data")
    runs.write_encoder(root / "encoder.safetensors")
    return {
        name: runs.losses(runs.run(runs.config(root, f"run{number}", max_train_steps=5, **options)))
        for number, (name, options) in enumerate(CASES.items())
    }


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    return compute(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_recorded_ones(name, computed):
    assert computed[name] == pytest.approx(json.loads(RECORDED.read_text())[name], rel=1e-4)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    with tempfile.TemporaryDirectory() as folder:
        RECORDED.write_text(json.dumps(compute(Path(folder)), indent=1) + "\n")
