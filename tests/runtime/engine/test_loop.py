"""The loop, with small real policies: dispatch, outcomes, the close of versions and the end of runs."""

# ruff: noqa: E501  (tables of sentences: one row a line)

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import fedbonsai
import msgspec
import pytest
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.inline_pool import InlinePool
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.learning.aggregation import Fold
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.seeds import derive
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.plan import Objective, Split
from fedbonsai.policies.policy import chain
from fedbonsai.policies.report import Outcome
from fedbonsai.policies.tasks import Distil, Restore, Snapshot
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.engine.engine import Engine
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import Evaluated, Notice, PlanEnded, RoundStarted, RunEnded, VersionClosed

from ..pools import WrappedPool

USER = '''
from dataclasses import dataclass
import torch
from fedbonsai.comms.codec import IdentityCodec
from fedbonsai.learning.data.types import SamplePool, Samples

def five_each(*, num_devices, seed, root, bad=(), labels="int64"):
    """Five samples on each device; those of bad devices are NaN."""
    generator = torch.Generator().manual_seed(seed % 1000)
    x = torch.randn(5 * num_devices, 4, generator=generator)
    for device in bad:
        x[5 * device : 5 * device + 5] = float("nan")
    y = (torch.arange(5 * num_devices) % 3).to(getattr(torch, labels))
    owners = torch.arange(5 * num_devices).numpy() // 5
    test = Samples(torch.randn(30, 4, generator=generator), torch.arange(30) % 3)
    return SamplePool(train=Samples(x, y), test=test, owners=owners, num_classes=3)

def fails_on_five(output, target):
    """Works in the dry run, which has other batches; fails in training."""
    if len(output) == 5 and torch.is_grad_enabled():
        raise ArithmeticError("boom")
    return torch.nn.functional.cross_entropy(output, target)

@dataclass(frozen=True)
class Breaks(IdentityCodec):
    """The identity, until it decodes the update of the plan with this seed."""

    seed: int = 0

    def decode(self, arrays, *, expected, context):
        if context.seed == self.seed:
            raise IndexError("no such thing")
        return super().decode(arrays, expected=expected, context=context)

def exhausts_on_five(output, target):
    if len(output) == 5 and torch.is_grad_enabled():
        raise MemoryError("no room")
    return torch.nn.functional.cross_entropy(output, target)
'''


@pytest.fixture(scope="module", autouse=True)
def user_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "users_parts.py").write_text(USER)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("users_parts", None)


@dataclass(frozen=True)
class Do:
    """A policy that is a function of the view."""

    function: Callable[[Any], Decision]

    def init(self):
        return None

    def decide(self, view, state, decision):
        return self.function(view), state


def config_of(*, devices=3, bad=(), **changes):
    """Devices 0, 1, 2 ... of which each is half as fast as the one before; a linear model, five samples each."""
    link = {"memory_bytes": 10**9, "up_bytes_per_s": 1e9, "down_bytes_per_s": 1e9}
    base = {
        "backend": "inline",
        "model": {"name": "torch.nn:Linear", "kwargs": {"in_features": 4, "out_features": 3}},
        "data": {"name": "users_parts:five_each", "kwargs": {"bad": list(bad)}},
        "fleet": {"classes": [{"name": f"c{i}", "flop_per_s": 1000 / 2**i} | link for i in range(devices)]},
        "evaluation": {"where": "none"},
        "stop": {"rounds": 2},
    }
    for section, value in changes.items():
        merged = isinstance(base.get(section), dict) and isinstance(value, dict)
        base[section] = base[section] | value if merged else value
    return base


def run(function, **changes):
    """The events of a run under a policy that is this function, and its summary."""
    running = fedbonsai.run(config_of(**changes), policy=Do(function))
    events = list(running)
    return events, running.summary


def failing(function, **changes):
    """The events before the error of a run that fails, and the error."""
    running = fedbonsai.run(config_of(**changes), policy=Do(function))
    events = []
    with pytest.raises(RunError) as caught:
        events.extend(running)  # keeps those that came before the error
    return events, caught.value


def start_of_round(decide):
    """Decide only when nothing of the version has been dispatched yet."""
    return lambda view: Decision() if view.dispatched else decide(view)


def idle(view):
    return [device for device in view.devices if device not in view.in_flight]


@start_of_round
def everyone(view):
    return Decision(plans=tuple(view.new_plan(device) for device in idle(view)))


def ends(events):
    return [
        (e.report.plan.device, e.report.plan.version, e.report.outcome.value)
        for e in events
        if isinstance(e, PlanEnded)
    ]


def closed(events):
    return [(e.version, e.folded) for e in events if isinstance(e, VersionClosed)]


def test_a_synchronous_round_waits_for_all():
    events, summary = run(everyone)
    assert ends(events) == [(device, version, "done") for version in (0, 1) for device in (0, 1, 2)]
    assert closed(events) == [(1, 3), (2, 3)]
    assert summary["outcomes"]["done"] == 6


def test_when_policies_are_called_and_what_they_see():
    asked = []

    def decide(view):
        asked.append((view.version, view.dispatched, sorted(view.in_flight), sorted(view.participation)))
        return everyone(view)

    run(decide, stop={"rounds": 2})
    assert asked == [
        (0, 0, [], []),
        (0, 3, [1, 2], [0]),
        (0, 3, [2], [0, 1]),
        (1, 0, [], [0, 1, 2]),
        (1, 3, [1, 2], [0, 1, 2]),
        (1, 3, [2], [0, 1, 2]),
    ]


def test_seeds_differ_by_decision_and_are_the_same_again():
    def seeds():
        found = []

        def decide(view):
            found.append(view.seed)
            return everyone(view)

        run(decide)
        return found

    assert len(set(seeds())) == 6
    assert seeds() == seeds()


def test_a_device_that_is_sent_two_plans_of_one_version_gets_two_seeds():
    """Device 0 delivers twice while the version, which closes at four updates, is open."""

    def decide(view):
        return Decision(plans=tuple(view.new_plan(device) for device in idle(view)), close_at=4)

    events, _ = run(decide, devices=4, stop={"rounds": 1})
    plans = [e.report.plan for e in events if isinstance(e, PlanEnded) and e.report.plan.device == 0]
    assert [plan.version for plan in plans] == [0, 0, 0]
    path = (0, "plan", 0, 0)  # run seed, purpose, device, version
    assert [plan.seed for plan in plans] == [derive(*path), derive(*path, 1), derive(*path, 2)]


def test_the_view_has_the_remaining_budgets():
    left = []

    def decide(view):
        left.append((view.remaining_s, view.remaining_bytes))
        return everyone(view)

    run(decide, stop={"rounds": 1, "virtual_s": 1000, "bytes": 10**6})
    assert left[0] == (1000.0, 10**6)
    assert all(later < 1000 and size < 10**6 for later, size in left[1:])


def test_a_version_closes_at_k_updates_and_later_ones_are_late():
    @start_of_round
    def decide(view):
        return Decision(plans=tuple(view.new_plan(device) for device in idle(view)), close_at=2)

    events, summary = run(decide, stop={"rounds": 2})
    # Device 2 is as slow as four rounds of device 0: it is late when it arrives, in the second round.
    assert closed(events) == [(1, 2), (2, 2)]
    assert (2, 0, "late") in ends(events)
    assert summary["outcomes"] == {"done": 4, "late": 1, "lost": 0, "out_of_memory": 0, "rejected": 0, "failed": 0}
    late = next(e.report for e in events if isinstance(e, PlanEnded) and e.report.outcome == Outcome.LATE)
    assert late.error in ("its version had closed", "the run ended")


def test_asynchronous_rounds_close_at_every_update():
    """K = 1 and every idle device at once: FedAsync's shape."""

    def decide(view):
        return Decision(plans=tuple(view.new_plan(device) for device in idle(view)), close_at=1)

    events, _ = run(decide, stop={"rounds": 4})
    assert [folded for _, folded in closed(events)] == [1, 1, 1, 1]
    versions = [plan[:2] for plan in ends(events) if plan[2] == "done"]
    assert all(version == number for number, (_, version) in enumerate(versions))


def test_a_deadline_closes_with_the_updates_that_have_arrived():
    seconds = {}

    @start_of_round
    def decide(view):
        plans = tuple(view.new_plan(device) for device in idle(view))
        for plan in plans:
            seconds[plan.device] = view.estimate(plan.device, plan).seconds
        return Decision(plans=plans, close_after_s=1.5 * seconds[1])  # device 2 needs twice as long as device 1

    events, _ = run(decide, stop={"rounds": 1})
    assert closed(events) == [(1, 2)]
    assert next(e.time_s for e in events if isinstance(e, VersionClosed)) == 1.5 * seconds[1]
    assert ends(events)[-1] == (2, 0, "late")


def test_a_deadline_before_the_first_arrival_closes_an_unchanged_version_with_a_notice():
    @start_of_round
    def decide(view):
        plans = tuple(view.new_plan(device) for device in idle(view)[:1])
        return Decision(plans=plans, close_after_s=1e-9 if view.version == 0 else None)

    events, summary = run(decide, stop={"rounds": 2})
    assert closed(events) == [(1, 0), (2, 1)]
    assert summary["notices"] == ["round 0 closed with nothing folded: 1 still out"]
    kinds = [type(event) for event in events]
    assert kinds.index(Notice) + 1 == kinds.index(VersionClosed)


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_a_deadline_does_not_close_a_version_in_which_nothing_was_dispatched(clock):
    """Round 1 chooses only device 2, which is busy with round 0; the deadline of round 1 is longer than any plan."""

    def decide(view):
        if view.version == 0:
            return Decision(plans=everyone(view).plans, close_after_s=1e-9)
        plans = [view.new_plan(device) for device in idle(view) if device == 2 and not view.dispatched]
        return Decision(plans=tuple(plans), close_after_s=1e6 if plans or view.dispatched else 1e-9)

    events, _ = run(decide, clock=clock, stop={"rounds": 2})
    assert closed(events) == [(1, 0), (2, 1)]
    assert ends(events) == [(0, 0, "late"), (1, 0, "late"), (2, 0, "late"), (2, 1, "done")]


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_a_run_in_which_every_update_was_late_fails(clock):
    def decide(view):
        return Decision(plans=everyone(view).plans, close_after_s=1e-9)

    events, error = failing(decide, clock=clock, stop={"rounds": 3})
    assert error.message == (
        "no device delivered an update in the whole run; none arrived before its version closed: the deadline (closing.after_s) is too short"
    )
    assert closed(events) == [(1, 0), (2, 0), (3, 0)]
    assert {end[2] for end in ends(events)} == {"late"}


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_a_run_that_only_evaluates_finishes(clock):
    """Nothing is to be folded, so no update is missing; some plans may be late."""

    @start_of_round
    def decide(view):
        plans = tuple(plan.with_("ask", objective=Objective(kind="evaluate")) for plan in everyone(view).plans)
        return Decision(plans=plans, close_after_s=1e6 if view.version == 0 else 1e-9)

    events, summary = run(decide, clock=clock, stop={"rounds": 2})
    assert closed(events) == [(1, 0), (2, 0)]
    assert [end[2] for end in ends(events)] == ["done"] * 3 + ["late"] * 3
    assert (summary["status"], summary["notices"]) == ("finished", [])


def test_a_missing_update_ends_the_run_even_if_another_device_evaluates():
    @start_of_round
    def decide(view):
        first, second, *_ = everyone(view).plans
        return Decision(plans=(first.with_("ask", objective=Objective(kind="evaluate")), second))

    _, error = failing(decide, bad=[1])
    assert str(error).startswith(
        "device 1, round 0, stage fold: no device of this round delivered; the first fault: Unfit"
    )


def test_a_round_in_which_nothing_was_dispatched_stays_open():
    """Round 1 chooses device 2, which is busy with round 0: its late arrival frees it, and does not close an empty round."""

    @start_of_round
    def decide(view):
        wanted = [0, 1, 2] if view.version == 0 else [2]
        plans = tuple(view.new_plan(device) for device in wanted if device not in view.in_flight)
        return Decision(plans=plans, close_at=1)

    events, _ = run(decide, stop={"rounds": 2})
    assert closed(events) == [(1, 1), (2, 1)]
    assert ends(events) == [(0, 0, "done"), (1, 0, "late"), (2, 0, "late"), (2, 1, "done")]


def one_at_a_time(view):
    """Devices 0 and 1 one after the other, while the version is kept open."""
    if view.in_flight:
        return Decision(keep_open=True)
    return Decision(plans=(view.new_plan(view.dispatched),), keep_open=view.dispatched == 0)


def test_a_version_stays_open_while_the_policy_has_more_to_send():
    events, _ = run(one_at_a_time)
    assert ends(events) == [(device, version, "done") for version in (0, 1) for device in (0, 1)]
    assert closed(events) == [(1, 2), (2, 2)]
    arrived = [e.time_s for e in events if isinstance(e, PlanEnded | VersionClosed)]
    assert arrived[1] == arrived[2]  # closed with the last


@pytest.mark.parametrize("says", [True, False])
def test_a_version_that_is_kept_open_closes_when_no_more_plans_are_sent(says):
    """Only device 0 had a plan; then the policy no longer keeps the version open, or does so with no plan in flight."""

    def decide(view):
        if not view.dispatched:
            return Decision(plans=(view.new_plan(0),), keep_open=True)
        return Decision(keep_open=says)

    events, _ = run(decide)
    assert closed(events) == [(1, 1), (2, 1)]


def test_a_deadline_closes_what_is_kept_open():
    def decide(view):
        deadline = 1.5 * view.estimate(0, view.new_plan(0)).seconds
        return msgspec.structs.replace(one_at_a_time(view), close_after_s=deadline)

    events, _ = run(decide, stop={"rounds": 1})
    assert closed(events) == [(1, 1)]
    assert ends(events) == [(0, 0, "done"), (1, 0, "late")]


@pytest.mark.parametrize("close_at", [None, 1, 2])
def test_every_dispatched_plan_comes_to_exactly_one_end(close_at):
    @start_of_round
    def decide(view):
        return Decision(plans=tuple(view.new_plan(device) for device in idle(view)), close_at=close_at)

    events, summary = run(decide, devices=4, stop={"rounds": 3})
    dispatched = sum(event.plans for event in events if isinstance(event, RoundStarted))
    ids = [event.report.plan.id for event in events if isinstance(event, PlanEnded)]
    assert sorted(ids) == list(range(1, dispatched + 1))
    assert sum(summary["outcomes"].values()) == dispatched
    assert isinstance(events[-1], RunEnded)


def test_a_run_that_fails_ends_its_plans_too():
    def decide(view):
        if view.version == 0:
            return everyone(view)
        raise KeyError("what")

    @start_of_round
    def close_early(view):
        return Decision(plans=tuple(view.new_plan(device) for device in idle(view)), close_at=1)

    events, error = failing(lambda view: close_early(view) if view.version == 0 else decide(view))
    assert str(error) == "round 1, stage decide: the policy raised KeyError: 'what'"
    assert (error.round, error.stage, error.device) == (1, "decide", None)
    assert "in decide\n    raise KeyError" in error.trace
    assert ends(events) == [(0, 0, "done"), (1, 0, "late"), (2, 0, "late")]
    assert events[-1].report.error == "the run failed"


def test_a_policy_that_chooses_no_device_ends_the_run():
    _, error = failing(lambda view: Decision())
    assert str(error) == (
        "round 0, stage decide: the policy chose no device while none is in flight, so the run cannot go on"
    )


def test_the_reasons_of_a_policy_that_chooses_no_device_are_in_the_error():
    link = {"up_bytes_per_s": 1e9, "down_bytes_per_s": 1e9}
    fleet = {"classes": [{"name": "tiny", "count": 2, "flop_per_s": 1000, "memory_bytes": 10} | link]}
    with pytest.raises(RunError) as caught:
        list(fedbonsai.run(config_of() | {"fleet": fleet}))
    assert str(caught.value).startswith(
        "round 0, stage decide: the policy chose no device while none is in flight, so the run cannot go on; "
        "it left out 2 for memory (device 0: needs "
    )
    assert "\n" not in str(caught.value)


def bad_plan(change, **decision):
    return start_of_round(lambda view: Decision(plans=(change(view),), **decision))


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (bad_plan(lambda view: msgspec.structs.replace(view.new_plan(0), device=9)), "the policy chose device 9; devices are 0 to 2"),
        (bad_plan(lambda view: msgspec.structs.replace(view.new_plan(0), device=-1)), "the policy chose device -1; devices are 0 to 2"),
        (bad_plan(lambda view: msgspec.structs.replace(view.new_plan(0), version=1)),
         "a plan for device 0 starts at version 1; the current one is 0"),
        (lambda view: Decision(plans=(view.new_plan(2),)) if view.dispatched else everyone(view), "the policy chose device 2, which still has a plan in flight"),
        (start_of_round(lambda view: Decision(plans=(view.new_plan(0), view.new_plan(0)))), "which still has a plan in flight"),
        (bad_plan(lambda view: view.new_plan(0).with_("", split=Split(cut="all"))), "split.cut is 'all'; this model can be cut behind"),
        (bad_plan(lambda view: view.new_plan(0).with_("", objective=Objective(kind="imitate"))), "to imitate, a part holds the first blocks, and trains none"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_carried_out_is_refused_before_dispatch(function, sentence):
    events, error = failing(function)
    assert sentence in str(error)
    assert "\n" not in str(error)
    assert (error.round, error.stage) == (0, "dispatch")
    assert closed(events) == []


def test_a_plan_that_would_send_what_its_device_may_not_is_refused():
    link = {"flop_per_s": 1, "memory_bytes": 10**9, "up_bytes_per_s": 1e9, "down_bytes_per_s": 1e9}
    fleet = {"classes": [{"name": "shy", "may_send": ["logits"]} | link]}
    with pytest.raises(RunError) as caught:
        list(fedbonsai.run(config_of() | {"fleet": fleet}))
    assert "it sends weights, and fleet class 'shy' may send only: logits" in str(caught.value)
    assert (caught.value.device, caught.value.round, caught.value.stage) == (0, 0, "dispatch")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda view: (Decision(tasks=(Distil(), Distil())), None), "the policy asks for 2 tasks Distil in one version; it must be one at most"),
        (lambda view: (Decision(close_at=0), None), "the policy set close_at to 0; it must be 1 or more"),
        (lambda view: (Decision(close_after_s=-1.0), None), "the policy set close_after_s to -1; it must be above 0"),
        (lambda view: Decision(), "the policy Answers returned a Decision; it must return a pair, a Decision and its new state"),
        (lambda view: None, "the policy Answers returned None; it must return a pair, a Decision and its new state"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_valid_decision_is_refused(answer, sentence):
    @dataclass(frozen=True)
    class Answers:
        def init(self):
            return None

        def decide(self, view, state, decision):
            return answer(view)

    with pytest.raises(RunError) as caught:
        list(fedbonsai.run(config_of(), policy=Answers()))
    assert str(caught.value) == f"round 0, stage decide: {sentence}"


def with_plan(**changes):
    """A decision on a view whose one plan has these fields."""
    return lambda view: Decision(plans=(msgspec.structs.replace(view.new_plan(0), **changes),))


def with_training(**changes):
    return lambda view: with_plan(training=msgspec.structs.replace(view.new_plan(0).training, **changes))(view)


@pytest.mark.parametrize(
    ("function", "where", "problem"),
    [
        (
            with_training(epochs=-1),
            "device 0, round 0",
            "plan for device 0: training.epochs is -1; it must be at least 0",
        ),
        (
            with_training(epochs=1.5),
            "device 0, round 0",
            "plan for device 0: training.epochs is 1.5; it must be a whole number",
        ),
        (
            with_training(batch_size=0),
            "device 0, round 0",
            "plan for device 0: training.batch_size is 0; it must be at least 1",
        ),
        (
            with_training(precision="fp8"),
            "device 0, round 0",
            "plan for device 0: training.precision is 'fp8'; it must be one of 'float32', 'bf16'",
        ),
        (
            with_plan(codec_up=({"name": "lz4"},)),
            "device 0, round 0",
            "plan for device 0: codec_up[0] is {'name': 'lz4'}; it must be a CodecSpec",
        ),
        (
            with_plan(split="conv1"),
            "device 0, round 0",
            "plan for device 0: split is 'conv1'; it must be a Split or None",
        ),
        (with_plan(device="0"), "round 0", "plans[0].device is '0'; it must be a whole number"),
        (lambda view: Decision(plans=[view.new_plan(0)]), "round 0", None),
        (lambda view: Decision(plans=(3,)), "round 0", "plans[0] is 3; it must be a Plan"),
        (lambda view: Decision(plans=None), "round 0", "plans is None; it must be a tuple"),
        (lambda view: Decision(left_out=((0,),)), "round 0", "left_out[0] is (0,); it must have 2 entries"),
        (lambda view: Decision(close_at="all"), "round 0", "close_at is 'all'; it must be a whole number or None"),
    ],
)
def test_a_decision_with_a_field_of_another_type_names_policy_round_and_field(function, where, problem):
    with pytest.raises(RunError) as caught:
        list(fedbonsai.run(config_of(), policy=Do(function)))
    said = f"{where}, stage decide: the policy Do made a decision that cannot be used: "
    assert str(caught.value).startswith(said + (problem or "plans is [Plan("))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"last": object}, "state['last'] is <class 'object'>, a builtins.type"),
        ([1, {2, Outcome.DONE}], "state[1]["),
        ({"seen": 2**70}, f"state['seen'] is {2**70}, which has more than 64 bits"),
        ("\ud800", r"state is '\ud800', which holds half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("when", ["init", "decide"])
def test_a_state_that_is_not_plain_is_refused_where_it_is_returned(when, state, problem, tmp_path):
    @dataclass(frozen=True)
    class Remembers:
        def init(self):
            return state if when == "init" else None

        def decide(self, view, before, decision):
            return everyone(view), state

    for policy, who in (
        (Remembers(), "the policy Remembers"),
        (chain(Do(everyone), Remembers()), "policy[1] (Remembers)"),
    ):
        with pytest.raises(RunError) as caught:
            list(fedbonsai.run(config_of(), policy=policy, out=tmp_path / who))
        at = "stage init" if when == "init" else "round 0, stage decide"
        assert str(caught.value).startswith(f"{at}: {who} returned a state that no checkpoint can hold: {problem}")


def test_the_link_of_a_chain_that_breaks_the_contract_is_named():
    @dataclass(frozen=True)
    class Forgets:
        def init(self):
            return None

        def decide(self, view, state, decision):
            return decision

    with pytest.raises(
        RunError, match=r"stage decide: policy\[1\] \(Forgets\) returned a Decision; it must return a pair"
    ):
        list(fedbonsai.run(config_of(), policy=chain(Do(everyone), Forgets())))


def test_the_state_that_is_passed_in_is_the_one_returned_before():
    seen = []

    @dataclass(frozen=True)
    class Counting:
        def init(self):
            return {"asked": 0}

        def decide(self, view, state, decision):
            seen.append(state)
            return everyone(view), {"asked": state["asked"] + 1}

    list(fedbonsai.run(config_of(stop={"rounds": 1}), policy=Counting()))
    assert seen == [{"asked": 0}, {"asked": 1}, {"asked": 2}]


def test_an_update_that_is_not_finite_is_rejected_and_the_round_goes_on():
    events, summary = run(everyone, bad=[1])
    rejected = [e.report for e in events if isinstance(e, PlanEnded) and e.report.outcome == Outcome.REJECTED]
    assert [(r.plan.device, r.plan.version, r.stage) for r in rejected] == [(1, 0, "fold"), (1, 1, "fold")]
    assert all("NaN or infinity" in r.error for r in rejected)
    assert closed(events) == [(1, 2), (2, 2)]
    assert summary["outcomes"]["rejected"] == 2
    assert summary["model_hash"] != run(everyone)[1]["model_hash"]


def test_a_fault_in_folding_ends_the_run_with_device_round_and_stage(monkeypatch):
    """Half an update in the mean must not become a version, and it is not the device's fault."""
    whole, folded = Fold.add, []

    def add(self, differences, **weights):
        whole(self, dict(list(differences.items())[:1]), **weights)
        folded.append(1)
        if len(folded) == 2:
            raise IndexError("of the second tensor")
        self.updates -= 1
        whole(self, dict(list(differences.items())[1:]), **weights)

    monkeypatch.setattr(Fold, "add", add)
    with pytest.raises(RunError, match=r"^device 1, round 0, stage fold: IndexError: of the second tensor$") as caught:
        run(everyone)
    assert "in add" in caught.value.trace


@pytest.mark.parametrize("where", ["server", "none"])
def test_a_model_that_has_diverged_ends_the_run_as_its_own_fault(where, digits):
    """Otherwise the updates of all devices would be rejected in every round, and the run would end as finished."""
    config = digits(server={"optimiser": {"learning_rate": 1e20}}, stop={"rounds": 9}, evaluation={"where": where})
    running = fedbonsai.run(config, policy=Do(everyone))
    loss = r"; its loss is (nan|inf)" if where == "server" else ""
    sentence = rf"^round \d, stage close: all 3 updates of this round hold NaN or infinity, since the model of version \d has diverged{loss}; "
    with pytest.raises(RunError, match=sentence + r"server.optimiser.learning_rate is 1e\+20, training"):
        list(running)
    assert running.summary["rounds"] < 4
    assert running.summary["status"] == "failed"


def test_a_server_step_to_infinity_ends_the_run_and_the_model_before_it_is_kept(tmp_path):
    first = fedbonsai.run(config_of(stop={"rounds": 0}), policy=Do(everyone))
    list(first)
    step = {"optimiser": {"learning_rate": 100.0}}
    config = config_of(server={"optimiser": {"learning_rate": 3e38}}, training=step, stop={"rounds": 5})
    running = fedbonsai.run(config, policy=Do(everyone), out=tmp_path / "run")
    with pytest.raises(RunError, match=r"^round 0, stage close: version 1 would hold values that are not finite in"):
        list(running)
    assert running.summary["status"] == "failed"
    kept, start = running.weights(), first.weights()
    assert all(torch.equal(kept[name], start[name]) for name in start)
    assert (tmp_path / "run" / "final.safetensors").is_file()


def test_a_round_whose_only_update_is_rejected_does_not_end_a_run_that_has_folded_before():
    """One device a round: 0, 1 (whose data are NaN), 2."""

    @start_of_round
    def decide(view):
        return Decision(plans=(view.new_plan(view.version),))

    events, summary = run(decide, bad=[1], stop={"rounds": 3})
    assert closed(events) == [(1, 1), (2, 0), (3, 1)]
    assert summary["notices"] == ["round 1 closed with nothing folded: 1 rejected"]


class AlteringPool(InlinePool):
    """The in-process pool; ``alter`` changes the results of device 1."""

    def __init__(self, settings, alter):
        super().__init__(Device(Workload(settings)), LocalChannel())
        self.alter = alter

    def result(self, plan_id):
        found = super().result(plan_id)
        return self.alter(found) if found.plan.device == 1 else found


def engine_with(config, make_pool):
    """An engine with the policy ``everyone``, on the pool that ``make_pool`` makes."""
    settings = workload_settings(config, num_devices=config.load_fleet().num_devices)
    return Engine(config, Do(everyone), settings=settings, pool=make_pool(settings))


def altered(alter, **changes):
    """The report of device 1's plan in a run of one round, in which the other plans are done."""
    config = load_config(config_of(stop={"rounds": 1}, **changes))
    engine = engine_with(config, lambda settings: AlteringPool(settings, alter))
    events = list(engine.events())
    assert closed(events) == [(1, 2)]
    return next(e.report for e in events if isinstance(e, PlanEnded) and e.report.plan.device == 1)


@pytest.mark.parametrize("samples", [-5, 0, 6, 2**63 - 1])
def test_an_update_with_an_impossible_number_of_samples_is_rejected(samples):
    report = altered(lambda found: replace(found, report=msgspec.structs.replace(found.report, samples=samples)))
    assert (report.outcome, report.stage) == (Outcome.REJECTED, "fold")
    assert report.error == f"it reports {samples} samples; the device has 5, and at least 1 must be used"


def test_an_answer_without_an_update_is_rejected():
    report = altered(lambda found: replace(found, update=None))
    assert (report.outcome, report.stage, report.error) == (Outcome.REJECTED, "fold", "it came without an update")


@pytest.mark.parametrize(("most", "rounds"), [(0, 0), (3, 3), (None, 6)])
def test_more_faults_than_max_failures_end_a_run_with_the_first(most, rounds):
    config = load_config(config_of(stop={"rounds": 6}, max_failures=most))
    make_pool = lambda settings: AlteringPool(settings, lambda found: replace(found, update=None))  # noqa: E731
    events, error = [], ""
    try:
        for event in engine_with(config, make_pool).events():
            events.append(event)
    except RunError as raised:
        error = str(raised)
    assert len(closed(events)) == rounds
    assert error == (
        ""
        if most is None
        else f"device 1, round 0, stage fold: {most + 1} plans have failed, were rejected or lost; max_failures is {most}; "
        "the first fault: it came without an update"
    )


def test_an_exception_of_a_users_codec_at_the_server_rejects_the_plan():
    fault = {"name": "users_parts:Breaks", "options": {"seed": derive(0, "plan", 1, 0)}}
    report = altered(lambda found: found, codecs={"up": [fault]})
    assert (report.outcome, report.stage, report.error) == (Outcome.REJECTED, "fold", "IndexError: no such thing")


def test_when_every_device_fails_the_run_ends_with_the_first_cause():
    events, error = failing(everyone, training={"loss": "users_parts:fails_on_five"})
    assert str(error) == (
        "device 0, round 0, stage train: no device of this round delivered; the first fault: ArithmeticError: boom"
    )
    assert (error.device, error.round, error.stage) == (0, 0, "train")
    assert [end[2] for end in ends(events)] == ["failed"] * 3


def test_when_every_update_is_rejected_the_run_ends_too():
    _, error = failing(everyone, bad=[0, 1, 2])
    assert str(error).startswith(
        "device 0, round 0, stage fold: no device of this round delivered; the first fault: Unfit"
    )


def test_a_run_in_which_every_device_ran_out_of_memory_fails():
    events, error = failing(everyone, training={"loss": "users_parts:exhausts_on_five"})
    assert str(error) == (
        "device 0, round 0, stage train: no device delivered an update in the whole run; "
        "the first fault: out_of_memory: MemoryError: no room"
    )
    assert Counter(end[2] for end in ends(events)) == {"out_of_memory": 6}


def test_one_failing_device_does_not_stop_the_others():
    """Only device 0 has data of five samples in one batch: the others train in batches of 2."""

    @start_of_round
    def decide(view):
        plans = [view.new_plan(device) for device in idle(view)]
        small = msgspec.structs.replace(plans[1].training, batch_size=2)
        return Decision(plans=(plans[0], *(plan.with_("small", training=small) for plan in plans[1:])))

    events, _ = run(decide, training={"loss": "users_parts:fails_on_five"})
    assert ends(events)[0] == (0, 0, "failed")
    assert closed(events) == [(1, 2), (2, 2)]


def test_a_plan_that_only_evaluates_is_done_without_an_update():
    @start_of_round
    def decide(view):
        plans = [view.new_plan(device) for device in idle(view)]
        return Decision(plans=(plans[0].with_("ask", objective=Objective(kind="evaluate")), *plans[1:]))

    events, summary = run(decide, stop={"rounds": 1})
    assert ends(events)[0] == (0, 0, "done")
    assert closed(events) == [(1, 2)]
    assert summary["outcomes"]["done"] == 3


@dataclass
class CountingPool(WrappedPool):
    """The in-process pool, which counts the bytes of what is submitted and returned."""

    bytes: Counter = field(default_factory=Counter)

    def submit(self, task):
        control = self.inner.submit(task)
        self.bytes["down"] += sum(packet.nbytes for packet in task.packets) + control
        assert control == len(plan_message(task.plan))
        return control

    def result(self, plan_id):
        finished = self.inner.result(plan_id)
        self.bytes["up"] += finished.control_bytes + (0 if finished.update is None else finished.update.nbytes)
        return finished


@pytest.mark.parametrize("codecs", [{}, {"up": "lz4", "down": "lz4"}])
def test_the_ledger_is_the_sum_of_the_packets_and_the_control_messages(codecs):
    pools = []

    def make_pool(settings):
        pools.append(CountingPool(InlinePool(Device(Workload(settings)), LocalChannel())))
        return pools[0]

    config = load_config(config_of(codecs=codecs, stop={"rounds": 2}, bad=[1]))
    events = list(engine_with(config, make_pool).events())
    ended = events[-1]
    assert ended.up_bytes == pools[0].bytes["up"] == sum(ended.up_by_kind.values())
    assert ended.down_bytes == pools[0].bytes["down"] == sum(ended.down_by_kind.values())
    charged = [event.report.virtual for event in events if isinstance(event, PlanEnded)]
    assert ended.up_by_kind["weights"] == sum(cost.up_bytes for cost in charged)
    assert ended.down_by_kind["weights"] == sum(cost.down_bytes for cost in charged)


@pytest.mark.parametrize(
    ("stop", "rounds", "reason"),
    [
        ({"rounds": 0}, 0, "0 rounds"),
        ({"rounds": 3}, 3, "3 rounds"),
        ({"virtual_s": 1e-9}, 1, "1e-09 virtual seconds"),
        ({"bytes": 1}, 1, "1 bytes"),
        ({"loss": 1e6}, 1, "reached the target 1e+06"),
        ({"accuracy": 1e-9}, 1, "reached the target 1e-09"),
        ({"patience": 1, "rounds": 40}, None, "no better evaluation in 1"),
    ],
)
def test_a_run_ends_by_its_rules(stop, rounds, reason):
    changes = {"evaluation": {"where": "server"}, "stop": {"rounds": 9} | stop}
    if "patience" in stop:  # a model that does not change never gets better
        changes["training"] = {"optimiser": {"learning_rate": 0.0}}
        rounds = 2
    events, summary = run(everyone, **changes)
    assert summary["rounds"] == rounds
    assert reason in summary["reason"]
    assert [e.version for e in events if isinstance(e, Evaluated)] == (
        [0] if rounds == 0 else list(range(1, rounds + 1))
    )


def test_the_wall_clock_runs_the_same_loop():
    events, summary = run(everyone, clock="wall")
    assert closed(events) == [(1, 3), (2, 3)]
    times = [event.time_s for event in events]
    assert times == sorted(times)
    assert summary["model_hash"]


def test_the_order_of_arrival_does_not_depend_on_the_machine():
    first, second = run(everyone), run(everyone)
    facts = [
        (event.report.plan, event.report.virtual, event.time_s) for event in first[0] if isinstance(event, PlanEnded)
    ]
    again = [
        (event.report.plan, event.report.virtual, event.time_s) for event in second[0] if isinstance(event, PlanEnded)
    ]
    assert facts == again
    assert first[1]["model_hash"] == second[1]["model_hash"]


def test_a_model_that_does_not_fit_the_data_is_refused_before_the_first_round():
    with pytest.raises(ConfigError, match=r"^the model fails on samples of shape \(2, 4\)"):
        next(
            fedbonsai.run(config_of(model={"name": "torch.nn:Linear", "kwargs": {"in_features": 3, "out_features": 3}}))
        )


def test_labels_of_a_type_that_the_loss_does_not_take_are_refused_before_the_first_round():
    sentence = (
        r"^training\.loss fails: RuntimeError: expected target dtype .*, targets have shape \(2,\) \(torch\.int32\)\)$"
    )
    with pytest.raises(ConfigError, match=sentence):
        next(fedbonsai.run(config_of(data={"kwargs": {"labels": "int32"}})))


# Versions for tasks alone, and what stands for the model.

DIGITS = {
    "model": "digits_cnn",
    "data": {"name": "digits", "kwargs": {}, "test_share": 0.2},
    "evaluation": {"where": "both"},
    "training": {"steps": 2, "batch_size": 16},
}
PATH = Part(
    blocks=("features.0", "classifier.2"),
    trained=("classifier.2",),
    auxiliaries=("proxy@features.2..classifier.0",),
)


def test_a_decision_with_tasks_alone_closes_its_version_at_once():
    def decide(view):
        if view.dispatched:
            return Decision()
        tasks = {1: (Snapshot(blocks=("all",)),), 3: (Restore(),)}.get(view.version, ())
        if view.version == 3:
            return Decision(tasks=tasks, close_at=0)
        return Decision(plans=tuple(view.new_plan(device) for device in idle(view)), tasks=tasks)

    config = config_of(stop={"rounds": 5}, evaluation={"where": "server"})
    engine = Engine(load_config(config), Do(lambda view: replaced(decide(view), engine)))
    weights, events = [engine.weights()], []
    for event in engine.events():
        events.append(event)
        if isinstance(event, VersionClosed):
            weights.append(engine.weights())
    engine.close()
    assert closed(events) == [(1, 3), (2, 3), (3, 3), (4, 0), (5, 3)]
    assert [same_bits(weights[4], each) for each in weights] == [False, True, False, False, True, False]
    (empty,) = [event for event in events if isinstance(event, VersionClosed) and event.folded == 0]
    assert (empty.loss, empty.version) == (None, 4)
    assert [event.version for event in events if isinstance(event, Evaluated)] == [1, 2, 3, 4, 5]


def replaced(decision, engine):
    """The same with the names of this model's blocks in snapshots."""
    names = engine.workload.spec.block_names
    tasks = tuple(Snapshot(blocks=names) if isinstance(task, Snapshot) else task for task in decision.tasks)
    return msgspec.structs.replace(decision, tasks=tasks)


def same_bits(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_version_for_tasks_alone_closes_while_devices_are_at_work():
    def decide(view):
        if view.version == 1:
            return Decision(tasks=(Restore(),), close_at=0)
        return Decision(plans=tuple(view.new_plan(device) for device in idle(view)), close_at=1)

    staleness = {"staleness": {"rule": "polynomial"}}
    events, _ = run(decide, stop={"rounds": 3}, server=staleness)
    assert closed(events) == [(1, 1), (2, 0), (3, 1)]
    assert [version for _, version, outcome in ends(events) if outcome == "done"] == [0, 0]


@pytest.mark.parametrize(
    ("decision", "sentence"),
    [
        (lambda view: Decision(tasks=(Restore(),), close_at=0, plans=(view.new_plan(0),)), "the policy set close_at to 0; it must be 1 or more"),
        (lambda view: Decision(tasks=(Restore(),), close_at=-1), "the policy set close_at to -1; it must be 0 or more"),
        (lambda view: Decision(tasks=(Restore(), Distil(), Restore())), "the policy asks for 2 tasks Restore in one version; it must be one at most"),
    ],
)  # fmt: skip
def test_a_version_closes_at_once_only_for_tasks(decision, sentence):
    events, error = failing(decision)
    assert str(error) == f"round 0, stage decide: {sentence}"
    assert closed(events) == []


def onto_the_path(view):
    """From version 1 on, all devices train the path, and it stands for the model."""
    if view.dispatched:
        return Decision()
    plans = [view.new_plan(device) for device in idle(view)]
    if view.version == 1:
        plans = [msgspec.structs.replace(plan, part=PATH) for plan in plans]
    return Decision(plans=tuple(plans), path=PATH if view.version == 1 else None)


def test_what_stands_for_the_model_is_evaluated_until_something_else_does():
    events, _ = run(onto_the_path, **DIGITS, stop={"rounds": 3})
    stages = ("features.0", "proxy@features.2..classifier.0", "classifier.2")
    assert [event.stages for event in events if isinstance(event, Evaluated)] == [(), stages, stages]


def test_a_path_of_all_blocks_is_the_whole_model():
    @start_of_round
    def decide(view):
        plans = tuple(view.new_plan(device) for device in idle(view))
        return Decision(plans=plans, path=plans[0].part)

    events, _ = run(decide, **DIGITS, stop={"rounds": 1})
    others, _ = run(everyone, **DIGITS, stop={"rounds": 1})
    found = [[event for event in each if isinstance(event, Evaluated)] for each in (events, others)]
    assert found[0] == found[1]


def test_what_stands_for_the_model_is_in_a_checkpoint_and_restored():
    config = load_config(config_of(**DIGITS, stop={"rounds": 4}))
    engine = Engine(config, Do(onto_the_path))
    saved, expected = None, []
    for event in engine.events():
        if isinstance(event, VersionClosed) and event.version == 2:
            saved = msgspec.msgpack.decode(msgspec.msgpack.encode(engine.saved()["loop"]["_path"]), type=Part)
        expected += [event] if isinstance(event, Evaluated) else []
    assert saved == PATH
    engine.close()
    again = Engine(config, Do(onto_the_path))
    assert again._loop._path is None
    other = Engine(config, Do(onto_the_path))
    for event in other.events():
        if isinstance(event, VersionClosed) and event.version == 2:
            break
    state = other.saved()
    again.check(state)
    again.restore(state)
    assert again._loop._path == PATH
    again.resume()
    found = [event for event in again.go_on([]) if isinstance(event, Evaluated)]
    assert [event.version for event in found] == [2, 3, 4] or [event.version for event in found] == [3, 4]
    assert found == expected[-len(found) :]
    for each in (again, other):
        each.close()
