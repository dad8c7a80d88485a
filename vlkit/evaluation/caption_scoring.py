"""eval --captions: any COCO results file beside its references, with intervals over images."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vlkit import console
from vlkit.config import CAPTIONED, SCHEMA, EvalConfig
from vlkit.errors import DataError, UsageError
from vlkit.evaluation.caption_metrics import CaptionScores
from vlkit.evaluation.caption_tokens import coco_tokens
from vlkit.evaluation.comparison import compare, refuse_missed
from vlkit.storage import json_text, refuse_unwritable, write_text

SHOWN = dict(zip(CAPTIONED, ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE_L", "CIDEr"), strict=True))
EXAMPLES = 20


@dataclass(frozen=True)
class Captioned:
    """Captions to be scored, an image each.

    Attributes:
        references: [images][at least one].
    """

    images: list[str]
    captions: list[str]
    references: list[list[str]]

    @classmethod
    def read(cls, captions: Path, references: Path) -> Captioned:
        """Of a COCO results file and a COCO annotation file.

        Raises:
            DataError: a file is none, an image has two captions, or no reference.
        """
        told: dict[str, list[str]] = defaultdict(list)
        for image, text in _pairs(references):
            told[image].append(text)
        made = _pairs(captions)
        if not made:
            raise DataError(f"{captions} holds no captions")
        twice = [image for image, count in Counter(image for image, _ in made).items() if count > 1]
        if twice:
            raise DataError(f"{captions}: image {twice[0]} has several captions", hint="one an image is scored")
        alone = [image for image, _ in made if image not in told]
        if alone:
            told_of = f"{captions}: {len(alone)} images have no reference in {references}, the first is {alone[0]}"
            raise DataError(told_of, hint="are these the references of the same split?")
        if len(told) > len(made):
            console.warn(f"{len(told) - len(made)} of {len(told)} images of {references} have no caption: left out")
        if empty := sum(not text.strip() for _, text in made):
            console.warn(f"{empty} captions are empty, and score 0")
        return cls([image for image, _ in made], [text for _, text in made], [told[image] for image, _ in made])

    def scores(self) -> CaptionScores:
        """Score them, on COCO's tokens."""
        candidates = coco_tokens(self.captions)
        flat = iter(coco_tokens([text for each in self.references for text in each]))
        return CaptionScores.of(candidates, [[next(flat) for _ in each] for each in self.references])


def score_captions(config: EvalConfig) -> dict[str, Any]:
    """Run `vlkit eval --captions`: print a table, write results.json where --out says, return the results.

    Raises:
        DataError: see `Captioned.read`.
    """
    assert config.captions is not None and config.references is not None
    if config.out is not None:
        if config.out.is_remote:
            raise UsageError(f"--out {config.out}: captions are scored into a folder on this machine")
        refuse_unwritable(config.out.path, "--out")
    captioned = Captioned.read(config.captions, config.references)
    scores = captioned.scores()
    found = compare(scores.measured(), None, captioned.images, draws=config.draws, seed=config.seed)
    exact = float(np.mean([_said(captioned, image) for image in range(len(captioned.images))]))
    results = {
        "schema": SCHEMA,
        "task": "captioning",
        "model": config.captions.stem,
        "data": {"path": str(config.references), "captions": str(config.captions), "images": len(captioned.images)},
        "metrics": {"captions": {**found["metrics"], "exact": exact, "images": len(captioned.images)}},
        "intervals": {"captions": found["intervals"]},
        "diversity": diversity(captioned.captions),
        "examples": _examples(captioned, scores),
    }
    if config.out is not None:
        write_text(config.out.path / "results.json", json_text(results, indent=2) + "\n")
    _tell(results, config)
    refuse_missed(results, config.fail_under)
    return results


def diversity(captions: Sequence[str]) -> dict[str, float]:
    """How much captions differ from each other: shares of distinct captions, words and word pairs; mean length."""
    tokens = coco_tokens(captions)
    words = [word for each in tokens for word in each]
    couples = [couple for each in tokens for couple in pairwise(each)]
    return {
        "distinct_captions": len({tuple(each) for each in tokens}) / len(tokens),
        "distinct_1": len(set(words)) / max(1, len(words)),
        "distinct_2": len(set(couples)) / max(1, len(couples)),
        "vocabulary": len(set(words)),
        "mean_length": len(words) / len(tokens),
    }


def _said(captioned: Captioned, image: int) -> bool:
    """Whether a caption is word for word one of its references."""
    candidate, *references = coco_tokens([captioned.captions[image], *captioned.references[image]])
    return candidate in references


def _examples(captioned: Captioned, scores: CaptionScores) -> dict[str, list[dict[str, Any]]]:
    """The captions of the lowest and the highest CIDEr."""
    order = np.argsort(scores.cider, kind="stable")

    def shown(places: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "image": captioned.images[place],
                "caption": captioned.captions[place],
                "references": captioned.references[place],
                "cider": float(scores.cider[place]),
                "rouge_l": float(scores.rouge_l[place]),
            }
            for place in places.tolist()
        ]

    return {"worst": shown(order[:EXAMPLES]), "best": shown(order[::-1][:EXAMPLES])}


def _pairs(path: Path) -> list[tuple[str, str]]:
    """(image, caption) of a list of {image_id, caption}, or of the annotations of a COCO file.

    Raises:
        DataError: it is neither.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    rows = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no captions", hint="a list of {image_id, caption}, or a COCO annotation file")
    found = []
    for number, row in enumerate(rows, start=1):
        text = row.get("caption") if isinstance(row, dict) else None
        if not isinstance(text, str) or not isinstance(row.get("image_id"), str | int):
            raise DataError(f"{path}: entry {number} has no image_id or no caption")
        found.append((str(row["image_id"]), text))
    return found


def _tell(results: dict[str, Any], config: EvalConfig) -> None:
    metrics, intervals = results["metrics"]["captions"], results["intervals"]["captions"]
    rows = []
    for name in SHOWN:
        low, high = intervals[name]
        rows.append([SHOWN[name], f"{metrics[name]:.4f}", f"[{low:.4f}, {high:.4f}]"])
    console.table(f"{config.captions}: {metrics['images']} images", ("", "value", "95 %"), rows)
    spread = results["diversity"]
    words = f"{spread['mean_length']:.1f} words on average, {spread['vocabulary']} different ones"
    same = f"{metrics['exact']:.1%} say word for word what a reference says"
    console.result(f"{spread['distinct_captions']:.1%} of the captions are distinct; {words}; {same}")
    if config.out is not None:
        console.hint(f"all numbers, the worst and the best captions: {config.out / 'results.json'}")
