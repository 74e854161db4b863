"""The memory that a plan needs as a process: measured by the probe, or predicted.

The figure is of the data segment above that of an idle trainer, which the probe measures and an enforced budget limits
(``actors.enforcement``). It is the largest of three stages::

    open     model + what the packet is decoded to and restored from
    train    the predicted peak of a training step (``learning.costs.workspace``), and what was opened
    seal     model + what was opened + the update before and after it is coded

A dense packet is opened in place. Packets and link state have been received before, and belong to the idle trainer.
"""

import hashlib
from collections.abc import Mapping

import msgspec
import numpy as np

from ...actors.enforcement.settings import MemorySettings
from ...actors.messages.messages import update_tensors
from ...learning.parts.structure import TensorSpec
from ...learning.parts.submodel import SubModel
from ...learning.spec import PartCost, Training
from ...policies.plan import Plan

_SEALING = 3  # differences, their coded form, and the packet
_SEALING_RESIDUALS = 4  # and the prediction


class ProcessMemory:
    """Bytes that plans need. ``probed``: those that were measured, by ``key``."""

    def __init__(self, settings: MemorySettings) -> None:
        """``settings``: with the margin, and what was measured earlier."""
        self.margin = settings.margin
        self.probed: Mapping[str, int] = dict(settings.probed)

    @classmethod
    def of(cls, settings: MemorySettings) -> "ProcessMemory | None":
        """None where the memory of processes is neither enforced nor measured, so that peaks are those of tensors."""
        return cls(settings) if settings.counts_processes else None

    def needed_bytes(self, plan: Plan, row: PartCost, submodel: SubModel) -> int:
        """Bytes of the data segment above an idle trainer. ``row``: cost of the part; ``submodel``: the part, compiled."""
        measured = self.probed.get(key(plan))
        train = row.process_memory_bytes if measured is None else measured
        coded = plan.link_down is not None or bool(plan.codec_down)
        down, held = _bytes(submodel.down), 4 * submodel.parameters
        up = _bytes(update_tensors(plan, submodel)) if plan.trains_on_device else 0
        opened = down if coded else 0
        sealing = _SEALING_RESIDUALS if plan.link_up is not None else _SEALING
        return max(held + 3 * opened, train + opened, held + opened + sealing * up)


def key(plan: Plan) -> str:
    """What the memory of a plan depends on: part, micro-batches, precision, memory format, optimiser and loss.

    Some of it in words, for people, and a hash of it all.
    """
    training = plan.training
    kept = Training(
        loss=training.loss,
        optimiser=msgspec.structs.replace(training.optimiser, learning_rate=1.0),
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        precision=training.precision,
        layout=training.layout,
        checkpointing=training.checkpointing,
        frozen_precision=training.frozen_precision,
        sparsity=training.sparsity,
    )
    part = msgspec.structs.replace(plan.part.shape, cached=())
    identity = _hash(part.key, plan.objective.kind, msgspec.json.encode(kept, order="sorted").decode())
    words = [
        f"{len(part.trained)} of {len(part.blocks)} blocks trained",
        f"batch {training.batch_size}",
        training.precision,
    ]
    words += ["checkpointing"] if training.checkpointing else []
    return f"{', '.join(words)}: {identity}"


def _hash(*words: str) -> str:
    return hashlib.blake2b("\n".join(words).encode(), digest_size=8).hexdigest()


def _bytes(tensors: tuple[TensorSpec, ...]) -> int:
    return sum(tensor.items * np.dtype(tensor.dtype).itemsize for tensor in tensors)
