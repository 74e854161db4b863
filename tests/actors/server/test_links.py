"""Links with memory, server to device to server: both ends hold the same, also after losses."""

from itertools import product
from typing import Any

import msgspec
import numpy as np
import pytest
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.messages import Dispatch
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.codec import Array, CodecSpec
from fedbonsai.comms.errors import OutOfSync
from fedbonsai.comms.links.memory import HeldModel
from fedbonsai.comms.links.predict import ANCHORED, Residual, hash_arrays
from fedbonsai.comms.links.state import LinkState, copy_state
from fedbonsai.comms.packet import PacketKind, read_stamp
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.report import Answer, Outcome, Report

from ..steps import IMAGES, end_of, make_plan, make_server

LOSSY = (CodecSpec("float16"),)
SPARSE = (
    CodecSpec("topk", {"density": 0.1}),
    CodecSpec("ternary"),
    CodecSpec("uniform", {"roles": ["vector", "statistic"]}),
    CodecSpec("entropy"),
)
BRIEF = Training(optimiser=Optimiser(learning_rate=0.1), batch_size=15)  # one step: for many rounds
UP = ["delta", "drift", "stationary", "half_step", "second_order"]
DOWN = ["stationary", "half_step", "second_order"]


def linked(server: Server, device: int, number: int, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "id": number,
        "version": server.version,
        "seed": number,
        "codec_down": SPARSE,
        "codec_up": SPARSE,
        "link_down": Residual(rule="stationary", feedback=True),
        "link_up": Residual(rule="delta", feedback=True),
    }
    return make_plan(server.workload, device, **(fields | changes))


def carry_out(device: Device, sent: Dispatch) -> tuple[Report, Array | None, LinkState | None]:
    report, update, state = device.run(plan_message(sent.plan), sent.packets_for(simulated=True), sent.state)
    return Report.of(sent.plan, msgspec.msgpack.decode(report, type=Answer)), update, state


def kinds(sent: Dispatch) -> list[PacketKind]:
    return [read_stamp(packet).kind for packet in sent.packets]


def finish(
    server: Server, sent: Dispatch, answer: tuple[Report, Array | None, LinkState | None], *, fold: bool
) -> Report:
    report, update, state = answer
    if fold:
        assert update is not None, report.error
        server.fold(sent.plan, server.open(sent.plan, update), weight=report.samples)
    server.ended(sent.plan, report, state)
    return report


def in_step(server: Server, device: int) -> bool:
    """Whether both ends of a link hold the same models, to the bit, and the same histories of the uplink.

    (To be called before the version closes: then the server advances to a model that devices do not hold yet.)
    """
    peer = server.links.peers.get(device)
    assert peer is not None
    assert peer.state is not None
    end = end_of(server, device)
    end.acknowledge(peer.folded)
    models = [(m.version, hash_arrays(m.arrays)) for m in peer.memory.models]
    if not models:  # a broadcast, which the server holds once
        held = server.links.downlinks._broadcasts[peer.stream].held
        models = [(held.version, hash_arrays(held.arrays))]
    sent = [(hash_arrays(s.base), hash_arrays(s.local)) for s in peer.memory.sent]
    mine = [(m.version, hash_arrays(m.arrays)) for m in end.memory.models]
    return (
        mine[-1][0] == peer.held
        and models[-len(mine) :] == mine[-len(models) :]
        and [(hash_arrays(s.base), hash_arrays(s.local)) for s in end.memory.sent][-len(sent) or 1 :] == sent
    )


@pytest.mark.parametrize("down", DOWN)
def test_ends_whose_models_differ_are_not_in_step(down: str) -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number in (1, 2):
        sent = server.send(linked(server, 0, number, link_down=Residual(rule=down)))
        finish(server, sent, carry_out(device, sent), fold=True)
        assert in_step(server, 0)
        if number == 1:
            server.close_version(in_flight=())
    peer = server.links.peers.get(0)
    assert peer is not None
    assert peer.state is not None
    if down == "stationary":  # the state names the model of the broadcast
        (broadcast,) = server.links.downlinks._broadcasts.values()
        arrays = {name: array + 5 for name, array in broadcast.held.arrays.items()}
        broadcast.held = HeldModel.of(broadcast.held.version, arrays)
    else:
        newest = max(name for name in peer.state if name.startswith("model"))
        peer.state = {name: array + 5 if name == newest else array for name, array in peer.state.items()}
    assert not in_step(server, 0)


def test_the_initial_model_is_agreed_by_seed_in_few_bytes() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    sent = server.send(linked(server, 0, 1))
    assert kinds(sent) == [PacketKind.AGREED]
    assert sent.num_bytes < 80
    report = finish(server, sent, carry_out(device, sent), fold=True)
    assert (report.outcome, report.held) == (Outcome.DONE, 0)


def test_a_device_whose_seed_gives_another_model_is_sent_a_dense_one_next() -> None:
    server, device = make_server(IMAGES), Device(Workload(msgspec.structs.replace(IMAGES, seed=IMAGES.seed + 1)))
    first = server.send(linked(server, 0, 1))
    report = finish(server, first, carry_out(device, first), fold=False)
    assert (report.outcome, report.stage, report.out_of_sync) == (Outcome.FAILED, "open", True)
    again = server.send(linked(server, 0, 2))
    assert [message.kind for message in again.messages] == ["resync"]
    assert finish(server, again, carry_out(device, again), fold=True).held == 0
    assert in_step(server, 0)


def test_one_residual_serves_all_devices() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number, version in enumerate(range(3)):
        sent = [server.send(linked(server, k, 10 * number + k + 1)) for k in range(2)]
        if version:
            assert kinds(sent[0]) == [PacketKind.RESIDUAL]
            assert sent[0].packets[0] is sent[1].packets[0]
        for one in sent:
            finish(server, one, carry_out(device, one), fold=True)
        assert in_step(server, 0)
        assert in_step(server, 1)
        server.close_version(in_flight=())


def test_a_device_that_missed_rounds_is_sent_the_missed_residuals() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number in range(1, 3):  # (three would be more than this small model is)
        sent = server.send(linked(server, 0, number))
        finish(server, sent, carry_out(device, sent), fold=True)
        server.close_version(in_flight=())
    late = server.send(linked(server, 1, 9))
    assert kinds(late) == [PacketKind.AGREED, PacketKind.RESIDUAL, PacketKind.RESIDUAL]
    assert finish(server, late, carry_out(device, late), fold=True).held == 2
    assert in_step(server, 1)


def test_a_device_that_missed_more_bytes_than_a_dense_model_is_sent_a_dense_model() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number in range(1, 4):
        sent = server.send(linked(server, 0, number, codec_down=()))  # each residual as large as a model
        finish(server, sent, carry_out(device, sent), fold=True)
        server.close_version(in_flight=())
    late = server.send(linked(server, 1, 9, codec_down=()))
    assert [message.kind for message in late.messages] == ["resync"]
    assert finish(server, late, carry_out(device, late), fold=True).held == 3
    assert in_step(server, 1)


def test_an_update_that_was_not_folded_is_not_built_on() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    plan = {"link_up": Residual(rule="drift", feedback=True)}
    first = server.send(linked(server, 0, 1, **plan))
    answer = carry_out(device, first)
    finish(server, first, answer, fold=False)
    second = server.send(linked(server, 0, 2, **plan))
    assert second.plan.acknowledged == 0
    report, update, state = carry_out(device, second)
    assert not device._end.memory.sent
    assert not device._end.error
    finish(server, second, (report, update, state), fold=True)
    assert server.send(linked(server, 0, 3, **plan)).plan.acknowledged == 2
    assert in_step(server, 0)


def test_an_update_that_builds_on_another_state_is_refused_and_the_link_resynchronised() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    plan = {"link_up": Residual(rule="stationary"), "link_down": Residual(rule="stationary")}
    for number in (1, 2):
        sent = server.send(linked(server, 0, number, **plan))
        answer = carry_out(device, sent)
        if number == 2:
            peer = server.links.peers.get(0)
            assert peer is not None
            peer.memory.sent[0].local[next(iter(peer.memory.sent[0].local))][0] += 1  # the server's end is damaged
            with pytest.raises(OutOfSync, match="builds on state"):
                finish(server, sent, answer, fold=True)
            server.ended(sent.plan, answer[0], answer[2])
        else:
            finish(server, sent, answer, fold=True)
        server.close_version(in_flight=())
    again = server.send(linked(server, 0, 3, **plan))
    assert [message.kind for message in again.messages] == ["resync"]
    finish(server, again, carry_out(device, again), fold=True)
    assert in_step(server, 0)


def test_a_device_that_lost_its_memory_is_resynchronised() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    first = server.send(linked(server, 0, 1))
    finish(server, first, carry_out(device, first), fold=True)
    server.close_version(in_flight=())
    second = server.send(linked(server, 0, 2))
    report = finish(server, second, carry_out(device, Dispatch(second.plan, second.messages, None)), fold=False)
    assert report.out_of_sync
    assert "holds no model" in report.error
    third = server.send(linked(server, 0, 3))
    assert [message.kind for message in third.messages] == ["resync"]
    assert finish(server, third, carry_out(device, third), fold=True).outcome == Outcome.DONE


@pytest.mark.parametrize("down", DOWN)
@pytest.mark.parametrize("up", UP)
def test_lossless_residuals_of_bit_patterns_equal_fedavg_bit_for_bit(down: str, up: str) -> None:
    hashes = []
    for links in (
        {},
        {
            "link_down": Residual(rule=down, arithmetic="bits"),
            "link_up": Residual(rule=up, arithmetic="bits"),
        },
    ):
        server, device = make_server(IMAGES), Device(Workload(IMAGES))
        for version in range(5):
            for k in range(2):
                plan = linked(server, k, 10 * version + k + 1, codec_down=(), codec_up=(CodecSpec("lz4"),))
                plan = msgspec.structs.replace(plan, **({"link_down": None, "link_up": None} | links))
                sent = server.send(plan)
                finish(server, sent, carry_out(device, sent), fold=True)
            server.close_version(in_flight=())
        hashes.append(server.model_hash())
    assert hashes[0] == hashes[1]


# Feedback is for anchored rules alone. Three rows here, every rule in ``test_links_between_processes``, all in ``make soak``.
ROWS = [row for row in product(UP, DOWN, (False, True)) if row[0] in ANCHORED or not row[2]]
SHORT = [("delta", "stationary", True), ("drift", "half_step", False), ("half_step", "stationary", False)]


@pytest.mark.parametrize(
    ("up", "down", "feedback"),
    [row if row in SHORT else pytest.param(*row, marks=pytest.mark.soak) for row in ROWS],
)
def test_both_ends_stay_in_step_over_200_rounds_with_random_drops(up: str, down: str, feedback: bool) -> None:
    rng = np.random.default_rng(7)
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    links: dict[str, Any] = {
        "link_down": Residual(rule=down, feedback=feedback),
        "link_up": Residual(rule=up, feedback=feedback),
    }
    # A lossless last stage changes what is sent only where missed broadcasts may cost more than a dense model.
    links |= {"codec_up": SPARSE[:-1], "codec_down": SPARSE if down == "stationary" else SPARSE[:-1], "training": BRIEF}
    resyncs = done = 0
    for number in range(1, 201):
        device_id = number % 3
        sent = server.send(linked(server, device_id, number, **links))
        resyncs += any(message.kind == "resync" for message in sent.messages)
        outcome = rng.choice(["folded", "lost", "late", "restarted"], p=[0.7, 0.12, 0.12, 0.06])
        if outcome == "lost":  # the worker died: neither report nor state arrived
            lost = Report(plan=sent.plan, outcome=Outcome.LOST)
            server.ended(sent.plan, lost, None)
        elif outcome == "restarted":  # the device lost its memory
            answer = carry_out(device, Dispatch(sent.plan, sent.messages, None))
            finish(server, sent, answer, fold=answer[0].outcome == Outcome.DONE)
        else:
            report, update, state = carry_out(device, sent)
            assert report.outcome == Outcome.DONE, report.error
            finish(server, sent, (report, update, state and copy_state(state)), fold=outcome == "folded")
            assert in_step(server, device_id)
            done += 1
        if number % 2 == 0:
            server.close_version(in_flight=())
    assert done > 120
    assert resyncs >= 3
