"""What a person should know of prepared pairs before a night is spent on them: counts, forecasts, warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any

from vlkit import console
from vlkit.config.data import PrepConfig
from vlkit.data import labels, pairs, splits
from vlkit.data.prep.collect import CollectedRows

if TYPE_CHECKING:
    import pandas as pd

FEW_TEST_UNITS = 50
FORECAST_BATCH, FORECAST_BATCHES = 32, 20
SHOWN_CLASSES = 12
KNOWN_LIMITS = {"siglip": 64, "clip": 77}


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens as a model does: texts -> how many each has, and how many the model takes."""

    count: Callable[[Sequence[str]], list[int]]
    limit: int


def describe(
    frame: pd.DataFrame, gathered: CollectedRows, config: PrepConfig, count_tokens: TokenCounter | None
) -> dict[str, Any]:
    """The content of data.yaml."""
    counts = {split: _counts(frame[frame["split"] == split], gathered) for split in splits.SPLITS}
    facts = {
        "texts_a_picture": _spread(frame.groupby("image_id")["text_id"].nunique()),
        "pictures_a_text": _spread(frame.groupby("text_id")["image_id"].nunique()),
        "eye_false_negatives": _false_negatives(frame, config.seed),
        "one_to_one_ceiling": _ceiling(frame[frame["split"] == "test"]),
        "copies": _copies(frame, gathered),
        "tokens": _tokens(frame, config, count_tokens),
    }
    classes = class_sizes(frame, gathered)
    looked_at = "bytes" if config.check_images else "names: the pictures were not looked at (--no-check-images)"
    # The output's place, and how the work was done, are left out: the same input gives the same bytes.
    settings = {name: value for name, value in config.to_dict().items() if name not in ("out", "workers", "rehash")}
    for name in ("source", "image_root"):
        place = getattr(config, name)
        settings[name] = None if place is None else str(place.absolute)
    return {
        "domain": config.domain,
        "counts": {**_counts(frame, gathered), "rejects": len(gathered.rejects)},
        "splits": counts,
        "classes": classes,
        **facts,
        "image_ids": looked_at,
        "fingerprint": pairs.fingerprint(frame),
        "warnings": _warnings(frame, gathered, config, {**facts, "splits": counts, "classes": classes}),
        "rejects": dict(gathered.reasons.most_common()),
        "settings": settings,
    }


def _counts(frame: pd.DataFrame, gathered: CollectedRows) -> dict[str, int]:
    pictures = set(frame["image_id"])
    return {
        "pairs": len(frame),
        "pictures": len(pictures),
        "texts": int(frame["text_id"].nunique()),
        "units": int(frame["unit"].nunique()),
        "classes": len({name for image_id in pictures for name in gathered.classes.get(image_id, ())}),
    }


def class_sizes(frame: pd.DataFrame, gathered: CollectedRows) -> dict[str, dict[str, int]]:
    """class -> split -> pictures. A picture with several classes counts for each of them."""
    sizes: dict[str, Counter[str]] = {}
    first = frame.drop_duplicates("image_id")
    for image_id, split in zip(first["image_id"], first["split"], strict=True):
        for name in gathered.classes.get(image_id, ()):
            sizes.setdefault(name, Counter())[split] += 1
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
        labels.count_false_negatives([images[i] for i in batch["image_id"]], [texts[t] for t in batch["text_id"]])
        for batch in batches
    )
    return {"batch_size": size, "a_row": round(extra / (size * len(batches)), 2)}


def _ceiling(test: pd.DataFrame) -> float | None:
    """Best recall@1 where only a row's own partner counts: K distinct texts over N rows allow K / N."""
    return round(test["text_id"].nunique() / len(test), 3) if len(test) else None


def _copies(frame: pd.DataFrame, gathered: CollectedRows) -> dict[str, int]:
    ids = Counter(each.image_id for each in gathered.checked.values())
    clusters = Counter(gathered.cluster.values())
    groups: dict[str, frozenset[str]] = {}
    for image_id, group in zip(frame["image_id"], frame["image_group"], strict=True):
        groups[image_id] = groups.get(image_id, frozenset()) | labels.as_set(group)
    without_class = (image_id for image_id in groups if image_id not in gathered.classes)
    return {
        "identical": sum(count - 1 for count in ids.values()),
        "near_identical": len(gathered.cluster),
        "under_several_classes": len(gathered.torn),
        "under_several_groups": sum(len(groups[image_id]) > 1 for image_id in without_class),
        "lookalikes_across_classes": gathered.alike_across_classes,
        "largest_cluster": max(clusters.values(), default=0),
    }


def _tokens(frame: pd.DataFrame, config: PrepConfig, count: TokenCounter | None) -> dict[str, Any]:
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


def _warnings(frame: pd.DataFrame, gathered: CollectedRows, config: PrepConfig, facts: dict[str, Any]) -> list[str]:
    found = [*gathered.notes]
    for split, of_split in facts["splits"].items():
        units = of_split["units"]
        if not units:
            found.append(f"the {split} split is empty: there are too few units, or classes, to share")
        elif split == "test" and units < FEW_TEST_UNITS:
            found.append(f"the test split has {pluralize(units, 'unit')}: expect wide intervals")
    found += _about_classes(facts, config)
    found += _about_copies(gathered, facts["copies"], config)
    if config.split_by == "seed" and len(gathered.source_splits) > 1:
        found.append("the source has splits of its own; these are drawn anew (--split-by source keeps them)")
    if gathered.subjects and not config.unit_column:
        column = gathered.subjects
        found.append(f"the same {column} is on several pictures: --unit-column {column} keeps each in one split")
    if shared := _shared_texts(frame):
        stand = "text of the test split also stands" if shared == 1 else "texts of the test split also stand"
        found.append(f"{shared} {stand} in training rows: known words, not known pictures")
    tokens = facts["tokens"]
    if tokens["over"]:
        least = "" if tokens["counted_by"] == "tokenizer" else "at least "
        many = f"{least}{tokens['over']} of {tokens['texts']} texts"
        found.append(f"{many} have more than {tokens['limit']} tokens and will be cut")
    if gathered.rejects:
        were = "was" if len(gathered.rejects) == 1 else "were"
        found.append(
            f"{pluralize(len(gathered.rejects), 'row or file', 'rows or files')} {were} left out: see rejects.csv"
        )
    return found


def pluralize(number: int, one: str, several: str | None = None) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {one if number == 1 else several or one + 's'}"


def _about_classes(facts: dict[str, Any], config: PrepConfig) -> list[str]:
    found = []
    sizes = facts["classes"]
    present = [split for split in splits.SPLITS if facts["splits"][split]["pairs"]]
    missing = sorted((sum(of.values()), name) for name, of in sizes.items() if any(not of[split] for split in present))
    if missing:
        size, name = missing[0]
        does = "does" if len(missing) == 1 else "do"
        what = f"{pluralize(len(missing), 'class', 'classes')} {does} not stand in every split"
        found.append(f"{what}, such as {name} of {pluralize(size, 'picture')}: too few pictures, or units")
    if len(sizes) == 1:
        found.append(f"there is one class, {next(iter(sizes))}: is {config.source} laid out as you think?")
    spelt: dict[str, list[str]] = {}
    for name in sizes:
        spelt.setdefault(name.casefold(), []).append(name)
    if twice := [names for names in spelt.values() if len(names) > 1]:
        found.append(f"classes that differ in capitals alone are counted apart: {', '.join(twice[0])}")
    return found


def _about_copies(gathered: CollectedRows, copies: dict[str, int], config: PrepConfig) -> list[str]:
    found = []
    if number := copies["under_several_classes"]:
        what = {"keep": "all of them count", "drop": "left out", "first": "the first by name or row counts"}
        stands = "picture stands" if number == 1 else "pictures stand"
        some = next(
            (gathered.classes[each] for each in sorted(gathered.torn) if len(gathered.classes.get(each, ())) > 1), ()
        )
        example = f", such as {' and '.join(some[:2])}" if some else ""
        found.append(f"{number} {stands} under several classes{example}: {what[config.on_conflict]} (--on-conflict)")
    if number := copies["under_several_groups"]:
        stands = "picture stands" if number == 1 else "pictures stand"
        found.append(f"{number} {stands} in several groups and match the texts of all of them")
    if number := copies["lookalikes_across_classes"]:
        stand = "group of lookalikes stands" if number == 1 else "groups of lookalikes stand"
        found.append(f"{number} {stand} under different classes: is one of them wrong?")
    if copies["largest_cluster"] > max(20, len(gathered.checked) // 20):
        told = f"{copies['largest_cluster']} pictures look alike and went to one split together"
        found.append(f"{told}: a smaller --near-duplicates than {config.near_duplicates} tells more of them apart")
    return found


def _shared_texts(frame: pd.DataFrame) -> int:
    """Texts of the test that training has too; none are counted where classes share captions by design."""
    if frame["class_name"].notna().any():
        return 0
    in_split = {split: set(frame.loc[frame["split"] == split, "text_id"]) for split in ("train", "test")}
    return len(in_split["train"] & in_split["test"])


def print_summary(described: dict[str, Any], config: PrepConfig, dry_run: bool) -> None:
    """Print the summary: what there is, what to expect, what was left out."""
    columns = ("pairs", "pictures", "texts", "units", "classes")
    rows = [(split, *(str(described["splits"][split][column]) for column in columns)) for split in splits.SPLITS]
    rows.append(("all", *(str(described["counts"][column]) for column in columns)))
    console.print_table(f"{config.out}{' (dry run: nothing written)' if dry_run else ''}", ("split", *columns), rows)
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
        told = f"{copies['identical']} identical and {pluralize(copies['near_identical'], 'near-identical picture')}"
        console.say(f"{told}: each stays in one split with its like")
    for warning in described["warnings"]:
        console.warn(warning)
    for reason, count in list(described["rejects"].items())[:5]:
        console.say(f"         {count} x {reason}")
    if dry_run:
        _tell_settings(described["settings"])
    elif described["splits"]["train"]["pairs"] > 1:
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
    console.print_table("pictures a class", ("class", *splits.SPLITS), rows)


def _tell_settings(settings: dict[str, Any]) -> None:
    shown = [(name, str(value)) for name, value in settings.items() if value not in (None, [], False)]
    console.print_table("settings", ("", "value"), shown)
