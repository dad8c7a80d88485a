"""Losses against golden values, textbook formulas and a plain loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.data.labels import label_matrix
from vlkit.training.losses import sigmoid_loss, softmax_loss

GROUPS = list("001222")
GOLDEN = {
    ("sigmoid", "eye"): 10.315461495119,
    ("sigmoid", "multi-positive"): 25.850795327214,
    ("sigmoid", "mask"): 10.296739785144,
    ("softmax", "eye"): 8.484482576515,
    ("softmax", "multi-positive"): 10.322463343663,
    ("softmax", "mask"): 8.230920297865,
}


def golden_cosines() -> torch.Tensor:
    i, j = torch.arange(6).view(6, 1).double(), torch.arange(4).view(1, 4).double()
    return F.normalize(torch.sin(1 + 4 * i + j), dim=1) @ F.normalize(torch.cos((1 + 4 * i + j) / 2), dim=1).T


@pytest.mark.parametrize(("loss", "mode"), GOLDEN)
def test_golden_values(loss, mode):
    labels = label_matrix(GROUPS, GROUPS, mode)
    value = (
        sigmoid_loss(10 * golden_cosines() - 10, labels)
        if loss == "sigmoid"
        else softmax_loss(10 * golden_cosines(), labels)
    )
    assert value.item() == pytest.approx(GOLDEN[loss, mode], rel=1e-6)


def test_sigmoid_at_its_start():
    """SigLIP's initial scale 10 and bias -10 at cosine 0: softplus(10) + (N - 1) softplus(-10)."""
    labels = label_matrix(list(map(str, range(64))), list(map(str, range(64))), "multi-positive")
    assert sigmoid_loss(torch.full((64, 64), -10.0), labels).item() == pytest.approx(10.0029055, rel=1e-6)


def test_softmax_on_distinct_ids_is_clip():
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(0)) * 5
    ids = list("abcdefg")
    target = torch.arange(7)
    clip = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    for mode in ("eye", "multi-positive", "mask"):
        assert softmax_loss(logits, label_matrix(ids, ids, mode)).item() == pytest.approx(clip.item(), rel=1e-6)


def test_gradients_stay_finite_with_masked_columns():
    """A column of zeros leaves the denominator; its -inf must not leak into the gradient."""
    logits = torch.randn(4, 4, requires_grad=True)
    labels = torch.tensor([[1, 0, 0, -1], [0, 1, 0, -1], [0, 0, 1, -1], [-1, -1, -1, 1]]).float()
    softmax_loss(logits, labels).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[labels == 0] == 0).all()


def loop_sigmoid(logits, labels):
    return sum(
        math.log1p(math.exp(-labels[i][j] * logits[i][j]))
        for i in range(len(labels))
        for j in range(len(labels[0]))
        if labels[i][j]
    ) / len(labels)


def loop_softmax(logits, labels):
    def direction(rows, row_labels):
        losses = []
        for row, row_label in zip(rows, row_labels, strict=True):
            positives = [x for x, label in zip(row, row_label, strict=True) if label > 0]
            if positives:
                denominator = math.log(sum(math.exp(x) for x, label in zip(row, row_label, strict=True) if label))
                losses.append(sum(denominator - x for x in positives) / len(positives))
        return sum(losses) / max(1, len(losses))

    return (direction(logits, labels) + direction(list(zip(*logits, strict=True)), list(zip(*labels, strict=True)))) / 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_losses_equal_a_plain_loop(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    number = st.floats(-8, 8, allow_nan=False, width=32)
    logits = [[data.draw(number) for _ in range(columns)] for _ in range(rows)]
    labels = [[data.draw(st.sampled_from([-1, 0, 1])) for _ in range(columns)] for _ in range(rows)]
    given_to = torch.tensor(logits), torch.tensor(labels).float()
    assert sigmoid_loss(*given_to).item() == pytest.approx(loop_sigmoid(logits, labels), rel=1e-4, abs=1e-5)
    assert softmax_loss(*given_to).item() == pytest.approx(loop_softmax(logits, labels), rel=1e-4, abs=1e-5)


def test_bf16_logits_are_widened():
    logits = torch.randn(5, 5).bfloat16()
    labels = label_matrix(list("abcde"), list("abcde"), "eye")
    assert sigmoid_loss(logits, labels).dtype == softmax_loss(logits, labels).dtype == torch.float32
