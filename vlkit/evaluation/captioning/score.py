"""Captions beside their references, scored as COCO does, with intervals over images; of any captioner.

`eval --captions` reads both from files; `eval --run` of a captioner (`describing.py`) scores what it has just written.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlkit import console
from vlkit.config.evaluation import CAPTIONED, SCHEMA, EvalConfig
from vlkit.errors import DataError, UsageError
from vlkit.evaluation.captioning.metrics import CaptionScores
from vlkit.evaluation.captioning.ptb_tokens import coco_tokens
from vlkit.evaluation.comparison import PerQueryMetrics, compare
from vlkit.evaluation.results import refuse_foreign, refuse_missed
from vlkit.storage import json_text, write_text

if TYPE_CHECKING:
    from vlkit.data.pairs import Pairs
    from vlkit.evaluation.captioning.clipscore import ClipScorer

NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE_L", "CIDEr", "word for word", "CLIPScore", "RefCLIPScore")
SHOWN = dict(zip(CAPTIONED, NAMES, strict=True))
EXAMPLES = 20


@dataclass(frozen=True)
class References:
    """What people say of each picture: image id -> texts."""

    of_image: Mapping[str, list[str]]

    @classmethod
    def from_pairs(cls, pairs: Pairs) -> References:
        """Every matching text of a table, by its picture."""
        found: dict[str, list[str]] = defaultdict(list)
        for image, text in zip(pairs.frame["image_id"], pairs.frame["text"], strict=True):
            found[image].append(text)
        return cls(found)


@dataclass(frozen=True)
class CaptionSet:
    """Captions to be scored, an image each.

    Attributes:
        references: [images][at least one].
        tokens: of the captions.
        reference_tokens: of the references.
    """

    images: list[str]
    captions: list[str]
    references: list[list[str]]
    tokens: list[list[str]]
    reference_tokens: list[list[list[str]]]

    @classmethod
    def from_texts(cls, images: list[str], captions: list[str], references: list[list[str]]) -> CaptionSet:
        """Cut everything into COCO's tokens."""
        flat = iter(coco_tokens([text for each in references for text in each]))
        return cls(
            images, captions, references, coco_tokens(captions), [[next(flat) for _ in each] for each in references]
        )

    @classmethod
    def read(cls, captions: Path, references: Path) -> CaptionSet:
        """Of a COCO results file and a COCO annotation file.

        Raises:
            DataError: a file is none, an image has two captions, or no reference.
        """
        told: dict[str, list[str]] = defaultdict(list)
        for image, text in read_captions(references):
            told[image].append(text)
        made = read_captions(captions)
        twice = [image for image, count in Counter(image for image, _ in made).items() if count > 1]
        if twice:
            hint = "one an image is scored; or are --captions and --references the wrong way round?"
            raise DataError(f"{captions}: image {twice[0]} has several captions", hint=hint)
        alone = [image for image, _ in made if image not in told]
        if alone:
            told_of = f"{captions}: image {alone[0]} has no reference in {references}, nor have {len(alone) - 1} others"
            raise DataError(told_of, hint="are these the references of the same split?")
        if len(told) > len(made):
            console.warn(f"{len(told) - len(made)} of {len(told)} images of {references} have no caption: left out")
        if len(made) == 1:
            console.warn("of one image CIDEr is always 0: it weighs words by how few of the images have them")
        found = cls.from_texts(
            [image for image, _ in made], [text for _, text in made], [told[image] for image, _ in made]
        )
        if empty := sum(not each for each in found.tokens):
            console.warn(f"{empty} of {len(made)} captions have no words: they score 0")
        return found

    def exact(self) -> np.ndarray:
        """float64 [images]: 1 where a caption is word for word one of its references."""
        pairs = zip(self.tokens, self.reference_tokens, strict=True)
        return np.array([bool(tokens) and tokens in references for tokens, references in pairs], np.float64)


@dataclass(frozen=True)
class ScoredCaptions:
    """Captions and everything that is measured of them."""

    captioned: CaptionSet
    scores: CaptionScores
    measured: PerQueryMetrics

    @classmethod
    def from_captions(cls, captioned: CaptionSet, judge: ClipScorer | None = None) -> ScoredCaptions:
        """Score captions on COCO's tokens; with a `judge`, what a dual encoder thinks of them, too."""
        scores = CaptionScores.from_tokens(captioned.tokens, captioned.reference_tokens)
        measured = scores.measured()
        more = {"exact": captioned.exact()}
        if judge is not None:
            clip = judge(captioned)
            more |= {"clipscore": clip.clipscore, "refclipscore": clip.refclipscore}
        return cls(captioned, scores, replace(measured, means={**measured.means, **more}))


def compare_captions(
    scored: ScoredCaptions, beside: ScoredCaptions | None, *, draws: int, seed: int
) -> dict[str, dict[str, Any]]:
    """metrics, intervals and, beside others, baseline and paired difference, as results.json has them."""

    def only(of: PerQueryMetrics, wanted: Callable[[str], bool]) -> PerQueryMetrics:
        return replace(of, means={name: values for name, values in of.means.items() if wanted(name)})

    images = scored.captioned.images
    if beside is None:
        found = compare(scored.measured, None, images, draws=draws, seed=seed)
    else:
        known = beside.measured.means
        both, base = (
            only(scored.measured, known.__contains__),
            only(beside.measured, scored.measured.means.__contains__),
        )
        found = compare(both, base, images, draws=draws, seed=seed)
        alone = only(scored.measured, lambda name: name not in known)
        # What is measured of one only is compared with nothing.
        rest = compare(PerQueryMetrics(alone.means), None, images, draws=draws, seed=seed)
        found = {part: values | rest[part] for part, values in found.items()}
    found["metrics"]["images"] = len(images)
    return {part: {"captions": values} for part, values in found.items() if values}


def score_captions(config: EvalConfig) -> dict[str, Any]:
    """Run `vlkit eval --captions`: print a table, write results.json where --out says, return the results.

    Raises:
        DataError: see `Captioned.read`. QualityError: a metric is below --fail-under; everything is written.
    """
    assert config.captions is not None and config.references is not None
    if config.out is not None:
        if config.out.is_remote:
            raise UsageError(f"--out {config.out}: captions are scored into a folder on this machine")
        refuse_foreign(config.out.path, None)
    captioned = CaptionSet.read(config.captions, config.references)
    told = None if config.against is None else read_other_captions(config.against, captioned.images)
    judge: ClipScorer | None = None
    if config.clip_model is not None:
        from vlkit.evaluation.captioning.clipscore import ClipScorer, coco_image_paths

        assert config.images is not None
        paths = coco_image_paths(config.references, config.images, captioned.images)
        judge = ClipScorer(config.clip_model, paths, config.batch_size, config.decode)
    scored = ScoredCaptions.from_captions(captioned, judge)
    other = None if told is None else CaptionSet.from_texts(captioned.images, told, captioned.references)
    against = None if other is None else ScoredCaptions.from_captions(other, judge)
    results = {
        "schema": SCHEMA,
        "task": "captioning",
        "model": config.captions.stem,
        "data": {"path": str(config.references), "captions": str(config.captions)},
        **compare_captions(scored, against, draws=config.draws, seed=config.seed),
        **({"compared_with": str(config.against)} if against else {}),
        **({"clip_model": config.clip_model} if config.clip_model else {}),
        "diversity": diversity(captioned.tokens),
        "examples": worst_and_best(captioned, scored.scores),
    }
    written = None
    if config.out is not None:
        written = config.out.path / "results.json"
        write_text(written, json_text(results, indent=2) + "\n")
    print_caption_summary(results, str(config.captions), written)
    print_captions(captioned, config.samples)
    refuse_missed(results, config.fail_under)
    return results


def read_other_captions(against: Path, images: Sequence[str], suffix: str = "") -> list[str]:
    """The captions of another run, or of a COCO results file, of the same images.

    Args:
        suffix: of the run's captions file: another split, or a part of it.

    Raises:
        DataError: it has none of some image, or there is no such file.
    """
    path = against / f"captions{suffix}.json" if against.is_dir() else against
    hint = f"measure it on the same data, split and limit first: vlkit eval --run {against}"
    if against.is_dir() and not path.is_file():
        raise DataError(f"no such file: {path}", hint=hint)
    texts = dict(read_captions(path))
    missing = [image for image in images if normalize_image_id(image) not in texts]
    if missing:
        told = f"{path} has no caption of {len(missing)} of the images, the first is {missing[0]}"
        raise DataError(told, hint=hint if against.is_dir() else "are they of the same images?")
    return [texts[normalize_image_id(image)] for image in images]


def diversity(captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """How much captions differ from each other: shares of distinct captions, words and word pairs; mean length.

    Args:
        captions: their tokens.
    """
    words = [word for each in captions for word in each]
    couples = [couple for each in captions for couple in pairwise(each)]
    return {
        "distinct_captions": len({tuple(each) for each in captions}) / len(captions),
        "distinct_1": len(set(words)) / max(1, len(words)),
        "distinct_2": len(set(couples)) / max(1, len(couples)),
        "vocabulary": len(set(words)),
        "mean_length": len(words) / len(captions),
    }


def worst_and_best(
    captioned: CaptionSet, scores: CaptionScores, places: Sequence[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """The captions of the lowest and the highest CIDEr.

    Args:
        places: where each image lies.
    """
    order = np.argsort(scores.cider, kind="stable")

    def shown(chosen: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "image": captioned.images[place],
                **({"file": places[place]} if places else {}),
                "caption": captioned.captions[place],
                "references": captioned.references[place],
                "cider": float(scores.cider[place]),
                "rouge_l": float(scores.rouge_l[place]),
            }
            for place in chosen.tolist()
        ]

    # Of few images none is both.
    half = len(order) // 2
    worst, best = min(EXAMPLES, len(order) - half), min(EXAMPLES, half)
    return {"worst": shown(order[:worst]), "best": shown(order[::-1][:best])}


def read_captions(path: Path) -> list[tuple[str, str]]:
    """(image, caption) of a list of {image_id, caption}, as JSON or JSON lines, or of the annotations of a COCO file.

    Raises:
        DataError: it is neither.
    """
    content = read_json_file(path)
    rows = content.get("annotations", [content]) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no captions", hint="a list of {image_id, caption}, or a COCO annotation file")
    found = []
    for number, row in enumerate(rows, start=1):
        if number == 1 and isinstance(row, dict) and "asked" in row:
            continue  # What vlkit caption --out begins with.
        image, text = (_named(row), row.get("caption")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(image, str | int | float):
            raise DataError(f"{path}: entry {number} has no image_id or no caption")
        # Half of an emoji is no letter.
        found.append((normalize_image_id(image), text.encode("utf-8", "replace").decode("utf-8")))
    return found


def _named(row: Mapping[str, Any]) -> Any:
    """A row's image_id; of a line of `vlkit caption --out`, which names files, the file's name."""
    by_file = "image_id" not in row and isinstance(row.get("image"), str)
    return Path(row["image"]).stem if by_file else row.get("image_id")


def normalize_image_id(image: str | int | float) -> str:
    """An image's id as text: 7, "7", 7.0 and "000000000007" are one image."""
    whole = isinstance(image, float) and image.is_integer()
    return str(int(image)) if whole or str(image).isdecimal() else str(image)


def read_json_file(path: Path) -> Any:
    """What a JSON file, or one of JSON lines, holds.

    Raises:
        DataError: there is none, or it is no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: a JSON file was expected") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}", hint="JSON lines are read from a .jsonl") from None


def print_caption_summary(results: Mapping[str, Any], title: str, written: Path | None) -> None:
    """The table that people read.

    Args:
        written: where all of it stands.
    """
    metrics, intervals = results["metrics"]["captions"], results["intervals"]["captions"]
    difference = results.get("difference", {}).get("captions", {})
    rows = []
    for name in (name for name in SHOWN if name in metrics):
        low, high = intervals[name]
        row = [SHOWN[name], f"{metrics[name]:.4f}", f"[{low:.4f}, {high:.4f}]"]
        if difference:
            row += _difference(difference.get(name))
        rows.append(row)
    beside = (f"more than {results['compared_with']}", "95 %", "p") if difference else ()
    console.print_table(f"{title}: {metrics['images']} images", ("", "value", "95 %", *beside), rows)
    if looking := results["metrics"].get("looking"):
        shuffled = "-" if looking["shuffled"] is None else f"{looking['shuffled']:.3f}"
        told = f"loss {looking['right']:.3f} nats a token; with a shuffled picture {shuffled}, with a blank one"
        console.print_result(f"{told} {looking['blank']:.3f}")
    spread = results["diversity"]
    words = f"{spread['mean_length']:.1f} words on average, {spread['vocabulary']} different ones"
    console.print_result(f"{spread['distinct_captions']:.1%} of the captions are distinct; {words}")
    if written is not None:
        console.hint(f"all numbers, the worst and the best captions: {written}")


def print_captions(captioned: CaptionSet, count: int) -> None:
    """A few captions beside what a person says, to be read."""
    rows = zip(captioned.images, captioned.captions, captioned.references, strict=True)
    shown = [(image, text, told[0]) for (image, text, told), _ in zip(rows, range(count), strict=False)]
    if shown:
        console.print_table("captions", ("image", "caption", "a person"), shown, left=3)


def _difference(found: Mapping[str, float] | None) -> list[str]:
    if found is None or found["value"] is None or found["value"] != found["value"]:
        return ["-", "", ""]
    p = found.get("p_value")
    shown = "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
    return [f"{found['value']:+.4f}", f"[{found['low']:+.4f}, {found['high']:+.4f}]", shown]
