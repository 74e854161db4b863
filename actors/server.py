"""The Server: the global model, what is cut from it for each plan, and the fold of what comes back. A plain class.

It decides nothing and knows no clock: the runtime's loop calls ``seal`` when a plan is dispatched, ``fold`` when its update
arrives and ``close_version`` when the round ends.
"""

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch

from ..comms.channel import Channel
from ..comms.codecs import Array, CodecSpec
from ..comms.errors import MismatchedPacket
from ..comms.make_codec import make_codec
from ..comms.packet import seal, unseal
from ..learning.aggregation import Fold
from ..learning.data.types import Samples
from ..learning.evaluation import evaluate
from ..learning.losses import make_loss
from ..learning.optimisers import ServerOptimiser, server_step
from ..learning.part import down_tensors, up_tensors
from ..learning.spec import Training
from ..learning.store import Store, model_hash
from ..learning.tensors import as_arrays, as_tensors
from ..learning.workload import Workload
from ..policies.plan import Plan
from .device import array_specs, context_of, update_stamp, weights_stamp

_PLAIN = ServerOptimiser()


class Server:
    """Holds the store; one version of the model at a time is current, older ones live in the packets still in flight."""

    def __init__(self, workload: Workload, *, channel: Channel, optimiser: ServerOptimiser) -> None:
        """Version 0 is the workload's initial model."""
        self.workload = workload
        self.version = 0
        self._channel = channel
        self._optimiser = optimiser
        self._model = workload.new_model()
        self.store = Store(self._model.state_dict())
        # The module that evaluates shares the store's tensors, so that it always is the current version.
        self._model.load_state_dict(self.store["model"], assign=True)
        self._roles = {t.name: t.role for block in workload.spec.blocks for t in block.tensors}
        self._fold = Fold()
        self._sealed: dict[tuple[int, str, str], tuple[Any, int]] = {}

    def seal(self, plan: Plan) -> tuple[Any, int]:
        """A reference to the packet that ``plan`` starts from, and its bytes. Equal parts and codecs share one packet."""
        key = self._key(plan)
        if key not in self._sealed:
            if plan.version != self.version:
                raise AssertionError(f"a plan of version {plan.version} cannot start at version {self.version}")
            specs = down_tensors(self.workload.spec, plan.part)
            model = self.store["model"]
            packet, _ = seal(
                as_arrays({spec.name: model[spec.name] for spec in specs}),
                codec=make_codec(plan.codec_down),
                context=context_of(specs, seed=plan.version),
                stamp=weights_stamp(plan.version),
            )
            self._sealed[key] = self._channel.put(packet), packet.nbytes
        return self._sealed[key]

    def fold(self, plan: Plan, packet: Array, *, weight: float) -> None:
        """Check an update and fold it; raises a ``PacketError`` and changes nothing when it is not sound."""
        specs = up_tensors(self.workload.spec, plan.part, statistics=plan.upload.statistics)
        arrays = unseal(
            packet,
            codec=make_codec(plan.codec_up),
            expected=array_specs(specs),
            context=context_of(specs, seed=plan.seed),
            stamp=update_stamp(plan),
            finite=True,
        )
        update = as_tensors(arrays)
        if plan.upload.payload == "weights":
            base = self._base(plan)
            update = {name: tensor - base[name] for name, tensor in update.items()}
        self._fold.add(update, weight=weight)

    @property
    def folded(self) -> int:
        """Updates folded into the version that is open."""
        return self._fold.updates

    def close_version(self, *, in_flight: Collection[int]) -> None:
        """Apply the mean update; ``in_flight``: versions whose packets are still needed."""
        model, state = self.store["model"], self.store["optimiser"]
        with torch.no_grad():
            for name, mean in self._fold.close().items():
                settings = _PLAIN if self._roles[name] == "statistic" else self._optimiser
                server_step(settings, name=name, value=model[name], mean=mean, state=state)
        self.version += 1
        keep = set(in_flight)
        self._sealed = {key: value for key, value in self._sealed.items() if key[0] in keep}

    def evaluate(self, training: Training, *, batch_size: int) -> dict[str, float]:
        """The current model on the server's test set; empty when the server has none."""
        samples = self._test
        if samples is None:
            return {}
        return evaluate(
            self._model,
            samples,
            loss=make_loss(training.loss),
            metrics=self.workload.metrics,
            transform=self.workload.data.test_transform,
            batch_size=batch_size,
            channels_last=training.channels_last,
            precision=training.precision,
        )

    @cached_property
    def _test(self) -> Samples | None:
        """The server's test set, read once."""
        return self.workload.data.server_test()

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the current model, counters included."""
        return {name: tensor.clone() for name, tensor in self.store["model"].items()}

    def model_hash(self) -> str:
        """The hash that names the current model."""
        return model_hash(self.store["model"])

    def _base(self, plan: Plan) -> dict[str, torch.Tensor]:
        """The tensors that ``plan`` was sent."""
        key = self._key(plan)
        if key not in self._sealed:
            raise MismatchedPacket(f"the packet of version {plan.version} that plan {plan.id} started from is gone")
        specs = down_tensors(self.workload.spec, plan.part)
        arrays = unseal(
            self._channel.get(self._sealed[key][0]),
            codec=make_codec(plan.codec_down),
            expected=array_specs(specs),
            context=context_of(specs, seed=plan.version),
        )
        return as_tensors(arrays)

    def _key(self, plan: Plan) -> tuple[int, str, str]:
        """What makes two downlink packets the same."""
        return plan.version, plan.part.key, _spell(plan.codec_down)


def _spell(codecs: tuple[CodecSpec, ...]) -> str:
    """Codecs as text."""
    return repr(codecs)
