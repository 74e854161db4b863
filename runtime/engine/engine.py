"""The engine: all parts of one run, built from its configuration.

It lives in the server's process: in process the caller iterates its events; on Ray it is in the server's actor, and the driver
fetches its events.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import torch

from ...actors.distiller.distiller import Distiller, InlineDistiller
from ...actors.enforcement.data_segment import limit_obstacle
from ...actors.enforcement.enforced_device import make_device
from ...actors.host.partition_host import PartitionHost
from ...actors.inline_pool import InlinePool
from ...actors.lifecycle import PlanLifecycle
from ...actors.messages.distiller_messages import DistillerClient
from ...actors.pool import Pool
from ...actors.replay.replay_index import ReplayIndex
from ...actors.server.server import Server
from ...actors.support import chain_layout
from ...clusters.fleet import Fleet
from ...clusters.scratch import Scratch
from ...comms.channel import Channel, LocalChannel
from ...comms.codecs.make_codec import make_codec
from ...comms.ledger import Ledger
from ...learning.parts.part import Part, whole
from ...learning.parts.structure import ModelSpec
from ...learning.spec import CountOrZero
from ...learning.training.losses import make_loss
from ...learning.workload import Workload
from ...learning.workload_settings import WorkloadSettings
from ...policies.checks.type_check import mismatch
from ...policies.policy import Policy
from ..advice.comparison import Comparison, advice, check_replay
from ..configuration.config import Config
from ..configuration.learning_checks import check_learning, few_samples_notice
from ..configuration.policy_checks import check_models, distils, known_tasks
from ..configuration.resolution import DefaultPlan, MachineMeasurements, apply_measurements, in_form, workload_settings
from ..errors import Damaged
from ..events import AnyEvent, Notice, RunStarted
from ..reporting.provenance import describe_init, overlap_notice, provenance
from ..simulation.costs import Costs
from ..simulation.process_memory import ProcessMemory
from ..simulation.virtual_clock import VirtualClock
from ..simulation.wall_clock import Clock, WallClock
from .evaluator import Evaluator
from .kernel_measurement import with_kernels
from .loop import Loop
from .memory_probe import probe_memory
from .saved_loop import state_problem
from .saved_state import check, collect, restore
from .step_measurement import emulating_here, measure_form
from .tasks.server_tasks import ServerTasks


class Engine:
    """One run. ``events`` may be iterated once."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        *,
        settings: WorkloadSettings | None = None,
        pool: Pool | None = None,
        channel: Channel | None = None,
        distiller: DistillerClient | None = None,
        scratch: Scratch | None = None,
        emulating: Sequence[str] | None = None,
    ) -> None:
        """Build data, model, server, clock and loop. A configuration that cannot be carried out raises ``ValueError``.

        ``settings``: of the workload, as the workers of ``pool`` have them (None: from ``config``). ``pool``: its workers may
        still be starting; None runs the devices in this process, and with them the ``distiller``, if the policy gives tasks.
        ``scratch``: folder of temporary files. ``emulating``: nodes of the cluster without bf16 instructions (None: this
        machine alone counts).
        """
        self.channel = channel or LocalChannel()
        fleet = config.load_fleet()
        check_names(config)
        check_enforcement(config)
        config, kernel_notices = with_kernels(config, policy)
        settings = settings or workload_settings(config, num_devices=fleet.num_devices)
        self.workload = Workload(settings)
        check_learning(in_form(config), self.workload)
        self.pool = pool or self._inline_pool(config, settings, fleet, scratch)
        self._fleet = fleet
        emulating = emulating_here() if emulating is None else emulating
        try:
            form, form_notices = measure_form(config, self.pool, self.workload, emulating=emulating)
            self._measured = MachineMeasurements(training=form, kernels=config.kernels.table)
            self.config = apply_measurements(config, self._measured)
            notices = (*form_notices, *kernel_notices)
            self._build(policy, settings, distiller, scratch, notices=notices, inline=pool is None)
        except BaseException:
            if pool is None:  # a device under limits has started its child for the measurement
                self.pool.close()
            raise

    def _build(
        self,
        policy: Policy,
        settings: WorkloadSettings,
        distiller: DistillerClient | None,
        scratch: Scratch | None,
        *,
        notices: Sequence[str],
        inline: bool,
    ) -> None:
        """Build what depends on measured settings. ``inline``: without workers of their own."""
        config, fleet = self.config, self._fleet
        self.server = self._new_server(scratch)
        part = whole(self.workload.spec)
        costs = self._costs(policy, fleet, part)
        comparison = Comparison(config, self.workload, fleet, costs)
        check_replay(policy, config, comparison)
        self._advice = [*notices, *few_samples_notice(self.workload), *advice(policy, config, comparison)]
        self.pool.ready()
        if inline and distils(policy):
            distiller = InlineDistiller(Distiller(self.workload.twin()))
        self._distiller = distiller
        self.replay = ReplayIndex(config.replay, num_hosts=fleet.hosts.count, settle=self.pool.settle)
        ledger = Ledger()
        tasks = self._tasks(policy, costs, ledger)
        new_plan = DefaultPlan.of(config, self.workload, fleet.profiles())
        self._loop = Loop(
            config,
            fleet=fleet,
            policy=policy,
            server=self.server,
            lifecycle=PlanLifecycle(server=self.server, replay=self.replay, parts=self.server.parts),
            pool=self.pool,
            clock=self._clock(fleet, costs),
            costs=costs,
            evaluator=Evaluator(config, fleet=fleet, server=self.server, pool=self.pool, ledger=ledger),
            ledger=ledger,
            tasks=tasks,
            new_plan=new_plan,
        )
        if config.memory.probes and not config.memory.probed:
            self._probe_memory(costs, settings, new_plan)

    def _probe_memory(self, costs: Costs, settings: WorkloadSettings, new_plan: DefaultPlan) -> None:
        """Measure what memory plans need, and make it part of the run; where the system has no limit, predictions stand."""
        if obstacle := limit_obstacle():
            self._advice.append(f"the memory of plans is predicted, and not measured: {obstacle}")
            return
        # Of each family the device with the most samples: the others may have none.
        profiles, data = self._fleet.profiles(), self.workload.data
        devices = sorted(range(len(profiles)), key=data.num_samples)
        families = {profiles[device].model: device for device in devices}
        plans = [*(new_plan(device, 0, 0) for device in families.values()), *self._loop.first_plans()]
        found, notices = probe_memory(plans, costs, settings)
        self._advice += notices
        self._measured = msgspec.structs.replace(self._measured, memory=found)
        self.config = apply_measurements(self.config, self._measured)
        costs.use_measured(found)

    def _new_server(self, scratch: Scratch | None) -> Server:
        """The server with the initial model."""
        settings = self.config.server
        return Server(
            self.workload,
            channel=self.channel,
            optimiser=settings.optimiser,
            link_memory_bytes=settings.link_memory_bytes,
            link_disk_bytes=settings.link_disk_bytes,
            scratch=scratch,
        )

    def _inline_pool(
        self, config: Config, settings: WorkloadSettings, fleet: Fleet, scratch: Scratch | None
    ) -> InlinePool:
        """A pool of partition hosts in this process, and of devices, in this process or in a child."""
        hosts = [PartitionHost(self.workload.twin(), config.replay, scratch) for _ in range(fleet.hosts.count)]
        device = make_device(settings, enforce=config.memory.is_enforced("inline"), workload=self.workload.twin())
        return InlinePool(device, self.channel, hosts)

    def _tasks(self, policy: Policy, costs: Costs, ledger: Ledger) -> ServerTasks:
        """The tasks of the server. Raises ``ValueError`` if one that is known before the first decision cannot be done."""
        tasks = ServerTasks(
            self.config,
            server=self.server,
            costs=costs,
            ledger=ledger,
            distiller=self._distiller,
            flop_per_s=self._fleet.server.flop_per_s,
        )
        for task in known_tasks(policy) if self._distiller is not None else ():
            tasks.prepare(task)
        return tasks

    def _costs(self, policy: Policy, fleet: Fleet, part: Part) -> Costs:
        """The costs of plans. Raises ``ValueError`` if the model cannot be trained, sent or cut as configured."""
        config, spec = self.config, self.workload.spec
        check_trainable(spec)
        check_chains(config, self.workload, part)
        check_models(policy, self.workload, fleet, config.training)
        costs = Costs(self.workload, fleet, self.server, memory=ProcessMemory.of(config.memory))
        # Raises if the model does not fit the data. Computed now, since it takes longer than a decision should.
        costs.row(part, config.training)
        return costs

    def _clock(self, fleet: Fleet, costs: Costs) -> Clock:
        """The configured clock. A wall clock starts now."""
        if self.config.clock == "virtual":
            return VirtualClock(fleet, self.pool, seed=self.config.seed)
        started = time.perf_counter()
        return WallClock(self.pool, now=lambda: time.perf_counter() - started, estimate=costs.estimate)

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint. Valid when a version has just closed; packets of buffered views are saved separately."""
        return {
            "data": self.workload.data.digest(),
            "precision": self.config.training.precision,
            "layout": self.config.training.layout,
            "memory": self.config.memory.probed,
            "kernels": msgspec.to_builtins(self.config.kernels.table),
            "loop": collect(self._loop),
        }

    def check(self, saved: dict[str, Any]) -> None:
        """Check a saved state, before ``restore``.

        Raises ``Damaged`` if it is not the state of such an engine, ``ValueError`` if it is of a run on other data or in
        another precision or layout ("auto" may be resolved otherwise on another machine).
        """
        if found := mismatch(
            saved,
            {
                "data": dict[str, str],
                "precision": str,
                "layout": str,
                "memory": dict[str, CountOrZero],
                "kernels": dict[str, dict[str, Any]],
                "loop": dict[str, Any],
            },
            into_structs=False,
        ):
            raise Damaged(f"{found[0]} {found[1]}")
        digest = self.workload.data.digest()
        for name, current in digest.items():
            if saved["data"].get(name) != current:
                raise ValueError(
                    f"data: the {name} has hash {current}; the run that is resumed had {saved['data'].get(name)}"
                )
        for name in ("precision", "layout"):
            if (here := getattr(self.config.training, name)) != saved[name]:
                raise ValueError(
                    f"training.{name} is 'auto', which is {here} here; the run that is resumed trained in {saved[name]}, and "
                    "its folder lacks measured.json, in which that is recorded"
                )
        if self.config.memory.probed != saved["memory"]:
            raise ValueError(
                "memory.probed, what plans were measured to need, differs from that of the run that is resumed; its folder has "
                "it in measured.json"
            )
        if msgspec.to_builtins(self.config.kernels.table) != saved["kernels"]:
            raise ValueError(
                "kernels.table, the measured kernels of sparse products, differs from that of the run that is resumed; its "
                "folder has it in measured.json"
            )
        check(self._loop, saved["loop"])
        problem = state_problem(
            saved["loop"],
            model=self.server.store["model"],
            workload=self.workload,
            profiles=self._fleet.profiles(),
            hosts=self.num_hosts,
        )
        if problem:
            raise Damaged(problem)

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore a state that ``check`` has accepted."""
        restore(self._loop, saved["loop"])

    def resume(self) -> None:
        """Submit the plans that were in flight again."""
        self._loop.resume()

    def go_on(self, notices: Sequence[str]) -> Iterator[AnyEvent]:
        """The further events of a resumed run, ``notices`` first."""
        yield from (Notice(time_s=self._loop.time_s, text=text) for text in (*notices, *self.pool.notices()))
        yield from self._loop.events()

    def events(self, notices: Sequence[str] = ()) -> Iterator[AnyEvent]:
        """All events of the run. ``notices``: of what happened before it, such as the start of Ray."""
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
        """Whether the version that has just closed is the last, as far as this is known before its evaluation."""
        return self._loop.ends

    @property
    def num_hosts(self) -> int:
        """Number of partition hosts in the fleet."""
        return self._fleet.hosts.count

    def weights(self) -> dict[str, torch.Tensor]:
        """The current model's tensors."""
        return self.server.weights()

    def evaluated_weights(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of some version as evaluation uses them; see ``Server.evaluated_weights``."""
        return self.server.evaluated_weights(tensors)

    def close(self) -> None:
        """Stop the pool's workers, and remove the memory of links from disk."""
        if self._distiller is not None:
            self._distiller.close()
        self.pool.close()
        self.server.close()

    def _started(self) -> RunStarted:
        """The event that describes what was built."""
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
    """Refuse unknown codecs and losses, before data are loaded."""
    for direction in ("down", "up"):
        try:
            make_codec(getattr(config.codecs, direction))
        except ValueError as error:
            raise ValueError(f"codecs.{direction}: {error}") from error
    make_loss(config.training.loss)


def check_enforcement(config: Config, *, obstacle: Callable[[], str] = limit_obstacle) -> None:
    """Refuse budgets that must be enforced, or measured, on a system that has no limit, as ``obstacle`` reports."""
    memory = config.memory
    for name, value in (("enforce", memory.enforce), ("probe", memory.probe)):
        if value is True and (reason := obstacle()):
            others = "false, auto" if name == "enforce" else "false, null"
            raise ValueError(f"memory.{name} is true, but {reason}; allowed here: {others}")


def check_trainable(spec: ModelSpec) -> None:
    """Refuse a model whose parameters are all frozen."""
    if spec.parameters and spec.parameters == spec.frozen_parameters:
        raise ValueError(
            f"model: all {spec.parameters:,} parameters are frozen (requires_grad is False); at least one must be trained"
        )


def check_chains(config: Config, workload: Workload, part: Part) -> None:
    """Refuse codec chains that cannot code the tensors of this model."""
    submodel = workload.submodel(part)
    up = submodel.up(statistics=config.server.statistics == "average")
    for direction, tensors in (("down", submodel.down), ("up", up)):
        try:
            chain_layout(getattr(config.codecs, direction), tensors, of_update=direction == "up")
        except ValueError as error:
            raise ValueError(f"codecs.{direction}: {error}") from error
