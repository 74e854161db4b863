"""The Server: the global model, what is cut from it for each plan, and the fold of what comes back. A plain class.

It decides nothing and knows no clock: the runtime's loop calls ``send`` when a plan is dispatched, ``fold`` when its update
arrives, ``ended`` when the plan has come to its end, and ``close_version`` when the round ends.
"""

from collections import ChainMap
from collections.abc import Collection
from functools import cached_property

import msgspec
import torch

from ..clusters.scratch import Scratch
from ..comms.channel import Channel
from ..comms.codecs import Array, Arrays, ArraySpec
from ..comms.errors import MismatchedPacket
from ..comms.link import State
from ..comms.predict import hash_arrays
from ..learning.aggregation import Fold
from ..learning.data.types import Samples
from ..learning.evaluation import evaluate
from ..learning.losses import make_loss
from ..learning.optimisers import ServerOptimiser, server_step
from ..learning.part import down_tensors, up_tensors
from ..learning.spec import Training
from ..learning.store import Store, model_hash
from ..learning.tensors import as_arrays, as_tensors, minus
from ..learning.workload import Workload
from ..policies.plan import Plan
from ..policies.report import Report
from ..policies.turns import shares
from .auxiliaries import provide
from .links import ServerLinks
from .messages import Dispatch, Message, array_specs
from .plain import PlainDownlinks
from .shared_heads import SharedHeads
from .split_plans import hosted, provisioned
from .trunk import BlockHashes
from .update import open_update

_PLAIN = ServerOptimiser()


class Server:
    """Holds the store; one version of the model at a time is current, older ones live in the packets still in flight."""

    SAVED = ("version", "store", "links", "_roles", "_fold", "_plain", "_heads", "_hashes", "_starts")  # fmt: skip

    def __init__(
        self,
        workload: Workload,
        *,
        channel: Channel,
        optimiser: ServerOptimiser,
        link_memory_bytes: int = 2 * 10**9,
        link_disk_bytes: int = 20 * 10**9,
        scratch: Scratch | None = None,
    ) -> None:
        """Version 0 is the workload's initial model. ``link_...``: budgets for what links remember, see ``peers``.

        ``scratch``: for temporary files.
        """
        self.workload = workload
        self.version = 0
        self._optimiser = optimiser
        self._model = workload.new_model()
        self.store = Store(self._model.state_dict())
        # The module that evaluates shares the store's tensors, so that it always is the current version.
        self._model.load_state_dict(self.store["model"], assign=True)
        self._roles = {t.name: t.role for block in workload.spec.blocks for t in block.tensors}
        # What plans are sent, and updates change: the model, and the auxiliaries that plans have named.
        self._tensors = ChainMap(self.store["model"], self.store["auxiliaries"])
        self._fold = Fold()
        self._plain = PlainDownlinks(channel, workload.spec)
        self._heads = SharedHeads(channel, workload.spec)
        self._hashes = BlockHashes(workload.spec, self.store["model"])
        self._starts: dict[tuple[int, str], tuple[int, Arrays]] = {}  # by version and part: the hash, and the model
        self.links = ServerLinks(
            channel,
            first={name: array.copy() for name, array in as_arrays(self.store["model"]).items()},
            memory_bytes=link_memory_bytes,
            disk_bytes=link_disk_bytes,
            scratch=scratch,
        )

    def send(self, plan: Plan) -> Dispatch:
        """What brings the plan's device to the current version. Equal parts and codecs share one packet."""
        if plan.version != self.version:
            raise AssertionError(f"a plan of version {plan.version} cannot start at version {self.version}")
        self.links.downlinks.count()
        provide(plan.part.auxiliaries, self.workload, held=self.store["auxiliaries"], roles=self._roles)
        if plan.split is not None:
            plan = provisioned(plan, self._hashes)
            of_host = hosted(plan, self.workload.spec, self._hashes)
            turn = (self._heads.send(of_host, self.store["model"]),) if shares(plan) else self._send(of_host)
            return Dispatch(plan, self._send(plan), None, turn)
        if plan.link_down is None and plan.link_up is None:
            return Dispatch(plan, self._send(plan), None)
        plan = msgspec.structs.replace(plan, acknowledged=self.links.acknowledged(plan.device))
        if plan.link_down is None:
            (message,) = self._send(plan)
            plan, message = self.links.track(plan, message, as_arrays(self._plain.sent(plan)))
            messages = [message]
        else:
            expected = array_specs(down_tensors(self.workload.spec, plan.part))
            messages = self.links.send(plan, lambda: self._target(expected), expected)
            start = plan.version, plan.part.key
            if not plan.link_down.feedback and start not in self._starts:
                model = self._target(expected)
                self._starts[start] = hash_arrays(model), {name: a.copy() for name, a in model.items()}
        return Dispatch(plan, tuple(messages), self.links.state(plan.device))

    def fold(
        self, plan: Plan, packet: Array | None, *, weight: float, host: Array | None = None, scale: float = 1.0
    ) -> None:
        """Check an update and fold it; raises a ``PacketError`` and changes nothing when it is not sound.

        ``packet``: None where the device trains nothing. ``host``: the update of the host's leg, where the plan is split.
        ``scale``: what staleness leaves of it, see ``Fold.add``.
        """
        local: Arrays | None = None
        if (packet is None) != (not plan.part.trained):
            told = "without its device's update" if packet is None else "with one of blocks that it does not train"
            raise MismatchedPacket(f"plan {plan.id} came {told}")
        if packet is not None and plan.link_up is not None:
            specs = array_specs(up_tensors(self.workload.spec, plan.part, statistics=plan.upload.statistics))
            residuals, local, whole = self.links.open_update(plan, packet, specs)
            update = as_tensors(residuals) if whole else minus(local, self.links.sent(plan).arrays)
        else:
            update = self._plain_update(plan, packet) if packet is not None else {}
            if plan.split is not None:
                if host is None:
                    raise MismatchedPacket(f"plan {plan.id} is split, and came without its host's update")
                update |= self._plain_update(hosted(plan, self.workload.spec, self._hashes), host, leg=1)
        own = self._heads.add(plan, update, weight=weight) if shares(plan) else self._from_start(plan, update)
        self._fold.add(own, weight=weight, scale=scale)
        if local is not None:
            self.links.folded(plan, local)

    def ended(self, plan: Plan, report: Report, state: State | None) -> None:
        """A plan has come to its end, well or not: settle what its link remembers."""
        self._heads.ended(plan)
        if plan.link_down is not None or plan.link_up is not None:
            self.links.ended(plan, report, state)

    def abandon(self, plan: Plan) -> None:
        """Nobody waits for a plan any more."""
        self._heads.ended(plan)
        self.links.abandon(plan)

    def lose_link(self, device: int) -> None:
        """What a device holds is not known any more: its link is resynchronised when it comes again."""
        self.links.lose(device)

    def notices(self) -> list[str]:
        """What an operator should know of the links' memory since the last call."""
        found, self.links.peers.notices = self.links.peers.notices, []
        return found

    def close(self) -> None:
        """Remove what the links' memory has on disk."""
        self.links.peers.close()

    def _send(self, plan: Plan) -> tuple[Message, ...]:
        """The packet of a memoryless downlink; none where there is nothing to send."""
        return (self._plain.send(plan, self._tensors),) if plan.part.sent else ()

    def _plain_update(self, plan: Plan, packet: Array, *, leg: int = 0) -> dict[str, torch.Tensor]:
        """The differences in an update of a memoryless uplink."""
        update = as_tensors(open_update(packet, plan, self.workload.spec, leg=leg))
        if plan.upload.payload == "weights":
            start = self._heads.sent(plan) if leg and shares(plan) else self._plain.sent(plan)
            update = {name: tensor - start[name] for name, tensor in update.items()}
        return update

    def _from_start(self, plan: Plan, update: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An update as the difference to the version that it started from.

        What a downlink without feedback left out is forgotten, as in ResFed: the mean is then over the recovered models.
        """
        if plan.link_down is None or plan.link_down.feedback:
            return update
        held = self.links.sent(plan)
        start_hash, start = self._starts[plan.version, plan.part.key]
        if held.hash == start_hash:
            return update
        offsets = minus({name: held.arrays[name] for name in update}, start)
        return {name: tensor + offsets[name] for name, tensor in update.items()}

    def _target(self, expected: tuple[ArraySpec, ...]) -> Arrays:
        """Where the downlinks lead: the model, with what of it has yet to be sent."""
        model, pending = self.store["model"], self.store["pending"]
        return as_arrays(
            {s.name: model[s.name] + pending[s.name] if s.name in pending else model[s.name] for s in expected}
        )

    @property
    def folded(self) -> int:
        """Updates folded into the version that is open."""
        return self._fold.updates

    def close_version(self, *, in_flight: Collection[int]) -> None:
        """Apply the mean update; ``in_flight``: versions whose packets are still needed.

        Behind a lossy downlink with feedback the model is what its receivers hold; the rest is pending, and sent later.
        """
        model, pending, state = self.store["model"], self.store["pending"], self.store["optimiser"]
        self._heads.close(self._fold)
        with torch.no_grad():
            for name, rest in pending.items():
                model[name].add_(rest)
            for name, mean in self._fold.close().items():
                self._hashes.changed(name)
                settings = _PLAIN if self._roles[name] == "statistic" else self._optimiser
                server_step(settings, name=name, value=self._tensors[name], mean=mean, state=state)
        self.version += 1
        held = self.links.advance(as_arrays(model), self.version)
        pending.clear()
        for name, tensor in as_tensors(held or {}).items():
            if not torch.equal(model[name], tensor):
                pending[name] = model[name] - tensor
                model[name].copy_(tensor)
        keep = set(in_flight)
        self._plain.keep(keep)
        self._starts = {start: value for start, value in self._starts.items() if start[0] in keep}

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
