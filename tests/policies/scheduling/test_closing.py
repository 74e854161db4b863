"""When versions close while plans are in flight, and the devices that stop early for that."""

import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.plan import Objective, Split
from fedbonsai.policies.scheduling.closing import Closing


@pytest.fixture
def chosen(make_plan):
    """A decision with plans for so many devices."""
    return lambda count, **changes: Decision(plans=tuple(make_plan(device) for device in range(count)), **changes)


def closing(view, decision, **fields):
    policy = Closing(**fields)
    return policy.decide(view, policy.init(), decision)[0]


@pytest.mark.parametrize(("at", "updates"), [(3, 3), (0.5, 5), (0.77, 8), (0.7, 7), (1.0, 10), (0.01, 1)])
def test_a_share_of_the_plans_is_rounded_up(make_view, chosen, at, updates):
    decision = closing(make_view(), chosen(10), at=at)
    assert (decision.close_at, decision.close_after_s) == (updates, None)
    assert decision.plans == chosen(10).plans


def test_values_of_policies_before_it_stay_where_its_fields_are_null(make_view, chosen):
    decision = closing(make_view(), chosen(2, close_at=1, close_after_s=9.0), after_s=4.0)
    assert (decision.close_at, decision.close_after_s) == (1, 4.0)
    decision = closing(make_view(), chosen(2, close_at=1, close_after_s=9.0), at=2)
    assert (decision.close_at, decision.close_after_s) == (2, 9.0)


def test_later_plans_of_a_version_change_nothing_but_stop_early_too(make_view, chosen):
    begun = make_view()
    object.__setattr__(begun, "dispatched", 3)
    decision = closing(begun, chosen(2), at=1, after_s=4.0, partial=True)
    assert (decision.close_at, decision.close_after_s) == (None, None)
    assert [plan.deadline_s for plan in decision.plans] == [4.0, 4.0]


def test_devices_that_train_stop_early_and_others_do_not(make_view, make_plan):
    views = make_plan(1, split=Split(cut="conv", depth="conv", mode="ecofed"))
    measured = make_plan(2, objective=Objective(kind="evaluate"))
    stream = make_plan(3, split=Split(cut="conv"))
    plans = (make_plan(0), views, measured, stream)
    decision = closing(make_view(), Decision(plans=plans), after_s=4.0, partial=True)
    assert [plan.deadline_s for plan in decision.plans] == [4.0, None, None, 4.0]
    assert decision.plans[0].reasons[-1] == "closing: stops after 4 s"
    assert decision.plans[1:3] == (views, measured)
    decision = closing(make_view(), Decision(plans=plans), after_s=4.0)
    assert decision.plans == plans


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, r"^at and after_s are both null; at least one"),
        ({"at": 0}, r"^at is 0; allowed: a whole number"),
        ({"at": 1.5}, r"^at is 1.5; allowed: a whole number"),
        ({"after_s": 0.0}, r"^after_s is 0.0: expected `float` > 0.0"),
        ({"at": 2, "partial": True}, r"^partial is true and after_s is null"),
    ],
)
def test_fields_are_checked(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Closing(**fields)
