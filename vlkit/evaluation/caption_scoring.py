"""eval --captions: any COCO results file beside its references, with intervals over images."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vlkit import console
from vlkit.config import CAPTIONED, SCHEMA, EvalConfig
from vlkit.errors import DataError, UsageError
from vlkit.evaluation.caption_metrics import CaptionScores
from vlkit.evaluation.caption_tokens import coco_tokens
from vlkit.evaluation.comparison import compare
from vlkit.evaluation.refusals import refuse_foreign, refuse_missed
from vlkit.storage import json_text, write_text

SHOWN = dict(zip(CAPTIONED, ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE_L", "CIDEr", "word for word"), strict=True))
EXAMPLES = 20


@dataclass(frozen=True)
class Captioned:
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
    def read(cls, captions: Path, references: Path) -> Captioned:
        """Of a COCO results file and a COCO annotation file.

        Raises:
            DataError: a file is none, an image has two captions, or no reference.
        """
        told: dict[str, list[str]] = defaultdict(list)
        for image, text in _pairs(references):
            told[image].append(text)
        made = _pairs(captions)
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
        texts, kept = [text for _, text in made], [told[image] for image, _ in made]
        tokens = coco_tokens(texts)
        flat = iter(coco_tokens([text for each in kept for text in each]))
        if empty := sum(not each for each in tokens):
            console.warn(f"{empty} of {len(made)} captions have no words: they score 0")
        return cls([image for image, _ in made], texts, kept, tokens, [[next(flat) for _ in each] for each in kept])

    def scores(self) -> CaptionScores:
        """Score them, on COCO's tokens."""
        return CaptionScores.of(self.tokens, self.reference_tokens)

    def exact(self) -> np.ndarray:
        """float64 [images]: 1 where a caption is word for word one of its references."""
        pairs = zip(self.tokens, self.reference_tokens, strict=True)
        return np.array([bool(tokens) and tokens in references for tokens, references in pairs], np.float64)


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
    captioned = Captioned.read(config.captions, config.references)
    scores = captioned.scores()
    measured = scores.measured()
    measured = replace(measured, means={**measured.means, "exact": captioned.exact()})
    found = compare(measured, None, captioned.images, draws=config.draws, seed=config.seed)
    results = {
        "schema": SCHEMA,
        "task": "captioning",
        "model": config.captions.stem,
        "data": {"path": str(config.references), "captions": str(config.captions)},
        "metrics": {"captions": {**found["metrics"], "images": len(captioned.images)}},
        "intervals": {"captions": found["intervals"]},
        "diversity": diversity(captioned.tokens),
        "examples": _examples(captioned, scores),
    }
    if config.out is not None:
        write_text(config.out.path / "results.json", json_text(results, indent=2) + "\n")
    _tell(results, config)
    refuse_missed(results, config.fail_under)
    return results


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
    """(image, caption) of a list of {image_id, caption}, as JSON or JSON lines, or of the annotations of a COCO file.

    Raises:
        DataError: it is neither.
    """
    content = _content(path)
    rows = content.get("annotations", [content]) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no captions", hint="a list of {image_id, caption}, or a COCO annotation file")
    found = []
    for number, row in enumerate(rows, start=1):
        image, text = (row.get("image_id"), row.get("caption")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(image, str | int | float):
            raise DataError(f"{path}: entry {number} has no image_id or no caption")
        whole = isinstance(image, float) and image.is_integer()
        # 7, "7" and "000000000007" are one image; half of an emoji is no letter.
        name = str(int(image)) if whole or str(image).isdecimal() else str(image)
        found.append((name, text.encode("utf-8", "replace").decode("utf-8")))
    return found


def _content(path: Path) -> Any:
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


def _tell(results: dict[str, Any], config: EvalConfig) -> None:
    metrics, intervals = results["metrics"]["captions"], results["intervals"]["captions"]
    rows = []
    for name in SHOWN:
        low, high = intervals[name]
        rows.append([SHOWN[name], f"{metrics[name]:.4f}", f"[{low:.4f}, {high:.4f}]"])
    console.table(f"{config.captions}: {metrics['images']} images", ("", "value", "95 %"), rows)
    spread = results["diversity"]
    words = f"{spread['mean_length']:.1f} words on average, {spread['vocabulary']} different ones"
    console.result(f"{spread['distinct_captions']:.1%} of the captions are distinct; {words}")
    if config.out is not None:
        console.hint(f"all numbers, the worst and the best captions: {config.out / 'results.json'}")
