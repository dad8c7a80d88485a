"""The token table of a text encoder, of which a domain's captions use few rows: only those are trained.

A row whose token never occurs gets no gradient. AdamW leaves its moments at zero and does nothing but decay it, by a
factor that is the same for every such row. So they need neither gradient nor moments: one row of ones, decayed beside
those that are used, says what has become of them all. The numbers are those of the whole table, to rounding; CLIP's has
49,408 rows of which 38 class captions use about a hundred.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlkit.models.dual_encoder import DualEncoder

# Of a table that is used for the most part little would be saved.
SHARE = 0.5


class PartialEmbedding(nn.Embedding):
    """torch's, with its rows in two places. Its state is that of a whole table.

    Attributes:
        weight: [tokens, width], as it was before the first step, frozen.
        used: [rows + 1, width], what is trained: the rows of the tokens that occur, and one that began as ones and is
            never looked up: a row that does not occur is what it was, times this one.
        place: int64 [tokens], each token's row of `used`; the last one where it does not occur.
        padding_place: the row of `used` that gets no gradient: padding's, in the encoders that do not train it.
    """

    used: nn.Parameter
    place: torch.Tensor
    padding_place: int | None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> [..., width]. One that was not to occur is looked up all the same, and not trained."""
        place = self.place[input_ids]
        values = F.embedding(place, self.used, self.padding_place)
        others = (self.weight[input_ids] * self.used[-1]).detach()
        return torch.where((place == len(self.used) - 1)[..., None], others, values)

    @torch.no_grad()
    def whole(self) -> torch.Tensor:
        """[tokens, width], as training the whole table would have made it."""
        found = self.weight * self.used[-1]
        occurs = self.place < len(self.used) - 1
        found[occurs] = self.used[self.place[occurs]]
        return found

    def told(self) -> str:
        """How many of its rows are trained."""
        return f"{len(self.used) - 1:,} of the token table's {len(self.weight):,} rows occur in the captions"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.whole()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        whole, used = state.get(f"{prefix}weight"), self.used.detach()
        if whole is not None and whole.shape == self.weight.shape:  # Where it is not, torch says so.
            rows = whole[self.place.to(whole.device) < len(self.used) - 1]
            used = torch.cat([rows, torch.ones_like(whole[:1])])  # From here on nothing has decayed.
        super()._load_from_state_dict({**state, f"{prefix}used": used}, prefix, *rest)


def train_used_rows(encoder: DualEncoder, texts: Iterable[Iterable[int]], whole: Container[str] = ()) -> PartialEmbedding | None:
    """Train, of the token table, the rows that these texts use, in place.

    Args:
        towers: on the device that they are trained on; what is trained is decided.
        texts: token ids of all texts that they will be trained on.
        whole: names of parameters that the run has trained whole so far.

    Returns:
        The table; None where it stays whole: it is not trained, most of it is used, or it is of a kind of its own.
    """
    try:
        table = encoder.model.text_model.get_input_embeddings()
    except NotImplementedError:  # CANINE's: its characters have no table.
        return None
    plain = type(table) is nn.Embedding and not (table.sparse or table.scale_grad_by_freq or table.max_norm)
    if not plain or not table.weight.requires_grad:
        return None
    if next(name for name, p in encoder.model.named_parameters() if p is table.weight) in whole:
        return None
    used = torch.tensor(sorted({encoder.pad_id}.union(*texts)), device=table.weight.device)
    if len(used) > SHARE * table.num_embeddings:
        return None
    table.weight.requires_grad_(False)
    table.__class__ = PartialEmbedding
    table.used = nn.Parameter(torch.cat([table.weight[used], torch.ones_like(table.weight[:1])]))
    place = torch.full((table.num_embeddings,), len(used), device=used.device)
    place[used] = torch.arange(len(used), device=used.device)
    table.register_buffer("place", place, persistent=False)
    table.padding_place = None if table.padding_idx is None else int(place[table.padding_idx])
    return table
