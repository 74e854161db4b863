"""Evaluates the global model on the server's test set, on the devices' own test shares, or both.

Evaluation is an instrument, not part of the method under test: it takes no simulated time, and its bytes are counted
separately.
"""

import math
from collections.abc import Collection, Iterable
from typing import ClassVar

import msgspec
import numpy as np

from ...actors.pool import Pool, Task
from ...actors.server.server import Server
from ...clusters.fleet import Fleet
from ...comms.ledger import Ledger
from ...learning.parts.part import Part, whole
from ...learning.parts.part import path as path_of
from ...learning.seeds import derive
from ...learning.spec import CountOrZero
from ...learning.training.losses import lower_is_better
from ...policies.plan import Objective, Plan
from ...policies.report import Outcome, Report
from ..configuration.config import Config
from ..errors import RunError
from ..events import Evaluated

_FIRST_ID = 1 << 48  # far above the ids of training plans


class Evaluator:
    """Runs evaluations. The devices that take part are drawn once, from the run's seed."""

    SAVED: ClassVar = {"_next_id": CountOrZero}  # in a checkpoint
    NOT_SAVED = ("_config", "_fleet", "_server", "_pool", "_ledger", "_training", "_devices")

    def __init__(self, config: Config, *, fleet: Fleet, server: Server, pool: Pool, ledger: Ledger) -> None:
        """Draw the devices."""
        self._config, self._fleet = config, fleet
        self._server, self._pool, self._ledger = server, pool, ledger
        self._next_id = _FIRST_ID
        self._training = msgspec.structs.replace(config.training, batch_size=config.evaluation.batch_size)
        count = config.evaluation.devices
        self._devices = list(range(fleet.num_devices))
        if count is not None and count < len(self._devices):
            generator = np.random.default_rng(derive(config.seed, "evaluation"))
            self._devices = sorted(generator.choice(fleet.num_devices, count, replace=False).tolist())

    def evaluate(
        self, version: int, *, time_s: float, unreachable: Collection[int] = frozenset(), path: Part | None = None
    ) -> Evaluated | None:
        """The figures of this version; None if nothing can be evaluated. Devices in ``unreachable`` are left out.

        ``path``: the part that stands for the global model (None: all of it).

        Raises ``RunError`` if a metric or the model raises on the server, or if every device with a test share failed.
        """
        where = self._config.evaluation.where
        server: dict[str, float] = {}
        families: dict[str, dict[str, float]] = {}
        devices: dict[str, dict[str, float]] = {}
        metrics: list[dict[str, float]] = []
        faults: list[str] = []
        if where in ("server", "both"):
            try:
                server = self._evaluate_on_server("", path)
                families = {name: self._evaluate_on_server(name, None) for name in self._config.models}
            except Exception as error:  # user code may raise anything
                raise RunError.of(error, round_=version, stage="evaluate") from error
        if where in ("devices", "both"):
            metrics, faults = self._evaluate_devices(
                version, [device for device in self._devices if device not in unreachable], path
            )
            for name in metrics[0] if metrics else ():
                devices[name] = spread(
                    [values[name] for values in metrics], worst_is_low=not self._less_is_better(name)
                )
        if not server and not devices:
            return None
        return Evaluated(
            time_s=time_s,
            version=version,
            server=server,
            families=families,
            devices=devices,
            num_devices=len(metrics),
            num_failed=len(faults),
            first_error=faults[0] if faults else "",
            stages=self._stages(path),
        )

    def _evaluate_on_server(self, family: str, path: Part | None) -> dict[str, float]:
        """The figures of one family's model on the server's test set."""
        batch_size = self._config.evaluation.batch_size
        return self._server.evaluate(self._config.training, batch_size=batch_size, family=family, path=path)

    def _evaluate_devices(
        self, version: int, devices: Iterable[int], path: Part | None
    ) -> tuple[list[dict[str, float]], list[str]]:
        """Metrics of each device on its own test share, and the errors of devices that failed.

        Devices without a test share are left out, and, where downlinks have a memory, devices that hold no model.
        Raises ``RunError`` if some failed and none returned metrics.
        """
        plans = []
        for device in devices:
            sent = self._server.send_to_evaluate(self._plan(device, version, path))
            if sent is None:
                continue
            group = self._fleet.group_of(device)
            packets = sent.packets_for(simulated=not group)
            control = self._pool.submit(Task(plan=sent.plan, packets=packets, state=sent.state, group=group))
            self._ledger.record("down", kind="evaluation", device=device, num_bytes=sent.num_bytes + control)
            plans.append(sent.plan)
        metrics: list[dict[str, float]] = []
        faults: list[Report] = []
        for plan in plans:
            finished = self._pool.result(plan.id)
            self._ledger.record("up", kind="evaluation", device=plan.device, num_bytes=finished.control_bytes)
            report = finished.report
            if report.outcome != Outcome.DONE:
                faults.append(report)
            elif report.metrics:
                metrics.append(report.metrics)
        if faults and not metrics:
            first = faults[0]
            text = f"no device could evaluate the model; the first fault: {first.error}"
            raise RunError(text, device=first.plan.device, round_=version, stage=first.stage or "evaluate")
        return metrics, [f"device {fault.plan.device}: {fault.error}" for fault in faults]

    def _stages(self, path: Part | None) -> tuple[str, ...]:
        """The stages of a part that stands for the model; () for the whole model."""
        names = self._server.workload.spec.block_names
        stages = path_of(path, names) if path is not None else names
        return () if stages == names else stages

    def _less_is_better(self, name: str) -> bool:
        """Whether a lower value of a metric is better."""
        return name == "loss" or lower_is_better(self._server.workload.metrics[name])

    def _plan(self, device: int, version: int, path: Part | None) -> Plan:
        """A plan that evaluates the whole model of the device's family, with the batch size of evaluation.

        Batch statistics depend on that size.
        """
        self._next_id += 1
        family = self._fleet.class_of(device).model
        spec = self._server.workload.family(family).spec
        return Plan(
            id=self._next_id,
            device=device,
            version=version,
            part=path if path is not None and not family else whole(spec, model=family),
            training=self._training,
            seed=derive(self._config.seed, "evaluation", device, version),
            objective=Objective(kind="evaluate"),
            codec_down=self._config.codecs.down,
        )


def spread(values: list[float], *, worst_is_low: bool) -> dict[str, float]:
    """Mean, standard deviation, worst value, and mean of the worst tenth (at least one value) of the devices' values."""
    ordered = sorted(values, reverse=not worst_is_low)
    mean = math.fsum(values) / len(values)
    tenth = ordered[: max(1, len(values) // 10)]
    return {
        "mean": mean,
        "spread": math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)),
        "worst": ordered[0],
        "worst_10": math.fsum(tenth) / len(tenth),
    }
