"""The Plan: the whole task of one device for one version of the model. Frozen, self-contained, and printed as one line.

Policies make plans with ``view.new_plan(device)`` and change them with ``plan.with_(reason, field=value)``. A plan that this
version of the trainer cannot carry out is refused before dispatch (``actors.support``); no field is silently ignored.
"""

from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from ..comms.codec import CodecSpec
from ..comms.links.predict import Residual
from ..learning.parts.part import Part
from ..learning.spec import Count, Training


class SplitMethod(NamedTuple):
    """The properties of one method of split training: the value of a row of ``SPLIT_METHODS``, by ``Split.mode``.

    ``returns_gradients``: the host answers each packet of activations with their gradient. ``trains_front``: the device
    trains its blocks, so that weights travel and it may stop early; otherwise its blocks are a frozen trunk, and the host
    buffers the uploaded activations as a view. ``local_head``: the device trains through an auxiliary head of its own.
    """

    returns_gradients: bool = False
    trains_front: bool = True
    local_head: bool = False


SPLIT_METHODS = {
    "splitfed": SplitMethod(returns_gradients=True),
    "local_loss": SplitMethod(local_head=True),
    "ecofed": SplitMethod(trains_front=False),
}


class Split(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the network is cut between device and host (split learning; EcoFed, arXiv 2304.05495).

    ``cut``: last block on the device. ``depth``: last block of the frozen trunk, at the cut or behind it (``ecofed``).
    ``trunk``: hash of the trunk, and ``frozen``: hash of the parameters that the model's author has frozen in the host's
    blocks; the runtime fills in both at dispatch. ``mode``: a row of ``SPLIT_METHODS``. ``head``: each device has a copy of the
    host's blocks (``slots``), or the devices of a host train one copy in turn (``shared``). ``window``: activation packets in
    flight. ``view``: id of a buffered view that the host replays instead of a stream from the device. ``codec_up``,
    ``codec_down``: codec chains for activations with their labels, and for gradients.
    """

    cut: str
    depth: str = ""
    trunk: str = ""
    frozen: str = ""
    host: int = 0
    mode: Literal["splitfed", "local_loss", "ecofed"] = "splitfed"
    head: Literal["slots", "shared"] = "slots"
    window: Count = 1
    view: str | None = None
    codec_up: tuple[CodecSpec, ...] = ()
    codec_down: tuple[CodecSpec, ...] = ()

    @property
    def method(self) -> SplitMethod:
        """The row of ``SPLIT_METHODS`` for its mode."""
        return SPLIT_METHODS[self.mode]

    @property
    def replays(self) -> bool:
        """Whether the host trains on a buffered view, without the device."""
        return self.view is not None

    @property
    def uploads_view(self) -> bool:
        """Whether the host buffers the uploaded activations as a view."""
        return not self.method.trains_front and self.view is None

    @property
    def shares_head(self) -> bool:
        """Whether the devices of a host train one copy of its blocks, one after another."""
        return self.head == "shared"


class Objective(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The kind of task; formulas in ``learning.training.staged``.

    ``train``: on the loss. ``imitate``: the part's one trained auxiliary, a proxy, learns to do what the blocks do that it
    stands for, which the part holds (ProFL). ``collect``: the running statistics of the part's blocks, without training.
    ``evaluate``: metrics of the model on the device's test share.
    """

    kind: Literal["train", "imitate", "collect", "evaluate"] = "train"


class Upload(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The contents of an update: differences to the version that the device received, or weights.

    Which of their entries are sent is up to the codec (``topk``). ``statistics``: whether running statistics are included.
    ``label_counts``: whether the report says how many samples of each class the device has.
    """

    payload: Literal["difference", "weights"] = "difference"
    statistics: bool = True
    label_counts: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device's task for one version of the model.

    ``id`` is unique in a run; ``attempt`` counts placements of the same plan after a worker died. ``version``: the model
    version that it starts from. ``codec_down``, ``codec_up``: codec chains, applied left to right, to models and updates, or to
    residuals where ``link_down``, ``link_up`` set the prediction rule of that direction (ResFed). ``acknowledged``: the newest
    plan of this device whose update was folded, -1 to have the device drop its link state; filled in by the runtime at
    dispatch. ``seed``: source of every random number that the device draws. ``deadline_s``: seconds after dispatch by which the
    update must arrive: the device stops early, after the last step that fits, and its update is weighted in proportion to the
    steps done. For this the runtime fills in, at dispatch, ``whole_steps`` under the virtual clock: the value of
    ``training.steps`` before it was reduced (0: not reduced); and ``train_s`` under the wall clock: the seconds for which the
    device may train by its own clock. ``memory_bytes``: what training may allocate above an idle trainer, where budgets are
    enforced; filled in by the runtime. ``reasons``: one short reason from each policy that changed the plan.
    """

    id: int
    device: int
    version: int
    part: Part
    training: Training
    seed: int
    attempt: int = 0
    split: Split | None = None
    objective: Objective = Objective()
    upload: Upload = Upload()
    codec_down: tuple[CodecSpec, ...] = ()
    codec_up: tuple[CodecSpec, ...] = ()
    link_down: Residual | None = None
    link_up: Residual | None = None
    acknowledged: int = 0
    deadline_s: float | None = None
    whole_steps: int = 0
    train_s: float | None = None
    memory_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    reasons: tuple[str, ...] = ()

    @property
    def replays(self) -> bool:
        """Whether a partition host carries it out alone, on a buffered view."""
        return self.split is not None and self.split.replays

    @property
    def uploads_view(self) -> bool:
        """Whether a partition host buffers the activations of its device as a view."""
        return self.split is not None and self.split.uploads_view

    @property
    def shares_head(self) -> bool:
        """Whether its host's blocks are one copy, which the host's devices train one after another."""
        return self.split is not None and self.split.shares_head

    @property
    def sends_update(self) -> bool:
        """Whether its device sends an update: it trains something, or collects statistics."""
        return self.part.learns or self.objective.kind == "collect"

    @property
    def trains_on_device(self) -> bool:
        """Whether its device trains blocks, so that weights travel in both directions and the device may stop early."""
        return self.split is None or self.split.method.trains_front

    def with_(self, reason: str, /, **changes: Any) -> "Plan":
        """A copy with ``changes``, and with ``reason`` added to its reasons."""
        return msgspec.structs.replace(self, reasons=(*self.reasons, reason), **changes)

    def __str__(self) -> str:
        """One line for operators: part, amount of training, codecs and reasons."""
        size = f"{len(self.part.blocks)} blocks"
        if self.part.trained != self.part.blocks:
            size += f", {len(self.part.trained)} trained"
        if self.objective.kind not in ("train", "evaluate"):
            size += f", {self.objective.kind}"
        if self.part.auxiliaries:
            size += f", {len(self.part.auxiliaries)} auxiliaries"
        amount = f"{self.training.steps} steps" if self.training.steps else f"{self.training.epochs} epochs"
        amount += f" of {self.whole_steps}" if self.whole_steps else ""
        extras = [self.part.model] if self.part.model else []
        if self.part.width != 1:
            extras.append(f"width {self.part.width:.3g} by {self.part.channels}")
        if self.split:
            extras.append(f"cut {self.split.cut}")
            extras += [f"window {self.split.window}"] if self.split.window > 1 else []
        if self.training.sparsity is not None:
            extras.append(f"sparsity {self.training.sparsity.weights:g}")
        codecs = []
        for link, chain in ((self.link_down, self.codec_down), (self.link_up, self.codec_up)):
            names = "+".join(codec.name for codec in chain) or "identity"
            codecs.append(f"{link.rule} residual {names}" if link else names)
        return (
            f"plan {self.id}.{self.attempt} device {self.device} v{self.version}: {', '.join([size, *extras])}, "
            f"{amount} of batch {self.training.batch_size}, down {codecs[0]}, up {codecs[1]}"
            + (f" ({'; '.join(self.reasons)})" if self.reasons else "")
        )
