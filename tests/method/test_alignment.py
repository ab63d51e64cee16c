"""The alignment loss and iREPA's normalisation, by hand."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from stablevm.alignment import AlignmentSchedule, alignment_loss, normalize_over_space, weighted_alignment
from stablevm.interpolant import LINEAR
from stablevm.support.errors import UserError
from stablevm.training.terms import Alignment


def test_loss_is_minus_the_mean_cosine():
    projected = torch.tensor([[[1.0, 0.0], [3.0, 3.0]]])
    features = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])
    assert alignment_loss(projected, features).tolist() == pytest.approx([-(1 + 0.5**0.5) / 2])


def test_loss_is_float32_whatever_the_tokens_are(stream):
    projected, features = torch.randn(2, 4, 16, 32, generator=stream).bfloat16()
    found = alignment_loss(projected, features)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, alignment_loss(projected.double(), features.double()), rtol=1e-5, atol=1e-6)


def test_weighted_mean():
    losses, weights = torch.tensor([-1.0, -0.5, 0.25]), torch.tensor([1.0, 0.0, 3.0])
    assert weighted_alignment(losses, weights).item() == pytest.approx((-1 + 0.75) / 4)
    assert weighted_alignment(losses, weights, total=torch.tensor(8.0)).item() == pytest.approx(-0.25 / 8)


def test_without_weight_the_term_is_zero_and_attached():
    projected = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    term = weighted_alignment(alignment_loss(projected, torch.ones(2, 3, 4)), torch.zeros(2))
    term.backward()
    assert term.item() == 0 and torch.equal(projected.grad, torch.zeros_like(projected))


def test_spatial_normalisation_is_float32(stream):
    features = (10 + torch.randn(2, 16, 8, generator=stream)).bfloat16()
    normalised = normalize_over_space(features, 1.0)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised.mean(1), torch.zeros(2, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.std(1), torch.ones(2, 8), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "gamma, grids, fits", [(0.6, [1], False), (0.6, [2, 1], False), (0.6, [2], True), (None, [1], True)]
)
def test_one_token_has_no_deviation_over_space(gamma, grids, fits):
    """iREPA would divide by a deviation that one token does not have."""
    encoders = [SimpleNamespace(grid_size=grid) for grid in grids]
    with nullcontext() if fits else pytest.raises(UserError, match=r"--use-irepa: .* one token .* smaller patches"):
        Alignment(encoders, AlignmentSchedule("hard", LINEAR), 0.5, gamma)


def test_spatial_normalisation():
    features = torch.tensor([[[1.0, 4.0], [3.0, 4.0], [8.0, 4.0]]])
    normalised = normalize_over_space(features, gamma=0.5)
    deviation = (((torch.tensor([1.0, 3.0, 8.0]) - 4) ** 2).sum() / 2).sqrt()
    torch.testing.assert_close(normalised[0, :, 0], (torch.tensor([1.0, 3.0, 8.0]) - 2) / (deviation + 1e-6))
    torch.testing.assert_close(normalised[0, :, 1], torch.full((3,), 2.0 / 1e-6))


@pytest.mark.parametrize(
    "projected, features", [((4, 9, 5), (4, 9, 6)), ((4, 9, 5), (1, 9, 5)), ((4, 9, 5), (4, 1, 5)), ((4, 5, 3, 3),) * 2]
)
def test_tokens_of_other_shapes_are_refused(projected, features):
    """Three of these would broadcast silently, or be read as another shape."""
    with pytest.raises(UserError, match=r"expected the same shape \(B, T, D\)"):
        alignment_loss(torch.ones(projected), torch.ones(features))


def test_weights_of_another_shape_are_refused():
    for losses, weights in ((torch.tensor(1.0), torch.ones(4)), (torch.ones(4), torch.ones(4, 1))):
        with pytest.raises(UserError, match=r"losses are .* expected"):
            weighted_alignment(losses, weights)
