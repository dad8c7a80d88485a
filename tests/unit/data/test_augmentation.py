"""Wrong texts, text variants and varied images: neighbours, negatives, losses, and batches on any number of workers."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vlkit.config.data import ImageAugmentSettings
from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.augment.negatives import NearestTexts, NegativeSampler
from vlkit.data.images.spec import PixelSpec
from vlkit.data.loading.epoch_sampler import BatchIndices, EpochSampler, batch_stream
from vlkit.data.loading.retrieval_batches import PairDataset
from vlkit.data.pairs import read_pairs


@pytest.fixture
def data(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def test_neighbours_are_a_full_sort():
    vectors = np.random.default_rng(0).normal(size=(150, 8)).astype(np.float32)
    vectors[20:110] = vectors[20]
    near = NearestTexts(vectors)
    for position in (0, 25, 149):
        actual = np.concatenate(list(near.blocks(position)))
        assert sorted([position, *actual]) == list(range(150))
        scores = vectors[actual] @ vectors[position]
        assert np.allclose(scores, np.sort(scores)[::-1], atol=1e-4)


def rows_of(*pairs):
    """A table of matching pairs (text, group, split), a picture each."""
    frame = pd.DataFrame(pairs, columns=["text", "text_group", "split"])
    frame["image_group"], frame["origin"], frame["match"] = frame["text_group"], "original", 1
    frame["text_id"], frame["image_id"] = frame["text"], [f"i{row}" for row in range(len(frame))]
    return frame


def test_hard_negatives_go_on_beyond_the_first_neighbours():
    """200 texts of one group lie nearer than all of the other: the nearest of that one is still found."""
    angles = np.concatenate([np.linspace(0, 0.5, 200), np.linspace(1, 2, 200)])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    rows = rows_of(*((f"text {n}", "ab"[n // 200], "train") for n in range(400)))
    actual = NegativeSampler(rows, {}, seed=1, embed=lambda texts: vectors)
    assert [wrong.text for wrong in actual.choose("row", "i0", "text 0", 3)] == ["text 200", "text 201", "text 202"]
    assert [wrong.text for wrong in actual.choose("row", "i399", "text 399", 2)] == ["text 199", "text 198"]


def test_texts_that_differ_in_case_alone_match_alike():
    rows = rows_of(("Soup one", "A", "train"), ("Tart", "A", "train"), ("tart", "B", "train"), ("pie", "C", "train"))
    actual = NegativeSampler(rows, {}, seed=1)
    assert [wrong.text for wrong in actual.choose("row", "i0", "Soup one", 9)] == ["pie"]
    assert [wrong.text for wrong in actual.choose("row", "i3", "pie", 9)].count("pie") == 0
    assert actual.short_rows == 2


def test_the_one_text_that_does_not_match_is_found_and_another_seed_draws_others():
    rows = rows_of(*((f"text {n}", "a", "train") for n in range(300)), ("odd", "b", "train"))
    assert [wrong.text for wrong in NegativeSampler(rows, {}, seed=1).choose("row", "i0", "text 0", 5)] == ["odd"]
    many = rows_of(*((f"text {n}", f"g{n}", "train") for n in range(300)))
    draws = [
        [wrong.text for wrong in NegativeSampler(many, {}, seed=seed).choose("r", "i0", "text 0", 5)]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_persian_letters_have_glyphs(tmp_path):
    from vlkit.data.augment.preview import Cell, write_contact_sheet

    for name, caption in (("one", "کباب"), ("other", "نانها"), ("none", "")):
        write_contact_sheet(tmp_path / f"{name}.png", [[Cell(Image.new("RGB", (8, 8)), caption, "")]])
    observed = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("one", "other", "none")]
    ink = [(item != observed[2]).sum() for item in observed]
    assert ink[0] > 50 and ink[1] > 50 and not np.array_equal(observed[0], observed[1])


def test_no_other_words_either_way_round():
    rows = rows_of(("Silky Mash", "a", "train"), ("Creamy Mash", "b", "train"), ("Soup", "c", "train"))
    phrasings = {"Creamy Mash": {"silky mash", "velvety mash"}}
    for image, text in (("i0", "Silky Mash"), ("i1", "Creamy Mash")):
        actual = NegativeSampler(rows, phrasings, seed=1)
        assert [wrong.text for wrong in actual.choose("row", image, text, 9)] == ["Soup"]
    siblings = {"Pie (1)": {"pie"}, "Pie (2)": {"pie"}}
    rows = rows_of(("Pie (1)", "a", "train"), ("Pie (2)", "b", "train"))
    assert [wrong.text for wrong in NegativeSampler(rows, siblings, seed=1).choose("row", "i0", "Pie (1)", 9)] == [
        "Pie (2)"
    ]


# Training


@pytest.fixture
def encoder(tiny_folder):
    from vlkit.models.loading import load_dual_encoder

    return load_dual_encoder(str(tiny_folder("tiny-clip")))


def dataset(data, encoder, *, mode="multi-positive", augmenter=None, negatives=True):
    frame = read_pairs(data).frame
    rows = frame[frame["match"] == 0].reset_index(drop=True)
    train = read_pairs(data).positives().split("train")
    return PairDataset(
        train,
        PixelSpec(32),
        encoder.tokenize,
        encoder.pad,
        labels=mode,
        negatives=rows if negatives and len(rows) else None,
        augmenter=augmenter,
    )


def test_wrong_texts_enter_both_losses_as_their_formulas_say():
    from vlkit.training.losses import sigmoid_loss, softmax_loss

    logits = torch.randn(4, 7, dtype=torch.float64)
    signs = torch.cat([2 * torch.eye(4) - 1, -torch.ones(4, 3)], dim=1).double()
    by_hand = sum(torch.log1p(torch.exp(-signs[i, j] * logits[i, j])) for i in range(4) for j in range(7)) / 4
    assert sigmoid_loss(logits, signs).item() == pytest.approx(by_hand.item(), rel=1e-12)
    images_pick = -sum(logits[i, i] - torch.logsumexp(logits[i], 0) for i in range(4)) / 4
    texts_pick = -sum(logits[i, i] - torch.logsumexp(logits[:, i], 0) for i in range(4)) / 4
    assert softmax_loss(logits, signs).item() == pytest.approx(((images_pick + texts_pick) / 2).item(), rel=1e-12)


def test_mismatched_rows_that_say_no_row_join_every_row_of_their_picture(data, encoder):
    frame = read_pairs(data).split("train").frame
    wrong = frame.iloc[[0]].assign(text="an odd text", text_id="f" * 20, text_group="nobody", match=0, pair_id="e" * 20)
    train = read_pairs(data).split("train")
    items = PairDataset(train, PixelSpec(32), encoder.tokenize, encoder.pad, labels="mask", negatives=wrong)
    own = [row for row in range(len(frame)) if frame["image_id"].iloc[row] == frame["image_id"].iloc[0]]
    assert set(items.negative_texts) == set(own) and len(own) > 1
    batch = items[BatchIndices(0, [own[1], own[-1] + 1], [0, 0])]
    assert batch.labels.shape == (2, 3) and (batch.labels.rows()[:, 2] == -1).all()


def test_varied_pictures_pay_for_processes_however_few_they_are(data, encoder):
    from vlkit.data.loading.stores import loader_workers

    items = dataset(data, encoder)
    assert loader_workers(items.pixels) == 0 < loader_workers(items.pixels, augmented=True)


def test_a_picture_that_is_drawn_twice_an_epoch_is_varied_twice(data, encoder):
    items = dataset(data, encoder, augmenter=ImageAugmenter.from_settings(ImageAugmentSettings()))
    batch = items[BatchIndices(0, [3, 3, 3], [0, 1, 0])]
    assert torch.equal(batch.images[0], batch.images[2]) and not torch.equal(batch.images[0], batch.images[1])
    weighted = EpochSampler.from_pair_ids(items.pair_ids, 16, seed=1, weights=[3.0] * len(items))
    drawn = list(itertools.islice(weighted, weighted.batches_per_epoch))
    observed = {item for part in drawn for item in zip(part.rows, part.copies, strict=True)}
    assert observed == {(row, copy) for row in range(len(items)) for copy in range(3)}


def test_varied_batches_are_the_same_on_any_number_of_workers_and_from_any_step(data, encoder):
    items = dataset(data, encoder, augmenter=ImageAugmenter.from_settings(ImageAugmentSettings()))

    def taken(first, workers):
        order = EpochSampler.from_pair_ids(items.pair_ids, 16, seed=1, first_batch=first)
        return [batch.images for batch in itertools.islice(batch_stream(items, order, workers=workers), 14 - first)]

    plain = taken(0, 0)
    for first, workers in ((0, 2), (9, 0), (5, 1)):
        assert all(torch.equal(*both) for both in zip(plain[first:], taken(first, workers), strict=True))
