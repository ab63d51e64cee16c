"""Training runs of the toy study: every option has its effect, interruptions leave no trace, paths are finite."""

import multiprocessing
from dataclasses import replace

import pytest
import torch

from stablevm.interpolant import LINEAR
from stablevm.support import rng
from stablevm.support.errors import UserError
from stablevm.support.threads import torch_threads
from stablevm.toy import experiment, films
from stablevm.toy.config import METHODS, RESULT_FIELDS, ToyConfig
from stablevm.toy.results import load, load_network, result_path
from stablevm.toy.training import UPDATES_AT_ONCE, Draws, mixture_of, train_method, training_batches
from stablevm.training.tracker import METRICS_FILE, Trackers, read_metrics

TINY = ToyConfig(
    exp=("stable_vm",), updates=6, eval_every=2, batch_size=8, references=16, components=3, dimension=3,
    eval_samples=20, learning_rate=1e-2, no_plot_variance=True,
)  # fmt: skip
CHANGED = {
    "vector_field": "score", "components": 4, "dimension": 4, "batch_size": 9, "references": 17, "updates": 7,
    "learning_rate": 2e-2, "max_grad_norm": 1e-3, "ema_decay": 0.1, "ema_warmup": True,
    "network": "perceptron", "width": 16, "depth": 2,
    "dropout": 0.5, "loss_reduction": "mean", "eval_every": 3,
    "eval_samples": 21, "eval_times": (0.3,),
}  # fmt: skip


def rows_of(config, folder):
    trackers = Trackers(folder, [], {})
    try:
        return train_method("stable_vm", config, 0, trackers)[0]
    finally:
        trackers.close()


def test_every_option_of_a_result_has_its_effect(tmp_path):
    assert set(CHANGED) == set(RESULT_FIELDS)
    usual = rows_of(TINY, tmp_path)
    assert rows_of(TINY, tmp_path) == usual
    for name, value in CHANGED.items():
        config = replace(TINY, **{name: value})
        assert rows_of(config, tmp_path) != usual, name
        assert result_path(config, "stable_vm", 0) != result_path(TINY, "stable_vm", 0), name


def test_an_interrupted_run_gives_the_same_result(tmp_path, monkeypatch):
    whole, again = (replace(TINY, output_dir=tmp_path / name) for name in ("whole", "again"))
    experiment.run(whole)
    real = Draws._drawn

    def interrupted(draws):
        if draws.update == 3:
            raise KeyboardInterrupt
        return real(draws)

    monkeypatch.setattr(Draws, "_drawn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(again)
    path = result_path(again, "stable_vm", 0)
    assert not path.exists()
    monkeypatch.setattr(Draws, "_drawn", real)
    experiment.run(again)
    assert load(again, "stable_vm", 0).divergence == load(whole, "stable_vm", 0).divergence
    metrics = read_metrics(again.output_dir / "logs" / path.stem / METRICS_FILE)
    assert [row["step"] for row in metrics] == [0, 2, 4, 6]
    networks = [load_network(config, "stable_vm", 0).state_dict() for config in (whole, again)]
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_another_process_are_the_same(method):
    """With a core for it, another process draws: more updates than it draws at once, and not a multiple of them."""
    config = replace(TINY, updates=UPDATES_AT_ONCE + 3)
    mixture = mixture_of(config, 0)
    draws = [draw for _, draw in zip(range(config.updates), Draws(method, config, mixture, 0), strict=False)]
    for threads in (1, 2):
        with torch_threads(threads):
            drawn = list(training_batches(method, config, mixture, 0))
        assert len(drawn) == config.updates and not multiprocessing.active_children()
        for (x_t, t, target), draw in zip(drawn, draws, strict=True):
            assert torch.equal(x_t, draw.x_t) and torch.equal(t, draw.t) and torch.equal(target, draw.target)


def test_the_process_that_draws_may_die():
    config = replace(TINY, updates=10 * UPDATES_AT_ONCE)
    with torch_threads(2):
        drawn = training_batches("stable_vm", config, mixture_of(config, 0), 0)
        next(drawn)
        multiprocessing.active_children()[0].kill()
        with pytest.raises(UserError, match=r"a process that draws batches .*was killed.*OMP_NUM_THREADS=1$"):
            list(drawn)


@pytest.mark.parametrize("field", ["velocity", "score"])
def test_paths_of_the_exact_field_are_the_exact_paths(field):
    """A network that knows the field takes the same way from noise to data; the score is undefined at t = 1 alone."""
    config = replace(TINY, vector_field=field)
    mixture = mixture_of(config, 0)

    def exact(x, t):
        value = mixture.field(LINEAR, x, t[0].item(), "velocity" if field == "velocity" else "noise")
        return (value if field == "velocity" else -value).float()

    for t, ours, truth in films._trajectories(config, exact, mixture, 0):
        assert (ours - truth).abs().max() < 1e-3, t
    noise = torch.randn(films.PATHS, config.dimension, generator=rng.generator(0, "paths"))
    assert (truth - noise).abs().mean() > 0.1, "they arrive somewhere else"


def test_one_reference_is_flow_matching():
    draw = next(iter(Draws("stable_vm", replace(TINY, references=1), mixture_of(TINY, 0), 0)))
    assert torch.equal(draw.target, LINEAR.velocity(draw.x0, draw.noise, draw.t))
    assert torch.equal(draw.ess, torch.ones(8))
