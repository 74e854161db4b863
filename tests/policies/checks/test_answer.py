"""Return values of policies: a decision of declared types and plain data, or a sentence with the policy and the path."""

import math

import msgspec
import numpy as np
import pytest
from fedbonsai.policies.checks.answer import BadAnswer, check_answer, check_state
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.report import Outcome

INSIDE: list = []
INSIDE.append(INSIDE)
SHARED = [1.0, "x"]
for _ in range(80):
    SHARED = [SHARED, SHARED]  # 2 ** 80 when written out


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        {"a": [1, 2.5, None, True, "x", b"y"], "b": {"c": (1, {2, 3}, frozenset({4}))}},
        {1: {(2, 3): "keys that are no text"}},
        [2**63, -(2**63), 2**64 - 1],
        [math.nan, math.inf, np.float64(0.5)],
        {str(number): float(number) for number in range(1000)},
        SHARED,
        "ü" * 10,
    ],
    ids=range(9),
)
def test_plain_data(state):
    check_state(state, who="the policy")
    check_answer((Decision(), state), who="the policy")


@pytest.mark.parametrize(
    ("state", "where", "what"),
    [
        (np.zeros(2), "", "array([0., 0.]), a numpy.ndarray"),
        ({"mean": np.int64(3)}, "['mean']", "np.int64(3), a numpy.int64"),
        ([{"a": Outcome.DONE}], "[0]['a']", "<Outcome.DONE: 'done'>, a fedbonsai.policies.report.Outcome"),
        ({"a": {"b": [0, object]}}, "['a']['b'][1]", "<class 'object'>, a builtins.type"),
        ({(1, Decision): 2}, "", ""),
        ([2**64], "[0]", f"{2**64}, which has more than 64 bits"),
        ([1.5, -(2**63) - 1], "[1]", f"{-(2**63) - 1}, which has more than 64 bits"),
        ({"\udcff": 1}, r"['\udcff']", r"'\udcff', which holds half of a surrogate pair"),
        (INSIDE, "[0][0][0][0][0]...", "nested more than 100 deep"),
        (msgspec.Raw(b"1"), "", ""),
        (type("Mine", (dict,), {})(a=1), "", "{'a': 1}, a test_answer.Mine"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_is_not_plain_is_reported_with_its_path(state, where, what):
    with pytest.raises(BadAnswer) as caught:
        check_state(state, who="policy[1] (Mine)")
    told = str(caught.value)
    begins = "policy[1] (Mine) returned a state that no checkpoint can hold: state"
    assert told.startswith(begins)
    assert told.endswith(
        "; allowed is plain data: None, bool, int, float, str, bytes, and lists, tuples, sets and dicts of these"
    )
    if what and "Mine()" not in what and "test_answer" not in what:
        assert told.startswith(f"{begins}{where} is {what};")
    assert caught.value.device is None


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (None, "None"),
        (Decision(), "a Decision"),
        ((Decision(),), "a tuple"),
        ((None, None), "a pair with None"),
        ([Decision(), None], "a list"),
        ((Decision, None), "a pair with a StructMeta"),
    ],
)
def test_a_return_value_of_another_type_is_reported(answer, what):
    with pytest.raises(BadAnswer) as caught:
        check_answer(answer, who="the policy Mine")
    assert str(caught.value) == f"the policy Mine returned {what}; it must return a pair, a Decision and its new state"


def test_an_error_in_a_plan_names_its_device(make_plan):
    plan = make_plan(3)
    training = msgspec.structs.replace(plan.training, batch_size=0)
    answer = Decision(plans=(make_plan(1), msgspec.structs.replace(plan, training=training))), None
    with pytest.raises(BadAnswer) as caught:
        check_answer(answer, who="policy[0] (Mine)")
    sentence = "a decision that cannot be used: plan for device 3: training.batch_size is 0; it must be at least 1"
    assert str(caught.value) == f"policy[0] (Mine) made {sentence}"
    assert caught.value.device == 3
