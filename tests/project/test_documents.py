"""The documents: links lead somewhere, generated pages are current, and code that they show works."""

import importlib.util
import math
import re
from pathlib import Path
from typing import Literal

import pytest
import torch

import stablevm
from stablevm import interpolant
from stablevm.networks import encoders
from stablevm.solvers import fixed_steps as solvers
from stablevm.solvers import integration as sampler

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[a-z]*/README.md")})
SHOWN = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        other = page.parent / path if path else page
        assert other.exists(), f"{page.name} links to {target}"
        assert not heading or heading in anchors(other), f"{page.name}: {other.name} has no heading {heading}"


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        waiting += [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)\s#]+)", page.read_text())]
    assert not set(PAGES) - reached


def test_options_page_is_current():
    spec = importlib.util.spec_from_file_location("options_page", ROOT / "docs" / "options.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run python docs/options.py"


def shown(containing, room):
    """What a block of docs/extending.md makes when it stands in the module `room`."""
    (block,) = (block for block in SHOWN if containing in block)
    names = dict(vars(room))
    exec(block, names)
    return names


def test_the_path_that_is_shown_is_one():
    path = shown("QUADRATIC", interpolant)["INTERPOLANTS"]["quadratic"]
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    at = path.coefficients(t)
    for value, derivative in ((at.alpha, at.d_alpha), (at.sigma, at.d_sigma)):
        assert torch.allclose(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], derivative)
    assert torch.allclose(path.time_at_ratio(at.sigma / at.alpha), t)


def test_the_solver_that_is_shown_has_order_two(monkeypatch):
    midpoint = shown("midpoint", solvers)["midpoint"]
    monkeypatch.setitem(sampler._FIXED_STEPS, "midpoint", midpoint)
    monkeypatch.setitem(sampler.SamplerSettings.__annotations__, "solver", Literal["midpoint"])
    settings = sampler.SamplerSettings("ode", num_steps=20, solver="midpoint")
    end = sampler.integrate(lambda x, t: x, lambda: torch.ones(1, dtype=torch.float64), interpolant.LINEAR, settings)
    assert end.item() == pytest.approx(math.exp(-1), rel=1e-3)
    start = torch.ones(1, dtype=torch.float64)
    errors = [(midpoint(lambda x, t: x, start, solvers.ode_times(n)) - math.exp(-1)).abs().item() for n in (10, 20)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_the_schedule_and_the_encoder_that_are_shown():
    weight = (block for block in SHOWN if "self.name" in block)
    body = next(weight).replace("\n", "\n    ")
    names = {}
    exec(f"def weight(self, t):\n    {body}", names)
    schedule = type("Schedule", (), {"name": "linear", "tau": 0.5})
    assert names["weight"](schedule, torch.tensor([0.0, 0.25, 1.0])).tolist() == [1, 0.5, 0]
    before = dict(encoders.SHORT_NAMES)
    try:
        shown("SHORT_NAMES", encoders)
        import timm

        assert timm.get_pretrained_cfg(encoders.SHORT_NAMES["siglip-vit-b"].timm_name) is not None
    finally:
        encoders.SHORT_NAMES.clear()
        encoders.SHORT_NAMES.update(before)


def test_the_loop_that_is_shown_runs():
    """The blocks of docs/own-loop.md, one after the other, with networks that know nothing."""
    training, meanflow, sampling = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "own-loop.md").read_text(), flags=re.DOTALL
    )
    stream, rows, scale = torch.Generator().manual_seed(0), torch.arange(6), torch.nn.Parameter(torch.zeros(()))
    images = torch.randn(20, 4, 8, generator=stream)
    names = {name: getattr(stablevm, name) for name in stablevm.__all__}
    names |= {"torch": torch, "images": images, "rows": rows, "latents": images[rows], "labels": rows % 3}
    names |= {"objective": stablevm.StableVM(stablevm.ClassBank(3, 8, shape=(4, 8))), "generator": stream}
    names |= {"model": lambda x, t, labels: (scale * x, scale + x), "encoder": lambda seen: seen}
    exec(training, names)
    assert names["loss"].isfinite() and names["alignment"].requires_grad
    names |= {"model": lambda x, t, labels, *, r: scale * x + r.view(-1, 1, 1), "bank": names["objective"].bank}
    exec(meanflow, names)
    assert names["loss"].requires_grad and names["loss"].isfinite()
    names |= {"model": lambda x, t, labels: x, "shape": images[rows].shape}  # dx/dt = x, from t = 1 to 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.randn(images[rows].shape)
        torch.manual_seed(0)
        exec(sampling, names)
    torch.testing.assert_close(names["samples"], noise * math.exp(-1), rtol=1e-3, atol=1e-4)
    names["model"] = lambda x, t, labels: x * (labels + 1).view(-1, 1, 1)
    each = stablevm.SamplerSettings("ode", solver="dopri5")  # gives `rows`, as samples arrive one after the other
    samples = stablevm.integrate(names["velocity"], lambda: noise, stablevm.LINEAR, each)
    torch.testing.assert_close(samples, noise * torch.exp(-1.0 - names["labels"]).view(-1, 1, 1), rtol=1e-3, atol=1e-4)
