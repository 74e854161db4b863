"""ProFL: progressive training of the model, block by block, so that devices with too little memory for all of it take part.

Wu, Li and Xu, "Breaking the Memory Wall for Heterogeneous Federated Learning via Progressive Training", KDD 2025, arXiv
2404.13349. The abstract gives the two phases and what freezes a block; details that it does not give are ours:

- Shrinking, back to front: each group of blocks is trained behind the untrained blocks before it, then a proxy learns to
  imitate it (``stages``). That yields initial weights for each group, and the output modules for the second phase.
- Growing, front to back: each group, from those weights, is trained behind the frozen ones before it and with the proxies of
  those behind it, then frozen. In the last stage the whole model stands.
- A stage ends when the effective movement of its blocks stays at the noise floor (``freezing``), or after so many rounds.
- Proxies are taught by the features of what they replace, without the logits. The first group is not trained while the model
  shrinks: growing begins with it at once.
- Before the first stage, running statistics of the untrained blocks are collected, once: they do not change while the model
  shrinks, since each stage trains only blocks behind them.

It changes the plans of the policies before it in a chain. A selection behind it draws from the devices that fit the stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from msgspec.structs import replace

from ...learning.parts.part import Part, proxy
from ...learning.spec import Count, NonNegative, Positive, Training
from ..checks.fields import check_fields
from ..decision import Decision
from ..plan import Objective, Plan
from ..policy import NEEDS_PLANS, State
from ..selection.candidates import memory_misfit
from ..tasks import Restore, ServerTask, Snapshot, TrackMovement
from ..view import View
from .division import choose_groups
from .freezing import is_calm
from .stages import (
    Groups,
    collect_part,
    grouped,
    head_part,
    imitate_part,
    shrunk_path,
    train_part,
)

Phase = Literal["collect", "shrink", "imitate", "grow"]
_OBJECTIVES = {"collect": Objective(kind="collect"), "imitate": Objective(kind="imitate")}
_OWN_PART = {
    "split": "which divides the model between device and host; allowed: one of the two",
    "part": "which says what part of the model a device trains; allowed: one such policy",
    "path": "which says what stands for the model; allowed: one such policy",
    "tasks": "which gives the server a task; allowed: one such policy",
}


@dataclass(frozen=True, kw_only=True)
class ProFL:
    """Progressive training in stages; see the module.

    ``blocks``: the last block of each group but the last, in the model's order; "auto": at most ``most_groups`` groups, such
    that the stage that needs the most memory needs as little as possible. With one group the plans are not changed.

    ``shrinking``: whether the first phase takes place. ``shrink_rounds``, ``grow_rounds``: a stage ends after so many rounds at
    the latest; the last stage goes on until the run ends. ``imitate_rounds``: of teaching one proxy, with gradients of norm 1
    at most. ``min_rounds``: a stage ends by its movement not before. ``window``: of the effective movement, in rounds.
    ``slope``: a movement that falls by less in a round does not fall. ``fitted``: rounds from which the slope is taken.
    ``patience``: consecutive rounds in which a stage's blocks must be calm.

    ``tolerance``: at the end of a growing stage, the accuracy may be so much below the best of the stage; if it is lower, the
    server returns to the weights of the best version. It needs evaluations.

    ``unaffordable``: what a device does whose memory does not fit the stage: it takes no part in it ("skip"), trains the head
    alone behind frozen blocks ("head_only"), splits batches into micro-batches ("smaller_batch"), or recomputes activations
    ("checkpointing"). A device that does not fit then either is left out, with the reason. ``none_fits``: what happens in a
    stage that no device at all fits: the run ends with an error ("stop"), or the next stage begins ("next").
    """

    blocks: tuple[str, ...] | Literal["auto"] = "auto"
    most_groups: Count = 4
    shrinking: bool = True
    shrink_rounds: Count = 5
    imitate_rounds: Count = 2
    grow_rounds: Count = 10
    min_rounds: Count = 3
    window: Count = 10
    slope: Positive = 0.005
    fitted: Count = 5
    patience: Count = 3
    tolerance: NonNegative = 0.02
    unaffordable: Literal["skip", "head_only", "smaller_batch", "checkpointing"] = "skip"
    none_fits: Literal["stop", "next"] = "stop"

    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    forbids_before: ClassVar[Mapping[str, str]] = _OWN_PART
    forbids_behind: ClassVar[Mapping[str, str]] = _OWN_PART
    forbids_settings: ClassVar[Mapping[str, str]] = {"models": "trains the global model block by block; allowed: empty"}
    fits_plans: ClassVar[bool] = True
    writes: ClassVar[tuple[str, ...]] = ("part", "objective", "training", "path", "tasks")

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The blocks behind which groups end."""
        return () if self.blocks == "auto" else tuple(self.blocks)

    def auxiliaries(self, blocks: Sequence[str]) -> tuple[str, ...]:
        """The proxies of the groups; where those are chosen later, one for each block, with the same kinds of cuts."""
        if self.blocks == "auto":
            return tuple(proxy(name, name) for name in blocks[1:-1]) if self.most_groups > 1 else ()
        return tuple(proxy(group[0], group[-1]) for group in grouped(tuple(blocks), self.blocks)[1:])

    def init(self) -> State:
        """``groups``: of blocks, once they are chosen; ``phase``, ``stage``: of now, from version ``began`` on.

        ``movement``: of the stage so far; ``calm``: consecutive calm rounds. ``seen``, ``best``: the newest evaluation, and the
        best of the stage. ``version``: of the newest decision.
        """
        return {
            "groups": None,
            "phase": "",
            "stage": 0,
            "began": 0,
            "movement": [],
            "calm": 0,
            "seen": None,
            "best": None,
            "version": -1,
        }

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Replace the parts of the plans by those of the stage."""
        if state["groups"] is None:
            if not decision.plans:
                return decision, state
            state = self._begin(view, state, decision.plans[0])
        groups: Groups = tuple(tuple(group) for group in state["groups"])
        if len(groups) == 1:
            return decision, state
        tasks: list[ServerTask] = []
        if state["version"] != view.version:
            state, tasks, restore = self._next_version(view, state, groups)
            if restore:
                return replace(decision, plans=(), tasks=(*decision.tasks, Restore()), close_at=0), state
        earlier = decision.tasks
        decision = replace(decision, tasks=(*earlier, *tasks))
        head = view.new_plan(0).part.blocks[-1]
        while True:
            fitted = self._fit(view, decision, state, groups, head)
            if not _none_fits(view, decision, fitted) or self.none_fits == "stop" or _is_last(state, groups):
                return fitted, state
            state = self._advance(state, view.version, groups)
            decision = replace(decision, tasks=(*earlier, *self._tasks(state, groups)))

    def groups(self, view: View, plan: Plan) -> Groups:
        """The groups of the model's blocks. ``plan``: of the whole model."""
        names = plan.part.blocks
        if self.blocks != "auto":
            return grouped(names, self.blocks)
        return choose_groups(
            names,
            self.most_groups,
            peak=lambda each, stage: _peak(view, plan, train_part(each, names[-1], stage)),
        )

    def _begin(self, view: View, state: State, plan: Plan) -> State:
        """The state with groups and first phase. ``plan``: of the whole model."""
        groups = self.groups(view, plan)
        phase: Phase = "grow"
        if self.shrinking:
            untrained = {name for group in groups[:-1] for name in group}
            phase = "collect" if plan.upload.statistics and view.statistics & untrained else "shrink"
        stage = 0 if phase == "grow" else len(groups) - 1
        return {**state, "groups": [list(group) for group in groups], "phase": phase, "stage": stage,
                "began": view.version}  # fmt: skip

    def _next_version(self, view: View, state: State, groups: Groups) -> tuple[State, list[ServerTask], bool]:
        """The state for a new version, its tasks, and whether the version only restores the best weights of the stage."""
        figure = _figure(view.evaluation)
        is_new = figure is not None and figure != state["seen"]
        before = state["best"]
        label = _label(state["phase"], state["stage"])
        state = {**state, "version": view.version, "seen": figure}
        if view.version > state["began"]:
            if is_new and (before is None or figure > before):
                state["best"] = figure
            if label in view.movement:
                movement = [*state["movement"], view.movement[label]][-self.fitted :]
                calm = is_calm(movement, window=self.window, fitted=self.fitted, most_slope=self.slope)
                state |= {"movement": movement, "calm": state["calm"] + 1 if calm else 0}
        improved = state["best"] is not None and state["best"] != before
        if self._is_over(view.version, state, groups):
            best = state["best"] if state["phase"] == "grow" else None
            if figure is not None and best is not None and figure < best - self.tolerance:
                return {**state, "best": figure, "version": -1, "seen": figure}, [], True
            state = self._advance(state, view.version, groups)
            improved = False
        tasks = self._tasks(state, groups)
        if improved and state["phase"] == "grow":
            tasks.append(Snapshot(blocks=(*groups[state["stage"]], _head(view)), auxiliaries=_proxies(state, groups)))
        return state, tasks, False

    def _is_over(self, version: int, state: State, groups: Groups) -> bool:
        """Whether the stage ends with this version."""
        rounds, phase = version - state["began"], state["phase"]
        if phase == "collect":
            return bool(rounds >= 1)
        if phase == "imitate":
            return bool(rounds >= self.imitate_rounds)
        if _is_last(state, groups):
            return False
        most = self.shrink_rounds if phase == "shrink" else self.grow_rounds
        return bool(rounds >= most or (rounds >= self.min_rounds and state["calm"] >= self.patience))

    def _advance(self, state: State, version: int, groups: Groups) -> State:
        """The state at the beginning of the next stage."""
        phase, stage = state["phase"], state["stage"]
        if phase == "collect":
            phase = "shrink"
        elif phase == "shrink":
            phase = "imitate"
        elif phase == "imitate":
            phase, stage = ("shrink", stage - 1) if stage > 1 else ("grow", 0)
        else:
            stage += 1
        return {**state, "phase": phase, "stage": stage, "began": version, "movement": [], "calm": 0, "best": None}

    def _tasks(self, state: State, groups: Groups) -> list[ServerTask]:
        """The task of each version of a stage that ends by its movement."""
        if state["phase"] not in ("shrink", "grow"):
            return []
        label = _label(state["phase"], state["stage"])
        return [TrackMovement(label=label, blocks=groups[state["stage"]], window=self.window)]

    def _fit(self, view: View, decision: Decision, state: State, groups: Groups, head: str) -> Decision:
        """The decision with plans of the stage; devices that do not fit are left out."""
        phase, stage = state["phase"], state["stage"]
        parts = {
            "collect": lambda: collect_part(groups),
            "imitate": lambda: imitate_part(groups, stage),
        }
        part = parts.get(phase, lambda: train_part(groups, head, stage))()
        path = shrunk_path(groups, head, stage) if phase == "imitate" else train_part(groups, head, stage)
        objective = _OBJECTIVES.get(phase, Objective())
        reason = f"profl: {phase} {stage + 1} of {len(groups)}"
        costs: dict[Any, int] = {}

        def peak(plan: Plan) -> int:
            key = plan.part.key, plan.training.accumulation, plan.training.checkpointing, repr(plan.training)
            if key not in costs:
                costs[key] = view.estimate(plan.device, plan).peak_memory_bytes
            return costs[key]

        plans, left_out = [], list(decision.left_out)
        for plan in decision.plans:
            if plan.objective.kind == "evaluate":
                plans.append(plan)
                continue
            staged = replace(plan, part=part, objective=objective)
            if objective.kind == "imitate" and plan.training.optimiser.clip_norm is None:
                staged = replace(staged, training=_clipped(plan.training))
            if objective.kind == "collect":
                staged = replace(
                    staged, training=replace(plan.training, epochs=1, steps=None), link_down=None, link_up=None
                )
            alternatives = [(staged, reason), *self._alternatives(staged, reason, groups, head, stage)]
            fitting = next((each for each in alternatives if not memory_misfit(view, plan.device, peak(each[0]))), None)
            if fitting is None:
                least = min(peak(each) for each, _ in alternatives)
                verb = "needs" if len(alternatives) == 1 else "needs at least"
                left_out.append((plan.device, memory_misfit(view, plan.device, least, verb=verb)))
                continue
            plans.append(fitting[0].with_(fitting[1]))
        return replace(decision, plans=tuple(plans), left_out=tuple(left_out), path=path)

    def _alternatives(self, plan: Plan, reason: str, groups: Groups, head: str, stage: int) -> list[tuple[Plan, str]]:
        """What a device may do instead of the stage's plan, with the reasons, in the order in which they are tried."""
        training = plan.training
        if self.unaffordable == "head_only" and plan.objective.kind == "train":
            part = head_part(groups, head, stage)
            return [(replace(plan, part=part), f"{reason}, head only")]
        if self.unaffordable == "checkpointing" and plan.objective.kind == "train":
            return [(replace(plan, training=replace(training, checkpointing=True)), f"{reason}, checkpointing")]
        if self.unaffordable == "smaller_batch":
            return [
                (replace(plan, training=each), f"{reason}, {_micro(each)} at a time") for each in _smaller(training)
            ]
        return []


def _none_fits(view: View, before: Decision, after: Decision) -> bool:
    """Whether no device fits the stage, though some were chosen, and none is at work."""
    return bool(before.plans) and not after.plans and not view.in_flight


def _clipped(training: Training) -> Training:
    """The same training with gradients of norm 1 at most: at the rate of the loss, a proxy of many inputs may diverge."""
    return replace(training, optimiser=replace(training.optimiser, clip_norm=1.0))


def _smaller(training: Training) -> list[Training]:
    """The same training with 2, 4, ... times the micro-batches, of two samples at least."""
    found, accumulation = [], 2 * training.accumulation
    while accumulation * 2 <= training.batch_size:
        found.append(replace(training, accumulation=accumulation))
        accumulation *= 2
    return found


def _micro(training: Training) -> int:
    """Samples of a micro-batch."""
    return -(-training.batch_size // training.accumulation)


def _peak(view: View, plan: Plan, part: Part) -> int:
    """Peak memory of training a part."""
    return view.estimate(plan.device, replace(plan, part=part)).peak_memory_bytes


def _figure(evaluation: Mapping[str, float]) -> float | None:
    """What is compared between versions: the accuracy, or the negative loss."""
    if "accuracy" in evaluation:
        return evaluation["accuracy"]
    return -evaluation["loss"] if "loss" in evaluation else None


def _label(phase: str, stage: int) -> str:
    return f"{phase} {stage + 1}"


def _is_last(state: State, groups: Groups) -> bool:
    """Whether the stage is the last one, which goes on until the run ends."""
    return bool(state["phase"] == "grow" and state["stage"] == len(groups) - 1)


def _head(view: View) -> str:
    """The model's last block."""
    return view.new_plan(0).part.blocks[-1]


def _proxies(state: State, groups: Groups) -> tuple[str, ...]:
    """The proxies that a stage trains."""
    return tuple(proxy(group[0], group[-1]) for group in groups[state["stage"] + 1 :])
