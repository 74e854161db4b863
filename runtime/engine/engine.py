"""The engine: everything that one run is made of, put together from its configuration. Lives where the server lives.

In process the caller iterates it; on Ray it lives in the server's actor, and the driver asks it for events.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch

from ...actors.device.device import Device
from ...actors.host.partition_host import PartitionHost
from ...actors.inline_pool import InlinePool
from ...actors.lifecycle import PlanLifecycle
from ...actors.pool import Pool
from ...actors.replay.replay_index import ReplayIndex
from ...actors.server.server import Server
from ...actors.support import chain_layout
from ...clusters.fleet import Fleet
from ...clusters.scratch import Scratch
from ...comms.channel import Channel, LocalChannel
from ...comms.codecs.make_codec import make_codec
from ...comms.ledger import Ledger
from ...learning.parts.part import Part, down_tensors, up_tensors, whole
from ...learning.parts.structure import ModelSpec
from ...learning.training.losses import make_loss
from ...learning.workload import Workload
from ...learning.workload_settings import WorkloadSettings
from ...policies.checks.type_check import mismatch
from ...policies.policy import Policy
from ..advice.comparison import Comparison, advice, check_replay
from ..configuration.config import Config
from ..configuration.learning_checks import check_learning, left_out
from ..configuration.policy_checks import check_cuts
from ..configuration.resolution import DefaultPlan, apply_measurements, measure, measurement_notices, workload_settings
from ..errors import Damaged
from ..events import AnyEvent, Notice, RunStarted
from ..reporting.provenance import describe_init, overlap_notice, provenance
from ..simulation.costs import Costs
from ..simulation.virtual_clock import VirtualClock
from ..simulation.wall_clock import Clock, WallClock
from .evaluator import Evaluator
from .loop import Loop
from .saved_loop import state_problem
from .saved_state import check, collect, restore


class Engine:
    """One run. ``events`` may be taken once."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        *,
        settings: WorkloadSettings | None = None,
        pool: Pool | None = None,
        channel: Channel | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """Build data, model, server and clock; a user's mistake raises ``ValueError``.

        ``pool``: whose workers start meanwhile; None runs the devices in this process. ``settings``: those of its workers.
        ``scratch``: for temporary files.
        """
        self.channel = channel or LocalChannel()
        fleet = config.load_fleet()
        check_names(config)
        self._measured = measure(config)
        self.config = config = apply_measurements(config, self._measured)
        settings = settings or workload_settings(config, num_devices=fleet.num_devices)
        self.workload = Workload(settings)
        check_learning(config, self.workload)
        self.server = Server(
            self.workload,
            channel=self.channel,
            optimiser=config.server.optimiser,
            link_memory_bytes=config.server.link_memory_bytes,
            link_disk_bytes=config.server.link_disk_bytes,
            scratch=scratch,
        )
        part = whole(self.workload.spec)
        costs = self._costs(policy, fleet, part)
        comparison = Comparison(config, self.workload, fleet, costs)
        check_replay(policy, config, comparison)
        self._advice = [
            *measurement_notices(config, self._measured),
            *left_out(self.workload),
            *advice(policy, config, comparison),
        ]
        self.pool = pool or self._inline_pool(settings, fleet, scratch)
        self.pool.ready()
        self._fleet = fleet
        self.replay = ReplayIndex(config.replay, num_hosts=fleet.hosts.count, settle=self.pool.settle)
        ledger = Ledger()
        self._loop = Loop(
            config,
            fleet=fleet,
            policy=policy,
            server=self.server,
            lifecycle=PlanLifecycle(server=self.server, replay=self.replay),
            pool=self.pool,
            clock=self._clock(fleet, costs),
            costs=costs,
            evaluator=Evaluator(config, fleet=fleet, server=self.server, pool=self.pool, ledger=ledger),
            ledger=ledger,
            new_plan=DefaultPlan(config, part),
        )

    def _inline_pool(self, settings: WorkloadSettings, fleet: Fleet, scratch: Scratch | None) -> InlinePool:
        """Devices and partition hosts in this process."""
        hosts = [PartitionHost(settings, self.config.replay, scratch) for _ in range(fleet.hosts.count)]
        return InlinePool(Device(settings), self.channel, hosts)

    def _costs(self, policy: Policy, fleet: Fleet, part: Part) -> Costs:
        """What plans cost; what cannot be trained, sent or cut raises ``ValueError``."""
        config, spec = self.config, self.workload.spec
        check_trainable(spec)
        check_chains(config, spec, part)
        check_cuts(policy, self.workload, config.training)
        costs = Costs(self.workload, fleet, self.server.links)
        # It refuses a model that does not fit the data, and takes longer than a decision should.
        costs.row(part, config.training)
        return costs

    def _clock(self, fleet: Fleet, costs: Costs) -> Clock:
        """The clock of the configuration; the wall's begins now."""
        if self.config.clock == "virtual":
            return VirtualClock(fleet, self.pool, seed=self.config.seed)
        started = time.perf_counter()
        return WallClock(self.pool, now=lambda: time.perf_counter() - started, estimate=costs.estimate)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint must hold, at a moment at which a version has just closed; packets of views are apart from it."""
        return {
            "data": self.workload.data.digest(),
            "precision": self.config.training.precision,
            "loop": collect(self._loop),
        }

    def check(self, saved: dict[str, Any]) -> None:
        """Raise ``Damaged`` for what was saved of no such engine, ``ValueError`` for that of one on other data.

        And for another precision: what was measured then must decide now.
        """
        if found := mismatch(
            saved, {"data": dict[str, str], "precision": str, "loop": dict[str, Any]}, into_structs=False
        ):
            raise Damaged(f"{found[0]} {found[1]}")
        digest = self.workload.data.digest()
        for name, here in digest.items():
            if saved["data"].get(name) != here:
                raise ValueError(
                    f"data: the {name} has hash {here}; the run that is resumed had {saved['data'].get(name)}"
                )
        if (now := self.config.training.precision) != saved["precision"]:
            raise ValueError(
                f"training.precision is 'auto', which is {now} here; the run that is resumed trained in {saved['precision']}, "
                "and its folder lacks measured.json, which says so"
            )
        check(self._loop, saved["loop"])
        problem = state_problem(
            saved["loop"],
            model=self.server.store["model"],
            spec=self.workload.spec,
            profiles=self._fleet.profiles(),
            hosts=self.num_hosts,
        )
        if problem:
            raise Damaged(problem)

    def restore(self, saved: dict[str, Any]) -> None:
        """Put in what was saved and checked."""
        restore(self._loop, saved["loop"])

    def resume(self) -> None:
        """Begin again with what was in flight."""
        self._loop.resume()

    def go_on(self, notices: Sequence[str]) -> Iterator[AnyEvent]:
        """Every further event of a run that was resumed."""
        yield from (Notice(time_s=self._loop.time_s, text=text) for text in (*notices, *self.pool.notices()))
        yield from self._loop.events()

    def events(self, notices: Sequence[str] = ()) -> Iterator[AnyEvent]:
        """Every event of the run, with what happened before it."""
        yield self._started()
        yield from (Notice(text=text) for text in notices)
        origin = provenance(self.config.init)
        if origin and (overlap := overlap_notice(origin, self.config.data, self.workload.data.digest()["data"])):
            yield Notice(text=overlap)
        if self._fleet.simulates_faults and self.config.clock == "wall":
            yield Notice(text="clock is 'wall': availability, dropout and jitter of the fleet are not acted on")
        yield from (Notice(text=text) for text in (*self._advice, *self.pool.notices()))
        yield from self._loop.events()

    @property
    def ends(self) -> bool:
        """Whether the version that has just closed is the last, by rounds, seconds or bytes."""
        return self._loop.ends

    @property
    def num_hosts(self) -> int:
        """Partition hosts of the fleet."""
        return self._fleet.hosts.count

    def weights(self) -> dict[str, torch.Tensor]:
        """The current model's tensors."""
        return self.server.weights()

    def close(self) -> None:
        """End the pool's workers, and remove what is on disk."""
        self.pool.close()
        self.server.close()

    def _started(self) -> RunStarted:
        """What was built."""
        data, spec = self.workload.data, self.workload.spec
        classes: dict[str, int] = {}
        for profile in self._fleet.profiles():
            classes[profile.name] = classes.get(profile.name, 0) + 1
        return RunStarted(
            name=self.config.name,
            preset=self.config.preset,
            seed=self.config.seed,
            devices=self._fleet.num_devices,
            classes=classes,
            parameters=spec.parameters,
            frozen_parameters=spec.frozen_parameters,
            blocks=spec.block_names,
            samples=sum(data.num_samples(device) for device in range(self._fleet.num_devices)),
            workers=self.pool.num_workers,
            data=data.digest(),
            init=describe_init(self.workload),
            skipped_files=data.skipped,
            block_reason=self.workload.blocks.reason,
            measured=msgspec.to_builtins(self._measured),
        )


def check_names(config: Config) -> None:
    """Refuse codecs and a loss that are not known, and training that cannot be carried out, before any data are loaded."""
    for direction in ("down", "up"):
        try:
            make_codec(getattr(config.codecs, direction))
        except ValueError as error:
            raise ValueError(f"codecs.{direction}: {error}") from error
    make_loss(config.training.loss)
    if config.training.checkpointing:
        raise ValueError(
            "training.checkpointing is true; activation checkpointing cannot be carried out yet; allowed: false"
        )


def check_trainable(spec: ModelSpec) -> None:
    """Refuse a model of which nothing would be trained."""
    if spec.parameters and spec.parameters == spec.frozen_parameters:
        raise ValueError(
            f"model: all {spec.parameters:,} parameters are frozen (requires_grad is False); at least one must be trained"
        )


def check_chains(config: Config, spec: ModelSpec, part: Part) -> None:
    """Refuse chains whose codecs cannot follow one another on what this model sends."""
    up = up_tensors(spec, part, statistics=config.server.statistics == "average")
    for direction, tensors in (("down", down_tensors(spec, part)), ("up", up)):
        try:
            chain_layout(getattr(config.codecs, direction), tensors)
        except ValueError as error:
            raise ValueError(f"codecs.{direction}: {error}") from error
