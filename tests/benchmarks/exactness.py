"""How far a gradient that is found in pieces is from the gradient of the whole batch, of vlkit and of its peers.

One tiny model, one batch of four pieces, float32. Each library is compared with itself: its own loss over all pairs in
one graph. With dropout, that graph drops what the pieces' first pass has dropped. A difference is the norm of the
difference over the norm.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measuring
import ours
import peers
import photos
import torch
from open_clip_weights import open_clip_model

PIECES = 4
DROPOUT, PATCH_DROPOUT = 0.1, 0.5


@dataclass(frozen=True)
class Gradient:
    """A batch's loss, and its gradient by parameter."""

    loss: float
    weights: Mapping[str, torch.Tensor]

    def apart(self, whole: Gradient) -> dict[str, float | None]:
        """How far it is from that of the whole batch; scale None: the library trains none."""

        def differ(names: Sequence[str]) -> float | None:
            if not names:
                return None
            found, right = (torch.cat([each.weights[name].flatten() for name in names]) for each in (self, whole))
            return float((found - right).norm() / right.norm())

        scale = [name for name in whole.weights if "logit_scale" in name]
        body = [name for name in whole.weights if name not in scale]
        loss = abs(self.loss - whole.loss) / abs(whole.loss)
        return {"loss": loss, "body": differ(body), "scale": differ(scale)}


class Recorder(torch.optim.SGD):
    """Takes no step: it keeps the gradient that it was asked to follow."""

    def __init__(self, named: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__([{"params": list(named.items()), "peak_lr": 0.0}], lr=0.0)
        self.named, self.found = named, dict[str, torch.Tensor]()

    def step(self, closure: Any = None) -> None:
        """Keep it."""
        self.found = {name: p.grad.clone() for name, p in self.named.items() if p.grad is not None}


def of_vlkit(work: peers.Work, loss_of: Callable[[Any], Any], pieces: int = 1) -> Gradient:
    """By its own loop.

    Args:
        loss_of: model -> what the loop is given.
        pieces: of ordinary accumulation.
    """
    from vlkit.data.loading.epoch_sampler import batch_stream
    from vlkit.models import tuning
    from vlkit.training.loop import steps

    model, dataset, _ = ours.opened(work)
    recorder = Recorder(tuning.trainable(model))
    batches = batch_stream(dataset, ours.drawn(work.order[:1], pieces), workers=0)
    unclipped = {"accumulate": pieces, "max_grad_norm": math.inf}
    done = next(steps(batches, loss_of(model), len, recorder, total=1, **unclipped))
    return Gradient(done.loss, recorder.found)


def vlkit_ways(work: peers.Work, size: int, dropout: bool) -> dict[str, dict[str, float | None]]:
    """Micro-batches, and ordinary accumulation."""
    from vlkit.training.gradient_cache import ContrastiveLoss
    from vlkit.training.losses import LOSSES

    def in_one_graph(model: Any) -> Callable[[Any], torch.Tensor]:
        def loss_of(batch: Any) -> torch.Tensor:
            at_once = size if dropout else len(batch)
            images = torch.cat([model.embed_images(part) for part in batch.images.split(at_once)])
            texts = torch.cat([model.embed_texts(part) for part in batch.texts.split(at_once)])
            return LOSSES["softmax"](model.logits(images, texts[batch.text_index]), batch.labels.rows())

        return loss_of

    whole = of_vlkit(work, in_one_graph)
    micro = of_vlkit(work, lambda model: ContrastiveLoss(model, "softmax", size))
    plain = of_vlkit(work, lambda model: ContrastiveLoss(model, "softmax"), PIECES)
    return {"vlkit, micro-batches": micro.apart(whole), "vlkit, accumulation": plain.apart(whole)}


def sentence_transformers_ways(work: peers.Work, size: int, dropout: bool) -> dict[str, dict[str, float | None]]:
    """Its cached symmetric loss beside its symmetric loss."""
    from PIL import Image
    from sentence_transformers import SentenceTransformer, losses
    from sentence_transformers.base.modules import Transformer

    model = SentenceTransformer(modules=[Transformer(str(work.model))], device="cpu").train()
    rows = list(work.order[0])

    def inputs(some: Sequence[int]) -> list[Any]:
        pictures = [Image.open(work.files[row]).convert("RGB") for row in some]
        return [model.preprocess(pictures), model.preprocess([work.texts[row] for row in some])]

    def gradient(loss: torch.Tensor) -> Gradient:
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return Gradient(loss.item(), found)

    cached = losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=size)
    symmetric = losses.MultipleNegativesSymmetricRankingLoss(model)
    torch.manual_seed(0)
    at_once = size if dropout else len(rows)
    pieces = [inputs(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]
    embedded = [torch.cat([model(part[kind])["sentence_embedding"] for part in pieces]) for kind in range(2)]
    whole = gradient(symmetric.compute_loss_from_embeddings(embedded, None))
    torch.manual_seed(0)
    return {"sentence-transformers, cached": gradient(cached(inputs(rows), None)).apart(whole)}


def open_clip_ways(work: peers.Work, size: int, dropout: bool) -> dict[str, dict[str, float | None]]:
    """Its own loop with --accum-freq beside its own loss over all pairs."""
    from open_clip import ClipLoss
    from open_clip.transformer import PatchDropout
    from open_clip_train.train import train_one_epoch

    pixels, texts = _tensors(work)
    model = open_clip_model(work.model).train()
    if dropout:
        model.visual.patch_dropout = PatchDropout(PATCH_DROPOUT)
    recorder = Recorder(dict(model.named_parameters()))
    told: list[float] = []

    def loss_of(**outputs: Any) -> Any:
        found = ClipLoss()(**outputs)
        told.append(found["contrastive_loss"].item())
        return found

    at_once = size if dropout else len(pixels)
    torch.manual_seed(0)
    parts = [model(*part) for part in zip(pixels.split(at_once), texts.split(at_once), strict=True)]
    features = {kind: torch.cat([part[kind] for part in parts]) for kind in ("image_features", "text_features")}
    whole_loss = loss_of(**features, logit_scale=parts[0]["logit_scale"], output_dict=True)
    whole_loss["contrastive_loss"].backward()
    recorder.step()
    whole = Gradient(told[-1], recorder.found)
    batches = list(zip(pixels.split(size), texts.split(size), strict=True))
    data = {"train": SimpleNamespace(dataloader=peers.Timed(batches, PIECES, len(pixels)), set_epoch=lambda epoch: 0)}
    torch.manual_seed(0)
    arguments = peers.open_clip_arguments("fp32", size, accumulate=PIECES, grad_clip_norm=None)
    train_one_epoch(model, data, loss_of, 0, recorder, None, None, None, arguments)
    return {f"open_clip, --accum-freq {PIECES}": Gradient(told[-1], recorder.found).apart(whole)}


def _tensors(work: peers.Work) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's pixels and its token ids, as open_clip wants them."""
    model, dataset, _ = ours.opened(work)
    batch = dataset[ours.drawn(work.order[:1])[0]]
    ids = batch.texts[batch.text_index]
    return model.normalize_pixels(batch.images), torch.nn.functional.pad(ids, (0, work.limit - ids.shape[1]))


WAYS = {
    "vlkit": vlkit_ways,
    "sentence-transformers": sentence_transformers_ways,
    "open_clip": open_clip_ways,
}


def measured(folder: Path, micro: int, without_peers: bool) -> dict[str, Any]:
    """Rows: what is done, and how far it is off; `dropout` too, where something is dropped."""
    files = photos.write_photos(folder / "photos", PIECES * micro, 160, 120)
    texts = photos.captions(len(files))
    photos.write_model(folder / "model", "tiny", texts)
    work = peers.Work(folder / "model", files, texts, [range(len(files))], "fp32")
    here, left_out = ([], []) if without_peers else peers.installed([way for way in WAYS if way in peers.TRAINERS])
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    rows: dict[str, Any] = {}
    for dropout in (False, True):
        if dropout:
            _drop(folder / "model")
        for library in ("vlkit", *here):
            for way, found in WAYS[library](work, micro, dropout).items():
                rows[way] = {**rows[way], "dropout": found["body"]} if dropout else found
    return {"batch": len(files), "micro": micro, "rows": rows}


def _drop(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in ("vision_config", "text_config"):
        config[part]["attention_dropout"] = DROPOUT
    path.write_text(json.dumps(config))


def shown(found: dict[str, Any]) -> str:
    """The table."""

    def cell(value: float | None) -> str:
        return "not trained" if value is None else f"{value:.0e}" if value < 0.01 else f"{value:.2f}"

    head = ["", "loss", "weights", "logit scale", "weights, with dropout"]
    keys = ("loss", "body", "scale", "dropout")
    rows = [[way, *(cell(row[key]) for key in keys)] for way, row in found["rows"].items()]
    title = f"how far from the whole batch: {found['batch']} in {found['micro']}s, tiny, fp32; relative differences"
    note = f"dropout: of attention {DROPOUT}; open_clip, which has none, drops patches ({PATCH_DROPOUT})"
    return f"{title}\n{measuring.table(head, rows)}\n{note}"
