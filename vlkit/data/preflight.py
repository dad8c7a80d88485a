"""What a person should know of prepared pairs before a night is spent on them: counts, forecasts, warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any

from vlkit import console
from vlkit.config import PrepConfig
from vlkit.data import labels, pairs, splits
from vlkit.data.gathering import Gathered

if TYPE_CHECKING:
    import pandas as pd

FEW_TEST_UNITS = 50
FORECAST_BATCH, FORECAST_BATCHES = 32, 20
SHOWN_CLASSES = 12
KNOWN_LIMITS = {"siglip": 64, "clip": 77}


@dataclass(frozen=True)
class CountTokens:
    """Counts tokens as a model does: texts -> how many each has, and how many the model takes."""

    count: Callable[[Sequence[str]], list[int]]
    limit: int


def describe(
    frame: pd.DataFrame, gathered: Gathered, config: PrepConfig, count_tokens: CountTokens | None
) -> dict[str, Any]:
    """The content of data.yaml."""
    counts = {split: _counts(frame[frame["split"] == split]) for split in splits.SPLITS}
    sizes = class_sizes(frame)
    facts = {
        "texts_a_picture": _spread(frame.groupby("image_id")["text_id"].nunique()),
        "pictures_a_text": _spread(frame.groupby("text_id")["image_id"].nunique()),
        "eye_false_negatives": _false_negatives(frame, config.seed),
        "one_to_one_ceiling": _ceiling(frame[frame["split"] == "test"]),
        "copies": _copies(gathered),
        "tokens": _tokens(frame, config, count_tokens),
    }
    return {
        "domain": config.domain,
        "counts": {**_counts(frame), "rejects": len(gathered.rejects)},
        "splits": counts,
        "classes": sizes,
        **facts,
        "image_ids": "bytes" if gathered.checked else "names: the pictures were not looked at (--no-check-images)",
        "fingerprint": pairs.fingerprint(frame),
        "warnings": _warnings(frame, gathered, config, counts, facts),
        "rejects": dict(gathered.reasons.most_common()),
        # The folder's own place, and how the work was done, are left out: the same input gives the same bytes anywhere.
        "settings": {k: v for k, v in config.to_dict().items() if k not in ("out", "workers", "rehash")},
    }


def _counts(frame: pd.DataFrame) -> dict[str, int]:
    return {
        "pairs": len(frame),
        "pictures": int(frame["image_id"].nunique()),
        "texts": int(frame["text_id"].nunique()),
        "units": int(frame["unit"].nunique()),
        "classes": int(frame["class_name"].nunique()),
    }


def class_sizes(frame: pd.DataFrame) -> dict[str, dict[str, int]]:
    """class -> split -> pictures. A picture with several conditions counts for each of them."""
    with_class = frame[frame["class_name"].notna()]
    sizes: dict[str, Counter[str]] = {}
    seen: set[tuple[str, str]] = set()
    for image_id, name, groups, split in zip(
        *(with_class[column] for column in ("image_id", "class_name", "image_group", "split")), strict=True
    ):
        for each in {name} | labels.as_set(groups) if len(labels.as_set(groups)) > 1 else {name}:
            if (image_id, each) not in seen:
                seen.add((image_id, each))
                sizes.setdefault(each, Counter())[split] += 1
    return {name: {split: sizes[name][split] for split in splits.SPLITS} for name in sorted(sizes)}


def _spread(counts: pd.Series[int]) -> dict[str, float]:
    return {"mean": round(float(counts.mean()), 2), "most": int(counts.max())}


def _false_negatives(frame: pd.DataFrame, seed: int) -> dict[str, float]:
    """Texts a row that one-to-one labels would push away although they match, in random batches of training rows."""
    rows = frame[frame["split"] == "train"]
    size = min(FORECAST_BATCH, len(rows))
    if size < 2:
        return {"batch_size": size, "a_row": 0.0}
    batches = [rows.sample(size, random_state=seed + number) for number in range(FORECAST_BATCHES)]
    drawn = {column: set().union(*(batch[column] for batch in batches)) for column in ("image_id", "text_id")}
    images, texts = labels.match_sets(
        rows[rows["image_id"].isin(drawn["image_id"]) | rows["text_id"].isin(drawn["text_id"])]
    )
    extra = sum(
        labels.matches_beside_own([images[i] for i in batch["image_id"]], [texts[t] for t in batch["text_id"]])
        for batch in batches
    )
    return {"batch_size": size, "a_row": round(extra / (size * len(batches)), 2)}


def _ceiling(test: pd.DataFrame) -> float | None:
    """Best text -> image recall@1 under one-to-one scoring: K distinct texts over N pictures allow K / N."""
    pictures = test["image_id"].nunique()
    return round(min(1.0, test["text_id"].nunique() / pictures), 3) if pictures else None


def _copies(gathered: Gathered) -> dict[str, int]:
    ids = Counter(each.image_id for each in gathered.checked.values())
    clusters = splits.connected((image_id, number) for number, pair in enumerate(gathered.alike) for image_id in pair)
    return {
        "identical": sum(count - 1 for count in ids.values()),
        "near_identical": len(clusters),
        "under_several_classes": len(gathered.classes),
        "near_identical_across_classes": gathered.alike_across_classes,
        "largest_cluster": max(Counter(clusters.values()).values(), default=0),
    }


def _tokens(frame: pd.DataFrame, config: PrepConfig, count: CountTokens | None) -> dict[str, Any]:
    """Texts longer than the model takes: counted by its tokenizer, else by words, which is a lower bound."""
    texts = list(frame.drop_duplicates("text_id")["text"])
    if count is not None:
        over = sum(tokens > count.limit for tokens in count.count(texts))
        return {
            "model": config.model,
            "limit": count.limit,
            "over": over,
            "texts": len(texts),
            "counted_by": "tokenizer",
        }
    limit = next((n for family, n in KNOWN_LIMITS.items() if family in (config.model or "").lower()), 64)
    over = sum(len(text.split()) > limit - 2 for text in texts)
    return {"model": config.model, "limit": limit, "over": over, "texts": len(texts), "counted_by": "words"}


def _warnings(
    frame: pd.DataFrame, gathered: Gathered, config: PrepConfig, counts: dict[str, Any], facts: dict[str, Any]
) -> list[str]:
    found = []
    for split, of_split in counts.items():
        if not of_split["pairs"]:
            found.append(f"the {split} split is empty: there are too few units to share")
        elif split == "test" and of_split["units"] < FEW_TEST_UNITS:
            found.append(f"the test split has {of_split['units']} units: expect wide intervals")
    found += _about_classes(frame, config)
    found += _about_copies(gathered, facts["copies"], config)
    found += _about_source_splits(gathered, config)
    if gathered.subjects and not config.unit_column:
        column = gathered.subjects
        found.append(f"the same {column} is on several pictures: --unit-column {column} keeps each in one split")
    if shared := _shared_texts(frame):
        found.append(f"{shared} texts of the test split also stand in training rows: known words, not known pictures")
    tokens = facts["tokens"]
    if tokens["over"]:
        least = "" if tokens["counted_by"] == "tokenizer" else "at least "
        many = f"{least}{tokens['over']} of {tokens['texts']} texts"
        found.append(f"{many} have more than {tokens['limit']} tokens and will be cut")
    if gathered.rejects:
        found.append(f"{len(gathered.rejects)} rows or files were left out: see rejects.csv")
    return found


def _about_classes(frame: pd.DataFrame, config: PrepConfig) -> list[str]:
    found = []
    sizes = class_sizes(frame)
    present = [split for split in splits.SPLITS if (frame["split"] == split).any()]
    missing = sorted((sum(of.values()), name) for name, of in sizes.items() if any(not of[split] for split in present))
    if missing:
        size, name = missing[0]
        what = "1 class does" if len(missing) == 1 else f"{len(missing)} classes do"
        found.append(f"{what} not stand in every split, such as {name} of {size}: too few pictures")
    if len(sizes) == 1:
        found.append(f"there is one class, {next(iter(sizes))}: is {config.source} laid out as you think?")
    return found


def _about_copies(gathered: Gathered, copies: dict[str, int], config: PrepConfig) -> list[str]:
    found = []
    if copies["under_several_classes"]:
        what = {"keep": "they have all of them", "drop": "they were left out", "first": "they keep the first"}
        some = next(iter(gathered.classes.values()))
        count = copies["under_several_classes"]
        what_stands = "1 picture stands" if count == 1 else f"{count} pictures stand"
        told = f"{what_stands} under several classes, such as {' and '.join(some)}"
        found.append(f"{told}: {what[config.on_conflict]} (--on-conflict)")
    if copies["near_identical_across_classes"]:
        count = copies["near_identical_across_classes"]
        found.append(
            f"{count} near-identical pairs of pictures stand under different classes: is one of the two wrong?"
        )
    if copies["near_identical"] and copies["largest_cluster"] > max(20, len(gathered.checked) // 20):
        told = f"{copies['largest_cluster']} pictures look alike and went to one split together"
        found.append(f"{told}: a smaller --near-duplicates than {config.near_duplicates} tells more of them apart")
    return found


def _about_source_splits(gathered: Gathered, config: PrepConfig) -> list[str]:
    named = gathered.source_splits
    if config.split_by == "seed" or not named:
        if len(named) > 1:
            return ["the source has splits of its own; these are drawn anew (--split-by source keeps them)"]
        return [] if config.split_by == "seed" else ["the source has no splits of its own: they are drawn"]
    if "train" not in named:
        return [f"the source has no training split, only {', '.join(sorted(map(str, named)))}: splits are drawn"]
    if "test" not in named:
        return ["the source has no test split: its val is the test, and validation is drawn from its training units"]
    return []


def _shared_texts(frame: pd.DataFrame) -> int:
    """Texts of the test that training has too; none are counted where classes share captions by design."""
    if frame["class_name"].notna().any():
        return 0
    in_split = {split: set(frame.loc[frame["split"] == split, "text_id"]) for split in ("train", "test")}
    return len(in_split["train"] & in_split["test"])


def tell(described: dict[str, Any], config: PrepConfig, dry_run: bool) -> None:
    """Print the summary: what there is, what to expect, what was left out."""
    columns = ("pairs", "pictures", "texts", "units", "classes")
    rows = [(split, *(str(described["splits"][split][column]) for column in columns)) for split in splits.SPLITS]
    rows.append(("all", *(str(described["counts"][column]) for column in columns)))
    console.table(f"{config.out}{' (dry run: nothing written)' if dry_run else ''}", ("split", *columns), rows)
    _tell_classes(described["classes"])
    texts, pictures = described["texts_a_picture"], described["pictures_a_text"]
    console.say(
        f"{texts['mean']:g} texts a picture (at most {texts['most']}), "
        f"{pictures['mean']:g} pictures a text (at most {pictures['most']})"
    )
    eye = described["eye_false_negatives"]
    if eye["a_row"]:
        row = f"{eye['a_row']:g} false negatives a row of a batch of {eye['batch_size']}"
        console.say(f"one-to-one labels (eye) would make {row}")
    if described["one_to_one_ceiling"] not in (None, 1.0):
        console.say(
            f"one-to-one scoring could not pass recall@1 {described['one_to_one_ceiling']:g}; eval counts groups"
        )
    copies = described["copies"]
    if copies["identical"] or copies["near_identical"]:
        told = f"{copies['identical']} identical and {copies['near_identical']} near-identical pictures"
        console.say(f"{told}: each stays in one split with its like")
    for warning in described["warnings"]:
        console.warn(warning)
    for reason, count in list(described["rejects"].items())[:5]:
        console.say(f"         {count} x {reason}")
    if not dry_run and described["splits"]["train"]["pairs"] > 1:
        console.hint(f"vlkit train-retrieval --data {quote(str(config.out))}")


def _tell_classes(sizes: dict[str, dict[str, int]]) -> None:
    if len(sizes) < 2:
        return
    ordered = sorted(sizes, key=lambda name: (-sum(sizes[name].values()), name))
    half = SHOWN_CLASSES // 2
    shown = ordered if len(ordered) <= SHOWN_CLASSES else [*ordered[:half], "...", *ordered[-half:]]
    rows = [
        (name, *("" for _ in splits.SPLITS))
        if name == "..."
        else (name[:40], *(str(sizes[name][s]) for s in splits.SPLITS))
        for name in shown
    ]
    console.table("pictures a class", ("class", *splits.SPLITS), rows)
