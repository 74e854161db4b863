"""The policy on plans whose cost follows from their sparsity and from the share that they send."""

import pytest
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.learning.spec import Sparsity, Training
from fedbonsai.policies.checks.statements import chain_fault, statements_of
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.plan import Objective, Split
from fedbonsai.policies.policy import chain
from fedbonsai.policies.resolve_policy import make_policy
from fedbonsai.policies.selection.plain import All, RandomCohort
from fedbonsai.policies.sparsity.zerofl import ZeroFL
from msgspec.structs import replace

TRAINING = Training(sparsity=Sparsity(weights=0.9, activations=0.8, period=3, layers=("conv",)))


def density(plan):
    """The share of the sparse layers that a plan sends."""
    stage = plan.codec_up[0]
    return stage.options["density"] if stage.name == "topk" else 1.0


def cost(speeds):
    """A device of speed s takes (10 (1 - sparsity) + 10 density) / s seconds."""

    def estimate(device, plan):
        sent = density(plan) if plan.codec_up else 1.0
        return Estimate(seconds=10 * (1 - plan.training.sparsity.weights + sent) / speeds[device])

    return estimate


@pytest.fixture(name="decide")
def decide_fixture(make_view, make_plan):
    """``decide(policy, speeds=...)``: the plans after the policy, by device."""

    def decide(policy, *, speeds=(1.0,), change=lambda plan: plan):
        view = make_view(seconds=speeds, estimator=cost(speeds))
        plans = tuple(change(replace(make_plan(device), training=TRAINING)) for device in view.devices)
        decision, state = policy.decide(view, policy.init(), Decision(plans=plans))
        assert state is None
        return {plan.device: plan for plan in decision.plans}

    return decide


# Fields.


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rule": "top"}, "rule is 'top'; it must be one of all, top_weights, diff_top_weights, top_diff"),
        ({"ratios": ()}, "ratios is empty; it must hold one mask ratio or more"),
        ({"ratios": (1.5,)}, "ratios is (1.5,): expected `float` <= 1.0 - at `$[0]`"),
        ({"levels": (1.0,)}, "levels is (1.0,): expected `float` < 1.0 - at `$[0]`"),
        ({"value_bits": 4}, "value_bits is 4; it must be one of 8, 16, 32"),
        ({"down": "dense"}, "down is 'dense'; it must be one of sparse, configured"),
        ({"deadline_s": 0.0, "ratios": (0.0, 0.2)}, "deadline_s is 0.0: expected `float` > 0.0"),
        (
            {"deadline_s": 2.5},
            "deadline_s is 2.5, and there is nothing to choose; set several ratios or levels",
        ),
        (
            {"rule": "all", "ratios": (0.0, 0.2), "deadline_s": 3.0},
            "deadline_s is 3, and there is nothing to choose; set several ratios or levels",
        ),
    ],
)
def test_wrong_fields_are_refused_with_a_sentence(fields, sentence):
    with pytest.raises(ValueError) as caught:
        ZeroFL(**fields)
    assert str(caught.value) == sentence


def test_fields_of_yaml_become_those_of_the_policy():
    found = make_policy([{"name": "all"}, {"name": "zerofl", "ratios": [0, 0.2], "levels": [0.5, 0.9]}])
    assert found == chain(All(), ZeroFL(ratios=(0.0, 0.2), levels=(0.5, 0.9)))


# What a plan trains and sends.


def topk(share, by="sent"):
    return CodecSpec("topk", {"density": share, "scope": "tensor", "roles": ["sparse"], "by": by})


@pytest.mark.parametrize(
    ("rule", "payload", "by"),
    [
        ("top_weights", "weights", "sent"),
        ("diff_top_weights", "difference", "reference"),
        ("top_diff", "difference", "sent"),
    ],
)
def test_a_rule_is_a_payload_and_a_selection(decide, rule, payload, by):
    plan = decide(ZeroFL(rule=rule))[0]
    assert plan.upload.payload == payload
    assert plan.codec_up == (topk(0.3, by), CodecSpec("float16"), CodecSpec("sparse"))
    assert plan.codec_down == (CodecSpec("sparse"),)
    assert plan.training == TRAINING
    assert plan.reasons[-1] == f"zerofl: 0.9 sparse, 30 % by {rule}"


def test_everything_is_sent_by_the_rule_all(decide, make_plan):
    plan = decide(ZeroFL(rule="all", down="configured"))[0]
    bare = replace(make_plan(0), training=TRAINING)
    assert plan == bare.with_("zerofl: 0.9 sparse", training=TRAINING)


BY_CHANNEL = CodecSpec("uniform", {"bits": 8, "granularity": "channel", "roles": ["sparse"]})


@pytest.mark.parametrize(
    ("bits", "coded"),
    [(32, ()), (16, (CodecSpec("float16"),)), (8, (BY_CHANNEL, CodecSpec("float16")))],
)
def test_values_have_the_bits_that_are_set(decide, bits, coded):
    assert decide(ZeroFL(value_bits=bits))[0].codec_up == (topk(0.3), *coded, CodecSpec("sparse"))


@pytest.mark.parametrize(
    ("sparsity", "ratio", "share"),
    [(0.9, 0.0, 0.1), (0.9, 0.2, 0.3), (0.95, 0.1, 0.15), (0.7, 0.2, 0.5), (0.5, 0.499, 0.999)],
)
def test_the_share_is_one_minus_the_sparsity_plus_the_ratio_without_rounding_errors(decide, sparsity, ratio, share):
    """1 - 0.9 + 0.2 is 0.30000000000000004 in floating point."""
    plan = decide(ZeroFL(levels=(sparsity,), ratios=(ratio,)))[0]
    assert plan.codec_up[0].options["density"] == share


@pytest.mark.parametrize("ratio", [0.9, 1.0])
def test_a_ratio_from_the_sparsity_on_selects_nothing(decide, ratio):
    plan = decide(ZeroFL(ratios=(ratio,)))[0]
    assert plan.codec_up == (CodecSpec("float16"), CodecSpec("sparse"))
    assert plan.upload.payload == "weights"


def test_a_level_sets_both_sparsities_and_keeps_the_rest(decide):
    plan = decide(ZeroFL(levels=(0.5,)))[0]
    assert plan.training.sparsity == Sparsity(weights=0.5, activations=0.5, period=3, layers=("conv",))
    assert replace(plan.training, sparsity=TRAINING.sparsity) == TRAINING


@pytest.mark.parametrize(
    "objective", [Objective(kind="evaluate"), Objective(kind="collect")], ids=lambda objective: objective.kind
)
def test_plans_that_send_no_weights_stay_as_they_are(decide, make_plan, objective):
    plan = decide(ZeroFL(), change=lambda plan: replace(plan, objective=objective))[0]
    assert plan == replace(make_plan(0), training=TRAINING, objective=objective)


def test_a_plan_whose_device_does_not_train_stays_as_it_is(decide, make_plan):
    frozen = Split(mode="ecofed", cut="conv")
    plan = decide(ZeroFL(), change=lambda plan: replace(plan, split=frozen))[0]
    assert plan == replace(make_plan(0), training=TRAINING, split=frozen)


def test_a_plan_that_imitates_sends_a_selection(decide):
    plan = decide(ZeroFL(), change=lambda plan: replace(plan, objective=Objective(kind="imitate")))[0]
    assert plan.codec_up[0] == topk(0.3)


def test_a_decision_without_plans_is_left_alone(make_view):
    policy = ZeroFL(ratios=(0.0, 0.2))
    assert policy.decide(make_view(), None, Decision()) == (Decision(), None)


# The choice. A plan of sparsity s and share q takes 10 (1 - s + q) / speed.


def chosen(plans):
    return {device: (plan.training.sparsity.weights, density(plan)) for device, plan in plans.items()}


def test_without_a_choice_nothing_is_estimated(make_view, make_plan):
    def refuse(device, plan):
        raise AssertionError

    view = make_view(seconds=(1,), estimator=refuse)
    plans = (replace(make_plan(0), training=TRAINING),)
    ZeroFL(levels=(0.9,)).decide(view, None, Decision(plans=plans))


def test_a_device_gets_the_largest_ratio_that_its_deadline_allows(decide):
    """At 90 % the choices take 1 + 6, 1 + 3 and 1 + 1 seconds by the speed of the device."""
    policy = ZeroFL(ratios=(0.0, 0.5, 0.2), deadline_s=4.0)
    assert chosen(decide(policy, speeds=(2.0, 1.0, 0.5, 0.25))) == {
        0: (0.9, 0.6),  # 3.5 s
        1: (0.9, 0.3),  # 4 s: just in time
        2: (0.9, 0.1),  # 4 s
        3: (0.9, 0.1),  # 8 s: none is in time, this is the fastest
    }


def test_a_lower_sparsity_goes_before_a_larger_ratio(decide):
    policy = ZeroFL(levels=(0.9, 0.5), ratios=(0.0, 0.2), deadline_s=10.0)
    # By level and ratio: 5 + 7, 5 + 5, then 1 + 3, 1 + 1 seconds by the speed.
    assert chosen(decide(policy, speeds=(2.0, 1.0, 0.5, 0.25))) == {
        0: (0.5, 0.7),
        1: (0.5, 0.5),
        2: (0.9, 0.3),
        3: (0.9, 0.1),
    }


def test_without_a_deadline_it_is_the_median_of_the_first_choice(decide):
    """The first choice takes 3.5, 7 and 14 seconds: the median is 7."""
    found = chosen(decide(ZeroFL(ratios=(0.0, 0.5, 0.2)), speeds=(2.0, 1.0, 0.5)))
    assert found == {0: (0.9, 0.6), 1: (0.9, 0.6), 2: (0.9, 0.1)}


def test_each_device_alone_is_planned_by_the_deadline_of_all(make_view, make_plan):
    """As ``fedbonsai advise`` asks for them. A device without enough samples does not count."""
    speeds, samples = (2.0, 1.0, 0.5, 0.01), (10, 10, 10, 1)
    view = make_view(
        seconds=speeds,
        samples=samples,
        min_samples=2,
        estimator=cost(speeds),
        plan_maker=lambda device: replace(make_plan(device), training=TRAINING),
    )
    policy = ZeroFL(ratios=(0.0, 0.5, 0.2))
    assert policy.with_deadline(view) == ZeroFL(ratios=(0.0, 0.5, 0.2), deadline_s=7.0)
    for same in (ZeroFL(), ZeroFL(ratios=(0.0, 0.2), deadline_s=3.0)):
        assert same.with_deadline(view) == same


def test_among_choices_that_are_all_late_the_fastest_wins(make_view, make_plan):
    """The lowest sparsity is the fastest here, as where its kernels are dense and the others' slower."""
    view = make_view(seconds=(1,), estimator=lambda _, plan: Estimate(seconds=1 + 10 * plan.training.sparsity.weights))
    plans = (replace(make_plan(0), training=TRAINING),)
    decision, _ = ZeroFL(levels=(0.9, 0.5), deadline_s=1.0).decide(view, None, Decision(plans=plans))
    assert decision.plans[0].training.sparsity.weights == 0.5


# Statements.


def test_a_policy_states_what_it_writes_and_what_devices_must_run():
    stated = statements_of(ZeroFL(levels=(0.5, 0.9)))
    assert stated.writes == ("training.sparsity", "codec_up", "codec_down", "upload")
    assert stated.replaces == ("codec_up", "codec_down")
    assert stated.needs_codecs == ("topk", "float16", "sparse")
    assert stated.sparsities == (0.5, 0.9)
    assert "plans" in stated.needs
    assert set(stated.needs_settings) == {"training.sparsity"}


@pytest.mark.parametrize(
    ("fields", "writes", "codecs"),
    [
        ({"rule": "all"}, ("training.sparsity", "codec_down"), ("sparse",)),
        ({"rule": "all", "down": "configured"}, ("training.sparsity",), ()),
        ({"down": "configured"}, ("training.sparsity", "codec_up", "upload"), ("topk", "float16", "sparse")),
        (
            {"value_bits": 8},
            ("training.sparsity", "codec_up", "codec_down", "upload"),
            ("topk", "uniform", "float16", "sparse"),
        ),
        ({"value_bits": 32}, ("training.sparsity", "codec_up", "codec_down", "upload"), ("topk", "sparse")),
    ],
)
def test_statements_follow_the_fields(fields, writes, codecs):
    stated = statements_of(ZeroFL(**fields))
    assert (stated.writes, stated.needs_codecs) == (writes, codecs)
    assert set(stated.forbids_before) == set(stated.forbids_behind) == {"codec_up", "codec_down"} & set(writes)


def fault(*policies):
    return chain_fault([(type(policy).__name__, statements_of(policy)) for policy in policies])


def test_it_goes_with_selections_and_cuts_and_needs_plans():
    assert fault(RandomCohort(cohort=1.0), ZeroFL()) == ""
    assert fault(All(), SplitFed(cut="conv"), ZeroFL()) == ""
    assert fault(ZeroFL(), All()).startswith("ZeroFL only changes plans of the policies before it")


@pytest.mark.parametrize(
    ("direction", "fields", "why"),
    [
        (
            "codec_up",
            {"rule": "all"},
            "which selects what is sent, and a link holds one selection at most; allowed: one of the two, or rule: all",
        ),
        (
            "codec_down",
            {"down": "configured"},
            "which sets the codec of the downlink; allowed: one of the two, or down: configured",
        ),
    ],
)
def test_another_codec_of_the_same_direction_is_refused_on_both_sides(direction, fields, why):
    class Coding(All):
        writes = (direction,)

    before, behind = fault(All(), Coding(), ZeroFL()), fault(All(), ZeroFL(), Coding())
    assert before == f"Coding sets {direction} before ZeroFL, {why}"
    assert behind == f"Coding sets {direction} behind ZeroFL, {why}"
    assert fault(All(), Coding(), ZeroFL(**fields)) == fault(All(), ZeroFL(**fields), Coding()) == ""


def test_it_does_not_go_with_a_frozen_trunk():
    why = "whose devices train nothing; allowed: one of the two"
    assert fault(All(), EcoFed(), ZeroFL()) == f"ZeroFL sets how sparsely the model is trained behind EcoFed, {why}"


@pytest.mark.parametrize(
    ("fields", "notices"),
    [
        ({}, []),
        ({"ratios": (0.0, 0.9)}, []),
        ({"rule": "all", "ratios": (0.95,)}, []),
        ({"ratios": (0.2, 0.95)}, [(0.95, 0.9)]),
        ({"levels": (0.5, 0.9), "ratios": (0.6,)}, [(0.6, 0.5)]),
    ],
)
def test_a_ratio_above_the_lowest_sparsity_is_told(fields, notices):
    assert list(ZeroFL(**fields).notices(TRAINING)) == [
        f"ratios holds {ratio:g}, above the sparsity {sparsity:g}: it counts as {sparsity:g}, and updates at that sparsity "
        "are sent whole"
        for ratio, sparsity in notices
    ]
