"""One-to-one scoring has a ceiling, ties have no rank, and corruptions do what they state."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.distributed import SINGLE
from vlkit.evaluation.json_codec import encode
from vlkit.evaluation.retrieval.corruptions import CORRUPTIONS, corrupt
from vlkit.evaluation.retrieval.one_to_one import one_to_one_metrics
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalTask, rank_task
from vlkit.metrics import DIRECTIONS


def embedded(images, texts):
    return Embeddings(images, texts, np.full(len(images), np.nan), 1.0, 1.0)


def task_of_captions(pictures, captions):
    from vlkit.data.pairs import Pairs, make_frame
    from vlkit.storage import Location

    rows = [(p, c) for p in range(pictures) for c in range(captions)]
    columns = {
        "image": [f"{p}.png" for p, _ in rows],
        "image_id": [f"i{p}" for p, _ in rows],
        "text": [f"caption {c} of {p}" for p, c in rows],
        "image_group": [str(p) for p, _ in rows],
        "unit": [str(p) for p, _ in rows],
        "class_name": [None] * len(rows),
        "split": ["test"] * len(rows),
    }
    return RetrievalTask.from_pairs(Pairs(make_frame(columns), Location(".")))


def test_one_to_one_cannot_pass_its_ceiling():
    """Four pictures of a perfect model with one caption: by groups all right, one-to-one a quarter."""
    from vlkit.data.pairs import Pairs, make_frame
    from vlkit.storage import Location

    columns = {
        "image": [f"{n}.png" for n in range(8)],
        "image_id": [f"i{n}" for n in range(8)],
        "text": ["a leaf with rust"] * 4 + ["a leaf with scab"] * 4,
        "image_group": ["rust"] * 4 + ["scab"] * 4,
        "unit": [str(n) for n in range(8)],
        "class_name": ["rust"] * 4 + ["scab"] * 4,
        "split": ["test"] * 8,
    }
    task = RetrievalTask.from_pairs(Pairs(make_frame(columns), Location(".")))
    images = torch.eye(2).repeat_interleave(4, 0)
    actual = encode(one_to_one_metrics(task, {"tuned": embedded(images, torch.eye(2))}, seed=42, world=SINGLE))
    for direction in DIRECTIONS:
        assert actual["metrics"][direction]["recall@1"] == pytest.approx(0.25)
    assert actual["ceiling"] == {"text_to_image": 0.25, "image_to_text": 0.25}, "which this perfect model reaches"
    assert rank_task(task, embedded(images, torch.eye(2))).metrics()["text_to_image"]["recall@1"] == 1


@pytest.mark.parametrize("shift", CORRUPTIONS)
def test_a_corruption_does_what_it_states(shift, tmp_path, tiny):
    noise = np.random.default_rng(0).integers(60, 255, (80, 120, 3)).astype(np.uint8)
    noise[:, :60] = 200
    Image.fromarray(noise).save(tmp_path / "a.png")
    spec = tiny("tiny-siglip").pixel_spec
    from vlkit.data.images.decode import load_pixels

    plain, after = (
        load_pixels(tmp_path / "a.png", spec).astype(float),
        corrupt(tmp_path / "a.png", shift, spec).astype(float),
    )
    assert after.shape == plain.shape and not np.array_equal(plain, after)
    assert np.array_equal(after, corrupt(tmp_path / "a.png", shift, spec)), "the same every time"
    if shift == "low-light":
        assert after.mean() / plain.mean() == pytest.approx(0.35, abs=0.01)
    else:
        assert after.mean() == pytest.approx(plain.mean(), abs=12)
    if shift in ("blur", "jpeg"):
        assert after[:, :, spec.size * 3 // 4 :].std() < plain[:, :, spec.size * 3 // 4 :].std()


def test_several_captions_cap_one_to_one_as_they_should():
    """Five captions a picture: a text finds the five rows of its picture, and one of them by luck alone."""
    task = task_of_captions(6, 5)
    perfect = embedded(torch.eye(6), torch.eye(6).repeat_interleave(5, 0) + 1e-3 * torch.rand(30, 6))
    actual = encode(one_to_one_metrics(task, {"tuned": perfect}, seed=42, world=SINGLE))
    assert actual["ceiling"] == {"text_to_image": pytest.approx(0.2), "image_to_text": pytest.approx(0.2)}
    for direction in DIRECTIONS:
        assert actual["metrics"][direction]["recall@1"] == pytest.approx(0.2)


def test_a_model_that_says_the_same_of_everything_has_no_rank_of_its_own():
    """Tied scores: the histogram shares a query among the places it may come to, and sums to recall@1 at the first."""
    from vlkit.evaluation.retrieval.per_query import rank_histogram

    task = task_of_captions(8, 1)
    scores = rank_task(task, embedded(torch.ones(8, 4), torch.ones(8, 4)))
    actual = rank_histogram(scores, "text_to_image")
    assert actual["from"] == [1, 2, 4, 8] and actual["to"] == [1, 3, 7, 15]
    assert actual["queries"] == pytest.approx([1, 2, 4, 1])
