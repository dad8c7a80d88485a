"""What the trainers measure on validation rows, and by what the best step is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlkit import console
from vlkit.config.base import require_resolved
from vlkit.config.fusion import TrainFusionConfig
from vlkit.config.training import TrainRetrievalConfig
from vlkit.distributed import World
from vlkit.evaluation.captioning.image_reliance import caption_dataset, generate_captions, image_reliance
from vlkit.evaluation.captioning.score import References, caption_metrics
from vlkit.evaluation.formatting import format_direction
from vlkit.evaluation.retrieval.task import RetrievalTask, score_task
from vlkit.metrics import SELECTION, metric_names
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.dual_encoder import DualEncoder
from vlkit.training.gradient_cache import ContrastiveLoss
from vlkit.training.setup.fill_cache import EvalInputs
from vlkit.training.setup.rows import CaptionRows

EVAL_BATCH = 256


@dataclass
class RetrievalValidation:
    """Retrieval in both directions on the validation rows.

    Attributes:
        task: None where there are no validation rows.
        inputs: images and texts, or cached features of them.
    """

    encoder: DualEncoder
    config: TrainRetrievalConfig
    objective: ContrastiveLoss
    world: World
    task: RetrievalTask | None
    inputs: EvalInputs | None = None

    def metrics(self, task: RetrievalTask | None = None, inputs: EvalInputs | None = None) -> dict[str, Any]:
        """Score the encoder as it is on the validation rows, or on another task."""
        inputs = inputs or self.inputs
        assert inputs is not None
        return score_task(
            self.encoder,
            require_resolved(task or self.task),
            batch_size=min(require_resolved(self.config.batch_size), self.objective.micro_batch or EVAL_BATCH),
            precision=require_resolved(self.config.precision),
            image_inputs=inputs.images,
            text_inputs=inputs.texts,
            world=self.world,
        ).metrics()

    def scores(self) -> tuple[dict[str, Any], list[float], str]:
        """Return what `RunState.record` takes: metrics, the key of the best (recall@1, then MRR), and a line."""
        metrics = self.metrics()
        key = [sum(direction[name] for direction in metrics.values()) for name in SELECTION]
        name = SELECTION[0]
        values = (f"{format_direction(direction)} {scores[name]:.3f}" for direction, scores in metrics.items())
        return metrics, key, f"{name} {', '.join(values)}"


class CaptionValidation:
    """Validation of a captioner: does it use the image, and what does it write?

    Attributes:
        dataset: one caption for each validation image.
        blank: patches of a blank image, [1, patches, width].
    """

    def __init__(self, captioner: Captioner, config: TrainFusionConfig, rows: CaptionRows, world: World) -> None:
        self.captioner, self.config, self.rows, self.world = captioner, config, rows, world
        self.dataset, _ = caption_dataset(rows.val, captioner, config.max_length, world)
        self.blank = captioner.patches(captioner.vision.blank())

    def scores(self) -> tuple[dict[str, Any], list[float], str]:
        """Return what `RunState.record` takes: scores, the key of the best (minus the loss), and a line."""
        reliance = image_reliance(self.captioner, self.dataset, self.blank, seed=self.config.seed)
        samples = self._samples()
        shuffled = "-" if reliance.shuffled is None else f"{reliance.shuffled:.3f}"
        line = f"loss {reliance.right:.3f} nats a token, shuffled image {shuffled}, blank {reliance.blank:.3f}"
        if samples:
            line += f'; "{samples[0]["caption"]}"'
        return {"looking": reliance.to_dict(), "samples": samples}, [-reliance.right], line

    def _samples(self) -> list[dict[str, str]]:
        """Caption a few validation images, always the same; rank 0 alone."""
        frame, count = self.rows.val.frame, min(self.config.samples, len(self.dataset))
        if not self.world.is_main or not count:
            return []
        texts = generate_captions(
            self.captioner,
            self.dataset.images,
            self.dataset.image_of[:count].tolist(),
            num_beams=1,
            max_new_tokens=self.config.max_new_tokens,
        )
        return [
            {"image": str(frame["image"].iloc[row]), "caption": text, "reference": str(frame["text"].iloc[row])}
            for row, text in enumerate(texts)
        ]

    def caption_scores(self) -> dict[str, float]:
        """Caption every validation image and score it: BLEU, ROUGE_L, CIDEr, exact matches."""
        with console.progress("writing captions", len(self.dataset)) as bar:
            texts = generate_captions(
                self.captioner,
                self.dataset.images,
                self.dataset.image_of.tolist(),
                num_beams=self.config.num_beams,
                max_new_tokens=self.config.max_new_tokens,
                on_progress=bar.update,
            )
        scores = caption_metrics(list(self.rows.val.frame["image_id"]), texts, References.from_pairs(self.rows.val_all))
        line = ", ".join(f"{name} {scores[name]:.3f}" for name in metric_names("captions", "comparison"))
        console.say(f"validation captions of {len(texts)} images: {line}")
        return scores
