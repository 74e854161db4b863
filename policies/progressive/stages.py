"""The stages of progressive training: which part of the model each phase holds and trains, and how the model is cut for them.

The model's blocks, without the last one, which is the head, are divided into *groups* of neighbours, theta_1 to theta_T. In
stage t the groups before t are frozen, group t is trained, and each group behind it is represented by a proxy::

    train      [theta_1 .. theta_t-1 frozen]  theta_t  [c_t+1 .. c_T]  head         trained: theta_t, the proxies, the head
    imitate    [theta_1 .. theta_t frozen]    c_t                                   trained: c_t
    collect    [theta_1 .. theta_T-1 frozen]                                        statistics alone
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from ...learning.parts.part import Part, proxy

Groups = tuple[tuple[str, ...], ...]


def grouped(names: Sequence[str], ends: Sequence[str]) -> Groups:
    """The groups that end with the blocks ``ends``, and the last one. ``names``: of the model's blocks, the head last."""
    body = names[:-1]
    bounds = [0, *(body.index(end) + 1 for end in ends), len(body)]
    return tuple(tuple(body[start:end]) for start, end in pairwise(bounds) if end > start)


def proxies(groups: Groups, first: int) -> tuple[str, ...]:
    """The proxies of all groups from number ``first`` on."""
    return tuple(proxy(group[0], group[-1]) for group in groups[first:])


def train_part(groups: Groups, head: str, stage: int) -> Part:
    """The part that is trained in a stage, which is counted from 0."""
    return Part(
        blocks=(*_joined(groups[: stage + 1]), head),
        trained=(*groups[stage], head),
        auxiliaries=proxies(groups, stage + 1),
    )


def head_part(groups: Groups, head: str, stage: int) -> Part:
    """The part of a stage with nothing but the head trained, whose training keeps no activation of the blocks."""
    whole = train_part(groups, head, stage)
    return Part(blocks=whole.blocks, trained=(head,), auxiliaries=whole.auxiliaries, untrained=whole.auxiliaries)


def imitate_part(groups: Groups, stage: int) -> Part:
    """The part in which the proxy of a group learns to imitate it."""
    return Part(blocks=_joined(groups[: stage + 1]), trained=(), auxiliaries=proxies(groups, stage)[:1])


def collect_part(groups: Groups) -> Part:
    """The part of which running statistics are collected: what stands before any trained block while the model shrinks."""
    return Part(blocks=_joined(groups[:-1]), trained=())


def shrunk_path(groups: Groups, head: str, stage: int) -> Part:
    """The model while the proxy of a group learns: the groups before it, proxies from there on, and the head."""
    return Part(blocks=(*_joined(groups[:stage]), head), trained=(), auxiliaries=proxies(groups, stage))


def _joined(groups: Groups) -> tuple[str, ...]:
    return tuple(name for group in groups for name in group)


def choose_groups(names: Sequence[str], most: int, *, peak: Callable[[Groups, int], int], frozen: int) -> Groups:
    """The division into at most ``most`` groups whose worst stage needs the least memory.

    ``names``: of the model's blocks, the head last. ``peak``: memory of a stage of a division, which is a dry run of training.
    ``frozen``: memory with the head alone trained. What each block adds to that is measured in a group of its own, with one
    proxy for all blocks behind it; a longer group is taken to need the sum, and the best division by these sums is found by
    dynamic programming, for each number of groups. Then single boundaries move as long as that lowers the true peaks. So n
    blocks take a few times n dry runs and not n^2. Ties: the fewest groups.
    """
    body = tuple(names[:-1])
    count = len(body)
    added = []
    for number in range(count):
        before = (body[:number],) if number else ()
        behind = (body[number + 1 :],) if number + 1 < count else ()
        added.append(max(0, peak((*before, (body[number],), *behind), len(before)) - frozen))
    worst = [sum(added[start:]) for start in range(count)]  # of the blocks from ``start`` on, in so many groups
    starts: list[tuple[int, ...]] = [(start,) for start in range(count)]
    found = [_improved(body, starts[0][1:], peak)]
    for size in range(2, min(most, count) + 1):
        last = count - size + 1  # where the first of these groups begins at the latest
        options = [
            [(max(sum(added[start:end]), worst[end]), (start, *starts[end])) for end in range(start + 1, last + 1)]
            for start in range(last)
        ]
        best = [min(each, key=lambda option: option[0]) for each in options]
        worst, starts = [each[0] for each in best], [each[1] for each in best]
        found.append(_improved(body, starts[0][1:], peak))
    return min(found, key=lambda each: each[0])[1]


def _improved(body: tuple[str, ...], bounds: Sequence[int], peak: Callable[[Groups, int], int]) -> tuple[int, Groups]:
    """Move one boundary by one block at a time as long as that helps; returns the worst peak and the division.

    It helps if the worst peak falls, or, where that stays, the next one. ``bounds``: where the later groups begin.
    """
    known: dict[tuple[int, ...], list[int]] = {}

    def divided(inner: Sequence[int]) -> Groups:
        return tuple(body[start:end] for start, end in pairwise([0, *inner, len(body)]))

    def peaks(inner: Sequence[int]) -> list[int]:
        key = tuple(inner)
        if key not in known:
            groups = divided(inner)
            known[key] = sorted((peak(groups, stage) for stage in range(len(groups))), reverse=True)
        return known[key]

    while True:
        neighbours = []
        for number in range(len(bounds)):
            for step in (-1, 1):
                moved = [*bounds[:number], bounds[number] + step, *bounds[number + 1 :]]
                if all(a < b for a, b in pairwise([0, *moved, len(body)])):
                    neighbours.append(moved)
        better = min(neighbours, key=peaks, default=bounds)
        if peaks(better) >= peaks(bounds):
            return peaks(bounds)[0], divided(bounds)
        bounds = better
