"""Variants that the rules make of the training texts, without those that would be wrong or leak."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vlkit.config.data import AugmentConfig
from vlkit.data import captions, labels
from vlkit.data.augment.text_ops import TextRules
from vlkit.data.splits import hash_order

if TYPE_CHECKING:
    import pandas as pd

OTHER_GROUP = "equal to a text of another group"
HELD_OUT = "equal to a text of validation or test"


class TextVariants:
    """Variants of the training texts.

    Args:
        rows: the original rows that match, of all splits.
        held_out: texts of validation and test; None: those of `rows`.

    Attributes:
        by_text: text id -> its variants, each with the rule that makes it. None of them equals a text of another group,
            original or variant, or a held-out text; case does not count.
        folded: text id -> everything that the rules make of it, usable or not, case folded.
        dropped: why variants were left out -> how many.
    """

    def __init__(self, rows: pd.DataFrame, config: AugmentConfig, held_out: Iterable[str] | None = None) -> None:
        self.rules, self.seed, self.count = TextRules.from_config(config), config.seed, config.texts
        self.dropped: Counter[str] = Counter()
        self._held_out = set(rows.loc[rows["split"] != "train", "text"] if held_out is None else held_out)
        self._held_out_folded = set(map(captions.fold_case, self._held_out))
        self._groups_by_wording: dict[str, set[str]] = defaultdict(set)
        for text, groups in zip(rows["text"], rows["text_group"], strict=True):
            self._groups_by_wording[captions.fold_case(text)] |= labels.as_set(groups)
        training = rows[rows["split"] == "train"]
        self._groups: dict[str, set[str]] = defaultdict(set)
        for text_id, groups in zip(training["text_id"], training["text_group"], strict=True):
            self._groups[text_id] |= labels.as_set(groups)
        unique = training.drop_duplicates("text_id")
        texts = dict(zip(unique["text_id"], unique["text"], strict=True))
        variants_of = {text_id: self.rules.variants(text) for text_id, text in texts.items()}
        self.folded = {
            text_id: {captions.fold_case(variant) for variant in variants} for text_id, variants in variants_of.items()
        }
        for text_id, wordings in self.folded.items():
            for wording in wordings:
                self._groups_by_wording[wording] |= self._groups[text_id]
        self.by_text = {
            text_id: self._usable_variants(text_id, texts[text_id], variants)
            for text_id, variants in variants_of.items()
        }
        if not self.count:
            self.dropped.clear()

    def for_pair(self, pair_id: str, text_id: str) -> list[str]:
        """Return the variants of a row: drawn for the row, but the same in every row of a text of several groups.

        A variant belongs to the groups of the rows it is in, and must belong to all groups of its text.
        """
        key = pair_id if len(self._groups[text_id]) == 1 else text_id
        variants = sorted(
            self.by_text[text_id], key=lambda variant: (hash_order(self.seed, f"{key}\0{variant}"), variant)
        )
        return variants[: self.count]

    def _usable_variants(self, text_id: str, text: str, variants: dict[str, str]) -> dict[str, str]:
        usable, groups = {}, self._groups[text_id]
        for variant, rule in variants.items():
            folded = captions.fold_case(variant)
            if variant in self._held_out or (folded in self._held_out_folded and folded != captions.fold_case(text)):
                self.dropped[HELD_OUT] += 1
            elif self._groups_by_wording[folded] - groups:
                self.dropped[OTHER_GROUP] += 1
            else:
                usable[variant] = rule
        return usable
