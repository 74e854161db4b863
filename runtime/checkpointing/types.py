"""The closed table of what a checkpoint may hold beside scalars, arrays and tensors: tags and their types.

A checkpoint names types by these tags only, never by module or class, so a class may be moved or renamed without a break,
and a file can name no code. A tag stays what it is for as long as the format's number does; so do the names of the fields.
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
from ...actors.server.peers import Peer
from ...clusters.profile import DeviceProfile
from ...comms.codec import ArraySpec
from ...comms.links.broadcast import Sealed
from ...comms.links.link import Memory, Model, Sent
from ...policies.estimate import StreamCharge
from ...policies.plan import Plan
from ...policies.report import Outcome, Report
from ..engine.round import Round
from ..events import Evaluated
from ..simulation.disruptions import Disruption
from ..simulation.in_flight import InFlightPlan
from ..simulation.links import Transfer
from ..simulation.stream_load import Load, Route, Work
from ..simulation.streams import HostQueue, Lane, StreamProgress

SCALARS = (bool, int, float, str, bytes)  # and None

# A defaultdict is saved as a dict: its factory is a part of what it is restored into.
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
    "plan": Plan,
    "report": Report,
    "view-key": ViewKey,
}


@dataclass(frozen=True)
class Kind:
    """A dataclass of the table. ``problem``: what is wrong with one whose fields have their types, "" for nothing.

    ``packet``: the field that refers to a packet in the channel. A reference means nothing in another process, so the packet
    behind it is saved in its place; its length is ``num_bytes``.
    """

    type: type
    packet: str | None = None
    problem: Callable[[Any], str] = lambda value: ""


def _indexed_view(view: IndexedView) -> str:
    lengths = view.lengths
    if lengths.dtype != np.int64 or lengths.ndim != 1 or not len(lengths) or lengths.min() < 0:
        return f"lengths are {lengths.dtype} of shape {lengths.shape}; they must be whole numbers, at least one, none negative"
    return "" if view.upload.uploads_view else "upload is no upload of a view"


def _round(round_: Round) -> str:
    if (round_.began_s is None) != (round_.dispatched == 0):
        return "it began with its first plan, or not at all"
    if round_.outstanding < 0 or min(round_.outcomes.values(), default=0) < 0:
        return f"of {round_.dispatched} plans {round_.dispatched - round_.outstanding} have ended"
    return ""


def _finished(finished: Finished) -> str:
    for name in ("update", "host_update"):
        packet = getattr(finished, name)
        if packet is not None and not is_packet(packet):
            return f"{name} is no packet"
    return "" if finished.report.plan.id == finished.plan.id else "the report is one of another plan"


def is_packet(value: Any) -> bool:
    """Whether a value is an array of bytes, as every packet is."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1


KINDS: Mapping[str, Kind] = {
    "dispatch": Kind(Dispatch),
    "fate": Kind(Disruption),
    "finished": Kind(Finished, problem=_finished),
    "host-queue": Kind(HostQueue),
    "indexed-view": Kind(IndexedView, problem=_indexed_view),
    "journey": Kind(InFlightPlan),
    "lane": Kind(Lane),
    "link-memory": Kind(Memory),
    "link-model": Kind(Model),
    "link-sent": Kind(Sent),
    "load": Kind(Load),
    "message": Kind(Message, packet="reference"),
    "peer": Kind(Peer),
    "round": Kind(Round, problem=_round),
    "route": Kind(Route),
    "sealed": Kind(Sealed, packet="reference"),
    "stream-bytes": Kind(StreamBytes),
    "stream-charge": Kind(StreamCharge),
    "stream-progress": Kind(StreamProgress),
    "transfer": Kind(Transfer),
    "work": Kind(Work),
}

TAGS: Mapping[type, str] = {
    **{kind: tag for tag, kind in CONTAINERS.items()},
    defaultdict: "dict",
    **{kind: tag for tag, kind in ENUMS.items()},
    **{kind: tag for tag, kind in STRUCTS.items()},
    **{kind.type: tag for tag, kind in KINDS.items()},
}
