"""The anchored, matrix-product form against a direct float64 evaluation."""

import pytest
import torch

from stablevm import posterior as kernel
from stablevm.interpolant import COSINE, INTERPOLANTS, LINEAR
from stablevm.posterior import posterior, posterior_over_blocks

TIMES = (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999, 1.0)
ROWS, SET = 5, 20


def direct_target(path, x0, noise, t, references):
    """The velocity that `softmax(-|x_t - alpha b|^2 / (2 sigma^2))` over (B, n, d) references gives, in float64."""
    x0, noise, references = x0.double(), noise.double(), references.double()
    at = path.coefficients(t.double()[:, None])
    x_t = at.alpha * x0 + at.sigma * noise
    logits = -(x_t[:, None] - at.alpha[..., None] * references).square().sum(-1) / (2 * at.sigma.square())
    mean = (logits.softmax(-1)[..., None] * references).sum(1)
    return at.d_alpha * mean + at.d_sigma * (x_t - at.alpha * mean) / at.sigma


def make_references(kind, d, stream):
    if kind == "generic":
        return torch.randn(SET, d, generator=stream)
    base = torch.randn(4, d, generator=stream).repeat(SET // 4, 1)  # clusters of five
    return base + 0.01 * torch.nn.functional.normalize(torch.randn(SET, d, generator=stream), dim=-1)


@pytest.mark.parametrize("kind, tolerance", [("generic", 1e-5), ("nearly coincident", 1e-3)])
@pytest.mark.parametrize("d", [16, 1024, 16384])
@pytest.mark.parametrize("path", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
@pytest.mark.parametrize("arrangement", ["shared", "per row", "bank"])
def test_equals_float64_under_tf32_and_autocast(path, d, kind, tolerance, arrangement, stream):
    references = make_references(kind, d, stream)
    anchor = torch.arange(ROWS)
    x0, noise = references[anchor], torch.randn(ROWS, d, generator=stream)
    keep = anchor[:, None] != torch.arange(SET)
    given, groups = {
        "shared": (references, None),
        "per row": (references.expand(ROWS, SET, d), None),
        "bank": (torch.stack([references, references]), torch.tensor([0, 1, 1, 1, 0])),
    }[arrangement]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for time in TIMES:
            t = torch.full((ROWS,), time)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = posterior(path, x0, noise, t, given, groups=groups, keep=keep)
            target = path.velocity(x0, noise, t) + path.offset_gain(t, x0) * found.offset
            expected = direct_target(path, x0, noise, t, references.expand(ROWS, SET, d))
            error = (target - expected).norm(dim=1) / expected.norm(dim=1)
            assert error.max() < tolerance, (time, error)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_ends_are_finite_and_right(path, stream):
    references = torch.randn(SET, 8, generator=stream)
    x0, noise = references[:2], torch.randn(2, 8, generator=stream)
    keep = torch.arange(2)[:, None] != torch.arange(SET)
    t = torch.tensor([0.0, 1.0])
    found = posterior(path, x0, noise, t, references, keep=keep)
    gain = path.offset_gain(t, x0)
    assert torch.equal(gain[0] * found.offset[0], torch.zeros(8)) and found.ess[0] == 1
    torch.testing.assert_close(found.offset[1], x0[1] - references.mean(0), atol=1e-6, rtol=1e-5)
    assert found.ess[1] == pytest.approx(SET, rel=1e-5)
    assert torch.isfinite(gain).all()


def test_references_may_be_stored_in_half_precision(stream):
    references = torch.randn(SET, 64, generator=stream).half()
    x0, noise, t = references[:3].float(), torch.randn(3, 64, generator=stream), torch.tensor([0.3, 0.8, 0.99])
    keep = torch.arange(3)[:, None] != torch.arange(SET)
    half = posterior(LINEAR, x0, noise, t, references, keep=keep)
    full = posterior(LINEAR, x0, noise, t, references.float(), keep=keep)
    assert torch.equal(half.offset, full.offset) and torch.equal(half.ess, full.ess)


def test_masked_references_do_not_exist(stream):
    references = torch.randn(SET, 6, generator=stream)
    x0, noise = torch.randn(2, 6, generator=stream), torch.randn(2, 6, generator=stream)
    t = torch.tensor([0.8, 0.9])
    keep = (torch.arange(SET) < 7).expand(2, SET)
    some = posterior(LINEAR, x0, noise, t, references, keep=keep)
    few = posterior(LINEAR, x0, noise, t, references[:7])
    torch.testing.assert_close(some.offset, few.offset)
    empty = posterior(LINEAR, x0, noise, t, references[:0])
    assert torch.equal(empty.offset, torch.zeros_like(x0)) and torch.equal(empty.ess, torch.ones(2))
    nothing = posterior(LINEAR, x0, noise, t, references, keep=torch.zeros(2, SET, dtype=torch.bool))
    assert torch.equal(nothing.offset, torch.zeros_like(x0)) and torch.equal(nothing.ess, torch.ones(2))


@pytest.mark.parametrize("arrangement", ["shared", "per row", "bank", "blocks"])
@pytest.mark.parametrize("d", [6, 200])
def test_omitting_a_position_is_masking_it(d, arrangement, monkeypatch, stream):
    """Also where references are read in several blocks, of which one has the position; position -1 omits none."""
    monkeypatch.setattr(kernel, "_CPU", kernel._Limits(values=2**21, logits=7 * ROWS))
    bank, x0, noise = (torch.randn(*size, d, generator=stream) for size in ((2, SET), (ROWS,), (ROWS,)))
    omit, t, groups = torch.tensor([0, -1, 19, 7, 3]), torch.linspace(0.5, 1, ROWS), torch.tensor([0, 1, 1, 1, 1])
    keep = omit[:, None] != torch.arange(SET)
    if arrangement == "blocks":
        parts = [range(13), range(13, SET)]
        found = posterior_over_blocks(LINEAR, x0, noise, t, [(bank[0, part], omit - part.start) for part in parts])
        expected = posterior(LINEAR, x0, noise, t, bank[0], keep=keep)
    else:
        references = {"shared": bank[0], "per row": bank[groups], "bank": bank}[arrangement]
        given = {"groups": groups} if arrangement == "bank" else {}
        found = posterior(LINEAR, x0, noise, t, references, **given, omit=omit)
        expected = posterior(LINEAR, x0, noise, t, references, **given, keep=keep)
    torch.testing.assert_close(found.offset, expected.offset, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.ess, expected.ess, atol=1e-6, rtol=1e-5)


def test_a_mask_and_a_position_are_too_much():
    values, t = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="not both"):
        posterior(LINEAR, values, values, t, values, keep=torch.ones(2, 2, dtype=torch.bool), omit=torch.arange(2))


@pytest.mark.parametrize("together", [1, 2, 100])
def test_groups_of_any_size_are_computed_together(together, monkeypatch, stream):
    sizes, n, d = (1, 30, 0, 3, 9, 17), 11, 5
    monkeypatch.setattr(kernel, "_TOGETHER_VALUES", together * n * d)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=stream)]
    bank = torch.randn(len(sizes), n, d, generator=stream)
    x0, noise = torch.randn(len(groups), d, generator=stream), torch.randn(len(groups), d, generator=stream)
    t, keep = torch.linspace(0, 1, len(groups)), torch.rand(len(groups), n, generator=stream) < 0.7
    found = posterior(LINEAR, x0, noise, t, bank, groups=groups, keep=keep)
    expected = posterior(LINEAR, x0, noise, t, bank[groups], keep=keep)
    torch.testing.assert_close(found.offset, expected.offset, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.ess, expected.ess, atol=1e-6, rtol=1e-5)
    batches = list(kernel._batches(groups, together))
    assert max(len(sets) for sets, _ in batches) <= together and sum(len(sets) for sets, _ in batches) == 5
    assert together < 100 or [[len(rows) for rows in each] for _, each in batches] == [[1, 3], [30, 17], [9]]


def test_images_keep_their_shape(stream):
    bank = torch.randn(3, 4, 2, 5, 5, generator=stream)
    x0, noise = torch.randn(6, 2, 5, 5, generator=stream), torch.randn(6, 2, 5, 5, generator=stream)
    groups, t = torch.tensor([0, 2, 2, 1, 0, 2]), torch.linspace(0.2, 0.9, 6)
    found = posterior(LINEAR, x0, noise, t, bank, groups=groups)
    rows = posterior(LINEAR, x0, noise, t, bank[groups])
    assert found.offset.shape == x0.shape and found.ess.shape == (6,)
    torch.testing.assert_close(found.offset, rows.offset, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("time", [0.003, 0.01, 0.1, 0.9])
def test_rows_that_share_close_references_keep_their_distances(time, stream):
    """Offsets themselves, not only the targets in which they are small; measured 1e-6, and 1e-3 from float32 sums."""
    d = 1024
    references = make_references("nearly coincident", d, stream)
    x0, noise, t = references, torch.randn(SET, d, generator=stream), torch.full((SET,), time)
    keep = ~torch.eye(SET, dtype=torch.bool)
    found = posterior(LINEAR, x0, noise, t, references, keep=keep).offset
    at = LINEAR.coefficients(t.double()[:, None])
    x_t = at.alpha * x0.double() + at.sigma * noise.double()
    logits = -(x_t[:, None] - at.alpha[..., None] * references.double()).square().sum(-1) / (2 * at.sigma.square())
    differences = x0.double()[:, None] - references.double()
    expected = (logits.softmax(-1)[..., None] * differences).sum(1)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_to_themselves_equal_shared_ones_in_one_pass_per_chunk(dtype, monkeypatch, stream):
    """What an accelerator does, whose limits fit two rows of references here."""
    n, d, rows = 6, 8, 5
    bank, groups = torch.randn(3, n, d, generator=stream).to(dtype), torch.tensor([0, 2, 2, 1, 0])
    x0, noise = torch.randn(rows, d, generator=stream), torch.randn(rows, d, generator=stream)
    lam, keep = torch.linspace(0.2, 3, rows, dtype=torch.float64), torch.rand(rows, n, generator=stream) < 0.7
    expected = kernel._per_group(x0, noise, lam, bank, groups, keep)
    monkeypatch.setattr(kernel, "_CPU", kernel._Limits(values=2 * n * d, logits=2**22))
    blocks, add_block = [], kernel._Weighing._add_block
    monkeypatch.setattr(
        kernel._Weighing,
        "_add_block",
        lambda self, refs, keep: (blocks.append(refs.shape), add_block(self, refs, keep)),
    )
    found = kernel._per_row(x0, noise, lam, bank, groups, keep)
    assert blocks == [(2, n, d), (2, n, d), (1, n, d)]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
