"""Summarise prepared pairs before training starts: counts, forecasts, warnings; the content of data.yaml."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any

from vlkit import console
from vlkit.config.data import TEXT_LIMITS, PrepConfig
from vlkit.data import labels, pairs, splits
from vlkit.data.prep.collect import CollectedRows, count_clusters_across_classes
from vlkit.data.prep.raw_folder import Reject, count_reasons

if TYPE_CHECKING:
    import pandas as pd

MIN_TEST_UNITS = 50
# A larger cluster of lookalikes than this, or than a twentieth of all images, is suspicious.
MAX_CLUSTER = 20
FORECAST_BATCH, FORECAST_BATCHES = 32, 20
SHOWN_CLASSES, SHOWN_REASONS = 12, 5


@dataclass(frozen=True)
class TokenCounter:
    """A model's way to count tokens: texts -> tokens of each; and how many tokens the model takes."""

    count: Callable[[Sequence[str]], list[int]]
    limit: int


def describe(
    frame: pd.DataFrame,
    collected: CollectedRows,
    rejects: Sequence[Reject],
    notes: Sequence[str],
    config: PrepConfig,
    token_counter: TokenCounter | None,
) -> dict[str, Any]:
    """Return the content of data.yaml.

    Args:
        rejects: everything that was left out.
        notes: warnings of the split, which come first.
    """
    counts = {split: _counts(frame[frame["split"] == split], collected) for split in splits.SPLITS}
    facts = {
        "texts_a_picture": _spread(frame.groupby("image_id")["text_id"].nunique()),
        "pictures_a_text": _spread(frame.groupby("text_id")["image_id"].nunique()),
        "eye_false_negatives": _forecast_false_negatives(frame, config.seed),
        "one_to_one_ceiling": _one_to_one_ceiling(frame[frame["split"] == "test"]),
        "copies": _count_copies(frame, collected),
        "tokens": _count_long_texts(frame, config, token_counter),
    }
    classes = class_sizes(frame, collected)
    image_ids = "bytes" if config.check_images else "names: the images were not opened (--no-check-images)"
    # The output's path, and how the work was done, are left out: the same input gives the same bytes.
    settings = {name: value for name, value in config.to_dict().items() if name not in ("out", "workers", "rehash")}
    for name in ("source", "image_root"):
        location = getattr(config, name)
        settings[name] = None if location is None else str(location.absolute)
    warnings = _collect_warnings(
        frame, collected, config, {**facts, "splits": counts, "classes": classes, "rejects": len(rejects)}
    )
    return {
        "domain": config.domain,
        "counts": {**_counts(frame, collected), "rejects": len(rejects)},
        "splits": counts,
        "classes": classes,
        **facts,
        "image_ids": image_ids,
        "fingerprint": pairs.fingerprint(frame),
        "warnings": [*notes, *warnings],
        "rejects": dict(count_reasons(rejects).most_common()),
        "settings": settings,
    }


def _counts(frame: pd.DataFrame, collected: CollectedRows) -> dict[str, int]:
    image_ids = set(frame["image_id"])
    return {
        "pairs": len(frame),
        "pictures": len(image_ids),
        "texts": int(frame["text_id"].nunique()),
        "units": int(frame["unit"].nunique()),
        "classes": len({name for image_id in image_ids for name in collected.classes.get(image_id, ())}),
    }


def class_sizes(frame: pd.DataFrame, collected: CollectedRows) -> dict[str, dict[str, int]]:
    """Return class -> split -> number of images. An image with several classes counts for each of them."""
    sizes: dict[str, Counter[str]] = {}
    first = frame.drop_duplicates("image_id")
    for image_id, split in zip(first["image_id"], first["split"], strict=True):
        for name in collected.classes.get(image_id, ()):
            sizes.setdefault(name, Counter())[split] += 1
    return {name: {split: sizes[name][split] for split in splits.SPLITS} for name in sorted(sizes)}


def _spread(counts: pd.Series[int]) -> dict[str, float]:
    return {"mean": round(float(counts.mean()), 2), "most": int(counts.max())}


def _forecast_false_negatives(frame: pd.DataFrame, seed: int) -> dict[str, float]:
    """Estimate the matching texts per row that one-to-one labels would push away, from random training batches."""
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
        labels.count_false_negatives([images[i] for i in batch["image_id"]], [texts[t] for t in batch["text_id"]])
        for batch in batches
    )
    return {"batch_size": size, "a_row": round(extra / (size * len(batches)), 2)}


def _one_to_one_ceiling(test: pd.DataFrame) -> float | None:
    """Return the best recall@1 where only a row's own partner counts: K distinct texts over N rows allow K / N."""
    return round(test["text_id"].nunique() / len(test), 3) if len(test) else None


def _count_copies(frame: pd.DataFrame, collected: CollectedRows) -> dict[str, int]:
    ids = Counter(image.image_id for image in collected.images.values())
    cluster_sizes = Counter(collected.cluster.values())
    groups: dict[str, frozenset[str]] = {}
    for image_id, group in zip(frame["image_id"], frame["image_group"], strict=True):
        groups[image_id] = groups.get(image_id, frozenset()) | labels.as_set(group)
    without_class = (image_id for image_id in groups if image_id not in collected.classes)
    return {
        "identical": sum(count - 1 for count in ids.values()),
        "near_identical": len(collected.cluster),
        "under_several_classes": len(collected.conflicting),
        "under_several_groups": sum(len(groups[image_id]) > 1 for image_id in without_class),
        "lookalikes_across_classes": count_clusters_across_classes(collected.cluster, collected.classes),
        "largest_cluster": max(cluster_sizes.values(), default=0),
    }


def _count_long_texts(frame: pd.DataFrame, config: PrepConfig, counter: TokenCounter | None) -> dict[str, Any]:
    """Count texts longer than the model takes: by its tokenizer, else by words, which gives a lower bound."""
    texts = list(frame.drop_duplicates("text_id")["text"])
    if counter is not None:
        limit, counted_by = counter.limit, "tokenizer"
        over = sum(tokens > limit for tokens in counter.count(texts))
    else:
        limit = next((n for family, n in TEXT_LIMITS.items() if family in (config.model or "").lower()), 64)
        over, counted_by = sum(len(text.split()) > limit - 2 for text in texts), "words"
    return {"model": config.model, "limit": limit, "over": over, "texts": len(texts), "counted_by": counted_by}


def _collect_warnings(
    frame: pd.DataFrame, collected: CollectedRows, config: PrepConfig, facts: dict[str, Any]
) -> list[str]:
    warnings = []
    for split, counts in facts["splits"].items():
        units = counts["units"]
        if not units:
            warnings.append(f"the {split} split is empty: there are too few units, or too few per class")
        elif split == "test" and units < MIN_TEST_UNITS:
            warnings.append(f"the test split has only {pluralize(units, 'unit')}: expect wide intervals")
    warnings += _class_warnings(facts, config)
    warnings += _copy_warnings(collected, facts["copies"], config)
    if config.split_by == "seed" and len(collected.source_splits) > 1:
        warnings.append("the source has its own splits; prep draws new ones (--split-by source keeps the source's)")
    if collected.subject_column and not config.unit_column:
        column = collected.subject_column
        warnings.append(f"several images share a {column}: --unit-column {column} keeps each in one split")
    if shared := _count_shared_texts(frame):
        stand = "text of the test split is" if shared == 1 else "texts of the test split are"
        warnings.append(f"{shared} {stand} also in training rows: the test has known texts, but no known images")
    tokens = facts["tokens"]
    if tokens["over"]:
        bound = "" if tokens["counted_by"] == "tokenizer" else "at least "
        many = f"{bound}{tokens['over']} of {tokens['texts']} texts"
        warnings.append(f"{many} have more than {tokens['limit']} tokens and will be truncated")
    if facts["rejects"]:
        were = "was" if facts["rejects"] == 1 else "were"
        warnings.append(
            f"{pluralize(facts['rejects'], 'row or file', 'rows or files')} {were} left out: see rejects.csv"
        )
    return warnings


def pluralize(number: int, one: str, several: str | None = None) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{number} {one if number == 1 else several or one + 's'}"


def _class_warnings(facts: dict[str, Any], config: PrepConfig) -> list[str]:
    warnings = []
    sizes = facts["classes"]
    present = [split for split in splits.SPLITS if facts["splits"][split]["pairs"]]
    missing = sorted(
        (sum(counts.values()), name) for name, counts in sizes.items() if any(not counts[split] for split in present)
    )
    if missing:
        size, name = missing[0]
        are = "is" if len(missing) == 1 else "are"
        example = f"such as {name} with {pluralize(size, 'image')}"
        warnings.append(
            f"{pluralize(len(missing), 'class', 'classes')} {are} not in every split, {example}: "
            "too few images or units"
        )
    if len(sizes) == 1:
        warnings.append(f"there is only one class, {next(iter(sizes))}: check how {config.source} is laid out")
    spellings: dict[str, list[str]] = {}
    for name in sizes:
        spellings.setdefault(name.casefold(), []).append(name)
    if ambiguous := [names for names in spellings.values() if len(names) > 1]:
        warnings.append(f"classes that differ only in capitals count as different: {', '.join(ambiguous[0])}")
    return warnings


def _copy_warnings(collected: CollectedRows, copies: dict[str, int], config: PrepConfig) -> list[str]:
    warnings = []
    if number := copies["under_several_classes"]:
        rule = {"keep": "counted for all of them", "drop": "left out", "first": "the first by name or row counts"}
        several = (collected.classes.get(image_id, ()) for image_id in sorted(collected.conflicting))
        names = next((classes for classes in several if len(classes) > 1), ())
        example = f", such as {' and '.join(names[:2])}" if names else ""
        images = "image has" if number == 1 else "images have"
        warnings.append(f"{number} {images} several classes{example}: {rule[config.on_conflict]} (--on-conflict)")
    if number := copies["under_several_groups"]:
        images = (
            "image belongs to several groups and matches"
            if number == 1
            else "images belong to several groups and match"
        )
        warnings.append(f"{number} {images} the texts of all of them")
    if number := copies["lookalikes_across_classes"]:
        groups = "group of lookalikes has" if number == 1 else "groups of lookalikes have"
        warnings.append(f"{number} {groups} different classes: is one of the labels wrong?")
    if copies["largest_cluster"] > max(MAX_CLUSTER, len(collected.images) // 20):
        message = f"{copies['largest_cluster']} images look alike and went to one split together"
        warnings.append(f"{message}: a --near-duplicates below {config.near_duplicates} separates more of them")
    return warnings


def _count_shared_texts(frame: pd.DataFrame) -> int:
    """Count the test's texts that training has too; 0 with classes, which share captions by design."""
    if frame["class_name"].notna().any():
        return 0
    in_split = {split: set(frame.loc[frame["split"] == split, "text_id"]) for split in ("train", "test")}
    return len(in_split["train"] & in_split["test"])


def print_summary(metadata: dict[str, Any], config: PrepConfig, dry_run: bool) -> None:
    """Print the counts, what training can expect, the warnings, and the commonest reasons of rejects."""
    columns = ("pairs", "pictures", "texts", "units", "classes")
    rows = [(split, *(str(metadata["splits"][split][column]) for column in columns)) for split in splits.SPLITS]
    rows.append(("all", *(str(metadata["counts"][column]) for column in columns)))
    title = f"{config.out}{' (dry run: nothing was written)' if dry_run else ''}"
    console.print_table(title, ("split", "pairs", "images", *columns[2:]), rows)
    _print_classes(metadata["classes"])
    texts, images = metadata["texts_a_picture"], metadata["pictures_a_text"]
    console.say(
        f"{texts['mean']:g} texts per image (at most {texts['most']}), "
        f"{images['mean']:g} images per text (at most {images['most']})"
    )
    false_negatives = metadata["eye_false_negatives"]
    if false_negatives["a_row"]:
        rate = f"{false_negatives['a_row']:g} false negatives per row of a batch of {false_negatives['batch_size']}"
        console.say(f"one-to-one labels (eye) would cause {rate}")
    if metadata["one_to_one_ceiling"] not in (None, 1.0):
        ceiling = f"{metadata['one_to_one_ceiling']:g}"
        console.say(f"one-to-one scoring could not exceed recall@1 {ceiling}; eval counts any match of the group")
    copies = metadata["copies"]
    if copies["identical"] or copies["near_identical"]:
        number = f"{copies['identical']} identical and {pluralize(copies['near_identical'], 'near-identical image')}"
        console.say(f"{number}: copies stay together in one split")
    for warning in metadata["warnings"]:
        console.warn(warning)
    for reason, count in list(metadata["rejects"].items())[:SHOWN_REASONS]:
        console.say(f"         {count} x {reason}")
    if dry_run:
        _print_settings(metadata["settings"])
    elif metadata["splits"]["train"]["pairs"] > 1:
        console.hint(f"vlkit train-retrieval --data {quote(str(config.out))}")


def _print_classes(sizes: dict[str, dict[str, int]]) -> None:
    if len(sizes) < 2:
        return
    ordered = sorted(sizes, key=lambda name: (-sum(sizes[name].values()), name))
    half = SHOWN_CLASSES // 2
    shown = ordered if len(ordered) <= SHOWN_CLASSES else [*ordered[:half], "...", *ordered[-half:]]
    rows = [
        (name, *("" for _ in splits.SPLITS))
        if name == "..."
        else (name[:40], *(str(sizes[name][split]) for split in splits.SPLITS))
        for name in shown
    ]
    console.print_table("images per class", ("class", *splits.SPLITS), rows)


def _print_settings(settings: dict[str, Any]) -> None:
    rows = [(name, str(value)) for name, value in settings.items() if value not in (None, [], False)]
    console.print_table("settings", ("", "value"), rows)
