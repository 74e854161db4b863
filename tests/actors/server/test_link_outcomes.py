"""The property of links with memory: after any outcomes of 200 plans, both ends hold the same, to the bit."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.messages import Dispatch
from fedbonsai.comms.links.predict import Residual
from fedbonsai.comms.links.state import copy_state
from fedbonsai.learning.spec import Call
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.report import Outcome, Report
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from ..steps import IMAGES, make_server
from .test_links import BRIEF, DOWN, UP, carry_out, finish, in_step, linked

ROUNDS = 200
LINKS = {
    "link_down": Residual(rule="half_step", feedback=True),
    "link_up": Residual(rule="drift", feedback=True),
    "training": BRIEF,
}
OUTCOMES = st.lists(
    st.tuples(
        st.integers(0, 2),  # the device
        st.sampled_from(["folded", "folded", "folded", "late", "lost", "restarted", "cut", "flipped", "abandoned"]),
        st.booleans(),  # whether the version closes
    ),
    min_size=ROUNDS,
    max_size=ROUNDS,
)


@given(outcomes=OUTCOMES)
@settings(
    max_examples=max(3, settings.default.max_examples // 20),  # each has 200 plans
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
def test_both_ends_stay_in_step_over_any_outcomes_of_200_plans(outcomes: list[tuple[int, str, bool]]) -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    resyncs = 0
    for number, (device_id, outcome, closes) in enumerate(outcomes, 1):
        sent = server.send(linked(server, device_id, number, **LINKS))
        resyncs += any(message.kind == "resync" for message in sent.messages)
        if outcome == "lost":  # the worker died: neither report nor state arrived
            server.ended(sent.plan, Report(plan=sent.plan, outcome=Outcome.LOST), None)
        elif outcome == "abandoned":  # released: the round closed without it
            server.released(sent.plan)
        elif outcome == "restarted":  # the device lost its memory; it is done only if it was sent a dense model
            answer = carry_out(device, Dispatch(sent.plan, sent.messages, None))
            finish(server, sent, answer, fold=answer[0].outcome == Outcome.DONE)
        elif outcome in ("cut", "flipped") and sent.messages:  # a packet down was damaged
            packet = np.array(sent.messages[-1].reference)
            damaged = packet[:-9] if outcome == "cut" else packet ^ (np.arange(packet.size) == 50).astype(np.uint8)
            messages = (*sent.messages[:-1], replace(sent.messages[-1], reference=damaged))
            answer = carry_out(device, replace(sent, messages=messages))
            assert answer[0].stage == "open"
            assert answer[1:] == (None, None)
            finish(server, sent, answer, fold=False)
        else:
            report, update, state = carry_out(device, sent)
            assert report.outcome == Outcome.DONE, report.error
            finish(server, sent, (report, update, state and copy_state(state)), fold=outcome == "folded")
            assert in_step(server, device_id)
        if closes:
            server.close_version(in_flight=())
    event(f"resynchronised {min(resyncs // 10 * 10, 50)} times or more")
    # Afterwards the next two plans of each device are done, and the second needs no resynchronisation.
    for device_id in range(3):
        for again in range(2):
            sent = server.send(linked(server, device_id, ROUNDS + 10 * device_id + again + 1, **LINKS))
            assert not again or all(message.kind != "resync" for message in sent.messages)
            finish(server, sent, carry_out(device, sent), fold=True)
            assert in_step(server, device_id)


@pytest.mark.parametrize("down", DOWN)
@pytest.mark.parametrize("up", UP)
def test_a_parameter_without_dimensions_is_trained(up: str, down: str) -> None:
    settings_ = msgspec.structs.replace(IMAGES, model=Call("my_models:Scaled"))
    server, device = make_server(settings_), Device(Workload(settings_))
    links = {"link_down": Residual(rule=down), "link_up": Residual(rule=up)}
    before = float(server.weights()["scale"])
    for number in range(1, 5):
        sent = server.send(linked(server, 0, number, **links))
        finish(server, sent, carry_out(device, sent), fold=True)
        assert in_step(server, 0)
        server.close_version(in_flight=())
    after = server.weights()["scale"]
    assert after.shape == ()
    assert float(after) != before
