"""The loop against larger batches, an uninterrupted run and planted disasters."""

import copy
import itertools
import math

import pytest
import torch

from vlkit.errors import NonFiniteError
from vlkit.training.loop import steps
from vlkit.training.optimizer import adamw, cosine_schedule, new_scaler, segmented_schedule


def make(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Dropout(0.0), torch.nn.Linear(16, 1))


def data(batches, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * size, 6, generator=generator)
    return [(part, part.sum(1, keepdim=True)) for part in x.split(size)]


def train(model, batches, total, **settings):
    optimizer = settings.pop("optimizer", None) or adamw(dict(model.named_parameters()), lr=1e-2, weight_decay=0.01)
    loss_of = settings.pop("loss_of", lambda batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1]))
    stream = settings.pop("stream", itertools.cycle(batches))
    return list(steps(stream, loss_of, lambda batch: len(batch[0]), optimizer, total=total, **settings))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns():
    model = make()
    report = train(model, data(8, 32), 200)
    assert report[-1].loss < report[0].loss / 20
    assert [step.step for step in report] == list(range(1, 201))


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [1, 7, 3, 5]])
def test_accumulation_equals_one_batch(sizes):
    """1 x 16 equals 4 x 4, and any uneven way to cut it, where the loss is a mean over items."""
    whole = data(1, 16)
    parts = list(zip(whole[0][0].split(sizes), whole[0][1].split(sizes), strict=True))
    one, many = make(), make()
    a = train(one, whole, 5)
    b = train(many, parts, 5, accumulate=4)
    assert [x.loss for x in a] == pytest.approx([x.loss for x in b], rel=1e-5)
    assert [x.grad_norm for x in a] == pytest.approx([x.grad_norm for x in b], rel=1e-4)
    assert torch.allclose(weights(one), weights(many), atol=1e-5)
    assert [x.items for x in b] == [16] * 5


def test_a_resumed_run_equals_an_uninterrupted_one_with_dropout():
    def dropping():
        model = make()
        model[2] = torch.nn.Dropout(0.3)
        return model

    batches, schedule = data(6, 8), cosine_schedule(20, 0.1)
    whole = dropping()
    train(whole, batches, 20, schedule=schedule, seed=7)
    first = dropping()
    optimizer = adamw(dict(first.named_parameters()), lr=1e-2, weight_decay=0.01)
    train(first, batches, 9, schedule=schedule, seed=7, optimizer=optimizer)
    torch.manual_seed(99)
    train(
        first,
        batches,
        20,
        start=9,
        schedule=schedule,
        seed=7,
        optimizer=optimizer,
        stream=itertools.cycle(batches[3:] + batches[:3]),
    )
    assert torch.equal(weights(whole), weights(first))


@pytest.mark.parametrize("where", ["loss", "input", "gradient"])
def test_nothing_that_is_not_finite_reaches_the_weights(where):
    model, batches = make(), data(8, 4)
    if where == "input":
        batches[3][0][0, 0] = math.nan
    observed = []

    def loss_of(batch):
        value = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        if batch[0] is batches[3][0] and where == "loss":
            return value * math.inf
        if batch[0] is batches[3][0] and where == "gradient":
            # The value is finite, its gradient is not: d sqrt(x) / dx at 0.
            return value + (model[0].weight * 0).sum().sqrt()
        return value

    optimizer = adamw(dict(model.named_parameters()), lr=1e-2, weight_decay=0.01)
    for step in steps(iter(batches), loss_of, len, optimizer, total=8):
        observed.append((step.skipped, weights(model)))
    assert [skipped for skipped, _ in observed] == [False] * 3 + [True] + [False] * 4
    assert torch.equal(observed[3][1], observed[2][1])
    assert all(torch.isfinite(w).all() for _, w in observed)


def test_bad_steps_in_a_row_end_the_run_and_name_the_batch():
    model = make()
    before = weights(model)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row; its batch: row seven"):
        train(
            model,
            data(2, 4),
            10,
            loss_of=lambda batch: model(batch[0]).sum() * math.nan,
            describe_batch=lambda batch: "row seven",
        )
    assert torch.equal(weights(model), before)


def test_a_parameter_that_the_loss_does_not_reach_is_a_bug():
    model = make()
    model.unused = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"unused\.weight"):
        train(model, data(2, 4), 1, loss_of=lambda batch: model[:4](batch[0]).mean())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_the_caller_is_outside_autocast(precision):
    model, batches = make(), data(8, 32)
    optimizer = adamw(dict(model.named_parameters()), lr=1e-2, weight_decay=0.01)
    losses = []

    def loss_of(batch):
        out = model(batch[0])
        assert out.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        return torch.nn.functional.mse_loss(out.float(), batch[1])

    for step in steps(itertools.cycle(batches), loss_of, len, optimizer, total=150, precision=precision):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        losses.append(step.loss)
    assert losses[-1] < losses[0] / 5


def test_an_fp16_overflow_halves_the_scale_and_goes_on():
    model, batches = make(), data(4, 8)
    scaler = new_scaler(torch.device("cpu"), "fp16")
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    report = train(
        model,
        batches,
        60,
        precision="fp16",
        scaler=scaler,
        loss_of=lambda batch: torch.nn.functional.mse_loss(model(batch[0]).float(), batch[1]),
    )
    assert report[0].skipped
    assert not report[-1].skipped
    assert scaler.get_scale() < 2.0**40


def test_clipping_bounds_the_step():
    loud, quiet = make(), make()
    batches = data(1, 8)
    plain = torch.optim.SGD
    for model, factor in ((loud, 1e4), (quiet, 1.0)):
        optimizer = plain(list(model.named_parameters()), lr=1.0)
        for group in optimizer.param_groups:
            group["peak_lr"] = 1.0
        before = weights(model)
        loss_of = lambda batch, m=model, f=factor: torch.nn.functional.mse_loss(m(batch[0]), batch[1]) * f  # noqa: E731
        train(model, batches, 1, optimizer=optimizer, loss_of=loss_of, max_grad_norm=0.5)
        assert (weights(model) - before).norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("share", [0.01, 0.999, 1.0, 1.001, 100.0])
def test_clipping_is_torchs_to_the_bit(share):
    ours, plain = make(), make()
    (batch,) = data(1, 8)
    torch.nn.functional.mse_loss(plain(batch[0]), batch[1]).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]).item()
    optimizer = adamw(dict(plain.named_parameters()), lr=1e-2, weight_decay=0.01)
    assert torch.nn.utils.clip_grad_norm_(plain.parameters(), share * norm).item() == norm
    optimizer.step()
    (step,) = train(ours, [batch], 1, max_grad_norm=share * norm)
    assert step.grad_norm == norm and torch.equal(weights(ours), weights(plain))


def test_the_schedule_is_a_pure_function_of_the_step():
    factor = cosine_schedule(100, 0.1)
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.5)
    assert factor(99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert cosine_schedule(100, 20)(9) == pytest.approx(0.5)
    assert cosine_schedule(10, 0)(0) == 1.0


def test_every_leg_of_an_extended_run_has_a_schedule_of_its_own():
    factor, first, second = segmented_schedule(30, 0.1, (10,)), cosine_schedule(10, 0.1), cosine_schedule(20, 0.1)
    assert [factor(step) for step in range(30)] == [*map(first, range(10)), *map(second, range(20))]
    plain = cosine_schedule(30, 3)
    assert [segmented_schedule(30, 3)(step) for step in range(30)] == [plain(step) for step in range(30)]


def test_decay_spares_biases_norms_and_logit_parameters(tiny):
    from vlkit.models import tuning
    from vlkit.training.optimizer import adamw

    encoder = tiny("tiny-siglip")
    groups = adamw(tuning.trainable(encoder), lr=1e-3, weight_decay=0.01).param_groups
    spared = {name for group in groups if group["weight_decay"] == 0 for name in group["param_names"]}
    decayed = {name for group in groups if group["weight_decay"] > 0 for name in group["param_names"]}
    assert {"logit_scale", "logit_bias"} <= spared
    assert all(name in spared for name in spared | decayed if name.endswith(".bias") or "norm" in name)
    assert "text_model.head.weight" in decayed


def test_the_loop_leaves_the_optimizer_without_gradients():
    model = make()
    train(model, data(2, 4), 2)
    assert all(p.grad is None for p in model.parameters())
    assert copy.deepcopy(model)
