"""Whether an update is folded, and with which weight: samples x share of the work done x the weight of its staleness."""

from collections.abc import Callable

import msgspec
import numpy as np

from ...actors.pool import Finished
from ...actors.server.server import Server
from ...learning.parts.part import Part
from ...learning.spec import Staleness
from ...policies.plan import Plan
from ...policies.report import Outcome, Report
from ..errors import RunError
from ..simulation.costs import share_done


def late(plan: Plan, *, behind: int, staleness: Staleness | None, path: Part | None) -> str:
    """Why the update of a plan is not folded ``behind`` versions after its own; "" if it is.

    ``staleness``: ``server.staleness``. The update of a plan with a shared head belongs to its own version only. ``path``: the
    part that stands for the model now; what it does not train was frozen meanwhile (None: nothing).
    """
    if behind and (staleness is None or not staleness.counts(behind) or plan.shares_head):
        return "its version had closed"
    if behind and path is not None and plan.objective.kind != "evaluate":
        trained = plan.part.blocks if plan.objective.kind == "collect" else plan.part.trained
        frozen = [name for name in trained if name not in path.trained]
        frozen += [name for name in plan.part.trained_auxiliaries if name not in path.trained_auxiliaries]
        if frozen:
            return f"{frozen[0]!r} was frozen meanwhile"
    return ""


def fold_update(
    server: Server,
    report: Report,
    finished: Finished,
    *,
    behind: int,
    num_samples: int,
    staleness: Staleness | None,
    before: Callable[..., None],
) -> Report:
    """Fold the update of a plan, and return its report; an update that is not valid makes the outcome ``rejected``.

    ``num_samples``: training samples of the device. ``before``: called with plan, opened update, report, ``weight`` and
    ``scale`` before the update is folded. Raises ``RunError`` for an error in the fold itself.
    """
    plan = report.plan
    if plan.objective.kind == "evaluate":  # its metrics are in the report; there is nothing to fold
        return report
    update = finished.update
    scale = staleness.scale(behind) if staleness is not None else 1.0
    problem = ""
    if not isinstance(update, np.ndarray) and plan.sends_update:
        problem = "it came without an update"
    elif not 1 <= report.samples <= num_samples:  # they are its weight
        problem = f"it reports {report.samples} samples; the device has {num_samples}, and at least 1 must be used"
    elif not (share := share_done(report, num_samples=num_samples)) > 0:
        problem = f"it reports {report.steps} steps; a device that stops early makes at least one"
    elif report.label_counts and not _counts_fit(report, server.workload.data.num_classes):
        problem = f"it reports the label counts {list(report.label_counts)[:20]}, which do not fit the data's classes"
    else:
        try:
            opened = server.open(plan, update, host=finished.host_update)
        except Exception as error:  # PacketError, or any exception of a user's codec
            problem = f"{type(error).__name__}: {error}"
    if problem:
        return msgspec.structs.replace(report, outcome=Outcome.REJECTED, stage="fold", error=problem)
    try:
        weight = report.samples * share
        before(plan, opened, report, weight=weight, scale=scale)
        server.fold(plan, opened, weight=weight, scale=scale)
    except RunError:
        raise
    except Exception as error:  # an error of this library; a partial fold must not become a version
        raise RunError.of(error, device=plan.device, round_=plan.version, stage="fold") from error
    return report


def _counts_fit(report: Report, num_classes: int | None) -> bool:
    """Whether a report counts some samples of the data's classes."""
    return len(report.label_counts) == num_classes and any(report.label_counts)
