"""augment --preview: what the rows would show, on one sheet, before thousands are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkit import console
from vlkit.data.augment.contact_sheet import Cell, write_contact_sheet
from vlkit.data.augment.negatives import EmbedTexts, NegativeSampler
from vlkit.data.images import decode
from vlkit.data.pairs import PREVIEW_FILE
from vlkit.data.splits import hash_order
from vlkit.storage import atomic_file

if TYPE_CHECKING:
    from vlkit.data.augment.augment import Augmentation

AT_LEAST = 3  # variants of a picture, so that ranges can be judged


def write_preview(work: Augmentation, embed: EmbedTexts | None, *, dry_run: bool = False) -> dict[str, Any]:
    """Write augment_preview.png: a row for each of --preview pictures, a cell for each row of its first text.

    Where fewer variants of a picture are wanted than tell what the ranges do, later epochs stand beside them. It goes
    into the prepared folder; of one behind a URL, into the working directory.
    """
    config = work.config
    path = Path(PREVIEW_FILE) if config.data.is_remote else config.data.path / PREVIEW_FILE
    unique = work.training.drop_duplicates("image_id")
    order = sorted(unique.index, key=lambda row: hash_order(config.seed, unique["image_id"][row]))
    chosen = unique.loc[order[: config.preview]].reset_index(drop=True)
    result = {"data": str(config.data), "preview": str(path), "pictures": len(chosen), "dry_run": dry_run}
    if dry_run:
        console.print_result(f"{path} would show {len(chosen)} pictures with their variants")
        return result
    negatives = work.negatives(work.training, embed)
    named = zip(chosen.to_dict("records"), work.paths(chosen), strict=True)
    with atomic_file(path) as aside:
        write_contact_sheet(aside, [list(_cells(row, place, work, negatives)) for row, place in named])
    console.print_result(f"{path}: {len(chosen)} training pictures with their variants and negatives")
    return result


def _cells(row: dict[str, Any], path: Path, work: Augmentation, negatives: NegativeSampler) -> Iterator[Cell]:
    config, image_id, text_id = work.config, row["image_id"], row["text_id"]
    original = decode.load_rgb(path, max_side=config.max_side)
    yield Cell(original, row["text"], "the original")
    for epoch in range(max(AT_LEAST, config.pictures)) if config.pictures else ():
        applied = ", ".join(
            f"{name.replace('_', ' ')} {amount:.2g}".removesuffix(" 0")
            for name, amount in work.augmenter.chosen_operations(epoch, image_id).items()
        )
        seen = "" if epoch < config.pictures else f"(epoch {epoch}) "
        yield Cell(work.augmenter.load_image(path, epoch, image_id), row["text"], seen + (applied or "as it is"))
    for variant in work.phrasings.of_pair(row["pair_id"], text_id):
        yield Cell(original, variant, work.phrasings.of_text[text_id][variant])
    for wrong in negatives.choose(row["pair_id"], image_id, text_id, config.negatives_per_positive):
        yield Cell(original, wrong.text, "a negative")
