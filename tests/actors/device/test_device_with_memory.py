"""A device that keeps its end of the link: its state is not sent, and evaluations do not change it."""

from typing import Any

import msgspec
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.device.device_with_memory import DeviceWithMemory
from fedbonsai.actors.messages.messages import Dispatch
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.comms.codec import Array
from fedbonsai.comms.links.predict import Residual
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Objective, Plan
from fedbonsai.policies.report import Answer, Outcome, Report

from ..server.test_links import linked
from ..steps import IMAGES, make_plan, make_server


def carry_out(device: DeviceWithMemory, sent: Dispatch) -> tuple[Report, Array | None]:
    assert sent.state is None
    packets = [packet.copy() for packet in sent.packets]
    answer, update, state = device.run(plan_message(sent.plan), packets)
    assert state is None
    for packet in packets:  # a worker's packets are views of memory that is used again
        packet[:] = 0
    return Report.of(sent.plan, msgspec.msgpack.decode(answer, type=Answer)), update


def test_what_it_holds_stays_through_plans_and_evaluations() -> None:
    server, device = make_server(IMAGES), DeviceWithMemory(Device(Workload(IMAGES), whole_states=True))

    def plan(number: int, **changes: Any) -> Plan:
        links = {"link_down": Residual(rule="stationary"), "link_up": Residual(rule="drift")}
        return make_plan(server.workload, id=number, version=server.version, **links, **changes)

    for number in range(1, 5):
        sent = server.send(plan(number))
        assert [message.kind for message in sent.messages] == ["agreed" if number == 1 else "weights"]
        assert sent.plan.acknowledged == number - 1
        report, update = carry_out(device, sent)
        assert update is not None, report.error
        server.fold(sent.plan, server.open(sent.plan, update), weight=report.samples)
        server.ended(sent.plan, report, None)
        server.close_version(in_flight=())
        evaluation = server.send_to_evaluate(plan(100 + number, objective=Objective(kind="evaluate")))
        assert evaluation is not None
        assert (evaluation.plan.version, evaluation.packets) == (number - 1, ())
        report, _ = carry_out(device, evaluation)
        assert report.outcome == Outcome.DONE, report.error
        assert report.metrics


def test_after_a_report_that_was_lost_the_link_is_resynchronised() -> None:
    server, device = make_server(IMAGES), DeviceWithMemory(Device(Workload(IMAGES), whole_states=True))
    found = []
    for number in range(1, 5):
        sent = server.send(linked(server, 0, number))
        report, update = carry_out(device, sent)
        if number == 2:
            report, update = Report(plan=sent.plan, outcome=Outcome.LOST), None
        if update is not None:
            server.fold(sent.plan, server.open(sent.plan, update), weight=report.samples)
        server.ended(sent.plan, report, None)
        server.close_version(in_flight=())
        found.append((sent.messages[-1].kind, report.outcome, report.out_of_sync))
    assert found == [
        ("agreed", Outcome.DONE, False),
        ("weights", Outcome.LOST, False),
        ("weights", Outcome.FAILED, True),
        ("resync", Outcome.DONE, False),
    ]
