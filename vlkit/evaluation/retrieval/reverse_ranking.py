"""The other direction of the same product: each gallery item ranks the queries while blocks of them pass by.

A row of the product is whole within its block, a column is not: what its scores are counted against has to be known
before. So the right scores are guessed, from small products with the right items alone, and then each block says what
they are. Mostly both are rounded alike. Where they are not, the blocks pass by once more, against what they said: the
counts never mix two ways of computing a score.
"""

from __future__ import annotations

import numpy as np
import torch

from vlkit.distributed import World
from vlkit.evaluation.retrieval.average_precision import COUNTED, MatchPositions, best_counts, count_compared
from vlkit.evaluation.retrieval.score_blocks import Block, Blocks, Matches
from vlkit.evaluation.retrieval.topk import items_of, ranking_keys, scores_of, top_items


class ReverseRanking:
    """What the columns of all blocks come to.

    Attributes:
        item: int64 [asking], the items that have a match, ascending.
    """

    def __init__(self, blocks: Blocks, matches: Matches, *, keep: int, all_matches: bool, world: World) -> None:
        """
        Args:
            keep: how many of the queries that an item ranks first to remember.
            every: look at every right query, not at the best alone.
            world: processes that share the blocks.
        """
        self.keep, self.all_matches, self.world = min(keep, len(blocks.queries)), all_matches, world
        self._matches, self._shape = matches, (1, len(blocks.gallery))
        self.item = np.flatnonzero(np.bincount(matches.item, minlength=len(blocks.gallery)))
        # Each match is counted against in a row of its own, or the best of them in one.
        self._row = np.zeros_like(matches.item)
        if all_matches:
            self._order = np.lexsort((matches.query, matches.item))
            ascending = matches.item[self._order]
            self._row[self._order] = np.arange(len(ascending)) - np.searchsorted(ascending, ascending)
            self._shape = int(self._row.max(initial=0)) + 1, len(blocks.gallery)
        guess = blocks.gallery.new_zeros(len(matches.item))
        for match, scores in blocks.guessed():
            guess[_at(match, guess)] = scores
        self._begin(self._summed(guess))

    def add(self, block: Block) -> None:
        """Count a block's scores."""
        self._said[_at(block.match, self._said)] = block.right
        for against, above, tied in zip(self._against, self._above, self._tied, strict=True):
            above += count_compared(torch.gt, block.scores, against, block.spare, dim=0)
            tied += count_compared(torch.eq, block.scores, against, block.spare, dim=0)
        if self.keep:
            self._remember(block)

    def _remember(self, block: Block) -> None:
        """Merge what a block has of the queries that the items rank first."""
        # After a few blocks most columns have nothing that would come among the first.
        reached = torch.nonzero(block.scores.amax(0) >= scores_of(self._top[:, -1]))[:, 0]
        turned = block.scores[:, reached].T.contiguous()
        spare = block.spare.view(-1)[: turned.numel()].view(turned.shape)
        values, rows = top_items(turned, min(self.keep, len(block.query)), spare)
        found = ranking_keys(values, _at(block.query, rows)[rows])
        self._top[reached] = torch.cat([self._top[reached], found], dim=1).topk(self.keep).values

    def held(self) -> bool:
        """Whether the blocks said what was guessed. If not, all of them have to be added again."""
        said = self._summed(self._said)
        held = torch.equal(said, self._right)
        if not held:
            self._begin(said)
        return held

    def counts(self) -> np.ndarray:
        """int64 [asking, 3]: better, tied_wrong and tied_right, as `Ranks` has them."""
        above, tied = (self._summed(counts[0]) for counts in (self._above, self._tied))
        found = best_counts(above, tied, _at(self._matches.item, above), self._right, self._against[0])
        return found.cpu().numpy()[self.item]

    def places(self) -> MatchPositions:
        """Where every right query stands, for each of the items that have one."""
        above, tied = (
            self._summed(counts).cpu().numpy()[self._row, self._matches.item][self._order]
            for counts in (self._above, self._tied)
        )
        asking = np.searchsorted(self.item, self._matches.item[self._order])
        return MatchPositions.from_counts(asking, self._right.cpu().numpy()[self._order], above, tied)

    def top(self) -> np.ndarray:
        """int64 [asking, keep]: the queries that each item ranks first."""
        shares = self.world.all_gather(self._top[None], self.world.size).transpose(0, 1)
        return items_of(shares.flatten(1).topk(self.keep).values).cpu().numpy()[self.item]

    def _begin(self, right: torch.Tensor) -> None:
        """Nothing has been counted; these scores of the matches are counted against."""
        self._right, self._said = right, torch.zeros_like(right)
        rows, items = self._shape
        at = _at(self._row * items + self._matches.item, right)
        against = right.new_full((rows * items,), -torch.inf).scatter_reduce_(0, at, right, "amax")
        self._against = against.view(rows, items)
        self._above, self._tied = torch.zeros((2, rows, items), dtype=torch.int64, device=right.device)
        self._top = ranking_keys(right.new_full((items, self.keep), -torch.inf), self._above.new_zeros(1))

    def _summed(self, mine: torch.Tensor) -> torch.Tensor:
        """Over the processes; of scores, all but one have zeros."""
        return self.world.all_gather(mine[None], self.world.size).sum(0)


def too_many_matches(matches: Matches) -> bool:
    """Whether an item has more right queries than are worth counting one by one."""
    return int(np.bincount(matches.item, minlength=1).max()) > COUNTED


def _at(places: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(places).to(like.device)
