"""torch has two generations of switches of float32 products: they must agree wherever something reads them."""

import pytest
import torch

from stablevm.support.precision import full_precision, tf32


def readings():
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(), newer


@pytest.mark.parametrize("allowed", [True, False])
def test_full_precision_inside_and_as_before_after_it(allowed):
    outside = readings()
    with tf32(allowed):
        before = readings()
        assert before[0] == allowed
        with full_precision(torch.device("cpu")):
            assert readings()[:2] == (False, "highest")
        assert readings() == before
    assert readings()[:2] == outside[:2]
