"""Training settings of devices and server, as plain data: the fields of a plan and of the configuration. Imports no torch."""

import math
from typing import Annotated, Any, Literal

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
CountOrZero = Annotated[int, msgspec.Meta(ge=0)]
Precision = Literal["float32", "bf16", "auto"]
Layout = Literal["contiguous", "channels_last", "auto"]


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model, loss, metric or transform by name, with keyword arguments: built in, or the user's ``module:function``."""

    name: str
    kwargs: dict[str, Any] = {}


class Optimiser(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device's optimiser. ``proximal`` is FedProx's mu (Li et al., MLSys 2020, arXiv 1812.06127, eq. 2).

    ``clip_norm`` bounds the global gradient norm. The optimiser's state starts empty at every plan: devices keep none.
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
        """Raise ``ValueError`` for combinations that would fail on every device."""
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("training.optimiser.nesterov is true; it needs the name sgd and a momentum above 0")
        if max(self.betas) >= 1:
            raise ValueError(f"training.optimiser.betas is {list(self.betas)}; both must be below 1")


ShareLeftOut = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class Sparsity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sparse products with dense weights (ZeroFL, Qiu et al., ICLR 2022, arXiv 2208.02507; formulas: ``learning.sparse``).

    ``weights``, ``activations``: share of a layer's weights, and of its input, that is left out. ``period``: optimiser steps
    from one exact threshold to the next, counted from the start of a plan; in between the thresholds are kept, so that the
    share drifts slightly. ``layers``: names of the layers with sparse products, or of modules that hold them; () for those that
    ``sparse.selection.eligible`` finds.

    In a configuration ``weights`` is also the sparsity of evaluation. A plan may change all but ``layers``.
    """

    weights: ShareLeftOut = 0.9
    activations: ShareLeftOut = 0.9
    period: Count = 10
    layers: tuple[str, ...] = ()


Kernel = Literal["dense", "native", "csr"]


class LayerKernels(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The kernels of one layer's products at one sparsity, and the time of each relative to that of the dense product.

    The order is that of a training step: output, gradient of the input, gradient of the weight. "dense" multiplies with zeros.
    """

    kernels: tuple[Kernel, Kernel, Kernel] = ("dense", "dense", "dense")
    times: tuple[NonNegative, NonNegative, NonNegative] = (1.0, 1.0, 1.0)


KernelTable = dict[str, LayerKernels]  # by ``kernel_key``


def kernel_key(layer: str, sparsity: Sparsity) -> str:
    """The row of a layer at one sparsity in a table of kernels."""
    return f"{layer} at {sparsity.weights:g}, {sparsity.activations:g}"


class KernelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which kernels carry out sparse products.

    ``sparse``: "dense" multiplies with zeros; "auto" takes, for each layer and product, the one that was measured to be the
    fastest on this machine before the first round: ``table``, which the run fills in.
    """

    sparse: Literal["dense", "auto"] = "dense"
    table: KernelTable = {}


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device's local training: loss, optimiser, amount and precision.

    ``epochs`` passes over the local data, or exactly ``steps`` optimiser steps if given. ``accumulation`` splits each batch
    into that many micro-batches, to bound memory. ``precision`` "bf16" is autocast; weights stay float32. ``layout`` is the
    memory format of images and of the weights of convolutions. Of both "auto" is allowed in a configuration only: a
    measurement resolves it before plans are made (``runtime.engine.step_measurement``). ``frozen_precision`` is that of frozen
    blocks before the first trained one: under "bf16" their weights are held in bfloat16, half of the memory. ``sparsity``:
    sparse products (None: the layers are dense).
    """

    loss: Call = Call("cross_entropy")
    optimiser: Optimiser = Optimiser()
    epochs: CountOrZero = 1
    steps: Count | None = None
    batch_size: Count = 32
    accumulation: Count = 1
    precision: Precision = "float32"
    frozen_precision: Literal["float32", "bf16"] = "float32"
    layout: Layout = "contiguous"
    checkpointing: bool = False
    sparsity: Sparsity | None = None


class MeasuredForm(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Precision and layout of a run that left one of them open, and what decided.

    ``step_s``: seconds of a training step by "precision, layout"; empty where there was one alternative.
    """

    precision: Literal["float32", "bf16"]
    layout: Literal["contiguous", "channels_last"]
    step_s: dict[str, NonNegative] = {}


class ServerOptimiser(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server's step on the mean update (formulas: ``training.optimisers``).

    ``mean`` with learning rate 1 is FedAvg. ``momentum`` is b1, ``beta2`` is b2.
    """

    name: Literal["mean", "momentum", "adam", "yogi"] = "mean"
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=3e38)] = 1.0  # the limit of float32
    momentum: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = 1e-3

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a momentum of 1, which never decays; with adam and yogi the model would never move."""
        if self.name != "mean" and self.momentum >= 1:
            raise ValueError(f"server.optimiser.momentum is {self.momentum}; it must be below 1")

    @property
    def slots(self) -> int:
        """Number of state tensors per parameter."""
        return {"mean": 0, "momentum": 1, "adam": 2, "yogi": 2}[self.name]


class LearningRateSchedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Factor on the learning rate over rounds. A plan carries the rate of its round, so it is complete in itself.

    With t = min(1, version / (rounds - 1)):

        constant      1
        exponential   final ** t                       (ZeroFL's schedule, arXiv 2208.02507 sec. 6: 0.1 -> 0.01 is final 0.1)
        cosine        final + (1 - final) (1 + cos(pi t)) / 2
        step          gamma ** (number of milestones at or before the version)

    In the first ``warmup_rounds`` a straight line replaces the schedule: warmup_from + (1 - warmup_from) s with
    s = (version + 1) / (warmup_rounds + 1). The schedule then continues as if there had been no warm-up.

    ``rounds``: the horizon (None: the limit of rounds that the run started with).
    """

    name: Literal["constant", "exponential", "cosine", "step"] = "constant"
    final: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    gamma: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    milestones: tuple[int, ...] = ()
    rounds: Annotated[int, msgspec.Meta(ge=1)] | None = None
    warmup_rounds: Annotated[int, msgspec.Meta(ge=0)] = 0
    warmup_from: Fraction = 0.0

    @property
    def has_horizon(self) -> bool:
        """Whether the factor depends on the number of rounds."""
        return self.name in ("exponential", "cosine")

    def within(self, rounds: int) -> "LearningRateSchedule":
        """Return the schedule with ``rounds`` as its horizon, if it depends on one and does not set it itself.

        The horizon is saved with the run. Otherwise a run that is extended would return to earlier learning rates.
        """
        if self.rounds is not None or not self.has_horizon:
            return self
        return msgspec.structs.replace(self, rounds=max(1, rounds))

    def factor(self, version: int, *, rounds: int) -> float:
        """Factor of the round that starts at ``version``, in a run of ``rounds`` rounds."""
        if version < self.warmup_rounds:
            return self.warmup_from + (1 - self.warmup_from) * (version + 1) / (self.warmup_rounds + 1)
        if self.name == "step":
            return float(self.gamma ** sum(version >= m for m in self.milestones))
        progress = min(1.0, version / max(1, (self.rounds or rounds) - 1))
        if self.name == "exponential":
            return float(self.final**progress)
        if self.name == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        return 1.0


class Staleness(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weight of an update that arrives t versions after the one that it started from.

        constant      1
        polynomial    (1 + t)^-a
        hinge         1 where t <= b, else 1 / (a (t - b) + 1)

    Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", arXiv 1903.03934, section 5.2; with a = 1/2 the polynomial is
    that of FedBuff (Nguyen et al., AISTATS 2022, arXiv 2106.06639). ``most``: an update older than this is not folded at all.
    """

    rule: Literal["constant", "polynomial", "hinge"] = "polynomial"
    a: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    b: CountOrZero = 4
    most: CountOrZero | None = None

    def counts(self, versions: int) -> bool:
        """Whether an update that started ``versions`` versions ago is folded."""
        return self.most is None or versions <= self.most

    def scale(self, versions: int) -> float:
        """Factor on an update that started ``versions`` versions ago; 1 for 0."""
        if self.rule == "polynomial":
            return float((1 + versions) ** -self.a)
        if self.rule == "hinge" and versions > self.b:
            return 1 / (self.a * (versions - self.b) + 1)
        return 1.0


class Distillation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ensemble distillation on the public set: the updated models of the devices teach the averaged model.

    Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020, arXiv 2006.07242. Each
    update that is folded is a teacher. The teachers' logits on the public set are averaged, and the mean of the updates is
    trained towards them (``training.distillation``)::

        loss = T^2 KL(softmax(mean_k logits_k / T) || softmax(logits / T))

    Attributes:
        steps: optimiser steps (Adam, learning rate decaying to 0 by a cosine); 0 evaluates and changes nothing.
        learning_rate: at the first step.
        batch_size: samples of one step.
        temperature: T.
        weighting: teachers count equally, or by their samples.
        class_prior: strength of the correction for teachers that lack classes: ``class_prior`` x the log of the teacher's share
            of each class is subtracted from its logits (Menon et al., ICLR 2021, arXiv 2007.07314), and classes that it has
            never seen get no vote (``training.distillation.adjust``). The devices' label counts are sent for it. 0: no
            correction.
        held_out: share of the public set on which the student is evaluated and not trained.
        check_every: steps between evaluations on the held-out share.
        patience: steps without a better evaluation after which training stops.
    """

    steps: CountOrZero = 1000
    learning_rate: Positive = 1e-3
    batch_size: Count = 128
    temperature: Positive = 1.0
    weighting: Literal["equal", "samples"] = "equal"
    class_prior: NonNegative = 0.0
    held_out: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.1
    check_every: Count = 50
    patience: Count = 500


class PartCost(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of training a part: the figures that estimates, the virtual clock and policies use.

    FLOPs are per sample; a multiply-accumulate counts as two. ``boundary_items``: elements per sample in the output of the
    part's last block. ``peak_memory_bytes``: predicted for one batch size and one optimiser; it covers weights, gradients,
    optimiser state, activations and temporaries. ``process_memory_bytes``: with what operations use inside themselves, and
    corrected by a fit to measured processes (``costs.workspace``).
    """

    parameters: int
    forward_flops: int
    training_flops: int
    boundary_items: int
    peak_memory_bytes: int
    process_memory_bytes: int
