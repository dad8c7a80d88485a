"""An index equals brute force, obeys filters, and states a recall that it has measured."""

import shutil

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.config.search import IndexConfig
from vlkit.data.pairs import read_pairs
from vlkit.errors import UsageError
from vlkit.inference.index import faiss_index, tune
from vlkit.inference.index.build import _build
from vlkit.inference.index.documents import DocumentSource
from vlkit.inference.index.embed_documents import EmbeddedDocuments, draw_queries
from vlkit.inference.index.faiss_index import VectorIndex, choose_type, estimate_bytes, refuse_too_few_rows
from vlkit.storage import Location


def unit_rows(count, width, seed):
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute(rows, queries, k, allowed=None):
    """The places of the k best, in float64."""
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
        k = min(k, int(allowed.sum()))
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 70), st.integers(0, 10**6), st.booleans())
def test_flat_is_brute_force(count, width, k, seed, filtered):
    rows, queries = unit_rows(count, width + 1, seed), unit_rows(5, width + 1, seed + 1)
    allowed = np.random.default_rng(seed).random(count) < 0.5 if filtered else None
    scores, places = VectorIndex.build(rows, "flat").search(queries, k, allowed)
    possible = count if allowed is None else int(allowed.sum())
    assert places.shape == scores.shape == (5, min(k, possible))
    assert np.allclose(np.take_along_axis(queries @ rows.T, places, 1), scores, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    expected = np.take_along_axis(queries @ rows.T, brute(rows, queries, min(k, possible), allowed), 1)
    assert np.allclose(scores, expected, atol=1e-6)


@pytest.fixture(scope="module")
def built():
    rows = unit_rows(4000, 32, 0)
    return rows, {kind: VectorIndex.build(rows, kind) for kind in ("flat", "hnsw", "ivf-pq")}


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-pq"])
@pytest.mark.parametrize("exact_up_to", [0, 50_000])
def test_a_filter_is_obeyed_however_few_it_leaves(kind, exact_up_to, built, monkeypatch):
    monkeypatch.setattr(faiss_index, "MAX_ROWS_SCANNED", exact_up_to)
    rows, created = built
    queries = unit_rows(20, 32, 1)
    for share in (0.5, 0.02, 0.001):
        allowed = np.random.default_rng(2).random(len(rows)) < share
        _, places = created[kind].with_effort(64).search(queries, 10, allowed)
        assert allowed[places].all() and all(len(set(row)) == len(row) for row in places.tolist())
        assert places.shape[1] == min(10, allowed.sum())
        actual = [len({*a} & {*b}) / len(b) for a, b in zip(places, brute(rows, queries, 10, allowed), strict=True)]
        assert np.mean(actual) > (0.999 if exact_up_to or kind == "flat" else 0.85), (share, np.mean(actual))


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-pq"])
def test_what_is_written_answers_the_same_and_any_faiss_reads_it(kind, built, tmp_path):
    rows, created = built
    nearest, queries = created[kind].with_effort(20), unit_rows(7, 32, 3)
    nearest.write(tmp_path / "x.faiss")
    again = VectorIndex.read(tmp_path / "x.faiss", kind, 20)
    for one, other in zip(nearest.search(queries, 9), again.search(queries, 9), strict=True):
        assert np.array_equal(one, other)
    assert np.abs(again.rows() - rows).max() < (1e-3 if kind == "ivf-pq" else 1e-7)
    assert np.allclose(np.linalg.norm(again.rows(), axis=1), 1, atol=1e-6)
    assert np.array_equal(again.rows(np.array([5, 3])), again.rows()[[5, 3]])
    assert faiss.read_index(str(tmp_path / "x.faiss")).ntotal == len(rows)
    size = (tmp_path / "x.faiss").stat().st_size
    overhead = 4 * 32 * (256 + int(4 * len(rows) ** 0.5)) if kind == "ivf-pq" else 0
    assert abs(size - overhead - estimate_bytes(len(rows), 32, kind)) < 0.1 * size


def test_types_by_size_and_too_few_rows_for_codes():
    assert [choose_type(count) for count in (1, 199_999, 200_000, 2_999_999, 3_000_000)] == [
        *("flat", "flat", "hnsw", "hnsw", "ivf-pq")
    ]
    with pytest.raises(UsageError, match="999 are too few"):
        refuse_too_few_rows(999, "ivf-pq")
    refuse_too_few_rows(1000, "ivf-pq")
    refuse_too_few_rows(1, "hnsw")


@pytest.mark.parametrize("kind", ["hnsw", "ivf-pq"])
def test_tuning_reaches_its_target_and_says_what_others_measure(kind, built):
    rows, created = built
    queries, own = unit_rows(400, 32, 5), np.full(400, -1)
    efforts = []
    for target in (0.5, 0.8, 0.98):
        nearest, actual = tune.tune_and_measure(created[kind], rows, queries, own, target)
        _, places = nearest.search(queries[1::2], 10)
        hits = [len({*a} & {*b}) / 10 for a, b in zip(places, brute(rows, queries[1::2], 10), strict=True)]
        assert actual.recall == pytest.approx(np.mean(hits), abs=1e-9)
        assert actual.recall > target - 0.04 and actual.queries == 200
        efforts.append(nearest.effort)
    assert efforts == sorted(efforts) and efforts[0] < efforts[-1]


def test_a_query_that_is_in_the_index_is_no_hit_of_itself(built):
    rows, created = built
    own = np.arange(200)
    asked = tune.ExactNeighbors.from_rows(rows, rows[:200], own)
    best = np.sort(np.where(np.eye(200, len(rows), dtype=bool), -9, rows[:200] @ rows.T), axis=1)[:, -10]
    assert np.allclose(asked.threshold, best, atol=1e-6)
    assert asked.recall(created["flat"], rows) == 1.0
    assert 0.3 < asked.recall(VectorIndex.build(rows[:2000], "flat"), rows) < 0.7
    # Of equals any one counts.
    equal = np.repeat(rows[:3], 20, axis=0)
    asked = tune.ExactNeighbors.from_rows(equal, rows[:3], np.full(3, -1))
    assert asked.recall(VectorIndex.build(equal, "flat"), equal) == 1
    assert asked.recall(VectorIndex.build(np.roll(equal, 20, axis=0), "flat"), equal) == 0


@pytest.mark.parametrize("kind", ["hnsw", "ivf-pq"])
def test_the_stated_recall_is_that_of_queries_that_it_never_saw(kind):
    """For the ten first, for fewer and for more."""
    rows, fresh = unit_rows(6000, 24, 8), unit_rows(300, 24, 9)
    texts = [{"text_id": f"t{number}", "text": f"text {number}", "group": ["x"]} for number in range(6000)]
    source = DocumentSource(Location("x"), "x", texts=texts)
    config = IndexConfig(model="x/y", target_recall=0.9)
    part = EmbeddedDocuments("texts", source.documents("texts"), rows, 6000)
    moved, queries = draw_queries(part, True, config, source, [part])
    assert queries.last == 600 and (queries.own == -1).all()
    order = [int(key[1:]) for key in moved.table.column("id").to_pylist()]
    assert sorted(order) == list(range(6000)) and np.array_equal(moved.rows, rows[order])
    assert {row.tobytes() for row in queries.rows} == {row.tobytes() for row in moved.rows[5400:]}
    nearest, actual = _build(moved, kind, queries, config)
    assert len(nearest) == 6000 and actual.reached and actual.recall < 0.97
    for k in (5, 10, 50):
        _, places = nearest.search(fresh, k)
        hits = [len({*a} & {*b}) / k for a, b in zip(places, brute(moved.rows, fresh, k), strict=True)]
        assert np.mean(hits) > 0.86, (k, np.mean(hits), actual)


@pytest.fixture
def own(prepared, tmp_path):
    """A prepared folder to be changed, its pictures beside it."""
    shutil.copytree(prepared, tmp_path / "data")
    pairs = read_pairs(tmp_path / "data")
    frame = pairs.frame
    for place, path in zip(frame.index, pairs.image_paths(frame), strict=True):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        target = tmp_path / "pictures" / path.name
        if not target.exists():
            shutil.copy2(path, target)
        frame.loc[place, "image"] = str(target)
    frame.to_parquet(tmp_path / "data/pairs.parquet")
    return tmp_path
