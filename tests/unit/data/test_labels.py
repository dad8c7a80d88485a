"""The one definition of a match."""

import pandas as pd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.data.labels import label_matrix, match_sets, matching_pairs

ids = st.lists(
    st.one_of(st.sampled_from("abcd"), st.sets(st.sampled_from("abcd"), min_size=1, max_size=3)), min_size=1, max_size=6
)


def as_set(value):
    return {value} if isinstance(value, str) else set(value)


@settings(max_examples=100, deadline=None)
@given(ids, ids)
def test_matching_pairs_are_the_intersecting_sets(images, texts):
    expected = [
        (i, j) for i, image in enumerate(images) for j, text in enumerate(texts) if as_set(image) & as_set(text)
    ]
    assert list(zip(*(part.tolist() for part in matching_pairs(images, texts)), strict=True)) == expected


@settings(max_examples=100, deadline=None)
@given(ids)
def test_the_three_modes(groups):
    matches = torch.tensor([[bool(as_set(a) & as_set(b)) for b in groups] for a in groups])
    diagonal = torch.eye(len(groups), dtype=torch.bool)
    eye, multi, mask = (label_matrix(groups, groups, mode) for mode in ("eye", "multi-positive", "mask"))
    assert torch.equal(eye, diagonal.float() * 2 - 1)
    assert torch.equal(multi, matches.float() * 2 - 1)
    assert torch.equal(mask, torch.where(diagonal, 1.0, torch.where(matches, 0.0, -1.0)))


def test_a_picture_with_two_conditions():
    labels = label_matrix([{"acne", "eczema"}, "psoriasis"], ["acne", "eczema", "psoriasis"], "multi-positive")
    assert labels.tolist() == [[1, 1, -1], [-1, -1, 1]]
    assert labels.dtype == torch.float32


def test_equal_texts_match_across_groups():
    """Two recipes with the same title: either title finds either picture, and the picture finds it as a text."""
    rows = [("i1", "same", "r1", 1), ("i2", "same", "r2", 1), ("i2", "other", "r2", 1), ("i3", "third", "r3", 1)]
    frame = pd.DataFrame(
        [{"image_id": i, "text_id": t, "image_group": g, "text_group": g, "match": m} for i, t, g, m in rows]
    )
    images, texts = match_sets(frame)
    assert images["i1"] & texts["same"]
    assert images["i2"] & texts["same"]
    assert not images["i1"] & texts["other"]
    assert not images["i3"] & texts["same"]


def test_a_mismatched_row_gives_no_text():
    frame = pd.DataFrame(
        [
            {"image_id": "i1", "text_id": "t1", "image_group": "a", "text_group": "a", "match": 1},
            {"image_id": "i1", "text_id": "t2", "image_group": "a", "text_group": "b", "match": 0},
        ]
    )
    images, texts = match_sets(frame)
    assert images["i1"] & texts["t1"]
    assert not images["i1"] & texts["t2"]


def test_a_group_named_like_a_text_id_is_no_text():
    frame = pd.DataFrame(
        [
            {"image_id": "i1", "text_id": "t1", "image_group": "t2", "text_group": "t2", "match": 1},
            {"image_id": "i2", "text_id": "t2", "image_group": "b", "text_group": "b", "match": 1},
        ]
    )
    images, texts = match_sets(frame)
    assert not images["i1"] & texts["t2"]
