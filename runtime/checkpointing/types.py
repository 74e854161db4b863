"""The closed table of types that a checkpoint may hold besides scalars, arrays and tensors, with their tags.

A checkpoint names types by these tags only, never by module or class: a class can be moved or renamed without breaking files,
and a file cannot name code. Tags and names of fields are fixed as long as the format's number is.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec
import numpy as np

from ...actors.messages.messages import Dispatch, Message
from ...actors.pool import Finished, StreamBytes
from ...actors.replay.replay_index import IndexedView
from ...actors.replay.upload import ViewKey
from ...actors.server.peers import MovedLink, Peer
from ...clusters.profile import DeviceProfile
from ...comms.codec import ArraySpec
from ...comms.links.broadcast import Origin, SealedPacket
from ...comms.links.memory import HeldModel, LinkMemory, SentUpdate
from ...learning.parts.part import Part
from ...policies.estimate import StreamCharge
from ...policies.plan import Plan
from ...policies.report import Outcome, Report
from ..engine.round import Round
from ..events import Evaluated
from ..simulation.disruptions import Disruption
from ..simulation.in_flight import InFlightPlan
from ..simulation.network_links import Transfer
from ..simulation.stream_load import Load, StreamPath, Work
from ..simulation.streams import HostQueue, PacketQueue, StreamProgress

SCALARS = (bool, int, float, str, bytes)  # and None

# A defaultdict is saved as a dict: the object that it is restored into supplies the factory.
CONTAINERS: Mapping[str, Any] = {
    "counter": Counter,
    "deque": deque,
    "dict": dict,
    "frozenset": frozenset,
    "list": list,
    "ordered-dict": OrderedDict,
    "set": set,
    "tuple": tuple,
}

ENUMS: Mapping[str, type[Enum]] = {"outcome": Outcome}

# Decoded by msgspec, which checks their fields.
STRUCTS: Mapping[str, type[msgspec.Struct]] = {
    "array-spec": ArraySpec,
    "device-profile": DeviceProfile,
    "evaluated": Evaluated,
    "part": Part,
    "plan": Plan,
    "report": Report,
    "view-key": ViewKey,
}


@dataclass(frozen=True)
class SavedDataclass:
    """A dataclass of the table. ``problem``: what is wrong with an object whose fields have their types; "" for nothing.

    ``packet``: the field that refers to a packet in the channel. The reference is valid in one process only, so the packet
    itself is saved in its place; the field ``num_bytes`` is its length.
    """

    type: type
    packet: str | None = None
    problem: Callable[[Any], str] = lambda value: ""


def _indexed_view(view: IndexedView) -> str:
    lengths = view.lengths
    if lengths.dtype != np.int64 or lengths.ndim != 1 or not len(lengths) or lengths.min() < 0:
        return f"lengths are {lengths.dtype} of shape {lengths.shape}; they must be whole numbers, at least one, none negative"
    return "" if view.upload.uploads_view else "upload is not the upload of a view"


def _round(round_: Round) -> str:
    if (round_.began_s is None) != (round_.dispatched == 0):
        return "only a round with dispatched plans has a beginning"
    if round_.outstanding < 0 or min(round_.outcomes.values(), default=0) < 0:
        return f"of {round_.dispatched} plans {round_.dispatched - round_.outstanding} have ended"
    return ""


def _finished(finished: Finished) -> str:
    for name in ("update", "host_update"):
        packet = getattr(finished, name)
        if packet is not None and not is_packet(packet):
            return f"{name} is not a packet"
    return "" if finished.report.plan.id == finished.plan.id else "the report is that of another plan"


def is_packet(value: Any) -> bool:
    """Whether a value is an array of bytes, as every packet is."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1


DATACLASSES: Mapping[str, SavedDataclass] = {
    "dispatch": SavedDataclass(Dispatch),
    "disruption": SavedDataclass(Disruption),
    "finished": SavedDataclass(Finished, problem=_finished),
    "host-queue": SavedDataclass(HostQueue),
    "indexed-view": SavedDataclass(IndexedView, problem=_indexed_view),
    "in-flight-plan": SavedDataclass(InFlightPlan),
    "packet-queue": SavedDataclass(PacketQueue),
    "link-memory": SavedDataclass(LinkMemory),
    "link-model": SavedDataclass(HeldModel),
    "link-moved": SavedDataclass(MovedLink),
    "link-origin": SavedDataclass(Origin),
    "link-sent": SavedDataclass(SentUpdate),
    "load": SavedDataclass(Load),
    "message": SavedDataclass(Message, packet="reference"),
    "peer": SavedDataclass(Peer),
    "round": SavedDataclass(Round, problem=_round),
    "stream-path": SavedDataclass(StreamPath),
    "sealed": SavedDataclass(SealedPacket, packet="reference"),
    "stream-bytes": SavedDataclass(StreamBytes),
    "stream-charge": SavedDataclass(StreamCharge),
    "stream-progress": SavedDataclass(StreamProgress),
    "transfer": SavedDataclass(Transfer),
    "work": SavedDataclass(Work),
}

TAGS: Mapping[type, str] = {
    **{container: tag for tag, container in CONTAINERS.items()},
    defaultdict: "dict",
    **{enum: tag for tag, enum in ENUMS.items()},
    **{struct: tag for tag, struct in STRUCTS.items()},
    **{entry.type: tag for tag, entry in DATACLASSES.items()},
}
