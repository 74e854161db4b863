"""How devices train and the server steps, as plain data: what a plan carries and what a user writes. No torch here."""

from typing import Annotated, Any, Literal

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
CountOrZero = Annotated[int, msgspec.Meta(ge=0)]
Precision = Literal["float32", "bf16", "auto"]


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named thing with keyword arguments: a built-in name, or the user's own as ``module:function``."""

    name: str
    kwargs: dict[str, Any] = {}


class Optimiser(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device's optimiser. ``proximal`` is FedProx's mu (Li et al., MLSys 2020, arXiv 1812.06127, eq. 2).

    ``clip_norm`` bounds the global gradient norm. State starts empty at every plan: devices have no memory.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: NonNegative = 0.05
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    clip_norm: Positive | None = None
    proximal: NonNegative = 0.0

    def __post_init__(self) -> None:
        """Refuse here what every device would fail on."""
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("training.optimiser.nesterov is true; it needs the name sgd and a momentum above 0")
        if max(self.betas) >= 1:
            raise ValueError(f"training.optimiser.betas is {list(self.betas)}; both must be below 1")


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device's local training: loss, optimiser, amount and precision.

    ``epochs`` passes over the local data, or exactly ``steps`` optimiser steps when given. ``accumulation`` splits each
    batch into that many micro-batches, to bound memory. ``precision`` "bf16" is autocast; weights stay float32. "auto" is of
    a configuration only: it is settled before plans are made (``runtime.measured``).
    """

    loss: Call = Call("cross_entropy")
    optimiser: Optimiser = Optimiser()
    epochs: CountOrZero = 1
    steps: Count | None = None
    batch_size: Count = 32
    accumulation: Count = 1
    precision: Precision = "float32"
    channels_last: bool = False
    checkpointing: bool = False


class ServerOptimiser(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the mean update enters the model: ``mean`` with learning rate 1 is FedAvg. ``momentum`` is b1, ``beta2`` b2."""

    name: Literal["mean", "momentum", "adam", "yogi"] = "mean"
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=3e38)] = 1.0  # float32 holds no more
    momentum: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = 1e-3

    def __post_init__(self) -> None:
        """Refuse a momentum of 1, which would never move."""
        if self.name != "mean" and self.momentum >= 1:
            raise ValueError(f"server.optimiser.momentum is {self.momentum}; it must be below 1")

    @property
    def slots(self) -> int:
        """Tensors of state per parameter."""
        return {"mean": 0, "momentum": 1, "adam": 2, "yogi": 2}[self.name]


class PartCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a part costs: the numbers that estimates, the virtual clock and policies work with.

    FLOPs are per sample and count a multiply-accumulate as two. ``boundary_items`` is the number of elements per sample
    that leave the part's last block; ``peak_memory_bytes`` is predicted for one batch size and one optimiser, and covers
    weights, gradients, optimiser state, activations and temporaries.
    """

    parameters: int
    forward_flops: int
    training_flops: int
    boundary_items: int
    peak_memory_bytes: int
