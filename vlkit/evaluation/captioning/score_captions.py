"""eval --captions: score captions from a file, whoever wrote them."""

from __future__ import annotations

from typing import Any

from vlkit.config.base import require_resolved
from vlkit.config.evaluation import EvalCaptionsConfig
from vlkit.errors import UsageError
from vlkit.evaluation.captioning.caption_files import coco_image_paths, read_other_captions
from vlkit.evaluation.captioning.score import (
    CaptionScorer,
    CaptionSet,
    ScoredCaptions,
    compare_captions,
    diversity,
    worst_and_best,
)
from vlkit.evaluation.results import Results, check_out_folder
from vlkit.evaluation.summary import print_caption_summary, print_captions


def score_captions(config: EvalCaptionsConfig) -> dict[str, Any]:
    """Run `vlkit eval --captions`: print a table, write results.json where --out says, return the results.

    Raises:
        DataError: see `CaptionSet.read`. QualityError: a metric is below --fail-under; everything is written.
    """
    captions, references = require_resolved(config.captions), require_resolved(config.references)
    if config.out is not None:
        if config.out.is_remote:
            raise UsageError(f"--out {config.out}: captions are scored into a folder on this machine")
        check_out_folder(config.out.path, None)
    captioned = CaptionSet.read(captions, references)
    other_texts = None if config.against is None else read_other_captions(config.against, captioned.images)
    scorer = _load_scorer(config, captioned)
    scored = ScoredCaptions.from_captions(captioned, scorer)
    base = None
    if other_texts is not None:
        base = ScoredCaptions.from_captions(captioned.with_captions(other_texts), scorer)
    results = Results(
        task="captioning",
        model=captions.stem,
        data={"path": str(references), "captions": str(captions)},
        groups={"captions": compare_captions(scored, base, draws=config.draws, seed=config.seed)},
        compared_with=str(config.against) if base else None,
        clip_model=config.clip_model,
        diversity=diversity(captioned.tokens),
        examples=worst_and_best(captioned, scored.scores),
    )
    path = None
    if config.out is not None:
        path = config.out.path / "results.json"
        results.write(path)
    print_caption_summary(results, str(captions), path)
    print_captions(captioned.images, captioned.captions, captioned.references, config.samples)
    results.check_fail_under(config.demands)
    return results.to_dict()


def _load_scorer(config: EvalCaptionsConfig, captioned: CaptionSet) -> CaptionScorer | None:
    """Load the dual encoder of --clip-model, and show it the images."""
    if config.clip_model is None:
        return None
    from vlkit.evaluation.captioning.clipscore import ClipScorer

    paths = coco_image_paths(require_resolved(config.references), require_resolved(config.images), captioned.images)
    return ClipScorer(config.clip_model, paths, config.batch_size, config.decode)
