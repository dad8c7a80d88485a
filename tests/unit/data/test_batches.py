"""The order of the samples is a function of (seed, epoch, sample), and of nothing else."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from vlkit.data.images.spec import PixelSpec
from vlkit.data.loading.epoch_sampler import BatchIndices, EpochSampler, batch_stream
from vlkit.data.loading.retrieval_batches import PairDataset
from vlkit.data.pairs import read_pairs
from vlkit.training.setup.plan import false_negatives_per_row

IDS = [f"pair-{number}" for number in range(23)]


def rows_of_epoch(order, epoch):
    order = dataclasses.replace(order, min_rows=1)
    order = dataclasses.replace(order, first_batch=epoch * order.batches_per_epoch)
    return [row for batch in itertools.islice(order, order.batches_per_epoch) for row in batch.rows]


def test_an_epoch_is_a_permutation_and_no_two_are_alike():
    order = EpochSampler.from_pair_ids(IDS, 4, seed=1)
    batches = list(itertools.islice(order, 12))
    assert order.batches_per_epoch == 6
    assert [len(batch.rows) for batch in batches] == [4, 4, 4, 4, 4, 3] * 2
    first, second = ([row for batch in batches[start : start + 6] for row in batch.rows] for start in (0, 6))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second
    assert batches != list(itertools.islice(EpochSampler.from_pair_ids(IDS, 4, seed=2), 12))


def test_a_sample_keeps_its_place_when_the_table_is_shuffled():
    shuffled = np.random.default_rng(0).permutation(23)
    order = [IDS[row] for row in rows_of_epoch(EpochSampler.from_pair_ids(IDS, 4, seed=1), 3)]
    assert order == [
        IDS[shuffled[row]]
        for row in rows_of_epoch(EpochSampler.from_pair_ids([IDS[row] for row in shuffled], 4, seed=1), 3)
    ]


@pytest.mark.parametrize("first", [0, 1, 5, 6, 7, 20])
def test_the_stream_from_any_batch_on_is_the_same(first):
    whole = list(itertools.islice(EpochSampler.from_pair_ids(IDS, 4, seed=1), 30))
    assert (
        list(itertools.islice(EpochSampler.from_pair_ids(IDS, 4, seed=1, first_batch=first), 30 - first))
        == whole[first:]
    )


def test_a_last_batch_of_one_is_left_out():
    order = EpochSampler.from_pair_ids(IDS[:9], 4, seed=1)
    assert order.batches_per_epoch == 2
    assert [len(batch.rows) for batch in itertools.islice(order, 4)] == [4, 4, 4, 4]


@pytest.fixture(scope="module")
def dataset(prepared, tiny_folder):
    from vlkit.models.loading import load_dual_encoder

    encoder = load_dual_encoder(str(tiny_folder("tiny-clip")))
    return PairDataset(
        read_pairs(prepared).split("train"), PixelSpec(32), encoder.tokenize, encoder.pad, labels="multi-positive"
    )


def test_workers_change_nothing(dataset):
    def taken(workers):
        return list(
            itertools.islice(
                batch_stream(dataset, EpochSampler.from_pair_ids(dataset.pair_ids, 16, seed=1), workers=workers), 8
            )
        )

    plain = taken(0)
    for workers in (1, 4):
        for one, other in zip(plain, taken(workers), strict=True):
            assert one.pair_ids == other.pair_ids
            assert torch.equal(one.labels.rows(), other.labels.rows())
            for name in ("images", "texts", "text_index"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_repeated_caption_is_tokenised_once(dataset):
    rows = [row for row in range(len(dataset)) if dataset.text_of[row] == dataset.text_of[0]] + [2]
    batch = dataset[BatchIndices(0, rows, [0] * len(rows))]
    assert len(batch.pair_ids) == len(rows) > len(batch.texts)
    assert batch.text_index[0] == batch.text_index[1]
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (len(rows), 3, 32, 32)


def test_false_negatives_of_balanced_classes():
    """38 balanced captions at batch 64: (64 - 1) other rows, of which one in 38 has the same caption: 1.66."""

    class Classes:
        def count_false_negatives(self, rows):
            from vlkit.data.labels import count_false_negatives

            groups = [str(row % 38) for row in rows]
            return count_false_negatives(groups, groups)

    order = EpochSampler.from_pair_ids([str(number) for number in range(38 * 400)], 64, seed=0)
    assert false_negatives_per_row(Classes(), order) == pytest.approx(63 / 38, abs=0.15)


def test_a_row_of_weight_w_is_drawn_w_times_an_epoch():
    weights = [1.0] * 20 + [2.5] * 20 + [3.0] * 10
    order = EpochSampler.from_pair_ids([f"p{n}" for n in range(50)], 8, seed=3, weights=weights)
    for epoch in (0, 1):
        times = np.bincount(rows_of_epoch(order, epoch), minlength=50)
        assert set(times[:20]) == {1} and set(times[20:40]) == {2, 3} and set(times[40:]) == {3}
    assert rows_of_epoch(order, 0) != rows_of_epoch(order, 1)
    assert len(set(order.keys.tolist())) == len(order.keys)
    plain = EpochSampler.from_pair_ids([f"p{n}" for n in range(50)], 8, seed=3)
    ones = EpochSampler.from_pair_ids([f"p{n}" for n in range(50)], 8, seed=3, weights=[1.0] * 50)
    assert rows_of_epoch(ones, 0) == rows_of_epoch(plain, 0)
