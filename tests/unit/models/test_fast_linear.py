"""Matrix products by oneDNN, beside torch's own and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.models.fast import linear


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(3,), (1,), (2, 5), (0,), (2, 0), (4, 3, 2)]),
    inner=st.integers(1, 40),
    columns=st.integers(1, 40),
    bias=st.booleans(),
    frozen=st.sampled_from(["nothing", "values", "weight"]),
    apart=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_and_its_gradients_are_torchs(shape, inner, columns, bias, frozen, apart, seed):
    generator = torch.Generator().manual_seed(seed)
    created = [torch.randn(*shape, inner, generator=generator), torch.randn(columns, inner, generator=generator)]
    created.append(torch.randn(columns, generator=generator) if bias else None)
    weight_of = torch.randn(*shape, columns, generator=generator)
    results = []
    for way, dtype in ((linear.linear, torch.float32), (F.linear, torch.float64)):
        values, weight, added = (
            None if item is None else item.detach().to(dtype, copy=True).requires_grad_() for item in created
        )
        values.requires_grad_(frozen != "values")
        weight.requires_grad_(frozen != "weight")
        # Rows that lie apart in memory, as one position of every item does.
        rows = torch.stack([values, values], dim=-2)[..., 0, :] if apart else values
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "SMALL_WEIGHT", 1)
            actual = way(rows, weight, added)
        (actual * weight_of.to(dtype)).sum().backward()
        results.append([actual.detach(), *(item.grad for item in (values, weight, added) if item is not None)])
    for ours, exact in zip(*results, strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            assert ours.shape == exact.shape
            assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_under_autocast_and_with_a_small_weight_it_is_torchs_own():
    values, weight, bias = torch.randn(7, 300), torch.randn(400, 300), torch.randn(400)
    small = weight[:33, :96]
    assert torch.equal(linear.linear(values[:, :96], small, None), F.linear(values[:, :96], small))
    assert not linear._is_faster(values[:, :96], small) and linear._is_faster(values, weight) == linear.onednn()
    with torch.autocast("cpu", torch.bfloat16):
        assert not linear._is_faster(values, weight)
        actual = linear.linear(values, weight, bias)
        assert actual.dtype == torch.bfloat16 and torch.equal(actual, F.linear(values, weight, bias))


def test_onednn_is_taken_where_there_is_avx_512_and_can_be_switched_off():
    at_hand = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    assert linear.onednn() == at_hand
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        assert not linear.onednn()
    finally:
        torch.backends.mkldnn.enabled = before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_left_to_torch(dtype):
    values, weight = torch.randn(2, 5).to(dtype), torch.randn(3, 5).to(dtype)
    assert torch.equal(linear.linear(values, weight, None), F.linear(values, weight))
