"""Index maps: which channels plans are sent, and which devices have which maps. The model has one group of four channels."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.index_map import MAX_MAPS, open_map
from fedbonsai.actors.messages.messages import Dispatch
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.server import index_maps
from fedbonsai.actors.server.index_maps import IndexMaps
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.learning.parts.channels import map_hash
from fedbonsai.learning.parts.part import whole
from fedbonsai.learning.spec import Call
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.report import Outcome, Report

from ..steps import IMAGES, make_plan, make_server

SMALL = msgspec.structs.replace(IMAGES, model=Call("my_models:Small"), models={"other": Call("my_models:Small")})


@pytest.fixture(name="server")
def server_fixture() -> Server:
    """Its channels have the L1 norms 1, 4, 2, 3 times nine."""
    server = make_server(SMALL)
    norms = torch.tensor([1.0, 4.0, 2.0, 3.0])
    for name in ("conv.weight", "other:conv.weight"):
        server.tensors[name].copy_(norms.reshape(4, 1, 1, 1).expand(4, 1, 3, 3))
    return server


def narrow(
    server: Server, device: int = 0, *, plan_id: int = 1, width: float = 0.5, family: str = "", **fields: Any
) -> Plan:
    part = whole(server.workload.family(family).spec, model=family)
    part = msgspec.structs.replace(part, **{"width": width, "channels": "l1"} | fields)
    return make_plan(server.workload, device, id=plan_id, part=part, version=server.version)


def kept(server: Server, sent: Dispatch) -> list[int]:
    return np.flatnonzero(server.workload.channels(sent.plan.part)).tolist()


def is_sent(sent: Dispatch) -> bool:
    assert [message.kind for message in sent.messages[-1:]] == ["weights"]
    assert [message.kind for message in (*sent.held, *sent.messages[:-1])] == ["map"]
    return not sent.held


def deliver(server: Server, sent: Dispatch, **report: Any) -> None:
    server.maps.ended(sent.plan, Report(plan=sent.plan, **report), None)


def test_channels_are_ranked_by_the_weights(server: Server) -> None:
    sent = server.send(narrow(server))
    assert kept(server, sent) == [1, 3]
    assert sent.plan.part.index_map == map_hash(np.array([0, 1, 0, 1], bool))
    groups = server.workload.family("").groups
    opened = open_map(sent.messages[0].reference, sent.plan.part.index_map, groups)
    assert opened.tolist() == [False, True, False, True]
    assert sent.num_bytes == sum(message.num_bytes for message in sent.messages)


def test_the_ranking_is_that_of_the_first_plan_of_its_turn(server: Server) -> None:
    first = server.send(narrow(server))
    server.tensors["conv.weight"].copy_(server.tensors["conv.weight"].flip(0).clone())  # norms 3, 2, 4, 1
    server.maps.version_closed()
    assert kept(server, server.send(narrow(server, 1, plan_id=2))) == kept(server, first) == [1, 3]
    assert kept(server, server.send(narrow(server, 2, plan_id=3, turn=1))) == [0, 2]
    # and of another width, of the first turn
    assert kept(server, server.send(narrow(server, 0, plan_id=4, width=0.75))) == [1, 2, 3]


def test_narrower_parts_are_in_wider_ones(server: Server) -> None:
    choices = [kept(server, server.send(narrow(server, plan_id=n, width=n / 4))) for n in (1, 2, 3)]
    assert choices == [[1], [1, 3], [1, 2, 3]]


def test_what_a_plan_would_be_sent_is_known_before_and_changes_nothing(server: Server) -> None:
    part = narrow(server).part
    assert np.flatnonzero(server.maps.channels(part)).tolist() == [1, 3]
    before = server.maps.num_bytes(part, 0)
    server.tensors["conv.weight"].copy_(server.tensors["conv.weight"].flip(0).clone())
    server.maps.version_closed()  # no plan has used the ranking yet
    assert np.flatnonzero(server.maps.channels(part)).tolist() == [0, 2]
    sent = server.send(narrow(server))
    assert kept(server, sent) == [0, 2]
    assert before == sent.messages[0].num_bytes > 0


def test_families_are_ranked_apart(server: Server) -> None:
    server.tensors["other:conv.weight"].copy_(server.tensors["conv.weight"].flip(0).clone())
    assert kept(server, server.send(narrow(server))) == [1, 3]
    assert kept(server, server.send(narrow(server, 1, plan_id=2, family="other"))) == [0, 2]


@pytest.mark.parametrize(("channels", "width"), [("prefix", 0.5), ("rolling", 0.5), ("l1", 1.0)])
def test_other_rules_and_whole_parts_need_no_map(server: Server, channels: str, width: float) -> None:
    plan = narrow(server, channels=channels, turn=3, width=width)
    sent = server.send(plan)
    assert (sent.plan.part.index_map, [message.kind for message in sent.messages], sent.held) == ("", ["weights"], ())
    assert server.maps.num_bytes(plan.part, 0) == 0


def test_a_map_is_sent_to_a_device_once(server: Server) -> None:
    first = server.send(narrow(server, 0, plan_id=1))
    assert is_sent(first)
    assert is_sent(server.send(narrow(server, 1, plan_id=2)))  # to another device
    deliver(server, first)
    again = server.send(narrow(server, 0, plan_id=3))
    assert not is_sent(again)
    assert again.num_bytes == again.messages[0].num_bytes
    assert server.maps.num_bytes(narrow(server).part, 0) == 0
    assert server.maps.num_bytes(narrow(server).part, 1) > 0
    assert is_sent(server.send(narrow(server, 0, plan_id=4, width=0.25)))


def test_the_workers_of_simulated_devices_read_a_held_map_again(server: Server) -> None:
    deliver(server, server.send(narrow(server)))
    again = server.send(narrow(server, plan_id=2))
    (map_message,) = again.held
    assert again.packets_for(simulated=True) == (map_message.reference, *again.packets)
    assert again.packets_for(simulated=False) == again.packets
    for packets, error in (
        (again.packets_for(simulated=True), ""),
        (again.packets, "OutOfSync: the device does not have"),
    ):
        report = msgspec.msgpack.decode(Device(Workload(SMALL)).run(plan_message(again.plan), packets)[0])
        assert report.get("error", "").startswith(error)
        assert ("error" in report, report.get("out_of_sync", False)) == (bool(error), bool(error))


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED, Outcome.REJECTED, Outcome.LATE])
def test_a_report_acknowledges_the_map_whatever_the_outcome(server: Server, outcome: Outcome) -> None:
    deliver(server, server.send(narrow(server)), outcome=outcome)
    assert not is_sent(server.send(narrow(server, plan_id=2)))


def test_a_map_is_sent_again_where_it_is_not_known_to_be(server: Server) -> None:
    server.maps.released(server.send(narrow(server, plan_id=1)).plan)  # lost
    second = server.send(narrow(server, plan_id=2))
    assert is_sent(second)
    deliver(server, second)
    third = server.send(narrow(server, plan_id=3))
    assert not is_sent(third)
    deliver(server, third, outcome=Outcome.FAILED, out_of_sync=True)
    fourth = server.send(narrow(server, plan_id=4))
    assert is_sent(fourth)
    deliver(server, fourth)
    server.maps.device_reset(0)
    assert is_sent(server.send(narrow(server, plan_id=5)))


def test_an_evaluation_gets_the_map_that_its_device_has(server: Server) -> None:
    sent = server.send(narrow(server))
    evaluation = server.maps.to_evaluate(Dispatch(sent.plan, (), None))
    assert evaluation is not None
    assert evaluation.packets_for(simulated=True) == (sent.messages[0].reference,)
    whole_part = Dispatch(make_plan(server.workload), (), None)
    assert server.maps.to_evaluate(whole_part) is whole_part
    gone = msgspec.structs.replace(sent.plan, part=msgspec.structs.replace(sent.plan.part, index_map="00"))
    assert server.maps.to_evaluate(Dispatch(gone, (), None)) is None


def test_what_is_remembered_of_a_device_is_bounded(server: Server) -> None:
    """Of maps that differ, as of many turns, the newest are remembered; an older one is sent again."""
    names = []
    for number in range(index_maps._MAX_HELD + 1):
        server.maps._sent[number] = name = f"{number:016x}"
        server.maps.ended(narrow(server, plan_id=number), Report(plan=narrow(server)), None)
        names.append(name)
    assert server.maps._held == {0: tuple(names[1:])}


def test_maps_are_bounded_and_those_of_plans_in_flight_stay(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_MAPS > 2
    monkeypatch.setattr(index_maps, "MAX_MAPS", 2)
    first = server.send(narrow(server, plan_id=1, width=0.25))
    deliver(server, server.send(narrow(server, plan_id=2, width=0.5)))
    server.send(narrow(server, plan_id=3, width=0.75))
    # The map of plan 1 is the oldest, and in use; that of plan 2 is dropped.
    assert kept(server, first) == [1]
    dropped = Dispatch(narrow(server, index_map=map_hash(np.array([0, 1, 0, 1], bool))), (), None)
    with pytest.raises(ValueError, match="a map that this process does not have"):
        kept(server, dropped)
    assert len(server.maps._maps) == len(server.maps._messages) == 2


def test_a_restored_state_sends_what_the_saved_one_would_have(server: Server) -> None:
    deliver(server, server.send(narrow(server, 0, plan_id=1)))
    in_flight = server.send(narrow(server, 1, plan_id=2))
    saved = server.maps.saved()

    workload = Workload(SMALL)
    tensors = {name: tensor.flip(0).clone() for name, tensor in server.tensors.items()}  # later weights
    restored = IndexMaps(LocalChannel(), workload, tensors)
    part = narrow(server).part
    assert np.flatnonzero(restored.channels(part)).tolist() == [0, 2]
    later = msgspec.structs.replace(part, turn=1)
    tensors["conv.weight"].copy_(server.tensors["conv.weight"])
    restored.channels(later)  # expected, of weights that are about to be replaced
    tensors["conv.weight"].copy_(server.tensors["conv.weight"].flip(0))
    restored.restore(saved)

    assert np.flatnonzero(restored.channels(part)).tolist() == [1, 3]
    assert np.flatnonzero(restored.channels(later)).tolist() == [0, 2]
    assert np.flatnonzero(workload.channels(in_flight.plan.part)).tolist() == [1, 3]
    assert restored.num_bytes(part, 0) == 0
    assert restored.num_bytes(part, 1) > 0
    restored.ended(in_flight.plan, Report(plan=in_flight.plan), None)
    assert restored.num_bytes(part, 1) == 0


def test_a_device_trains_the_channels_of_its_map(server: Server) -> None:
    sent = server.send(narrow(server))
    answer, update, _ = Device(Workload(SMALL)).run(plan_message(sent.plan), sent.packets)
    assert update is not None, answer
    before = server.weights()
    server.fold(sent.plan, server.open(sent.plan, update), weight=3)
    server.close_version(in_flight=())
    after = server.weights()
    for name in ("conv.weight", "norm.weight", "norm.running_mean"):
        same = [torch.equal(before[name][i], after[name][i]) for i in range(4)]
        assert same == [True, False, True, False], name
    columns = (before["out.weight"] != after["out.weight"]).any(dim=0).reshape(4, 16).any(dim=1).tolist()
    assert columns == [False, True, False, True]
