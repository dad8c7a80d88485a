"""Ranks against the published check array, a brute-force loop over all orders of ties, and a memory bound."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.distributed import World
from vlkit.errors import NonFiniteError
from vlkit.evaluation.retrieval import score_blocks
from vlkit.evaluation.retrieval.ranking import metric_values, rank, rank_both

CHECK = [
    [0.8, 0.8, 0.1, 0.5, 0.1, 0.2, 0.5, 0.1],
    [0.5, 0.4, 0, 0, 0.4, 0.2, 0.6, 0.4],
    [0.5, 0.4, 0.1, 0.5, 0, 0.8, 0.8, 0.3],
    [0.5, 0.4, 0.1, 0.5, 0.4, 0.2, 0.3, 0.3],
]


def rank_scores(scores, right, **flags):
    """Rank given scores: the gallery is the identity, so the embeddings' product is the scores themselves."""
    scores = torch.tensor(scores, dtype=torch.float32)
    query_groups = [[f"{q}:{g}" for g in actual] or ["none"] for q, actual in enumerate(right)]
    gallery_groups = [
        [f"{q}:{g}" for q, actual in enumerate(right) if g in actual] or ["alone"] for g in range(scores.shape[1])
    ]
    return rank(scores, torch.eye(scores.shape[1]), query_groups, gallery_groups, **flags)


def test_the_check_array():
    """Distances of 4 images to 8 texts, text j belonging to image j // 2; published recall@1/5/10."""
    ranks = rank_scores((-np.array(CHECK)).tolist(), [{2 * i, 2 * i + 1} for i in range(4)])
    values = metric_values(ranks)
    assert [values[f"recall@{k}"].mean() for k in (1, 5, 10)] == pytest.approx([0.5, 0.75, 1.0])


def brute_force(scores, right):
    """Expectation of every metric over all orders of the tied items, one order after the other."""
    firsts = []
    for order in itertools.permutations(range(len(scores))):
        by_score = sorted(order, key=lambda item: -scores[item])
        firsts.append(1 + min(by_score.index(item) for item in right))
    firsts = np.array(firsts)
    return {
        **{f"recall@{k}": (firsts <= k).mean() for k in (1, 5, 10)},
        "mrr": (1 / firsts).mean(),
        "mean_rank": firsts.mean(),
    }


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_are_expectations(data):
    gallery = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=gallery, max_size=gallery))
    right = data.draw(st.sets(st.integers(0, gallery - 1), min_size=1))
    values = metric_values(rank_scores([scores], [right]))
    for metric, expected in brute_force(scores, right).items():
        assert values[metric][0] == pytest.approx(expected), metric


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 30))
def test_random_scores_equal_a_sort(seed, queries, gallery):
    generator = torch.Generator().manual_seed(seed)
    q, g = torch.randn(queries, 8, generator=generator), torch.randn(gallery, 8, generator=generator)
    groups = [str(number % 7) for number in range(gallery)]
    asked = [str(number % 9) for number in range(queries)]
    ranks = rank(q, g, asked, groups)
    scores = (q @ g.T).numpy()
    expected = []
    for query, group in enumerate(asked):
        order = np.argsort(-scores[query], kind="stable")
        hits = [place for place, item in enumerate(order) if groups[item] == group]
        if hits:
            expected.append((query, hits[0] + 1))
    assert [(int(query), r) for query, r in zip(ranks.query, ranks.expected_rank(), strict=True)] == expected
    assert ranks.top[:, 0].tolist() == [int(np.argmax(scores[query])) for query, _ in expected]


def test_a_model_that_says_the_same_of_everything_is_at_chance():
    ranks = rank(torch.ones(10, 4), torch.ones(10, 4), list("abcdefghij"), list("abcdefghij"))
    values = metric_values(ranks)
    assert values["recall@1"].mean() == pytest.approx(0.1)
    assert values["recall@5"].mean() == pytest.approx(0.5)
    assert values["median_rank"].mean() == pytest.approx(5.5)


def test_k_is_clamped_to_the_gallery():
    ranks = rank_scores([[0.0, 0.0, 1.0]], [{0}])
    assert metric_values(ranks)["recall@10"].tolist() == [1.0]


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="not finite"):
        rank(torch.tensor([[float("nan"), 1.0]]), torch.eye(2), ["a"], ["a", "b"])


def test_memory_stays_small_for_25000_by_5000():
    """The full matrix would be 500 MB; what ranking adds to the resting process must stay under 300 MB."""
    program = """
import resource, torch
from vlkit.evaluation.retrieval.ranking import rank
torch.manual_seed(0)
texts, images = torch.randn(25000, 512), torch.randn(5000, 512)
text_groups = [str(n // 5) for n in range(25000)]; image_groups = [str(n) for n in range(5000)]
rank(texts[:64], images[:64], text_groups[:64], image_groups[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
a = rank(texts, images, text_groups, image_groups); b = rank(images, texts, image_groups, text_groups)
assert len(a) == 25000 and len(b) == 5000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    added = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert added < 300


def brute_precision(scores, right):
    """Average precision and the fraction found, as means over every order of the tied items."""
    precisions, actual = [], {k: [] for k in (1, 5, 10)}
    for order in itertools.permutations(range(len(scores))):
        by_score = sorted(order, key=lambda item: -scores[item])
        places = sorted(by_score.index(item) + 1 for item in right)
        precisions.append(np.mean([number / place for number, place in enumerate(places, start=1)]))
        for k in actual:
            actual[k].append(np.mean([place <= k for place in places]))
    return {"map": np.mean(precisions), **{f"fraction_recall@{k}": np.mean(v) for k, v in actual.items()}}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_precision_is_an_expectation_over_ties(data):
    gallery = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=gallery, max_size=gallery))
    right = data.draw(st.sets(st.integers(0, gallery - 1), min_size=1))
    values = metric_values(rank_scores([scores], [right], all_matches=True))
    for metric, expected in brute_precision(scores, right).items():
        assert values[metric][0] == pytest.approx(expected), metric


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(2, 40), st.integers(1, 12))
def test_average_precision_is_scikit_learns(seed, queries, gallery, groups):
    """Few and many right items a query: both ways of counting."""
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(seed)
    q, g = torch.randn(queries, 8, generator=generator), torch.randn(gallery, 8, generator=generator)
    asked, there = [str(n % groups) for n in range(queries)], [str(n % groups) for n in range(gallery)]
    ranks = rank(q, g, asked, there, all_matches=True)
    values, scores = metric_values(ranks), (q @ g.T).numpy()
    for place, query in enumerate(ranks.query):
        truth = np.array([group == asked[query] for group in there])
        assert values["map"][place] == pytest.approx(average_precision_score(truth, scores[query]))
        top = np.argsort(-scores[query], kind="stable")[:5]
        assert values["fraction_recall@5"][place] == pytest.approx(truth[top].sum() / truth.sum())


def test_five_captions_cap_the_fraction_at_a_fifth():
    """The same name elsewhere: any hit is 1 here, the fraction found is 1 of 5."""
    images = torch.eye(4)
    texts = images.repeat_interleave(5, 0)
    ranks = rank(images, texts, list("abcd"), [name for name in "abcd" for _ in range(5)], all_matches=True)
    values = metric_values(ranks)
    assert (values["recall@1"].mean(), values["fraction_recall@1"].mean()) == (1, pytest.approx(0.2))
    assert values["fraction_recall@5"].mean() == values["map"].mean() == pytest.approx(1)


def test_shares_of_several_processes_are_the_whole():
    """Ranks of two shares, put together by hand, are those of one process."""

    class Half(World):
        def all_gather(self, mine, count):
            return mine

    torch.manual_seed(0)
    q, g = torch.randn(33, 8), torch.randn(20, 8)
    groups = [str(n % 5) for n in range(33)]
    whole = rank(q, g, groups, groups[:20], all_matches=True)
    halves = [rank(q, g, groups, groups[:20], all_matches=True, world=Half(r, 2)) for r in (0, 1)]
    for name in ("better", "tied_wrong", "tied_right", "top", "precision"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(half, name) for half in halves])), name


def asserted_equal(ranks, expected):
    for name in ("better", "tied_wrong", "tied_right", "top", "query", "precision"):
        np.testing.assert_array_equal(getattr(ranks, name), getattr(expected, name), name)
    assert ranks.gallery == expected.gallery


def drawn(seed):
    """Queries, gallery and their groups, of whole numbers, so that many scores tie and none is rounded."""
    numbers = np.random.default_rng(seed)
    queries, items, width, ids = numbers.integers(1, (60, 40, 9, 30))
    sides = [torch.tensor(numbers.integers(-1, 2, (n, width)), dtype=torch.float32) for n in (queries, items)]
    several = [{str(x) for x in numbers.integers(0, ids, numbers.integers(1, 3))} for _ in range(queries)]
    return *sides, several, numbers.integers(0, ids, items).astype(str).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([1, 40, 333, 2**22]))
def test_both_directions_of_one_product_are_each_alone(seed, all_matches, scores):
    """Ties, items without a match, and whatever the block size: also of what comes first."""
    q, g, asking, there = drawn(seed)
    alone = rank(q, g, asking, there, all_matches=all_matches), rank(g, q, there, asking, all_matches=all_matches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(score_blocks.BLOCK_SCORES, "cpu", scores)
        for ranks, expected in zip(rank_both(q, g, asking, there, all_matches=all_matches), alone, strict=True):
            asserted_equal(ranks, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_what_comes_first_is_a_stable_sort(seed):
    q, g, asking, there = drawn(seed)
    for ranks, scores in zip(rank_both(q, g, asking, there), (q @ g.T, g @ q.T), strict=True):
        order = scores.sort(dim=1, descending=True, stable=True).indices[ranks.query, :5]
        assert ranks.top.tolist() == order.tolist()


@pytest.mark.parametrize("all_matches", [False, True])
@pytest.mark.parametrize("rounds_anew", [False, True])
def test_a_product_that_rounds_otherwise_changes_nothing(monkeypatch, all_matches, rounds_anew):
    """What is guessed from a smaller product is off by a rounding; or every product is, each time."""
    torch.manual_seed(0)
    q, g = torch.randn(90, 16), torch.randn(30, 16)
    asking, there = [str(n % 30) for n in range(90)], [str(n) for n in range(30)]
    alone = rank(q, g, asking, there, all_matches=all_matches), rank(g, q, there, asking, all_matches=all_matches)
    plain, calls = score_blocks.matmul_t, []

    def product(queries, gallery):
        calls.append(1)
        off = len(calls) if rounds_anew and len(calls) < 7 else len(gallery) < 30
        return plain(queries, gallery) * (1 + off * 2**-22)

    monkeypatch.setitem(score_blocks.BLOCK_SCORES, "cpu", 900)
    monkeypatch.setattr(score_blocks, "matmul_t", product)
    for ranks, expected in zip(rank_both(q, g, asking, there, all_matches=all_matches), alone, strict=True):
        asserted_equal(ranks, expected)
    assert len(calls) > 6


def test_the_product_is_the_product():
    torch.manual_seed(0)
    q, g = torch.randn(50, 33), torch.randn(20, 33)
    torch.testing.assert_close(score_blocks.matmul_t(q, g), q @ g.T)


@pytest.mark.parametrize("all_matches", [False, True])
def test_both_directions_in_two_processes(all_matches):
    """Two threads that tell each other what processes would."""

    class Beside(World):
        barrier, parts = threading.Barrier(2), {}

        def all_gather(self, mine, count):
            self.parts[self.rank] = mine
            self.barrier.wait()
            whole = torch.cat([self.parts[0], self.parts[1]])
            self.barrier.wait()
            return whole

    q, g, asking, there = drawn(7)
    actual = {}

    def of(number):
        actual[number] = rank_both(q, g, asking, there, all_matches=all_matches, world=Beside(number, 2))

    threads = [threading.Thread(target=of, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        for ranks, expected in zip(
            actual[number], rank_both(q, g, asking, there, all_matches=all_matches), strict=True
        ):
            asserted_equal(ranks, expected)
