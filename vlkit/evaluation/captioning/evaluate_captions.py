"""eval --run of a captioner: what it says of pictures that it has not seen, and whether it looks at them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlkit import console
from vlkit.config.evaluation import SCHEMA, EvalConfig, suffix_of
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.errors import DataError, UsageError
from vlkit.evaluation.captioning.clipscore import ClipScorer
from vlkit.evaluation.captioning.image_reliance import (
    ImageReliance,
    caption_dataset,
    generate_captions,
    image_reliance,
    one_caption_per_image,
)
from vlkit.evaluation.captioning.score import (
    CaptionSet,
    References,
    ScoredCaptions,
    compare_captions,
    diversity,
    print_caption_summary,
    print_captions,
    read_other_captions,
    worst_and_best,
)
from vlkit.evaluation.efficiency import peak_memory_gb
from vlkit.evaluation.results import refuse_foreign, refuse_missed
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.captioner.save_load import load_captioner
from vlkit.runs import Run


def caption_metrics(images: Sequence[str], texts: Sequence[str], references: References) -> dict[str, float]:
    """BLEU, ROUGE_L, CIDEr and the exact share of some captions, without intervals.

    Args:
        images: ids of the pictures that `texts` are of.
    """
    captioned = CaptionSet.from_texts(list(images), list(texts), [references.of_image[image] for image in images])
    scored = ScoredCaptions.from_captions(captioned)
    return {name: scored.measured.value(name, len(images)) for name in scored.measured.names}


def evaluate_captions(config: EvalConfig) -> dict[str, Any]:
    """Run `vlkit eval --run` of a captioner: write captions.json and results.json, print a table, return the results.

    Raises:
        QualityError: a metric is below --fail-under; everything is written.
    """
    assert config.run is not None
    run = Run(config.run)
    if config.out is not None:
        if config.out.is_remote:
            raise UsageError(f"--out {config.out}: captions are scored into a folder on this machine")
        refuse_foreign(config.out.path, run)
    settings = run.config()
    data = config.data or run.data_location()
    pairs = read_pairs(data).positives()
    asked, empty = pairs.split(config.split).with_text()
    if empty:
        console.warn(f"{empty} texts of the {config.split} split without a word are left out")
    pictures = one_caption_per_image(asked, config.limit, config.seed)
    if not len(pictures):
        raise DataError(f"{data}: the {config.split} split has no pairs", hint="choose another --split")
    folder, suffix = _place(config, run, pairs)
    # What is cheap to find missing is looked for before what is dear is computed.
    told = None
    if config.against is not None:
        told = read_other_captions(config.against, list(pictures.frame["image_id"]), suffix)
    judge = None
    if config.clip_model is not None:
        judge = ClipScorer(config.clip_model, pictures.image_paths(pictures.frame), config.batch_size, config.decode)
    captioner = load_captioner(run, precision=config.precision, decode=config.decode)
    made = _generate(captioner, pictures, asked, settings, config, judge)
    captioned = made.captioned
    against = None if told is None else CaptionSet.from_texts(captioned.images, told, captioned.references)
    results = {
        "schema": SCHEMA,
        "task": "captioning",
        "model": run.name,
        "data": {
            "path": str(pairs.folder.absolute),
            "split": config.split,
            "fingerprint": pairs.fingerprint,
            "limit": config.limit,
            "rows": len(pictures),
        },
        **_sections(made, against, config),
        "efficiency": made.cost(run, captioner),
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = Run(folder)
    target.write_json(f"captions{suffix}.json", made.coco())
    target.write_json(f"results{suffix}.json", results)
    if config.out is None:
        run.mirror(required=True)
    print_caption_summary(results, f"{run.folder}, {config.split}", folder / f"results{suffix}.json")
    print_captions(captioned, config.samples)
    refuse_missed(results, config.fail_under)
    return results


@dataclass(frozen=True)
class GeneratedCaptions:
    """Pictures, what a captioner says of them, and how long it took.

    Attributes:
        blank: what it says of a picture with nothing on it.
        places: where each picture lies.
        seconds: of writing the captions.
        judge: what scores captions by a dual encoder, where one was named.
    """

    captioned: CaptionSet
    blank: str
    looking: ImageReliance
    places: list[str]
    seconds: float
    judge: ClipScorer | None

    def coco(self) -> list[dict[str, str]]:
        """As COCO's results files have it."""
        pairs = zip(self.captioned.images, self.captioned.captions, strict=True)
        return [{"image_id": image, "caption": text} for image, text in pairs]

    def cost(self, run: Run, captioner: Captioner) -> dict[str, Any]:
        """The section of results.json."""
        facts, peak = run.read_json("finished.json"), peak_memory_gb()
        return {
            "captions_per_second": len(self.places) / self.seconds,
            "peak_memory_gb": peak["process"] if peak["gpu"] is None else peak["gpu"],
            "train_seconds": facts.get("train_seconds"),
            "trainable_parameters": facts.get("trainable_parameters"),
            "total_parameters": facts.get("total_parameters"),
        }


def _generate(
    captioner: Captioner,
    pictures: Pairs,
    asked: Pairs,
    settings: Mapping[str, Any],
    config: EvalConfig,
    judge: ClipScorer | None,
) -> GeneratedCaptions:
    """Let it write a caption of every picture, measure whether it looks, and what CLIP thinks of it."""
    assert captioner.vision is not None
    dataset, _ = caption_dataset(pictures, captioner, int(settings["max_length"]))
    blank = captioner.patches(captioner.vision.blank())
    how = {"num_beams": config.num_beams, "max_new_tokens": int(settings["max_new_tokens"])}
    began = time.perf_counter()
    with console.progress("writing captions", len(dataset)) as bar:
        texts = generate_captions(
            captioner, dataset.pixels, dataset.image_of.tolist(), at_once=config.batch_size, watch=bar.update, **how
        )
    seconds = time.perf_counter() - began
    images, references = list(pictures.frame["image_id"]), References.from_pairs(asked)
    captioned = CaptionSet.from_texts(images, texts, [references.of_image[image] for image in images])
    looking = image_reliance(captioner, dataset, blank, seed=config.seed, at_once=config.batch_size)
    of_nothing = captioner.generate(blank, **how)[0]
    return GeneratedCaptions(captioned, of_nothing, looking, list(pictures.frame["image"]), seconds, judge)


def _sections(made: GeneratedCaptions, against: CaptionSet | None, config: EvalConfig) -> dict[str, Any]:
    """metrics to examples, of results.json. The baseline is the same model in front of a blank picture."""
    captioned = made.captioned
    nothing = CaptionSet.from_texts(captioned.images, [made.blank] * len(captioned.images), captioned.references)
    other = against or nothing
    scored, beside = (
        ScoredCaptions.from_captions(captioned, made.judge),
        ScoredCaptions.from_captions(other, made.judge),
    )
    found = compare_captions(scored, beside, draws=config.draws, seed=config.seed)
    found["metrics"]["looking"] = made.looking.to_dict()
    return {
        **found,
        "compared_with": str(config.against) if against is not None else "a blank picture",
        **({"clip_model": config.clip_model} if config.clip_model else {}),
        "blank_caption": made.blank,
        "diversity": diversity(captioned.tokens),
        "examples": worst_and_best(captioned, scored.scores, made.places),
    }


def _place(config: EvalConfig, run: Run, pairs: Pairs) -> tuple[Path, str]:
    """Folder and file suffix: another split, or other data than the run's, gets files of its own."""
    suffix = suffix_of(config.split, config.limit)
    if config.out is not None:
        return config.out.path, suffix
    if run.environment().get("data", {}).get("fingerprint") != pairs.fingerprint:
        console.warn(f"{pairs.folder} is not the data, or no longer, that {run.name} was trained on")
        suffix += f"-{pairs.folder.name}"
    return run.folder, suffix
