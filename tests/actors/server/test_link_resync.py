"""Resynchronisation: uplinks with memory alone, damaged states, and parts that change."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.messages import Dispatch
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.comms.errors import OutOfSync
from fedbonsai.comms.links.memory import FORGET
from fedbonsai.comms.links.predict import Residual
from fedbonsai.comms.links.state import named_models, state_bytes
from fedbonsai.learning.spec import ServerOptimiser
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Upload
from fedbonsai.policies.report import Outcome, Report
from msgspec.structs import replace

from ..steps import IMAGES, end_of, make_server
from .test_links import UP, carry_out, finish, in_step, linked


def uplink_alone(rule: str) -> dict[str, Any]:
    return {
        "link_down": None,
        "codec_down": (),
        "link_up": Residual(rule=rule, feedback=rule in ("delta", "drift")),
    }


def forgetful(sent: Dispatch) -> Dispatch:
    """The dispatch as it is for a device that has lost its memory."""
    return Dispatch(sent.plan, sent.messages, None)


def error_of(server: Server, device: int) -> dict[str, float]:
    """Sums of absolute values of the device's error feedback, once the newest fold is acknowledged."""
    end = end_of(server, device)
    end.acknowledge(server.links.acknowledged(device))
    return {name: float(np.abs(array).sum()) for name, array in end.error.items()}


@pytest.mark.parametrize("rule", ["drift", "stationary", "half_step", "second_order"])
def test_an_uplink_alone_is_resynchronised_by_its_plan(rule: str) -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    sent_kinds, acknowledged = [], []
    for number in range(1, 8):
        sent = server.send(linked(server, 0, number, **uplink_alone(rule)))
        sent_kinds += [message.kind for message in sent.messages]
        acknowledged.append(sent.plan.acknowledged)
        answer = carry_out(device, forgetful(sent) if number == 3 else sent)
        if number == 3:
            assert answer[1] is not None
            with pytest.raises(OutOfSync, match="the update builds on state"):
                server.fold(sent.plan, server.open(sent.plan, answer[1]), weight=1)
        finish(server, sent, answer, fold=number != 3)
        server.close_version(in_flight=())
    assert sent_kinds == ["weights", "weights", "weights", "resync", "weights", "weights", "weights"]
    assert acknowledged == [0, 1, 2, FORGET, 4, 5, 6]


def test_a_plan_drops_the_devices_memory_until_a_report_acknowledges_it() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    peer = None
    for number in range(1, 6):
        sent = server.send(linked(server, 0, number, **uplink_alone("drift")))
        peer = server.links.peers.get(0)
        assert peer is not None
        assert (sent.plan.acknowledged == FORGET) == (number in (3, 4))
        if number == 3:  # the worker died: neither report nor state arrived
            server.ended(sent.plan, Report(plan=sent.plan, outcome=Outcome.LOST), None)
        else:
            finish(server, sent, carry_out(device, sent), fold=True)
        if number == 2:
            peer.lost = True
        server.close_version(in_flight=())
    assert server.links.peers.held == {}  # an uplink alone holds no model


def test_histories_are_trimmed_at_both_ends_or_at_neither() -> None:
    """Drift needs one pair, second_order two: a plan that never arrived has trimmed nothing."""
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number, rule in enumerate(["second_order", "second_order", "drift", "second_order"], 1):
        sent = server.send(linked(server, 0, number, **uplink_alone(rule)))
        if rule == "drift":
            server.ended(sent.plan, Report(plan=sent.plan, outcome=Outcome.LOST), None)
        else:
            finish(server, sent, carry_out(device, sent), fold=True)
        server.close_version(in_flight=())


@pytest.mark.parametrize("rule", UP)
def test_memory_dropped_for_the_budget_is_counted_and_reported(rule: str) -> None:
    workload = Workload(IMAGES)
    server = Server(
        workload, channel=LocalChannel(), optimiser=ServerOptimiser(), link_memory_bytes=0, link_disk_bytes=0
    )
    device, notices, sent_kinds = Device(Workload(IMAGES)), [], []
    for number in range(1, 5):
        sent = server.send(linked(server, 0, number, **uplink_alone(rule)))
        sent_kinds += [message.kind for message in sent.messages]
        finish(server, sent, carry_out(device, sent), fold=True)
        notices += server.notices()
        server.close_version(in_flight=())
    assert sent_kinds == ["weights", "resync", "resync", "resync"]
    assert server.links.peers.dropped == 4
    assert len(notices) == 3  # the first, the second and the fourth
    assert "number 4 beyond the 0 bytes that links may have on disk" in notices[-1]
    server.close()


@pytest.mark.parametrize("rule", UP)
def test_updates_of_changing_tensors_are_folded(rule: str) -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    blocks, feedback = server.workload.spec.block_names, rule in ("delta", "drift")
    changes = uplink_alone(rule)
    for number in range(1, 8):
        plan = linked(server, 0, number, upload=Upload(statistics=number % 2 == 0), **changes)
        if number in (1, 4):
            plan = replace(plan, part=replace(plan.part, trained=blocks[-1:]))
        before = error_of(server, 0) if number > 1 else {}
        sent = server.send(plan)
        assert [message.kind for message in sent.messages if message.kind != "block"] == ["weights"]
        assert finish(server, sent, carry_out(device, sent), fold=True).outcome == Outcome.DONE
        server.close_version(in_flight=())
        after = error_of(server, 0)
        if number == 4 and feedback:  # the error of what the plan did not train is kept
            waiting = {name: size for name, size in before.items() if name.startswith("conv")}
            assert any(waiting.values())
            assert waiting.items() <= after.items()
            assert after["out.weight"] != before["out.weight"]


def test_parts_that_differ_within_a_version_are_folded_without_feedback_too() -> None:
    """The downlink's coding error is kept by part: the plan of the last block is sent first, and has no other block."""
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    blocks = server.workload.spec.block_names
    for version in range(3):
        for device_id in range(2):
            plan = linked(server, device_id, 10 * version + device_id + 1, link_down=Residual(rule="stationary"))
            if device_id == 0:
                plan = replace(plan, part=replace(plan.part, trained=blocks[-1:]))
            sent = server.send(plan)
            finish(server, sent, carry_out(device, sent), fold=True)
            assert in_step(server, device_id)
        assert server.folded == 2
        server.close_version(in_flight=())


def test_plans_of_changing_parts_are_done() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    blocks = server.workload.spec.block_names
    for number in range(1, 6):
        plan = linked(server, 0, number)
        if number in (1, 4):
            plan = replace(plan, part=replace(plan.part, trained=blocks[-1:]))
        sent = server.send(plan)
        assert finish(server, sent, carry_out(device, sent), fold=True).outcome == Outcome.DONE
        assert in_step(server, 0)
        server.close_version(in_flight=())


@pytest.mark.parametrize("changes", [{}, uplink_alone("drift")], ids=["both", "uplink"])
def test_a_damaged_state_fails_one_plan_and_is_dropped(changes: dict[str, Any]) -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number in range(1, 5):
        sent = server.send(linked(server, 0, number, **changes))
        if number == 2:
            assert sent.state is not None
            sent = dataclasses.replace(sent, state={**sent.state, "head": np.zeros(3, np.uint8)})
        report = finish(server, sent, carry_out(device, sent), fold=number != 2)
        if number == 2:
            assert (report.outcome, report.stage, report.out_of_sync) == (Outcome.FAILED, "open", True)
            assert "the state of the device's end of its link cannot be read" in report.error
        else:
            assert report.outcome == Outcome.DONE
        assert (sent.messages[0].kind == "resync") == (number == 3)
        server.close_version(in_flight=())


@pytest.mark.parametrize("changes", [{}, uplink_alone("drift")], ids=["both", "uplink"])
def test_an_acknowledged_version_is_kept_though_the_plan_failed(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("no more")

    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number in range(1, 5):
        sent = server.send(linked(server, 0, number, **changes))
        assert all(message.kind != "resync" for message in sent.messages)
        with monkeypatch.context() as patch:
            if number == 2:
                patch.setattr(device._modules, "get", no_memory)
            report = finish(server, sent, carry_out(device, sent), fold=number != 2)
        assert (report.outcome == Outcome.OUT_OF_MEMORY) == (number == 2)
        assert report.held == sent.plan.version
        server.close_version(in_flight=())


def test_a_device_with_delta_keeps_what_it_has_not_sent_and_the_name_of_its_model_after_missed_rounds() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number in range(1, 3):
        sent = server.send(linked(server, 0, number))
        finish(server, sent, carry_out(device, sent), fold=True)
        server.close_version(in_flight=())
    (stream,) = server.links.downlinks._broadcasts.values()
    model_bytes = sum(array.nbytes for array in stream.held.arrays.values())
    for number, packets in ((8, 3), (9, 1)):
        sent = server.send(linked(server, 1, number))
        assert len(sent.packets) == packets
        finish(server, sent, carry_out(device, sent), fold=True)
        state = server.links.state(1)
        assert state is not None
        assert state_bytes(state) - state["head"].nbytes == model_bytes
        assert [name for name, _ in named_models(state)] == [server.version]
        server.close_version(in_flight=())
