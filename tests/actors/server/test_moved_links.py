"""Links with memory whose channels change: both ends move their memories by index, and patches bring what is new."""

from typing import Any

import msgspec
import numpy as np
import pytest
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.messages import Dispatch, array_specs
from fedbonsai.actors.messages.places import Places
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.codec import Array, CodecSpec
from fedbonsai.comms.codecs.make_codec import make_codec
from fedbonsai.comms.errors import OutOfSync
from fedbonsai.comms.links.memory import DeviceEnd
from fedbonsai.comms.links.predict import Residual, hash_arrays
from fedbonsai.comms.links.state import copy_state, to_state
from fedbonsai.comms.packet import sealed_bytes
from fedbonsai.learning.parts.part import whole
from fedbonsai.learning.spec import Call
from fedbonsai.learning.tensors import as_arrays
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.report import Outcome, Report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from ..steps import IMAGES, end_of, make_server
from .test_links import BRIEF, carry_out, finish, linked

# One group of four channels; the global model, and a family with the same tensors.
SMALL = replace(IMAGES, model=Call("my_models:Small"), models={"twin": Call("my_models:Small")})
# Most of a message is short against the 211 values of a narrow part, so that moves are cheaper than dense models.
SPARSE = (
    CodecSpec("topk", {"density": 0.03}),
    CodecSpec("ternary"),
    CodecSpec("uniform", {"bits": 2, "roles": ["vector", "statistic"]}),
    CodecSpec("entropy"),
)
OWN = {"link_down": Residual(rule="half_step"), "link_up": Residual(rule="half_step")}
DRIFT = {"link_up": Residual(rule="drift", feedback=True)}


def narrow(server: Server, device: int, number: int, *, turn: int = 0, width: float = 0.5, **changes: Any) -> Plan:
    """A plan for a window of channels that starts at ``turn``; width 0.5: two of four."""
    fields = {"channels": "rolling", "turn": turn, "width": width} | changes.pop("part", {})
    codecs = {"codec_down": SPARSE, "codec_up": SPARSE, "training": BRIEF}
    plan = linked(server, device, number, **(codecs | changes))
    return replace(plan, part=replace(plan.part, **fields))


def in_step(server: Server, device: int) -> bool:
    """Whether both ends are at one place and hold the same models and histories. (Before the version closes.)"""
    peer = server.links.peers.get(device)
    assert peer is not None
    assert peer.state is not None
    assert peer.moved is None
    end = end_of(server, device)
    end.acknowledge(peer.folded)
    models = [hash_arrays(model.arrays) for model in peer.memory.models]
    if not models and peer.stream:
        models = [hash_arrays(server.links.downlinks._broadcasts[peer.stream].held.arrays)]
    mine = [hash_arrays(model.arrays) for model in end.memory.models]
    sent, own = ([(hash_arrays(s.base), hash_arrays(s.local)) for s in each.memory.sent] for each in (peer, end))
    assert Places(server.workload).problem(end.place, {name: a.shape for name, a in end.error.items()}) == ""
    return end.place == peer.place and mine[-len(models) or 1 :] == models and own[-len(sent) or len(own) :] == sent


def kinds(sent: Dispatch) -> list[str]:
    return [message.kind for message in sent.messages if message.kind != "map"]


def plays(server: Server, device: Device, plan: Plan) -> Dispatch:
    """One plan from dispatch to fold, which must be done."""
    sent = server.send(plan)
    report = finish(server, sent, carry_out(device, sent), fold=True)
    assert report.outcome == Outcome.DONE, report.error
    assert in_step(server, plan.device)
    return sent


def held(server: Server, device: int) -> dict[str, Array]:
    """The model that a device holds."""
    return end_of(server, device).memory.models[-1].arrays


@pytest.mark.parametrize("changes", [{}, OWN], ids=["broadcast", "own"])
def test_the_first_message_of_a_narrow_part_is_the_part(changes: dict[str, Any]) -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    dense = 64 + 4 * (2 * 9 + 2 * 5 + 3 * 32 + 3)
    for k in range(2):
        sent = plays(server, device, narrow(server, k, k + 1, **changes))
        assert [(each.kind, each.num_bytes, each.typical) for each in sent.messages] == [("weights", dense, False)]
    server.close_version(in_flight=())
    assert kinds(plays(server, device, narrow(server, 0, 3, **changes))) == ["weights"]
    assert kinds(plays(server, device, narrow(server, 2, 4, **changes))) == ["weights"]  # first contact, in version 1
    server.close_version(in_flight=())


def test_a_device_never_builds_the_whole_model_for_a_narrow_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    monkeypatch.setattr(device.workload, "new_model", lambda: pytest.fail("the whole model is built"))
    for turn in range(3):
        sent = plays(server, device, narrow(server, 0, turn + 1, turn=turn, **DRIFT))
        server.close_version(in_flight=())
    assert "patch" in kinds(sent)


def test_a_familys_model_is_sent_first_and_has_the_familys_tensors() -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    for version in range(3):
        before = {name: tensor.clone() for name, tensor in server.tensors.items()}
        plan = linked(server, 0, version + 1, codec_down=SPARSE)
        sent = plays(server, device, replace(plan, part=whole(server.workload.family("twin").spec, model="twin")))
        assert kinds(sent) == ["weights"]
        assert sent.messages[0].typical == (version > 0)
        server.close_version(in_flight=())
        changed = {name for name, tensor in server.tensors.items() if not tensor.equal(before[name])}
        assert changed
        assert all(name.startswith("twin:") for name in changed)
        stream = server.links.downlinks._broadcasts[server.links.peers.get(0).stream]
        for name, array in stream.held.arrays.items():
            assert np.array_equal(as_arrays(server.tensors)[f"twin:{name}"], array)
    assert set(server.store["pending"]) <= {name for name in server.tensors if name.startswith("twin:")}


def test_a_device_that_changes_its_family_starts_anew() -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    twin = whole(server.workload.family("twin").spec, model="twin")
    found = []
    for number, part in enumerate([None, twin, twin, None, None], 1):
        plan = narrow(server, 0, number, **DRIFT)
        found.append(kinds(plays(server, device, plan if part is None else replace(plan, part=part))))
        server.close_version(in_flight=())
    assert found == [["weights"]] * 5
    assert server.links.peers.get(0).place == b"\0\xc0"


@pytest.mark.parametrize("changes", [{}, DRIFT, OWN], ids=["delta", "drift", "own"])
def test_a_window_that_moves_on_is_followed_by_patches(changes: dict[str, Any]) -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    dense = 64 + 4 * (2 * 9 + 2 * 5 + 3 * 32 + 3)
    for version in range(6):
        for k in range(2):
            sent = plays(server, device, narrow(server, k, 10 * version + k + 1, turn=version, **changes))
            if version:
                assert set(kinds(sent)) == {"patch", "weights"}
                assert sum(each.num_bytes for each in sent.messages) < dense + 300
                patch = next(each for each in sent.messages if each.kind == "patch")
                assert patch.num_bytes == 64 + 4 * (9 + 5 + 48)  # one channel of the window is new
        server.close_version(in_flight=())
    if changes is not OWN:  # both devices were sent the same objects
        assert len(server.links.downlinks._broadcasts) <= 2


def test_elements_that_both_channels_have_keep_their_bits() -> None:
    """The residual to the version comes before the patch, which changes nothing of channel 1."""
    server, device = make_server(SMALL), Device(Workload(SMALL))
    plays(server, device, narrow(server, 0, 1, codec_up=()))
    server.close_version(in_flight=())
    stream = server.links.peers.get(0).stream
    before = server.links.downlinks._broadcasts[stream].held.arrays["conv.bias"].copy()
    exact = {name: tensor.clone() for name, tensor in server.store["model"].items()}
    for name, rest in server.store["pending"].items():
        exact[name] += rest
    sent = plays(server, device, narrow(server, 0, 2, turn=1))
    assert kinds(sent) == ["weights", "patch"]
    after = held(server, 0)["conv.bias"]
    assert after[0] == before[1]
    assert after[1] == exact["conv.bias"][2]  # what is new comes with what has not been sent yet


def test_the_model_is_what_the_receivers_of_a_narrow_part_hold_and_untouched_elsewhere() -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    initial = {name: tensor.clone() for name, tensor in server.store["model"].items()}
    for number in range(1, 4):
        plays(server, device, narrow(server, 0, number, codec_up=()))
        server.close_version(in_flight=())
    (broadcast,) = server.links.downlinks._broadcasts.values()
    model, pending = server.store["model"], server.store["pending"]
    assert model["conv.bias"][:2].tolist() == broadcast.held.arrays["conv.bias"].tolist()
    assert model["out.weight"][:, :32].tolist() == broadcast.held.arrays["out.weight"].tolist()
    assert pending["out.weight"][:, :32].any()
    assert not pending["out.weight"][:, 32:].any()
    for name, start in (("conv.weight", 2), ("conv.bias", 2)):
        assert model[name][start:].equal(initial[name][start:])
    assert model["out.weight"][:, 32:].equal(initial["out.weight"][:, 32:])


@pytest.mark.parametrize(("first", "second"), [(1.0, 0.5), (0.5, 1.0), (0.75, 0.5)])
def test_a_change_of_width_moves_too(first: float, second: float) -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    plays(server, device, narrow(server, 0, 1, width=first))
    server.close_version(in_flight=())
    sent = plays(server, device, narrow(server, 0, 2, width=second))
    assert kinds(sent) == ["weights", "patch"]


def test_the_broadcast_of_a_new_turn_grows_out_of_that_of_the_same_width() -> None:
    """A device that changes its width comes first: it is resynchronised, and the others follow."""
    server, device = make_server(replace(SMALL, num_devices=4)), Device(Workload(replace(SMALL, num_devices=4)))
    for version in range(2):
        for k, width in enumerate((0.75, 0.5, 0.5)):
            plays(server, device, narrow(server, k, 10 * version + k + 1, width=width))
        server.close_version(in_flight=())
    found = [kinds(plays(server, device, narrow(server, k, 21 + k, turn=1)))[-1] for k in range(3)]
    assert found == ["resync", "patch", "patch"]


def test_an_index_map_is_followed_by_patches() -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    for turn in range(3):
        for again in range(2):
            with_scores(server, turn)
            plan = narrow(server, 0, 1 + 2 * turn + again, turn=turn, part={"channels": "l1"})
            sent = plays(server, device, plan)
            assert ("patch" in kinds(sent)) == (turn > 0 and not again)
            server.close_version(in_flight=())


def with_scores(server: Server, turn: int) -> None:
    """The ranking of a turn: channels from ``turn`` on, in circles."""
    scores = np.array([-((channel - turn) % 4) for channel in range(4)], float)
    server.maps._rankings["", "l1", turn] = scores


def uplink_alone(rule: str) -> dict[str, Any]:
    link = Residual(rule=rule, feedback=rule in ("delta", "drift"))
    return {"link_down": None, "codec_down": (), "link_up": link}


@pytest.mark.parametrize("rule", ["delta", "drift", "stationary", "half_step", "second_order"])
def test_the_uplinks_memory_moves_without_a_downlinks(rule: str) -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    for number in range(1, 8):
        sent = plays(server, device, narrow(server, 0, number, turn=number // 2, **uplink_alone(rule)))
        assert kinds(sent) == ["weights"]
        server.close_version(in_flight=())


def test_feedback_is_moved_by_index_and_not_by_shape() -> None:
    """What was not sent of channel 1 is at position 0 once the window has moved on; the other position starts at zero."""
    server, device = make_server(SMALL), Device(Workload(SMALL))
    sent = plays(server, device, narrow(server, 0, 1))
    end = end_of(server, 0)
    end.acknowledge(server.links.acknowledged(0))
    before = end.error["out.weight"].copy()
    assert before[:, :16].any()
    assert before[:, 16:].any()
    server.close_version(in_flight=())
    sent = server.send(narrow(server, 0, 2, turn=1))
    seen = []
    move = DeviceEnd.move

    def watched(end: DeviceEnd, *arguments: Any) -> None:
        move(end, *arguments)
        seen.append(end.error["out.weight"].copy())

    DeviceEnd.move = watched  # type: ignore[method-assign]
    try:
        finish(server, sent, carry_out(device, sent), fold=True)
    finally:
        DeviceEnd.move = move  # type: ignore[method-assign]
    (moved,) = seen
    assert moved[:, :16].tolist() == before[:, 16:].tolist()
    assert not moved[:, 16:].any()


@pytest.mark.parametrize("changes", [{}, DRIFT, OWN, uplink_alone("drift")], ids=["delta", "drift", "own", "uplink"])
def test_a_lost_plan_with_new_channels_changes_no_record(changes: dict[str, Any]) -> None:
    """Of a simulated device the state is lost with the plan: the next plan moves it from where it was."""
    server, device = make_server(SMALL), Device(Workload(SMALL))
    plays(server, device, narrow(server, 0, 1, **changes))
    server.close_version(in_flight=())
    for number, turn, how in ((2, 1, "lost"), (3, 2, "released"), (4, 0, "done"), (5, 1, "lost"), (6, 3, "done")):
        sent = server.send(narrow(server, 0, number, turn=turn, **changes))
        assert "resync" not in kinds(sent)
        if how == "lost":
            server.ended(sent.plan, Report(plan=sent.plan, outcome=Outcome.LOST), None)
        elif how == "released":
            server.released(sent.plan)
        else:
            report = finish(server, sent, carry_out(device, sent), fold=True)
            assert report.outcome == Outcome.DONE, report.error
            assert in_step(server, 0)
        server.close_version(in_flight=())


@pytest.mark.parametrize("changes", [{}, DRIFT, OWN, uplink_alone("drift")], ids=["delta", "drift", "own", "uplink"])
def test_the_record_moves_with_the_report_of_an_update_that_is_not_folded(changes: dict[str, Any]) -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    for number, turn, fold in ((1, 0, True), (2, 1, False), (3, 1, True), (4, 2, False), (5, 2, True)):
        sent = server.send(narrow(server, 0, number, turn=turn, **changes))
        assert "resync" not in kinds(sent)
        report = finish(server, sent, carry_out(device, sent), fold=fold)
        assert report.outcome == Outcome.DONE, report.error
        assert in_step(server, 0)
        assert server.links.peers.get(0).place == Places(server.workload).of(sent.plan.part)
        server.close_version(in_flight=())


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("changes", [{}, DRIFT, OWN], ids=["delta", "drift", "own"])
def test_a_device_that_moved_without_the_servers_knowledge_is_resynchronised(
    changes: dict[str, Any], back: bool
) -> None:
    """A device of its own memory opened a plan whose report was lost; the next one is for the old channels, or for new ones."""
    server, device = make_server(SMALL), Device(Workload(SMALL))
    plays(server, device, narrow(server, 0, 1, **changes))
    server.close_version(in_flight=())
    sent = server.send(narrow(server, 0, 2, turn=1, **changes))
    carry_out(device, sent)
    state = to_state(device._end)
    server.ended(sent.plan, Report(plan=sent.plan, outcome=Outcome.LOST), None)
    sent = server.send(narrow(server, 0, 3, turn=0 if back else 3, **changes))
    answer = carry_out(device, Dispatch(sent.plan, sent.messages, state))
    assert (answer[0].stage, answer[0].out_of_sync, answer[1]) == ("open", True, None), answer[0].error
    finish(server, sent, answer, fold=False)
    again = server.send(narrow(server, 0, 4, turn=2, **changes))
    assert kinds(again) == ["resync"]
    answer = carry_out(device, Dispatch(again.plan, again.messages, state))
    assert finish(server, again, answer, fold=True).outcome == Outcome.DONE
    assert in_step(server, 0)


def test_an_uplink_alone_that_moved_without_the_servers_knowledge_is_resynchronised() -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    changes = uplink_alone("drift")
    for number in (1, 2):
        plays(server, device, narrow(server, 0, number, **changes))
        server.close_version(in_flight=())
    sent = server.send(narrow(server, 0, 3, turn=2, **changes))  # nothing in common with turn 0
    _, _, state = carry_out(device, sent)
    server.ended(sent.plan, Report(plan=sent.plan, outcome=Outcome.LOST), None)
    sent = server.send(narrow(server, 0, 4, turn=0, **changes))
    report, update, state = carry_out(device, Dispatch(sent.plan, sent.messages, state))
    assert update is not None
    with pytest.raises(OutOfSync, match="the update builds on state"):
        server.open(sent.plan, update)
    server.ended(sent.plan, report, state)
    assert kinds(plays(server, device, narrow(server, 0, 5, **changes))) == ["resync"]


def test_memory_on_disk_moves() -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    server.links.peers._memory_bytes = 0
    for number in range(1, 5):
        sent = server.send(narrow(server, 0, number, turn=number, **OWN))
        assert kinds(sent)[0] == ("patch" if number > 1 else "weights")
        assert finish(server, sent, carry_out(device, sent), fold=True).outcome == Outcome.DONE
        server.close_version(in_flight=())
    server.close()


FIXED = (CodecSpec("uniform", {"roles": ["weight", "vector", "statistic"]}),)  # 8 bits


@pytest.mark.parametrize("links", [{}, OWN, uplink_alone("drift")], ids=["broadcast", "own", "uplink"])
@pytest.mark.parametrize("rule", ["rolling", "l1"])
def test_estimates_are_what_is_sent(links: dict[str, Any], rule: str) -> None:
    """With codecs of fixed size: first contact, residuals, patches, dense models. Maps are counted apart."""
    server, device = make_server(SMALL), Device(Workload(SMALL))
    number, patches = 0, 0
    for version in range(6):
        for k, width in enumerate((1.0, 0.5, 0.75)):
            number += 1
            plan = narrow(server, k, number, turn=version // 2, width=width, part={"channels": rule})
            plan = replace(plan, **({"codec_down": FIXED, "codec_up": ()} | links))
            if version == 5:
                plan = replace(plan, part=replace(plan.part, width=0.5))
            expected = server.workload.submodel(plan.part.shape).down
            estimate = estimated(server, plan, expected)
            if k == 1 and rule == "l1" and not version % 2 and plan.link_down is not None:
                assert ("", "l1", version // 2) not in server.maps._rankings  # an estimate decides nothing
            sent = plays(server, device, plan)
            assert estimate == sum(each.num_bytes for each in sent.messages if each.kind != "map")
            patches += "patch" in kinds(sent)
        server.close_version(in_flight=())
    assert patches >= 3 or rule == "l1" or plan.link_down is None


def estimated(server: Server, plan: Plan, expected: Any) -> int:
    specs = array_specs(expected)
    newest, _ = sealed_bytes(make_codec(plan.codec_down), specs)
    return server.links.estimate_bytes(plan, newest=newest, expected=specs) if plan.link_down else newest


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),  # the device
        st.sampled_from([(0.5, 0), (0.5, 1), (0.5, 2), (0.25, 3), (0.75, 0), (1.0, 0)]),  # width and turn
        st.sampled_from(["folded", "folded", "folded", "late", "lost", "released"]),
        st.booleans(),  # whether the version closes
    ),
    min_size=30,
    max_size=30,
)


@pytest.mark.parametrize("changes", [{}, DRIFT, OWN], ids=["delta", "drift", "own"])
@given(steps=STEPS)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_both_ends_stay_in_step_over_any_channels_and_outcomes(
    changes: dict[str, Any], steps: list[tuple[int, tuple[float, int], str, bool]]
) -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    places = Places(server.workload)
    for number, (device_id, (width, turn), outcome, closes) in enumerate(steps, 1):
        peer = server.links.peers.get(device_id)
        start = peer.place if peer is not None else b""
        has_model = peer is not None and peer.held is not None and not peer.lost
        before = held(server, device_id) if has_model else {}
        sent = server.send(narrow(server, device_id, number, width=width, turn=turn, **changes))
        if outcome == "lost":
            server.ended(sent.plan, Report(plan=sent.plan, outcome=Outcome.LOST), None)
        elif outcome == "released":
            server.released(sent.plan)
        else:
            report, update, state = carry_out(device, sent)
            assert report.outcome == Outcome.DONE, report.error
            finish(server, sent, (report, update, state and copy_state(state)), fold=outcome == "folded")
            assert in_step(server, device_id)
            if kinds(sent) == ["patch"]:  # no residual: what is common keeps its bits
                move = places.move(start, places.of(sent.plan.part))
                assert move is not None
                for name, array in held(server, device_id).items():
                    common = move(name, np.ones(before[name].shape, bool))
                    assert array[common].tobytes() == move(name, before[name])[common].tobytes()
        if closes:
            server.close_version(in_flight=())


def test_a_device_evaluates_the_part_that_it_holds() -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    plan = plays(server, device, narrow(server, 0, 1, part={"channels": "l1"})).plan
    server.close_version(in_flight=())
    asked = replace(linked(server, 0, 99), objective=msgspec.structs.replace(plan.objective, kind="evaluate"))
    sent = server.send_to_evaluate(asked)
    assert sent is not None
    assert (sent.plan.part, sent.plan.version, sent.messages, len(sent.held)) == (plan.part, 0, (), 1)
    answer, _, _ = Device(Workload(SMALL)).run(plan_message(sent.plan), sent.packets_for(simulated=True), sent.state)
    assert b"accuracy" in answer
