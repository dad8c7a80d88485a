"""Splits: whatever the structure, nothing stands on both sides and every promise is kept."""

from collections import defaultdict
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.config.data import PrepConfig
from vlkit.data import splits
from vlkit.data.images.decode import ImageInfo
from vlkit.data.prep.collect import CollectedRows
from vlkit.data.prep.prepare import build_table
from vlkit.data.prep.raw_folder import RawRow
from vlkit.errors import DataError

shares = st.tuples(st.sampled_from([0.0, 0.1, 0.2]), st.sampled_from([0.0, 0.1, 0.125]))
units_and_classes = st.dictionaries(
    st.text(min_size=1, max_size=4), st.one_of(st.none(), st.sampled_from("abc")), max_size=40
)


def wanted(share, members):
    """Of a class of three or more, or of no class."""
    return 0 if not share or members < 2 else min(max(1, round(share * members)), members - 1)


@settings(max_examples=150, deadline=None)
@given(units_and_classes, st.integers(0, 9), shares)
def test_every_class_is_split_in_its_shares(units, seed, shares):
    test_share, val_share = shares
    classes = {unit: () if name is None else (name,) for unit, name in units.items()}
    split = splits.split_units(classes, test_share=test_share, val_share=val_share, seed=seed)
    assert set(split) == set(units)
    single = [name for name in set(units.values()) - {None} if list(units.values()).count(name) == 1]
    pooled = set(single) | {None} if 2 * len(single) > len(units) else {None}
    strata = [{name} for name in set(units.values()) - pooled] + [pooled]
    for stratum in strata:
        members = [split[unit] for unit, of in units.items() if of in stratum]
        held_out = members.count("test") + members.count("val")
        assert not members or members.count("train") >= 1
        if len(members) == 2 and test_share and val_share:
            assert held_out == 1
            continue
        assert members.count("test") == wanted(test_share, len(members))
        assert members.count("val") == wanted(val_share, len(members) - members.count("test"))
    shuffled = dict(sorted(classes.items(), reverse=True))
    assert splits.split_units(shuffled, test_share=test_share, val_share=val_share, seed=seed) == split


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcd"), min_size=1, max_size=3), min_size=1, max_size=40), st.integers(0, 5))
def test_units_of_several_classes_leave_none_untrained(classes, seed):
    """The rarest class gets all its shares; every class trains, if any of its units could."""
    units = {str(number): sorted(of) for number, of in enumerate(classes)}
    split = splits.split_units(units, test_share=0.2, val_share=0.1, seed=seed)
    members = defaultdict(list)
    for unit, of in units.items():
        for name in of:
            members[name].append(split[unit])
    rarest = min(members, key=lambda name: (len(members[name]), name))
    if len(members[rarest]) > 2:
        assert members[rarest].count("test") == wanted(0.2, len(members[rarest]))
    if len(members[rarest]) > 1:
        assert members[rarest].count("train") >= 1
    assert set(split) == set(units)


def test_a_rare_class_stands_in_every_split_it_can():
    units = {
        f"{name}{n}": (name,)
        for name, count in {"one": 1, "two": 2, "three": 3, "many": 60}.items()
        for n in range(count)
    }
    split = splits.split_units(units, test_share=0.1, val_share=0.1, seed=3)
    actual = {name: sorted(split[unit] for unit in units if unit.startswith(name)) for name in ("one", "two", "three")}
    assert actual["one"] == ["train"] and actual["three"] == ["test", "train", "val"]
    assert actual["two"] in (["test", "train"], ["train", "val"])


@pytest.mark.parametrize("size", [1, 2])
def test_many_rare_classes_leave_no_split_empty(size):
    units = {f"{name}-{n}": (str(name),) for name in range(100) for n in range(size)}
    split = splits.split_units(units, test_share=0.1, val_share=0.1, seed=1)
    counts = [list(split.values()).count(name) for name in splits.SPLITS]
    assert min(counts) >= 9 and counts[0] >= len(units) / 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 6)), max_size=20))
def test_what_shares_a_picture_is_one_unit(links):
    together = splits.connected_components(links)
    neighbours = {unit: {u for u, p in links for v, q in links if p == q and v == unit} for unit, _ in links}
    for unit in neighbours:
        reached, frontier = {unit}, {unit}
        while frontier := {n for f in frontier for n in neighbours[f]} - reached:
            reached |= frontier
        assert {other for other in together if together[other] == together[unit]} == reached


row = st.tuples(
    st.integers(0, 14),  # the file
    st.integers(0, 8),  # its bytes: fewer than files, so that there are copies
    st.sampled_from(["t1", "t2", "t3", "t4"]),
    st.integers(0, 6),  # the unit
    st.sets(st.sampled_from("abc"), max_size=2),
    st.sampled_from([None, "train", "val", "test"]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(row, min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=3),
    st.sampled_from(["seed", "source"]),
    st.sampled_from([None, 5]),
    st.booleans(),
)
def test_no_structure_leaks(rows, alike, split_by, limit, stratify):
    """Random units, classes, copies and lookalikes: nothing of one cluster stands in two splits, nothing is lost."""
    bytes_of = {file: content for file, content, *_ in rows}
    config = PrepConfig(split_by=split_by, limit=limit, stratify=stratify, test_share=0.2, val_share=0.1)
    collected = CollectedRows(
        SimpleNamespace(config=config, image_source=SimpleNamespace(address=lambda name: f"/x/{name}"))
    )
    collected.images = {str(file): ImageInfo(f"id{content}", 9, 9) for file, content in bytes_of.items()}
    for number, pair in enumerate(alike):
        collected.cluster |= {f"id{content}": f"cluster{number}" for content in pair}
    collected.rows = [
        RawRow(
            str(file), text, tuple(sorted(classes)) or (f"u{unit}",), f"u{unit}", tuple(sorted(classes)), "x:1", split
        )
        for file, _, text, unit, classes, split in rows
    ]
    asked = list(collected.rows)
    try:
        frame = build_table(collected, config).frame
    except DataError as error:
        # The source puts none of them anywhere.
        assert split_by == "source" and "no rows" in error.message
        return
    assert frame.groupby("unit")["split"].nunique().max() == 1
    assert frame.groupby("image_id")["split"].nunique().max() == 1
    split_of = dict(zip(frame["image_id"], frame["split"], strict=True))
    unit_of = dict(zip(frame["image_id"], frame["unit"], strict=True))
    for one in unit_of:
        for other in unit_of:
            if one in collected.cluster and collected.cluster[one] == collected.cluster.get(other):
                assert unit_of[one] == unit_of[other] and split_of[one] == split_of[other]
    assert not frame.duplicated(["image_id", "text_id"]).any()
    if limit is None and split_by == "seed":
        # Every picture with every text, and every group of it, is in the table.
        remaining = defaultdict(set)
        for image_id, text, groups in zip(frame["image_id"], frame["text"], frame["image_group"], strict=True):
            remaining[image_id, text] |= {groups} if isinstance(groups, str) else set(groups)
        for item in asked:
            assert set(item.groups) <= remaining[collected.images[item.image].image_id, item.text]
    assert list(frame["image_group"]) == list(frame["text_group"])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train2017", "train"),
        ("Training", "train"),
        ("valid", "val"),
        ("val2014", "val"),
        ("TEST", "test"),
        ("dev", "val"),
        ("restval", "train"),
        ("tomato", None),
        ("testament", None),
    ],
)
def test_how_sources_call_their_splits(name, split):
    assert splits.split_from_name(name) == split


def test_a_unit_in_two_of_the_sources_splits_is_held_out():
    named = {"a": {"train", "test"}, "b": {"train"}, "c": {"val", "train"}, "d": set()}
    assert splits.splits_from_source(named) == ({"a": "test", "b": "train", "c": "val"}, ["a", "c"])


def test_a_planted_leak_is_named():
    frame = pd.DataFrame({"unit": ["a", "a"], "image_id": ["1", "2"], "split": ["train", "test"], "image": ["x", "y"]})
    with pytest.raises(DataError, match="unit a"):
        splits.refuse_leaks(frame, "t")
