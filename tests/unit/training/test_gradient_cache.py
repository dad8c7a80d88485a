"""Batches in micro-batches against the same batches at once: loss, gradients, weights, masks."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.labels import Labels, label_matrix
from vlkit.data.loading.retrieval_batches import Batch
from vlkit.distributed import SINGLE
from vlkit.models import tuning
from vlkit.training.gradient_cache import ContrastiveLoss, TwoPassEncoder, loss_and_embedding_gradients
from vlkit.training.loop import steps
from vlkit.training.losses import LOSSES

GROUPS = [{"a"}, {"b"}, {"a", "c"}, {"d"}, {"b"}, {"e"}, {"c"}, {"f"}, {"a"}, {"g"}, {"h"}]
WORDS = ["red tart", "soup", "blue pie", "bread", "soup", "a green cake", "pie", "salad", "red tart", "yellow", "white"]


class Logits(torch.nn.Module):
    """scale * cosine + bias in double precision."""

    def __init__(self):
        super().__init__()
        self.scale, self.bias = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (2.0, -3.0))

    def forward(self, images, texts):
        return self.scale.exp() * images @ texts.T + self.bias


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.sets(st.sampled_from("abcd"), min_size=1, max_size=2), min_size=1, max_size=9),
    st.integers(0, 4),
    st.sampled_from(["eye", "multi-positive", "mask"]),
    st.sampled_from(sorted(LOSSES)),
    st.integers(1, 10),
)
def test_blocks_of_rows_give_the_loss_and_its_gradients(groups, more, mode, loss, rows):
    texts_of = groups + [{chr(ord("a") + n)} for n in range(more)]
    generator = torch.Generator().manual_seed(len(groups) * 100 + more * 10 + rows)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=1)
        for n in (len(groups), len(texts_of))
    )
    logits = Logits()
    leaves = [images.clone().requires_grad_(), texts.clone().requires_grad_(), logits.scale, logits.bias]
    whole = LOSSES[loss](logits(leaves[0], leaves[1]), label_matrix(groups, texts_of, mode))
    expected = torch.autograd.grad(whole, leaves)
    labels = Labels.from_groups(groups, texts_of, mode)
    actual = loss_and_embedding_gradients(
        loss, logits, images, texts, [logits.scale, logits.bias], labels, block_rows=rows
    )
    assert actual.loss.item() == pytest.approx(whole.item(), rel=1e-10, abs=1e-12)
    for mine, its in zip([actual.images, actual.texts, *actual.logit_parameters], expected, strict=True):
        assert torch.allclose(mine, its, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["eye", "multi-positive", "mask"])
def test_rows_of_labels_are_rows_of_the_matrix(mode):
    texts = [*GROUPS, {"a", "h"}, {"z"}]
    labels, matrix = Labels.from_groups(GROUPS, texts, mode), label_matrix(GROUPS, texts, mode)
    for start, stop in itertools.combinations(range(12), 2):
        assert torch.equal(labels.rows(start, stop), matrix[start:stop])


def batch_for(encoder, mode="multi-positive", size=11):
    """Pictures of noise; repeated captions are encoded once, and two texts are there only to be wrong."""
    generator = torch.Generator().manual_seed(5)
    side = encoder.pixel_spec.size
    unique = list(dict.fromkeys([*WORDS[:size], "a wrong text", "another wrong one"]))
    columns = [unique.index(word) for word in WORDS[:size]] + [len(unique) - 2, len(unique) - 1]
    return Batch(
        images=torch.randint(0, 255, (size, 3, side, side), dtype=torch.uint8, generator=generator),
        texts=encoder.pad(encoder.tokenize(unique)[0]),
        text_count=len(unique),
        text_index=torch.tensor(columns),
        labels=Labels.from_groups(GROUPS[:size], [*GROUPS[:size], {"y"}, {"z"}], mode),
        pair_ids=[str(n) for n in range(size)],
    )


def gradients(encoder, batch, loss, micro):
    """Loss and gradients as the loop makes them."""
    named = tuning.trainable(encoder)
    optimizer = torch.optim.SGD([{"params": list(named.items()), "peak_lr": 0.0}], lr=0.0)
    remaining = {}

    def keep(optimizer, args, kwargs):
        remaining.update({name: p.grad.clone() for name, p in named.items()})

    optimizer.register_step_pre_hook(keep)
    step = next(steps([batch], ContrastiveLoss(encoder, loss, micro), len, optimizer, total=1, max_grad_norm=1e9))
    return step.loss, remaining


def apart(one, other):
    """Norm of the difference over the total norm."""
    total = torch.sqrt(sum((g.double() ** 2).sum() for g in one.values()))
    return (torch.sqrt(sum(((one[k].double() - other[k].double()) ** 2).sum() for k in one)) / total).item()


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("mode", ["eye", "multi-positive", "mask"])
def test_micro_batches_give_the_gradients_of_the_batch(name, loss, mode, tiny):
    encoder = tiny(name)
    tuning.apply_tuning(encoder, TrainRetrievalConfig(), seed=0)
    batch = batch_for(encoder, mode)
    whole, expected = gradients(encoder, batch, loss, None)
    assert {"logit_scale"} <= expected.keys()
    for micro in (1, 3, 7, 10, 11, 50):
        value, actual = gradients(encoder, batch, loss, micro)
        assert value == pytest.approx(whole, rel=1e-5)
        assert apart(expected, actual) <= 1e-5
        for key in ("logit_scale", "logit_bias") & expected.keys():
            # The bias cancels out of a softmax: there its gradient is rounding, some 1e-7.
            assert actual[key].item() == pytest.approx(expected[key].item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["tiny-siglip", pytest.param("tiny-clip", marks=pytest.mark.slow)])
def test_weights_after_eight_steps(name, tiny):
    ends = []
    for micro in (None, 1, 3, 7):
        encoder = tiny(name)
        tuning.apply_tuning(encoder, TrainRetrievalConfig(), seed=0)
        named = tuning.trainable(encoder)
        optimizer = torch.optim.SGD([{"params": list(named.items()), "peak_lr": 0.05}], lr=0.05, momentum=0.9)
        batches = [batch_for(encoder, size=size) for size in (11, 8, 5)]
        contrast = ContrastiveLoss(encoder, encoder.family.loss, micro)
        losses = [s.loss for s in steps(itertools.cycle(batches), contrast, len, optimizer, total=8, accumulate=2)]
        assert losses[-1] < losses[0]
        ends.append({key: p.detach().clone() for key, p in named.items()})
    start = {key: p.detach() for key, p in tiny(name).model.named_parameters()}
    moved = {key: ends[0][key] - start[key] for key in ends[0]}
    for end in ends[1:]:
        assert apart(moved, {key: end[key] - start[key] for key in moved}) <= 1e-4


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_second_pass_drops_what_the_first_one_dropped(tune, tiny):
    """Against a plain batch whose slices are embedded one by one from the same random states."""
    encoder = tiny("tiny-siglip")
    tuning.apply_tuning(encoder, dataclasses.replace(TrainRetrievalConfig(), tune=tune, lora_dropout=0.4), seed=0)
    for key, parameter in encoder.model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(key)))
    if tune == "full":
        for module in encoder.model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.3
    tuning.train_mode(encoder)
    batch = batch_for(encoder)
    torch.manual_seed(9)
    first = TwoPassEncoder(encoder.embed_images, batch.images, 4, None)
    torch.manual_seed(9)
    assert not torch.equal(first.embeddings, TwoPassEncoder(encoder.embed_images, batch.images, 11, None).embeddings), (
        "no dropout at work"
    )
    again = [part.surrogate.item() for part in first.second_pass(first.embeddings)]
    assert sum(again) == pytest.approx(len(first.embeddings), rel=1e-6), "unit vectors, times themselves"

    _, actual = gradients(encoder, batch, "sigmoid", 4)
    from vlkit.training.loop import _dropout_seed

    torch.manual_seed(_dropout_seed(0, 0, 0, SINGLE))
    images = torch.cat([encoder.embed_images(part) for part in batch.images.split(4)])
    texts = torch.cat([encoder.embed_texts(part) for part in batch.texts.split(4)])[batch.text_index]
    LOSSES["sigmoid"](encoder.logits(images, texts), batch.labels.rows()).backward()
    assert apart({key: p.grad for key, p in tuning.trainable(encoder).items()}, actual) <= 1e-5


@pytest.mark.parametrize(("tune", "frozen"), [("text", "embed_images"), ("image", "embed_texts")])
def test_a_frozen_tower_is_not_embedded_twice(tune, frozen, tiny, monkeypatch):
    encoder = tiny("tiny-clip")
    tuning.apply_tuning(encoder, TrainRetrievalConfig(tune=tune), seed=0)
    batch = batch_for(encoder)
    calls, embed = [], getattr(encoder, frozen)
    monkeypatch.setattr(encoder, frozen, lambda part: calls.append(len(part)) or embed(part))
    _, actual = gradients(encoder, batch, "softmax", 4)
    # The first slice is looked at once more, to find that it has no gradient.
    rows = len(batch.images if tune == "text" else batch.texts)
    assert sum(calls) <= rows + 4
    assert max(calls) <= 4, "nor more of it at a time than a micro-batch"
    monkeypatch.undo()
    assert apart(gradients(encoder, batch, "softmax", None)[1], actual) <= 1e-5


def test_memory_that_runs_out_halves_the_micro_batch_and_goes_on(tiny, monkeypatch):
    encoder = tiny("tiny-siglip")
    tuning.apply_tuning(encoder, TrainRetrievalConfig(), seed=0)
    batch = batch_for(encoder)
    whole, expected = gradients(encoder, batch, "sigmoid", None)
    embed = encoder.embed_images

    def cramped(pixels):
        if torch.is_grad_enabled() and len(pixels) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return embed(pixels)

    monkeypatch.setattr(encoder, "embed_images", cramped)
    contrast, named = ContrastiveLoss(encoder, "sigmoid"), tuning.trainable(encoder)
    optimizer = torch.optim.SGD([{"params": list(named.items()), "peak_lr": 0.0}], lr=0.0)
    remaining = {}
    optimizer.register_step_pre_hook(lambda *_: remaining.update({name: p.grad.clone() for name, p in named.items()}))
    step = next(
        steps(
            [batch], contrast, len, optimizer, total=1, max_grad_norm=1e9, on_out_of_memory=contrast.reduce_micro_batch
        )
    )
    assert contrast.micro_batch in (2, 3)
    assert step.loss == pytest.approx(whole, rel=1e-5)
    assert apart(expected, remaining) <= 1e-5
    monkeypatch.setattr(encoder, "embed_images", lambda pixels: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        next(steps([batch], contrast, len, optimizer, total=1, on_out_of_memory=contrast.reduce_micro_batch))


def test_the_first_pass_takes_four_micro_batches_at_a_time_and_the_last_pictures_once():
    calls, weight = [], torch.ones(3, requires_grad=True)
    embed = lambda part: calls.append((len(part), torch.is_grad_enabled())) or part * weight  # noqa: E731
    passed = TwoPassEncoder(embed, torch.ones(11, 3), 2, None, keep_last=True)
    assert calls == [(2, False), (8, False), (1, True)]
    assert len(list(passed.second_pass(torch.ones(11, 3)))) == 6
    assert calls[3:] == [(2, True)] * 5


@pytest.mark.parametrize("size", [0, 4])
def test_a_share_of_nothing_is_embedded_as_nothing(size):
    passed = TwoPassEncoder(lambda part: part, torch.ones(0, 2), size, torch.zeros(0, 3), keep_last=True)
    assert passed.embeddings.shape == (0, 3) and not list(passed.second_pass(torch.zeros(0, 3)))


def test_halving_begins_at_what_batches_are(tiny):
    contrast = ContrastiveLoss(tiny("tiny-siglip"), "sigmoid", 512)
    contrast(batch_for(contrast.encoder, size=8))
    assert contrast.reduce_micro_batch() and contrast.micro_batch == 4, "half of 8, not of 512"


def test_many_texts_split_a_batch_of_few_pictures_and_the_random_state_goes_on(tiny):
    encoder = tiny("tiny-clip")
    tuning.apply_tuning(encoder, TrainRetrievalConfig(), seed=0)
    batch = batch_for(encoder, size=4)
    assert len(batch.images) <= 4 < len(batch.texts)
    parts = ContrastiveLoss(encoder, "softmax", 4)(batch)
    assert not isinstance(parts, torch.Tensor)
    torch.manual_seed(3)
    first = TwoPassEncoder(lambda part: part * torch.rand(1).requires_grad_(), torch.ones(6, 2), 2, None)
    after = torch.get_rng_state()
    assert len(list(first.second_pass(torch.ones(6, 2)))) == 3
    assert torch.equal(torch.get_rng_state(), after)
