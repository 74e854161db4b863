"""The division of a model's blocks into groups whose worst stage needs the least memory.

What a stage needs is known from a dry run of training, which takes a tenth of a second, and n blocks have 2^(n-1) divisions. A
stage depends on where its group begins and ends and where the groups behind it end, each of which has a proxy; not on how the
frozen blocks before it are divided. So divisions share stages. Beyond that, two properties bound what has not been predicted
from what has been. A stage needs no less

- if its group has one more block at the front, which was frozen and is now trained, and
- if the blocks behind it are divided further, since there are more proxies.

All divisions are kept in the order of these bounds. One unknown stage of the best division is predicted, which raises the
bounds of others, until the best one has no unknown stage: no other one can need less. (LazySP: Dellin and Srinivasa, "A
Unifying Formalism for Shortest Path Problems with Expensive Edge Evaluations via Lazy Best-First Search over Paths with Edge
Selectors", ICAPS 2016, arXiv 1603.03490; here for the worst edge of a path.) With 13 blocks and 6 groups, some 200 of 3171
stages are predicted.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from math import comb

from .stages import Groups

MOST_UNITS = 24
MOST_DIVISIONS = 50_000

Key = tuple[int, ...]  # of a stage: where its group begins and ends, and where each group behind it ends
Rank = tuple[int, int, list[int]]  # of a division: worst stage, number of groups, all stages from the worst on


def choose_groups(names: Sequence[str], most: int, *, peak: Callable[[Groups, int], int]) -> Groups:
    """The division into at most ``most`` groups whose worst stage needs the least memory.

    ``names``: of the model's blocks, the head last. ``peak``: memory of a stage of a division, with the properties that the
    module describes; where it lacks them a better division may be missed. Ties: the fewest groups, then the least memory of
    the next stage. Of more than ``MOST_UNITS`` blocks, or of fewer that have more than ``MOST_DIVISIONS`` divisions, neighbours
    stay together, in runs of equal length.
    """
    ends = _ends(len(names) - 1, most)

    def predicted(key: Key) -> int:
        starts = (0, *key) if key[0] else key
        groups = tuple(tuple(names[ends[a] : ends[b]]) for a, b in pairwise(starts))
        return peak(groups, 1 if key[0] else 0)

    best = _Search(len(ends) - 1, most, predicted).best()
    return tuple(tuple(names[ends[key[0]] : ends[key[1]]]) for key in best)


def _ends(count: int, most: int) -> list[int]:
    """Where groups of so many blocks may end, from 0 on."""
    units = max(size for size in range(1, min(count, MOST_UNITS) + 1) if _num_divisions(size, most) <= MOST_DIVISIONS)
    return [count * number // units for number in range(units + 1)]


def _num_divisions(count: int, most: int) -> int:
    return sum(comb(count - 1, groups - 1) for groups in range(1, min(most, count) + 1))


def _divisions(count: int, most: int) -> Iterator[tuple[Key, ...]]:
    """All divisions into at most ``most`` groups, each as the keys of its stages."""
    for groups in range(1, min(most, count) + 1):
        for inner in combinations(range(1, count), groups - 1):
            bounds = (0, *inner, count)
            yield tuple(bounds[number:] for number in range(groups))


class _Search:
    """Bounds of all stages, those that are predicted, and the divisions in the order of their bounds."""

    def __init__(self, count: int, most: int, peak: Callable[[Key], int]) -> None:
        self._count, self._peak = count, peak
        self._known: set[Key] = set()
        self._bound: dict[Key, int] = {}
        self._by_end: dict[int, list[tuple[Key, frozenset[int]]]] = defaultdict(list)
        divisions = list(_divisions(count, most))
        for key in dict.fromkeys(key for keys in divisions for key in keys):
            self._bound[key] = 0
            self._by_end[key[1]].append((key, frozenset(key[2:])))
        self._heap = [(self._rank(keys), keys) for keys in divisions]
        heapq.heapify(self._heap)

    def best(self) -> tuple[Key, ...]:
        """The keys of the best division's stages."""
        while True:
            rank, keys = self._heap[0]
            newest = self._rank(keys)
            if newest != rank:
                heapq.heapreplace(self._heap, (newest, keys))
            elif unknown := [key for key in keys if key not in self._known]:
                self._predict(max(unknown, key=lambda key: key[1] - key[0]))
            else:
                return keys

    def _rank(self, keys: tuple[Key, ...]) -> Rank:
        bounds = sorted((self._bound[key] for key in keys), reverse=True)
        return bounds[0], len(bounds), bounds

    def _predict(self, key: Key) -> None:
        """Predict a stage, or first the one with the same group and a single one behind it, which bounds more others."""
        coarse = (*key[:2], self._count)
        if len(key) > len(coarse) and coarse not in self._known:
            key = coarse
        self._known.add(key)
        self._bound[key] = needed = self._peak(key)
        behind = set(key[2:])
        for other, others_behind in self._by_end[key[1]]:
            known = other in self._known  # where the properties fail, what was predicted counts
            if not known and other[0] <= key[0] and behind <= others_behind and self._bound[other] < needed:
                self._bound[other] = needed
