"""The stages of progressive training: which part of the model each phase holds and trains, and how the model is cut for them.

The model's blocks, without the last one, which is the head, are divided into *groups* of neighbours, theta_1 to theta_T. In
stage t the groups before t are frozen, group t is trained, and each group behind it is represented by a proxy::

    train      [theta_1 .. theta_t-1 frozen]  theta_t  [c_t+1 .. c_T]  head         trained: theta_t, the proxies, the head
    imitate    [theta_1 .. theta_t frozen]    c_t                                   trained: c_t
    collect    [theta_1 .. theta_T-1 frozen]                                        statistics alone
"""

from collections.abc import Sequence
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
