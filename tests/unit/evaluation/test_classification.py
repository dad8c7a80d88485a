"""Classes told from their names, against scikit-learn and against plain counting."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, precision_recall_fscore_support

from vlkit.data.pairs import Pairs, make_frame
from vlkit.errors import UsageError
from vlkit.evaluation.retrieval.classification import OTHERS, Classes, ClassScores, TenChoices
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalTask
from vlkit.storage import Location


def classified(scores, truth):
    return ClassScores(np.asarray(scores, np.float32), np.asarray(truth, bool), np.full(len(scores), np.nan))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(2, 7))
def test_the_macro_numbers_are_scikit_learns(seed, pictures, classes):
    generator = np.random.default_rng(seed)
    scores, truth = generator.random((pictures, classes)), generator.integers(0, classes, pictures)
    of = classified(scores, np.eye(classes)[truth])
    measured, predicted = of.per_query_metrics(), np.asarray(scores, np.float32).argmax(1)
    present = np.unique(truth)
    expected = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    for name, value in zip(("precision", "recall", "f1"), expected, strict=False):
        assert measured.value(f"{name}_macro", pictures) == pytest.approx(value), name
    assert measured.value("accuracy", pictures) == pytest.approx(accuracy_score(truth, predicted))
    item = precision_recall_fscore_support(truth, predicted, labels=range(classes), zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), item, strict=False):
        assert of.per_class()[name][present] == pytest.approx(values[present]), name
    assert np.isnan(np.delete(of.per_class()["recall"], present)).all()
    assert of.confusion().sum() == pytest.approx(pictures)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(2, 6), st.booleans())
def test_average_precision_of_several_labels_is_scikit_learns(seed, pictures, classes, tied):
    """Ties fall under one threshold, there and here; a draw that repeats pictures is the table with them repeated."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 3, (pictures, classes)) / 2 if tied else generator.random((pictures, classes))
    truth = generator.random((pictures, classes)) < 0.4
    truth[0] = True
    truth[:, 0] |= ~truth.any(axis=1)  # A picture of no class at all is another test's.
    of = classified(scores, truth)
    expected = [average_precision_score(truth[:, c], of.scores[:, c]) for c in range(classes)]
    assert of.per_query_metrics().value("average_precision_macro", pictures) == pytest.approx(np.mean(expected))
    weights = generator.integers(0, 3, pictures)
    weights[0] = 1
    repeated = np.repeat(np.arange(pictures), weights)
    drawn = of.per_query_metrics().others["average_precision_macro"](weights[None, :].astype(float))
    expected = [average_precision_score(truth[repeated, c], of.scores[repeated, c]) for c in range(classes)]
    assert drawn[0] == pytest.approx(np.mean(expected))
    drawn = of.per_query_metrics().others["f1_macro"](weights[None, :].astype(float))
    again = classified(scores[repeated], truth[repeated]).per_query_metrics().value("f1_macro", len(repeated))
    assert drawn[0] == pytest.approx(again, nan_ok=True)


def test_a_model_that_says_the_same_of_everything_is_at_chance():
    of = classified(np.zeros((12, 4)), np.eye(4)[np.arange(12) % 4])
    assert of.per_query_metrics().value("accuracy", 12) == pytest.approx(0.25)
    assert of.confusion() == pytest.approx(np.full((4, 4), 0.75))


def table(rows):
    """(image, text, classes) rows of a test split."""
    frame = make_frame(
        {
            "image": [f"{image}.png" for image, _, _ in rows],
            "image_id": [image for image, _, _ in rows],
            "text": [text for _, text, _ in rows],
            "image_group": [classes for _, _, classes in rows],
            "unit": [image for image, _, _ in rows],
            "class_name": [classes[0] for _, _, classes in rows],
            "split": ["test"] * len(rows),
        }
    )
    return Pairs(frame, Location("."))


def test_a_picture_has_the_classes_of_all_its_rows():
    pairs = table(
        [("a", "one", ["rust", "scab"]), ("b", "two", ["rust"]), ("c", "three", ["scab"]), ("c", "x", ["rot"])]
    )
    classes = Classes.from_pairs(pairs, RetrievalTask.from_pairs(pairs))
    assert classes.names == ["rot", "rust", "scab"]
    assert classes.of_image.tolist() == [[False, True, True], [False, True, False], [True, False, True]]
    assert Classes.from_pairs(table([("a", "one", ["rust"])]), RetrievalTask.from_pairs(pairs)) is None, (
        "one class tells nothing apart"
    )


def test_prompts_are_averaged_and_told_by_their_templates():
    pairs = table([("a", "one", ["Leaf_Rust"]), ("b", "two", ["scab"])])
    task = RetrievalTask.from_pairs(pairs)
    classes = Classes.from_pairs(pairs, task, ("a {class_name}", "the {class_name}"))
    assert classes.prompts == [["a leaf rust", "the leaf rust"], ["a scab", "the scab"]]
    encoded = {text: torch.nn.functional.normalize(torch.randn(4), dim=0) for text in classes.texts()}
    mean = (encoded["a scab"] + encoded["the scab"]) / 2
    assert torch.allclose(classes.embeddings(encoded)[1], mean / mean.norm())
    assert Classes.from_pairs(pairs, task).prompts[1] == ["a photo of scab"]
    with pytest.raises(UsageError, match="class_name"):
        Classes.from_pairs(pairs, task, ("a photo",))


def many(classes):
    rows = [(f"{c}-{n}", f"text {n} of class {c}", [f"class{c}"]) for c in range(classes) for n in range(3)]
    pairs = table(rows)
    return pairs, RetrievalTask.from_pairs(pairs)


@pytest.mark.parametrize("count", [2, 5, 10, 14])
def test_ten_descriptions_are_the_right_one_and_nine_of_other_classes(count):
    pairs, task = many(count)
    classes = Classes.from_pairs(pairs, task)
    tens = TenChoices.draw(task, classes, seed=1)
    assert tens.texts.shape == (len(task.images), 1 + min(OTHERS, count - 1))
    class_of = task.texts["class_name"].to_numpy()
    for row, own in zip(tens.texts, task.images["class_name"], strict=True):
        assert class_of[row[0]] == own
        assert own not in class_of[row[1:]] and len(set(class_of[row])) == len(row)
    assert np.array_equal(tens.texts, TenChoices.draw(task, classes, seed=1).texts)
    assert count == 2 or not np.array_equal(tens.texts, TenChoices.draw(task, classes, seed=2).texts)
    fewer = RetrievalTask.from_pairs(Pairs(task.pairs.frame.iloc[3:], Location(".")))
    assert len(TenChoices.draw(fewer, Classes.from_pairs(pairs, fewer), seed=1).texts) == len(task.images) - 3


def test_one_of_ten_is_won_as_a_plain_loop_says():
    pairs, task = many(12)
    classes = Classes.from_pairs(pairs, task)
    tens = TenChoices.draw(task, classes, seed=3)
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(36, 6, generator=generator), torch.randn(36, 6, generator=generator)
    texts[5] = texts[6]  # A tie, should both be drawn.
    embedded = Embeddings(images, texts, np.full(36, np.nan), 1.0, 1.0)
    for picture, won in enumerate(tens.win_probability(embedded)):
        scores = (images[picture] @ texts[tens.texts[picture]].T).numpy()
        ties = np.isclose(scores, scores[0], atol=1e-6).sum()
        assert won == pytest.approx(0 if scores.max() > scores[0] + 1e-6 else 1 / ties)


def test_a_picture_of_no_known_class_is_neither_right_nor_wrong():
    """Accuracy, F1, average precision and the widths of their intervals are those of the labelled pictures alone."""
    from vlkit.evaluation.comparison import compare

    generator = np.random.default_rng(0)
    truth = np.zeros((60, 3))
    truth[:12] = np.eye(3)[np.arange(12) % 3]
    scores = generator.random((60, 3))
    whole, labelled = (
        classified(scores, truth).per_query_metrics(),
        classified(scores[:12], truth[:12]).per_query_metrics(),
    )
    for metric in ("accuracy", "f1_macro", "average_precision_macro"):
        assert whole.value(metric, 60) == pytest.approx(labelled.value(metric, 12)), metric
    perfect = classified(truth, truth)
    actual = compare(perfect.per_query_metrics(), None, [str(n) for n in range(60)], draws=1000, seed=0)
    assert actual.units == dict.fromkeys(actual.units, 12) | {"top1_of_10": 0}
    low, high = actual.intervals["accuracy"]
    assert (low**12, high) == (pytest.approx(0.025), 1), "twelve units' doubt, not sixty's"
    assert np.isnan(actual.intervals["top1_of_10"]).all()


def test_what_cannot_be_measured_has_no_p_value():
    """Every picture has two classes: no F1 and no difference of it, instead of p < 0.001; a few units prove nothing."""
    from vlkit.evaluation.comparison import compare
    from vlkit.evaluation.formatting import format_p

    generator, units = np.random.default_rng(1), [str(n) for n in range(40)]
    truth = np.tile([1, 1, 0], (40, 1))
    one, other = (classified(generator.random((40, 3)), truth).per_query_metrics() for _ in range(2))
    actual = compare(one, other, units, draws=1000, seed=0)
    assert all(np.isnan(value) for value in astuple(actual.difference["f1_macro"]))
    assert np.isnan(actual.smallest_difference["f1_macro"]) and format_p(float("nan")) == "-"
    truth[:4] = [1, 0, 0]
    right, wrong = np.array(truth, float), np.array(truth, float)
    wrong[:4] = [0, 1, 0]
    actual = compare(
        *(classified(scores, truth).per_query_metrics() for scores in (right, wrong)), units, draws=1000, seed=0
    )
    assert actual.difference["f1_macro"].p_value >= 2 * 0.5**4


def test_macro_numbers_lie_in_their_intervals_whatever_a_draw_misses():
    """Few pictures a class: draws repeat some and miss others, and are moved back to what they are drawn from."""
    from vlkit.evaluation.comparison import compare
    from vlkit.metrics import METRICS

    generator, units = np.random.default_rng(3), [str(n) for n in range(24)]
    truth = np.eye(8)[np.arange(24) % 8]
    tuned = classified(truth * 0.7 + generator.random((24, 8)), truth).per_query_metrics()
    base = classified(generator.random((24, 8)), truth).per_query_metrics()
    actual = compare(tuned, base, units, draws=1000, seed=0)
    for values, intervals in (("metrics", "intervals"), ("baseline", "baseline_intervals")):
        for metric in (name for name, metric in METRICS.items() if metric.centre_draws):
            (low, high), value = getattr(actual, intervals)[metric], getattr(actual, values)[metric]
            assert 0 <= low <= value <= high <= 1, (values, metric)
            assert value - low == pytest.approx(high - value, rel=1.2), (values, metric)


def test_a_text_that_fits_is_never_among_the_others():
    """A passage of two classes is right for both, though it is listed under either."""
    rows = [(f"a{n}", "of both", ["rust", "scab"]) for n in range(3)]
    rows += [(f"b{n}", f"rust {n}", ["rust"]) for n in range(3)] + [(f"c{n}", "scab alone", ["scab"]) for n in range(3)]
    pairs = table(rows)
    task = RetrievalTask.from_pairs(pairs)
    image_groups, text_groups = task.groups()
    for seed in range(20):
        for groups, listed in zip(
            image_groups, TenChoices.draw(task, Classes.from_pairs(pairs, task), seed).texts, strict=True
        ):
            assert not any(text_groups[text] & groups for text in listed[1:] if text >= 0)


def test_a_tie_among_ten_is_shared():
    pairs, task = many(3)
    classes = Classes.from_pairs(pairs, task)
    tens = TenChoices.draw(task, classes, seed=0)
    same = Embeddings(torch.ones(9, 4), torch.ones(9, 4), np.full(9, np.nan), 1.0, 1.0)
    assert tens.win_probability(same) == pytest.approx(np.full(9, 1 / 3))


def test_training_pictures_are_the_originals():
    pairs = table([("a", "one", ["rust"]), ("b", "two", ["scab"]), ("c", "three", ["rust"]), ("d", "x", ["rust"])])
    task = RetrievalTask.from_pairs(pairs)
    pairs.frame["split"] = ["test", "test", "train", "train"]
    pairs.frame["origin"] = ["original", "original", "original", "augmented"]
    assert Classes.from_pairs(pairs, task).training.tolist() == [1, 0]


@pytest.mark.parametrize("template", ["{0}", "a photo of {clas_name}", "a photo"])
def test_a_template_names_the_class_and_it_alone(template):
    pairs = table([("a", "one", ["rust"]), ("b", "two", ["scab"])])
    with pytest.raises(UsageError, match="class_name"):
        Classes.from_pairs(pairs, RetrievalTask.from_pairs(pairs), (template,))
