"""The profile of a device: the figures that policies plan with and that the virtual clock charges."""

from typing import Annotated, Literal

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Kind = Literal["weights", "logits", "activations", "labels", "statistics"]
ALL_KINDS: frozenset[Kind] = frozenset({"weights", "logits", "activations", "labels", "statistics"})


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The figures of one class of devices.

    ``flop_per_s``: sustained speed of training, not a data sheet's peak. ``memory_bytes``: memory that training may allocate
    in addition to an idle trainer. ``up_bytes_per_s``, ``down_bytes_per_s``, ``latency_s``: its own link; ``shared_link``
    names a link of the fleet that it shares with others. ``codecs``: names of codecs that it can run (None: all).
    ``may_send``: kinds of data that may leave it; a plan that would send others is refused. ``watts``: power while training,
    if known. ``model``: the family of models that it trains (``models`` in the configuration); "" means the global model.
    """

    name: str
    flop_per_s: Positive
    memory_bytes: Annotated[int, msgspec.Meta(gt=0)]
    up_bytes_per_s: Positive
    down_bytes_per_s: Positive
    latency_s: NonNegative = 0.0
    cpu_share: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    codecs: frozenset[str] | None = None
    may_send: frozenset[Kind] = ALL_KINDS
    watts: NonNegative | None = None
    shared_link: str | None = None
    model: str = ""
