"""The part of the model that a device holds, trains and receives: plain data, in the names of the full model.

Five published methods are expressed by it: in EcoFed and split learning devices hold the first blocks (``blocks``), with a
frozen trunk (``trained``) that they have already (``cached``); REFT narrows them (``width``, ``index_map``); ProFL trains one
block behind a frozen prefix (``trained``) with proxies in place of the blocks behind it (``auxiliaries``, ``head``).
"""

import hashlib
from typing import Annotated, Literal

import msgspec

from ..spec import Count, CountOrZero
from .structure import ModelSpec

# The first channels of each group; a window of them that moves on; those with the largest L1 norms of their filters, or with
# the largest scales of their batch normalisation.
ChannelRule = Literal["prefix", "rolling", "l1", "batchnorm"]


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device's part of the model.

    Attributes:
        blocks: blocks that the device holds, in model order.
        trained: the blocks that are trained; the others are frozen and not averaged.
        cached: (block, content hash) pairs that the device is known to hold. They are not sent, and the device checks the hash.
        frozen: hash of all tensors of the blocks that the model's author has frozen, which every process has from the start;
            "" if there are none. The runtime sets ``cached`` and ``frozen``.
        model: family of models that the part is of (``models`` in the configuration); "" means the global model.
        width: share of the channels that the device holds in each group of channels that can be removed (``parts.channels``),
            rounded up. At width 1 the part is of the whole width, and the next five fields have no meaning.
        min_channels: channels that each group keeps at least, as far as it has as many.
        channels: the rule by which the channels are chosen.
        turn: number of the choice. When it changes, rules that rank channels by the model's weights rank them anew, and a
            rolling window moves on.
        scaled: while training, the outputs of narrowed layers are divided by ``width`` (HeteroFL's scaler, arXiv 2010.01264).
        index_map: content hash of the map that says which channels are held; "" until the runtime fills it in.
        head: name of an auxiliary head in place of the model's own; "" means the model's own.
        auxiliaries: proxies and heads that are held and sent with the part, by their names in the server's ``auxiliaries``
            section. A proxy stands in the forward pass in place of the blocks that it names (``proxy``).
        untrained: those of the auxiliaries that are not trained.
    """

    blocks: tuple[str, ...]
    trained: tuple[str, ...]
    cached: tuple[tuple[str, str], ...] = ()
    frozen: str = ""
    model: str = ""
    width: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    min_channels: Count = 1
    channels: ChannelRule = "prefix"
    turn: CountOrZero = 0
    scaled: bool = False
    index_map: str = ""
    head: str = ""
    auxiliaries: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()

    @property
    def trained_auxiliaries(self) -> tuple[str, ...]:
        """The auxiliaries that are trained."""
        return tuple(name for name in self.auxiliaries if name not in self.untrained)

    @property
    def learns(self) -> bool:
        """Whether anything is trained."""
        return bool(self.trained or self.trained_auxiliaries)

    @property
    def sent(self) -> tuple[str, ...]:
        """Blocks whose tensors are sent to the device: those that it holds and has not cached."""
        cached = {name for name, _ in self.cached}
        return tuple(name for name in self.blocks if name not in cached)

    @property
    def shape(self) -> "Part":
        """The part without what does not change its tensors' shapes: which channels it holds, and the frozen tensors' hash."""
        if self.width == 1 and not self.frozen:
            return self
        return msgspec.structs.replace(self, channels="prefix", turn=0, index_map="", frozen="")

    @property
    def key(self) -> str:
        """Hash of all fields except ``frozen``, which follows from the blocks. Parts with equal keys are equal."""
        plain = msgspec.structs.replace(self, frozen="") if self.frozen else self
        return hashlib.blake2b(msgspec.msgpack.encode(plain), digest_size=8).hexdigest()


_LINEAR = "linear@"
_PROXY = "proxy@"
_TO = ".."


def linear_head(cut: str) -> str:
    """The name of the auxiliary head behind block ``cut``, which is one fully connected layer."""
    return _LINEAR + cut


def cut_of(auxiliary: str) -> str:
    """The last block before an auxiliary head; "" if ``auxiliary`` is not the name of one."""
    return auxiliary.removeprefix(_LINEAR) if auxiliary.startswith(_LINEAR) else ""


def proxy(first: str, last: str) -> str:
    """The name of the proxy that stands in place of the blocks from ``first`` to ``last``."""
    return f"{_PROXY}{first}{_TO}{last}"


def replaced_by(auxiliary: str) -> tuple[str, str] | None:
    """The first and the last block that a proxy stands for; None if ``auxiliary`` is not the name of one."""
    first, found, last = auxiliary.removeprefix(_PROXY).partition(_TO)
    return (first, last) if auxiliary.startswith(_PROXY) and found else None


def blocks_of(auxiliary: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The blocks that a proxy stands for; ``names``: the model's. Raises ``ValueError`` if it is no proxy of such blocks."""
    ends = replaced_by(auxiliary)
    if ends is None or not set(ends) <= set(names) or names.index(ends[0]) > names.index(ends[1]):
        raise ValueError(
            f"part.auxiliaries names {auxiliary!r}; a proxy stands for neighbouring blocks of: {', '.join(names)}"
        )
    return names[names.index(ends[0]) : names.index(ends[1]) + 1]


def path(part: Part, names: tuple[str, ...]) -> tuple[str, ...]:
    """The stages of a part's forward pass, blocks and proxies, in order. ``names``: the model's blocks.

    Blocks behind the last stage are left out: they run on a host, or an auxiliary head replaces them. Raises ``ValueError`` if
    a proxy is of blocks that the model does not have, or if blocks in between are missing or covered twice.
    """
    stages, covered = list[str](), dict[str, str]()
    for name in part.auxiliaries:
        if replaced_by(name) is None:
            continue
        for block in blocks_of(name, names):
            if block in covered:
                raise ValueError(
                    f"part.auxiliaries names {covered[block]!r} and {name!r}, which both stand for {block!r}"
                )
            covered[block] = name
    for block in names:
        stage = block if block in part.blocks else covered.get(block, "")
        if stage and stage not in stages[-1:]:
            stages.append(stage)
    return tuple(stages)


def whole(spec: ModelSpec, *, model: str = "") -> Part:
    """The whole model as a part: every block is held, trained and sent. ``model``: its family."""
    return Part(blocks=spec.block_names, trained=spec.block_names, model=model)
