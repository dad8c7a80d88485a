"""Texts end to end against the same texts padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.config import TrainRetrievalConfig
from vlkit.models import adapters, packing, stages
from vlkit.models.device import autocast
from vlkit.models.packing import Packing


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7), more=st.integers(0, 3), seed=st.integers(0, 99))
def test_what_is_packed_is_the_text_and_comes_back_to_its_place(lengths, more, seed):
    length = max(lengths) + more
    packed_as = Packing.of(torch.tensor(lengths) - 1, length)
    if packed_as is None:
        assert packing._rounded(sum(lengths)) >= (1 - packing.WORTH) * len(lengths) * length
        return
    padded = torch.randn(len(lengths), length, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    packed = packed_as.pack(padded)
    texts = [padded[n, :count] for n, count in enumerate(lengths)]
    kept = packed_as.flat
    assert torch.equal(packed[0], padded.flatten(0, 1)[kept])
    assert set(kept.tolist()) >= {n * length + at for n, count in enumerate(lengths) for at in range(count)}
    assert len(kept) == packing._rounded(sum(lengths)) < len(lengths) * length and (kept.diff() > 0).all()
    assert torch.equal(packed[0, packed_as.last], torch.stack([text[-1] for text in texts]))
    again = packed_as.unpack(packed)
    assert all(torch.equal(again[n, :count], text) for n, (count, text) in enumerate(zip(lengths, texts, strict=True)))
    # A gradient that is zero at the padding comes back as it is, through both.
    given_ = torch.randn(again.shape, generator=torch.Generator().manual_seed(seed + 1))
    for n, count in enumerate(lengths):
        given_[n, count:] = 0
    again.backward(given_)
    assert torch.equal(padded.grad, given_)


def test_numbers_of_tokens_are_few_and_near():
    rounded = [packing._rounded(tokens) for tokens in range(1, 5000)]
    assert all(tokens <= each <= tokens * 17 / 16 for tokens, each in enumerate(rounded, 1))
    assert len({each for each in rounded if 256 < each <= 512}) == 16
    assert rounded == sorted(rounded)


def test_nothing_is_packed_where_there_is_little_padding_or_no_text():
    assert Packing.of(torch.zeros(0, dtype=torch.long), 5) is None
    assert Packing.of(torch.tensor([4, 4, 4]), 5) is None
    assert Packing.of(torch.tensor([4, 4, 1]), 5) is not None
    # 129 tokens in 136 places would be rounded to all of them.
    assert Packing.of(torch.tensor([16] * 7 + [9]), 17) is None


TEXTS = ["a red soup", "bread", "a green pie with salt, pepper, lemon and a little sugar on top of it", "cake", "tea"]


def embedded(towers, precision, monkeypatch, whole):
    """Embeddings and gradients, packed or padded."""
    monkeypatch.setattr(packing, "WORTH", 2.0 if whole else 0.05)
    asked = []
    of = Packing.of
    monkeypatch.setattr(stages.Packing, "of", lambda *told: asked.append(of(*told)) or asked[-1])
    ids = towers.pad(towers.tokenize(TEXTS)[0])
    towers.zero_grad()
    torch.manual_seed(0)
    with autocast(torch.device("cpu"), precision):
        found = towers.embed_texts(ids)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weight).sum().backward()
    monkeypatch.undo()
    assert {each is None for each in asked} == {whole}
    return found.detach(), {
        name: p.grad.clone() for name, p in adapters.trainable(towers).items() if p.grad is not None
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings", [{}, {"tune": "text", "checkpoint_activations": True}, {"tune": "lora", "lora_dropout": 0.0}]
)
def test_embeddings_and_gradients_are_those_of_padded_texts(settings, precision, tiny, monkeypatch):
    towers = tiny("tiny-clip")
    adapters.adapt(towers, TrainRetrievalConfig(**settings), seed=0)
    for name, parameter in towers.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    adapters.train_mode(towers)
    (packed, ours), (padded, exact) = (embedded(towers, precision, monkeypatch, whole) for whole in (False, True))
    near = 1e-5 if precision == "fp32" else 2e-2
    assert (packed - padded).norm() / padded.norm() < near
    assert ours.keys() == exact.keys() and len(ours) > 4
    off = sum((ours[name] - exact[name]).square().sum() for name in exact).sqrt()
    assert off / sum(each.square().sum() for each in exact.values()).sqrt() < near


def test_a_tower_that_is_cut_anywhere_goes_on_as_if_it_had_not_been(tiny):
    towers = tiny("tiny-clip")
    ids = towers.pad(towers.tokenize(TEXTS)[0])
    begun, chain = stages.Halfway(ids, 0, towers.ends(ids)), towers.text_chain
    with torch.no_grad():
        whole = stages.through(chain, begun).values
        for depth in range(len(chain) + 1):
            assert torch.allclose(stages.through(chain, stages.through(chain, begun, depth)).values, whole, atol=1e-6)


def test_other_attention_and_other_towers_are_not_packed(tiny):
    from vlkit.models.towers import Towers

    clip = tiny("tiny-clip")
    clip.model.config.text_config._attn_implementation = "eager"
    again = Towers(clip.model, clip.tokenizer, clip.pixel_spec, "eager")
    assert not any(stage.packs for stage in again.text_chain)
    assert not any(stage.packs for stage in tiny("tiny-siglip").text_chain)
