"""The other direction of the same product: each gallery item ranks the queries while blocks of them pass by.

A row of the product is whole within its block, a column is not: the right score that its scores are counted against
must be known before. So the right scores are predicted from small products with the right items alone, and each block
then gives the actual ones. Usually both are rounded alike. Where they are not, all blocks pass once more, counted
against the actual scores: the counts never mix two ways of computing a score.
"""

from __future__ import annotations

import numpy as np
import torch

from vlkit.distributed import World
from vlkit.evaluation.retrieval.average_precision import MOST_COUNTED, MatchPositions, best_counts, count_compared
from vlkit.evaluation.retrieval.score_blocks import Block, Blocks, Matches
from vlkit.evaluation.retrieval.topk import items_of, ranking_keys, scores_of, top_items


class ReverseRanking:
    """The ranks of the gallery items, which are the columns of all blocks.

    Attributes:
        item: int64 [matched], the items that have a match, ascending.
    """

    def __init__(self, blocks: Blocks, matches: Matches, *, keep: int, all_matches: bool, world: World) -> None:
        """Predict the right scores, and begin to count.

        Args:
            keep: how many of the queries that an item ranks first to remember.
            all_matches: count at every right query, not only at the best.
            world: processes that shard the blocks.
        """
        self.keep, self.all_matches, self.world = min(keep, len(blocks.queries)), all_matches, world
        self._matches, self._shape = matches, (1, len(blocks.gallery))
        self.item = np.flatnonzero(np.bincount(matches.item, minlength=len(blocks.gallery)))
        # One row for each match of an item to count against, or one row for its best.
        self._row = np.zeros_like(matches.item)
        if all_matches:
            self._order = np.lexsort((matches.query, matches.item))
            ascending = matches.item[self._order]
            self._row[self._order] = np.arange(len(ascending)) - np.searchsorted(ascending, ascending)
            self._shape = int(self._row.max(initial=0)) + 1, len(blocks.gallery)
        predicted = blocks.gallery.new_zeros(len(matches.item))
        for match, scores in blocks.predicted_scores():
            predicted[_to_index(match, predicted)] = scores
        self._begin(self._sum_over_processes(predicted))

    def add(self, block: Block) -> None:
        """Count a block's scores."""
        self._actual[_to_index(block.match, self._actual)] = block.right
        for against, above, tied in zip(self._against, self._above, self._tied, strict=True):
            above += count_compared(torch.gt, block.scores, against, block.spare, dim=0)
            tied += count_compared(torch.eq, block.scores, against, block.spare, dim=0)
        if self.keep:
            self._remember(block)

    def _remember(self, block: Block) -> None:
        """Merge a block's queries into those that the items rank first."""
        # After a few blocks most columns have no score that would come among the first.
        reached = torch.nonzero(block.scores.amax(0) >= scores_of(self._top[:, -1]))[:, 0]
        transposed = block.scores[:, reached].T.contiguous()
        spare = block.spare.view(-1)[: transposed.numel()].view(transposed.shape)
        values, rows = top_items(transposed, min(self.keep, len(block.query)), spare)
        keys = ranking_keys(values, _to_index(block.query, rows)[rows])
        self._top[reached] = torch.cat([self._top[reached], keys], dim=1).topk(self.keep).values

    def predictions_hold(self) -> bool:
        """Return whether the blocks gave the predicted scores; if not, start over: all blocks must be added again."""
        actual = self._sum_over_processes(self._actual)
        hold = torch.equal(actual, self._right)
        if not hold:
            self._begin(actual)
        return hold

    def counts(self) -> np.ndarray:
        """Return int64 [matched, 3]: better, tied_wrong and tied_right, as `Ranks` has them."""
        above, tied = (self._sum_over_processes(counts[0]) for counts in (self._above, self._tied))
        counts = best_counts(above, tied, _to_index(self._matches.item, above), self._right, self._against[0])
        best: np.ndarray = counts.cpu().numpy()[self.item]
        return best

    def positions(self) -> MatchPositions:
        """Return the position of every right query, for each of the items that have one."""
        above, tied = (
            self._sum_over_processes(counts).cpu().numpy()[self._row, self._matches.item][self._order]
            for counts in (self._above, self._tied)
        )
        asking = np.searchsorted(self.item, self._matches.item[self._order])
        return MatchPositions.from_counts(asking, self._right.cpu().numpy()[self._order], above, tied)

    def top(self) -> np.ndarray:
        """Return int64 [matched, keep]: the queries that each item ranks first."""
        shares = self.world.all_gather(self._top[None], self.world.size).transpose(0, 1)
        top: np.ndarray = items_of(shares.flatten(1).topk(self.keep).values).cpu().numpy()[self.item]
        return top

    def _begin(self, right: torch.Tensor) -> None:
        """Reset all counts; the next blocks are counted against these scores of the matches."""
        self._right, self._actual = right, torch.zeros_like(right)
        rows, items = self._shape
        at = _to_index(self._row * items + self._matches.item, right)
        against = right.new_full((rows * items,), -torch.inf).scatter_reduce_(0, at, right, "amax")
        self._against = against.view(rows, items)
        self._above, self._tied = torch.zeros((2, rows, items), dtype=torch.int64, device=right.device)
        self._top = ranking_keys(right.new_full((items, self.keep), -torch.inf), self._above.new_zeros(1))

    def _sum_over_processes(self, mine: torch.Tensor) -> torch.Tensor:
        """Return the sum over the processes; of a match's score, all but one have zero."""
        return self.world.all_gather(mine[None], self.world.size).sum(0)


def too_many_matches(matches: Matches) -> bool:
    """Return whether an item has more right queries than are worth counting one by one."""
    return int(np.bincount(matches.item, minlength=1).max()) > MOST_COUNTED


def _to_index(positions: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(positions).to(like.device)
