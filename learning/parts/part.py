"""Which piece of the model a device holds, trains and is sent: pure data, in the names of the full model.

The five methods are settings of one part: EcoFed and split learning hold the first blocks (``blocks``), with a frozen
trunk (``trained``) that the device already has (``cached``); REFT narrows them (``width``, ``index_map``); ProFL trains
one block behind a frozen prefix (``trained``) with proxies in place of what follows (``auxiliaries``, ``head``).
"""

import hashlib

import msgspec

from .structure import ModelSpec, TensorSpec


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device's piece of the model.

    ``blocks``: held, in model order. ``trained``: the subset that is trained; the rest is frozen and is not averaged.
    ``cached``: (block, content hash) pairs the device is known to hold; they are not sent, and the device checks the hash.
    ``frozen``: hash of all tensors of the blocks that the model's author has frozen, which every holder of the model has from
    the start; "" where there are none. The runtime fills in ``cached`` and ``frozen``.
    ``width`` and ``index_map``: fraction of channels, and hash of the map that says which; 1 and "" mean all.
    ``head``: name of an auxiliary head in place of the model's own; "" means the model's own. ``auxiliaries``: proxies and
    heads trained along with the part, by their names in the server's ``auxiliaries`` section.
    """

    blocks: tuple[str, ...]
    trained: tuple[str, ...]
    cached: tuple[tuple[str, str], ...] = ()
    frozen: str = ""
    width: float = 1.0
    index_map: str = ""
    head: str = ""
    auxiliaries: tuple[str, ...] = ()

    @property
    def sent(self) -> tuple[str, ...]:
        """Blocks whose tensors travel down: those held and not cached."""
        cached = {name for name, _ in self.cached}
        return tuple(name for name in self.blocks if name not in cached)

    @property
    def key(self) -> str:
        """Hash of all fields but ``frozen``, which follows from the blocks: two parts with one key are the same piece."""
        plain = msgspec.structs.replace(self, frozen="") if self.frozen else self
        return hashlib.blake2b(msgspec.msgpack.encode(plain), digest_size=8).hexdigest()


_LINEAR = "linear@"


def linear_head(cut: str) -> str:
    """The name of the auxiliary head behind block ``cut`` that is one fully connected layer."""
    return _LINEAR + cut


def cut_of(auxiliary: str) -> str:
    """The last block before an auxiliary; raises ``ValueError`` for what is not the name of one."""
    if not auxiliary.startswith(_LINEAR):
        raise ValueError(f"part.auxiliaries names {auxiliary!r}; allowed: {_LINEAR}CUT, a linear head behind block CUT")
    return auxiliary.removeprefix(_LINEAR)


def whole(spec: ModelSpec) -> Part:
    """The identity part: every block held, trained and sent."""
    return Part(blocks=spec.block_names, trained=spec.block_names)


def down_tensors(spec: ModelSpec, part: Part) -> tuple[TensorSpec, ...]:
    """Tensors that travel to the device, in model order, then its auxiliaries'. Counters and frozen tensors never travel."""
    tensors = (*spec.tensors_of(part.sent), *spec.auxiliary_tensors(part.auxiliaries))
    return tuple(t for t in tensors if t.role != "counter" and not t.frozen)


def up_tensors(spec: ModelSpec, part: Part, *, statistics: bool) -> tuple[TensorSpec, ...]:
    """Tensors that come back: those the part trains, with the running statistics when ``statistics``; its auxiliaries' too."""
    unwanted = {"counter"} if statistics else {"counter", "statistic"}
    tensors = (*spec.tensors_of(part.trained), *spec.auxiliary_tensors(part.auxiliaries))
    return tuple(t for t in tensors if t.role not in unwanted and not t.frozen)


def trained_tensors(spec: ModelSpec, blocks: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    """Tensors of these blocks that training changes, counters included: all but the frozen ones."""
    return tuple(t for t in spec.tensors_of(blocks) if not t.frozen)


def frozen_tensors(spec: ModelSpec, blocks: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    """Tensors of these blocks that the model's author has frozen; of their counters nothing depends on the value."""
    return tuple(t for t in spec.tensors_of(blocks) if t.frozen and t.role != "counter")


def complement(spec: ModelSpec, part: Part, *, frozen_to: str = "") -> Part:
    """What a part leaves of the model: the other blocks, the host's side of a split plan.

    All are trained but those up to block ``frozen_to``, of the trunk that nobody trains.
    """
    names = spec.block_names
    others = tuple(name for name in names if name not in part.blocks)
    first = names.index(frozen_to) + 1 if frozen_to else 0
    return Part(blocks=others, trained=tuple(name for name in others if names.index(name) >= first))
