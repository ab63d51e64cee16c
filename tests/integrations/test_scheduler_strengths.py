"""Every pipeline of diffusers that takes a strength begins at the Euler scheduler's noise level, for any strength.

Each has its own copy of `retrieve_timesteps` and `get_timesteps`; these are what the scheduler must understand, so they
are run as they are, for the pipelines that the installed diffusers has.
"""

import importlib
import inspect
import itertools
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stablevm.integrations.diffusers_scheduler import StableVSFlowMatchScheduler

pytest.importorskip("transformers", reason="diffusers has these pipelines where transformers is installed")

STEPS = 30
STRENGTHS = (1.0, 0.77, 0.4, 0.3, 0.1)
FOLDER = Path(diffusers.__file__).parent / "pipelines"


def pipelines():
    """Modules of pipelines for flow matching that have `get_timesteps`."""
    for path in sorted(FOLDER.rglob("pipeline_*.py")):
        text = path.read_text()
        if "FlowMatchEuler" in text and "def get_timesteps" in text:
            yield "diffusers.pipelines." + ".".join(path.relative_to(FOLDER).with_suffix("").parts)


def begun(module, pipeline, scheduler, strength, sigmas):
    """The first noise level, the network's timesteps, and the sum of the steps for a velocity of 1."""
    timesteps, steps = module.retrieve_timesteps(scheduler, STEPS, "cpu", **sigmas)
    given = {
        "num_inference_steps": steps,
        "timesteps": timesteps,
        "sigmas": scheduler.sigmas,
        "strength": strength,
        "device": "cpu",
    }
    wanted = inspect.signature(pipeline.get_timesteps).parameters
    cut = pipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), **{k: given[k] for k in given if k in wanted})
    timesteps = [each for each in cut if isinstance(each, torch.Tensor)][-1]
    level = scheduler.scale_noise(torch.zeros(1, 1), timesteps[:1], torch.ones(1, 1)).item()
    x = torch.zeros(1, 1)
    for t in timesteps:
        x = scheduler.step(torch.ones(1, 1), t, x).prev_sample
    return level, timesteps.tolist(), x.item()


@pytest.mark.parametrize("name", list(pipelines()))
def test_a_strength_is_the_euler_schedulers(name):
    module = importlib.import_module(name)
    if not hasattr(module, "retrieve_timesteps"):
        pytest.skip("it asks the scheduler itself")
    (pipeline,) = (
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if kind.__module__ == name and "get_timesteps" in vars(kind)
    )
    for strength, own in itertools.product(STRENGTHS, ({}, {"sigmas": np.linspace(1.0, 1 / STEPS, STEPS)})):
        level, by_euler, travelled = begun(module, pipeline, FlowMatchEulerDiscreteScheduler(shift=3.0), strength, own)
        ours, by_stablevs, end = begun(module, pipeline, StableVSFlowMatchScheduler(shift=3.0), strength, own)
        assert ours == level and by_stablevs[0] == by_euler[0], strength
        assert len(by_stablevs) < len(by_euler) or len(by_euler) == 3
        assert all(t > after for t, after in itertools.pairwise(by_stablevs))
        assert end == pytest.approx(travelled, abs=1e-5) == pytest.approx(-level, abs=1e-5)
