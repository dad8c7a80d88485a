"""eval --run of a captioner: score its captions of unseen images, and measure whether it uses the images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlkit import console
from vlkit.config.evaluation import EvalCaptionerConfig
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.errors import DataError, UsageError
from vlkit.evaluation.captioning.caption_files import read_other_captions
from vlkit.evaluation.captioning.clipscore import ClipScorer
from vlkit.evaluation.captioning.image_reliance import (
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
    worst_and_best,
)
from vlkit.evaluation.efficiency import peak_memory_gb
from vlkit.evaluation.results import (
    CaptioningEfficiency,
    ImageReliance,
    Results,
    check_out_folder,
    result_suffix,
)
from vlkit.evaluation.summary import print_caption_summary, print_captions
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.captioner.save_load import load_captioner
from vlkit.runs import Run

# A value of results.json, which scripts read: what captions are compared with without --against.
BLANK_IMAGE = "a blank picture"


@dataclass(frozen=True)
class GeneratedCaptions:
    """A captioner's captions of the images.

    Attributes:
        blank: its caption of a blank image.
        seconds: of writing the captions.
    """

    captioned: CaptionSet
    blank: str
    reliance: ImageReliance
    seconds: float

    def to_coco(self) -> list[dict[str, Any]]:
        """Return the captions as COCO's results files have them."""
        pairs = zip(self.captioned.images, self.captioned.captions, strict=True)
        return [{"image_id": image, "caption": text} for image, text in pairs]


def evaluate_captions(config: EvalCaptionerConfig) -> dict[str, Any]:
    """Run `vlkit eval --run` of a captioner: write captions.json and results.json, print a table, return the results.

    Raises:
        QualityError: a metric is below --fail-under; everything is written.
    """
    assert config.run is not None
    run = Run(config.run)
    if config.out is not None:
        if config.out.is_remote:
            raise UsageError(f"--out {config.out}: captions are scored into a folder on this machine")
        check_out_folder(config.out.path, run)
    data = config.data or run.data_location()
    pairs = read_pairs(data).positives()
    rows, empty = pairs.split(config.split).with_text()
    if empty:
        console.warn(f"{empty} texts of the {config.split} split without a word are left out")
    images = one_caption_per_image(rows, config.limit, config.seed)
    if not len(images):
        raise DataError(f"{data}: the {config.split} split has no pairs", hint="choose another --split")
    folder, suffix = _output_folder(config, run, pairs)
    # Cheap checks come before the expensive work.
    other_texts = None
    if config.against is not None:
        other_texts = read_other_captions(config.against, list(images.frame["image_id"]), suffix)
    scorer = None
    if config.clip_model is not None:
        scorer = ClipScorer(config.clip_model, images.image_paths(images.frame), config.batch_size, config.decode)
    captioner = load_captioner(run, precision=config.precision, decode=config.decode)
    generated = _generate(captioner, images, References.from_pairs(rows), run.config(), config)
    captioned = generated.captioned
    # Without other captions the baseline is the same model in front of a blank image.
    base_texts = [generated.blank] * len(captioned.images) if other_texts is None else other_texts
    scored = ScoredCaptions.from_captions(captioned, scorer)
    base = ScoredCaptions.from_captions(captioned.with_captions(base_texts), scorer)
    results = Results(
        task="captioning",
        model=run.name,
        data={
            "path": str(pairs.folder.absolute),
            "split": config.split,
            "fingerprint": pairs.fingerprint,
            "limit": config.limit,
            "rows": len(images),
        },
        groups={"captions": compare_captions(scored, base, draws=config.draws, seed=config.seed)},
        image_reliance=generated.reliance,
        compared_with=BLANK_IMAGE if other_texts is None else str(config.against),
        clip_model=config.clip_model or None,
        blank_caption=generated.blank,
        diversity=diversity(captioned.tokens),
        examples=worst_and_best(captioned, scored.scores, list(images.frame["image"])),
        efficiency=_efficiency(run, len(images), generated.seconds),
    )
    folder.mkdir(parents=True, exist_ok=True)
    Run(folder).write_json(f"captions{suffix}.json", generated.to_coco())
    results.write(folder / f"results{suffix}.json")
    if config.out is None:
        run.mirror(required=True)
    print_caption_summary(results, f"{run.folder}, {config.split}", folder / f"results{suffix}.json")
    print_captions(captioned.images, captioned.captions, captioned.references, config.samples)
    results.check_fail_under(config.demands)
    return results.to_dict()


def _generate(
    captioner: Captioner, images: Pairs, references: References, settings: dict[str, Any], config: EvalCaptionerConfig
) -> GeneratedCaptions:
    """Write a caption of every image and of a blank one, and measure whether the captioner uses the images.

    Args:
        settings: of the run.
    """
    max_new_tokens = int(settings["max_new_tokens"])
    dataset, _ = caption_dataset(images, captioner, int(settings["max_length"]))
    blank = captioner.patches(captioner.vision.blank())
    started = time.perf_counter()
    with console.progress("writing captions", len(dataset)) as bar:
        texts = generate_captions(
            captioner,
            dataset.pixels,
            dataset.image_of.tolist(),
            num_beams=config.num_beams,
            max_new_tokens=max_new_tokens,
            batch_size=config.batch_size,
            on_progress=bar.update,
        )
    seconds = time.perf_counter() - started
    image_ids = list(images.frame["image_id"])
    captioned = CaptionSet.from_texts(image_ids, texts, references.of_images(image_ids))
    reliance = image_reliance(captioner, dataset, blank, seed=config.seed, batch_size=config.batch_size)
    (blank_caption,) = captioner.generate(blank, num_beams=config.num_beams, max_new_tokens=max_new_tokens)
    return GeneratedCaptions(captioned, blank_caption, reliance, seconds)


def _efficiency(run: Run, count: int, seconds: float) -> CaptioningEfficiency:
    """Return the speed of writing `count` captions, and the run's facts of its training."""
    facts, peak = run.read_json("finished.json"), peak_memory_gb()
    return CaptioningEfficiency(
        captions_per_second=count / seconds,
        peak_memory_gb=peak["process"] if peak["gpu"] is None else peak["gpu"],
        train_seconds=facts.get("train_seconds"),
        trainable_parameters=facts.get("trainable_parameters"),
        total_parameters=facts.get("total_parameters"),
    )


def _output_folder(config: EvalCaptionerConfig, run: Run, pairs: Pairs) -> tuple[Path, str]:
    """Return folder and file suffix: another split, or other data than the run's, gets its own files."""
    suffix = result_suffix(config.split, config.limit)
    if config.out is not None:
        return config.out.path, suffix
    if run.environment().get("data", {}).get("fingerprint") != pairs.fingerprint:
        console.warn(f"{pairs.folder} is not the data that {run.name} was trained on, or it has changed")
        suffix += f"-{pairs.folder.name}"
    return run.folder, suffix
