"""The step that a device gets: messages of 1000, 100 and 50 bytes over links of 1000 bytes/s, and a dense model of 4000."""

from dataclasses import dataclass, field

import pytest
from fedbonsai.policies.compression.residuals import Residuals
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.policy import chain
from fedbonsai.policies.selection.plain import All

MESSAGE = {0.1: 1000, 0.01: 100, 0.005: 50}
DENSE = 4000


@dataclass
class Wires:
    """Estimates of links. ``held``: the density that a device was sent so far; ``missed``: messages that it has missed."""

    held: dict[int, float] = field(default_factory=dict)
    missed: int = 1

    def __call__(self, device, plan):
        up, down = (codecs[0].options["density"] if codecs else None for codecs in (plan.codec_up, plan.codec_down))
        down_bytes = MESSAGE[down] if down else DENSE
        if plan.link_down is not None:
            moved = self.held.get(device, down) != down
            down_bytes = DENSE if moved else min(DENSE, self.missed * down_bytes)
        up_bytes = MESSAGE[up] if up else DENSE
        return Estimate(down_bytes=down_bytes, down_s=down_bytes / 1000, up_bytes=up_bytes, up_s=up_bytes / 1000)


def steps_of(make_view, wires, state=None, **limits):
    """Densities down and up of one device, and the state after."""
    policy = chain(All(), Residuals(density=0.1, steps=((0.01, 1), (0.005, 1)), **limits))
    view = make_view(seconds=(1,), estimator=wires)
    decision, after = policy.decide(view, state or policy.init(), Decision())
    (plan,) = decision.plans
    return plan.codec_down[0].options["density"], plan.codec_up[0].options["density"], after


@pytest.mark.parametrize(
    ("seconds", "step"),
    [(1.0, 0.1), (0.99, 0.01), (0.1, 0.01), (0.05, 0.005), (0.01, 0.005)],
)
def test_the_first_step_of_which_one_message_is_short_enough(make_view, seconds, step):
    assert steps_of(make_view, Wires(), upload_s=seconds)[:2] == (0.1, step)
    assert steps_of(make_view, Wires(), download_s=seconds)[:2] == (step, 0.1)


def test_missed_messages_do_not_move_a_device_to_a_smaller_step(make_view):
    wires = Wires(held={0: 0.1}, missed=3)  # 3 s to catch up; moving would take 4
    assert steps_of(make_view, wires, download_s=1.0)[0] == 0.1


@pytest.mark.parametrize(("missed", "step"), [(1, 0.1), (3, 0.1), (4, 0.005), (9, 0.005)])
def test_where_none_is_short_enough_the_fewest_bytes_including_those_of_moving_decide(make_view, missed, step):
    # A dense model that must come anyway (from 4 messages on) brings the smallest step.
    assert steps_of(make_view, Wires(held={0: 0.1}, missed=missed), download_s=0.001)[0] == step


def test_on_the_downlink_a_device_never_moves_back(make_view):
    state = steps_of(make_view, Wires(), download_s=0.1)[2]
    assert state == [None, {"0": 1}]
    assert steps_of(make_view, Wires(held={0: 0.01}), state, download_s=9.0)[0] == 0.01


def test_without_a_limit_the_first_step_is_taken_without_an_estimate(make_view):
    policy = Residuals(density=0.1)

    def refuse(device, plan):
        raise AssertionError("no estimate is needed")

    view = make_view(seconds=(1,), estimator=refuse)
    decision, _ = policy.decide(view, {}, Decision(plans=(view.new_plan(0),)))
    assert decision.plans[0].reasons == ("residuals: down stationary 0.1, up delta 0.1",)


@pytest.mark.parametrize(("levels", "fits"), [(1, True), (16, True), (0, False), (17, False)])
def test_levels_of_a_step_are_bounded_like_those_of_the_first(levels, fits):
    def make(**changes):
        return Residuals(upload_s=1.0, **changes)

    for changes in ({"levels": levels}, {"steps": ((0.01, levels),)}):
        if fits:
            make(**changes)
        else:
            with pytest.raises(ValueError, match=rf"^{next(iter(changes))} is .*: expected `int` [<>]= 1"):
                make(**changes)


def test_statements():
    assert set(Residuals.needs) == {"plans"}
    assert Residuals().replaces == ("codec_down", "codec_up")
    assert Residuals().writes == ("codec_down", "codec_up", "link_down", "link_up")
    assert Residuals(up="none").replaces == ("codec_down",)
    assert Residuals(up="none").writes == ("codec_down", "link_down")
    assert Residuals(up="none", down="none").writes == ()
    assert Residuals().needs_codecs == ("topk", "ternary", "uniform")
    assert Residuals(up="none", down="none").needs_codecs == ()
