"""Messages of the distiller: what it is asked to compute on the public set, and its answers."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from ...comms.codec import Array
from ...learning.parts.part import Part
from ...learning.spec import Count, CountOrZero, Distillation, Layout, NonNegative, Precision


class Execution(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How models are run on the public set; the settings of training and evaluation."""

    precision: Precision = "float32"
    layout: Layout = "contiguous"
    batch_size: Count = 256


class TeacherRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The logits of one teacher.

    ``part``: all blocks of its model. ``label_counts``: [class] of its training samples, or empty. ``class_prior``: see
    ``Distillation``.
    """

    part: Part
    execution: Execution
    held_out: float
    label_counts: tuple[CountOrZero, ...] = ()
    class_prior: NonNegative = 0.0


class DistilRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The training of the students. ``parts``: the whole model of each family that is a student."""

    parts: tuple[Part, ...]
    settings: Distillation
    execution: Execution
    seed: int


class StudentResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The training of one student; figures before and after it, on the held-out share of the public set.

    ``processed``, ``evaluated``: samples in training steps, and in evaluations.
    """

    steps: int
    best_step: int
    processed: int
    evaluated: int
    loss_before: float
    loss_after: float
    accuracy_before: float | None = None
    accuracy_after: float | None = None


class PublicInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The public set: its samples and bytes, and the number of samples dropped because devices or the test set have them."""

    samples: int
    num_bytes: int
    dropped: int


class DistillerClient(Protocol):
    """The server's access to the distiller, in the same process or on Ray."""

    def public(self, held_out: float) -> PublicInfo:
        """Load the public set. Raises ``ValueError`` if there is none, or if it is not disjoint from the other data."""
        ...

    def teach(self, request: TeacherRequest, packet: Array) -> None:
        """Start to compute a teacher's logits. ``packet``: its model."""
        ...

    def logits(self, *, wait: bool) -> list[Array]:
        """Logits [sample, class] of teachers, in the order of ``teach``, that were not returned before.

        ``wait``: of all teachers; else of those that are known already.
        """
        ...

    def distil(
        self, request: DistilRequest, targets: Array, packets: Sequence[Array]
    ) -> tuple[list[StudentResult], list[Array]]:
        """Train the students. ``targets``: [sample, class] logits. ``packets``: their models, as the answer's are."""
        ...

    def notices(self) -> list[str]:
        """Notices since the last call, one sentence each."""
        ...

    def close(self) -> None:
        """End it."""
        ...
