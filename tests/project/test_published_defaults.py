"""The options of StableVelocity's scripts: each exists here, and another default stands in docs/differences.md."""

import dataclasses
from pathlib import Path

import pytest

from stablevm.sampling.config import GenerateConfig
from stablevm.toy.config import ToyConfig
from stablevm.training.config import TrainConfig

DIFFERENCES = (Path(__file__).parents[2] / "docs" / "differences.md").read_text().partition("## Defaults")[2]
PUBLISHED = {
    TrainConfig: {
        "output_dir": Path("exps"), "exp_name": dataclasses.MISSING, "logging_dir": None, "report_to": "wandb",
        "sampling_steps": 10_000, "resume_step": 0, "model": None, "encoder_depth": 8, "fused_attn": True,
        "qk_norm": False, "data_dir": Path("../data/imagenet256"), "resolution": 256, "batch_size": 256,
        "num_classes": 1000, "allow_tf32": False, "mixed_precision": "fp16", "epochs": 1400, "max_train_steps": 400_000,
        "checkpointing_steps": 50_000, "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "adam_beta1": 0.9,
        "adam_beta2": 0.999, "adam_weight_decay": 0.0, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "ema_decay": 0.9999,
        "seed": 0, "num_workers": 4, "path_type": "linear", "prediction": "v", "cfg_prob": 0.1,
        "enc_type": "dinov2-vit-b", "proj_coeff": 0.5, "proj_weight_schedule": "hard", "proj_tau": 0.7, "proj_k": 20.0,
        "weighting": "uniform", "legacy": False, "loss_type": "si", "use_proj_loss": False,
        "bank_capacity_per_class": 256, "bank_on_gpu": True, "prefill_bank_fully": False, "bank_chunk_size": None,
        "prefill_batch_size": 1024, "prefill_workers": None, "use_irepa": False, "irepa_gamma": 0.6,
        "references_from": 0.5, "encoder_resize": "bicubic",
    },
    GenerateConfig: {
        "global_seed": 0, "tf32": True, "ckpt": None, "sample_dir": Path("samples"), "model": "SiT-XL/2",
        "encoder_depth": 8, "resolution": 256, "fused_attn": False, "qk_norm": False, "use_projector": False,
        "use_irepa": False, "vae": "ema", "per_proc_batch_size": 32, "num_fid_samples": 50_000, "unconditional": False,
        "label_sampling": "random", "mode": "ode", "cfg_scale": 1.5, "projector_embed_dims": "768",
        "path_type": "linear", "num_steps": 50, "heun": False, "guidance_low": 0.0, "guidance_high": 1.0,
        "edm_schedule": False, "prediction_type": "v", "legacy": False,
    },
    ToyConfig: {
        "exp": ("stf",), "vector_field": "velocity", "use_wandb": False, "no_plot_variance": False, "only_plot": False,
        "enable_visualization": False, "imagenet_data_path": None, "batch_size": 256, "references": 2048,
        "updates": 20_000, "learning_rate": 1e-4, "ema_decay": 0.999, "eval_every": 500, "eval_samples": 10_000,
        "components": 100, "dimension": 10, "max_grad_norm": 1.0, "variance_dimensions": (10, 100, 500),
    },
}  # fmt: skip


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config.__name__)
def test_other_defaults_are_documented(config):
    ours = {field.name: field.default for field in dataclasses.fields(config)}
    published = PUBLISHED[config]
    assert set(published) <= set(ours)
    other = [name for name, value in published.items() if ours[name] != value]
    assert [name for name in other if f"`--{name.replace('_', '-')}`" not in DIFFERENCES] == []
