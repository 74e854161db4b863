"""Frozen blocks: named by hash, sent to a device once, and never sent where every process has them from the start."""

from typing import Any

import pytest
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.block_packet import block_bytes, open_block
from fedbonsai.actors.messages.messages import Dispatch
from fedbonsai.actors.server import frozen_blocks
from fedbonsai.actors.server.frozen_blocks import FrozenBlocks, with_cached
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.learning.parts.part import Part, linear_head
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan, Split
from fedbonsai.policies.report import Outcome, Report
from msgspec.structs import replace

from ..steps import FOUR, carry_out, make_plan, make_server, one_round

NAMES = ("a", "b", "c", "out")


@pytest.fixture(name="server")
def server_fixture() -> Server:
    server = make_server(FOUR)
    assert server.workload.spec.block_names == NAMES
    return server


@pytest.fixture(name="trained")
def trained_fixture(server: Server) -> Server:
    """In version 1: all blocks have other values than at the start."""
    one_round(server, Device(Workload(FOUR)), [make_plan(server.workload, 0)])
    return server


def plan_of(
    server: Server, device: int = 0, *, plan_id: int = 1, trained: tuple[str, ...] = ("c", "out"), **changes: Any
) -> Plan:
    part = Part(blocks=NAMES, trained=trained)
    return make_plan(server.workload, device, id=plan_id, part=part, version=server.version, **changes)


def kinds(messages: tuple[Any, ...]) -> list[str]:
    return [message.kind for message in messages]


def deliver(server: Server, sent: Dispatch, **report: Any) -> None:
    server.blocks.ended(sent.plan, Report(plan=sent.plan, **report), None)


def set_block(server: Server, name: str, value: float) -> None:
    """Change a tensor of the model outside a round."""
    server.tensors[name].fill_(value)
    server._hashes.changed(name)


def test_blocks_of_the_initial_model_are_named_and_never_sent(server: Server) -> None:
    plan = plan_of(server)
    sent = server.send(plan)
    assert [name for name, _ in sent.plan.part.cached] == ["a", "b"]
    assert (kinds(sent.messages), sent.held) == (["weights"], ())
    assert sent.plan.part.sent == ("c", "out")
    assert server.blocks.num_bytes(plan) == 0
    report, update = carry_out(Device(Workload(FOUR)), sent)
    assert (report.outcome, report.error, update is not None) == (Outcome.DONE, "", True)


def test_plans_that_train_all_that_they_hold_are_left_as_they_are(trained: Server) -> None:
    plan = plan_of(trained, trained=NAMES)
    sent = trained.send(plan)
    assert (sent.plan.part.cached, kinds(sent.messages)) == ((), ["weights"])
    assert trained.blocks.num_bytes(plan) == 0
    assert with_cached(plan) is plan


def test_a_block_that_was_frozen_later_is_a_packet_of_its_own(trained: Server) -> None:
    plan = plan_of(trained)
    expected = trained.blocks.num_bytes(plan)
    sent = trained.send(plan)
    assert kinds(sent.messages) == ["block", "block", "weights"]
    assert [message.num_bytes for message in sent.messages[:2]] == [
        block_bytes(name, trained.workload.spec) for name in ("a", "b")
    ]
    assert expected == sum(message.num_bytes for message in sent.messages[:2])
    # 36 + 4 * 4 and 144 + 4 * 4 values of four bytes, behind a header
    assert 4 * (52 + 160) < expected < 4 * (52 + 160) + 400
    ((_, name), _) = sent.plan.part.cached
    opened = open_block(sent.messages[0].reference, "a", name, trained.workload.spec)
    assert set(opened) == {"a.weight", "na.weight", "na.bias", "na.running_mean", "na.running_var"}
    assert all(torch.equal(opened[each], trained.tensors[each]) for each in opened)


def test_it_is_sent_to_a_device_once(trained: Server) -> None:
    first = trained.send(plan_of(trained))
    assert kinds(trained.send(plan_of(trained, 1, plan_id=2)).messages) == ["block", "block", "weights"]
    deliver(trained, first)
    again = trained.send(plan_of(trained, plan_id=3))
    assert (kinds(again.messages), kinds(again.held)) == (["weights"], ["block", "block"])
    assert again.num_bytes == again.messages[0].num_bytes
    assert trained.blocks.num_bytes(plan_of(trained)) == 0
    assert trained.blocks.num_bytes(plan_of(trained, 1)) > 0  # its plan has not ended
    hashes = frozenset(name for _, name in first.plan.part.cached)
    assert trained.blocks.view_fields(1) == {"cached": {0: hashes}}


def test_one_packet_serves_all_devices(trained: Server) -> None:
    sent = [trained.send(plan_of(trained, device, plan_id=device + 1)) for device in (0, 1)]
    assert sent[0].messages[0].reference is sent[1].messages[0].reference


def test_a_block_that_has_changed_is_sent_anew_and_the_others_are_not(trained: Server) -> None:
    deliver(trained, trained.send(plan_of(trained)))
    set_block(trained, "b.weight", 2.0)
    again = trained.send(plan_of(trained, plan_id=2))
    assert (kinds(again.messages), kinds(again.held)) == (["block", "weights"], ["block"])
    assert trained.blocks.num_bytes(plan_of(trained)) == block_bytes("b", trained.workload.spec)
    deliver(trained, again)
    report, update = carry_out(Device(Workload(FOUR)), trained.send(plan_of(trained, plan_id=3)))
    assert (report.error, update is not None) == ("", True)


def test_counters_do_not_name_a_block(trained: Server) -> None:
    before = trained.send(plan_of(trained)).plan.part.cached
    trained.store["model"]["na.num_batches_tracked"].add_(5)
    trained._hashes.changed("na.num_batches_tracked")
    assert trained.send(plan_of(trained, plan_id=2)).plan.part.cached == before


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED, Outcome.REJECTED, Outcome.LATE])
def test_a_report_acknowledges_the_blocks_whatever_the_outcome(trained: Server, outcome: Outcome) -> None:
    deliver(trained, trained.send(plan_of(trained)), outcome=outcome, stage="train")
    assert kinds(trained.send(plan_of(trained, plan_id=2)).messages) == ["weights"]


def test_blocks_are_sent_again_where_they_are_not_known_to_be(trained: Server) -> None:
    def is_sent(plan_id: int) -> Dispatch:
        sent = trained.send(plan_of(trained, plan_id=plan_id))
        assert kinds(sent.messages) == ["block", "block", "weights"]
        return sent

    trained.blocks.released(is_sent(1).plan)  # lost
    deliver(trained, is_sent(2), outcome=Outcome.FAILED, stage="open")  # it may not have read them
    deliver(trained, is_sent(3))
    held = trained.send(plan_of(trained, plan_id=4))
    assert kinds(held.messages) == ["weights"]
    deliver(trained, held, outcome=Outcome.FAILED, stage="open", out_of_sync=True)
    deliver(trained, is_sent(5))
    trained.blocks.device_reset(0)
    is_sent(6)
    trained.blocks.device_reset(2)  # one that has none


def test_a_worker_without_the_blocks_is_out_of_sync(trained: Server) -> None:
    deliver(trained, trained.send(plan_of(trained)))
    sent = trained.send(plan_of(trained, plan_id=2))
    assert sent.packets_for(simulated=False) == sent.packets
    missing = Dispatch(sent.plan, sent.messages, sent.state)
    report, update = carry_out(Device(Workload(FOUR)), missing)
    assert (report.outcome, report.out_of_sync, update) == (Outcome.FAILED, True, None)
    assert report.error.startswith("OutOfSync: ")


def test_only_the_trained_blocks_change(trained: Server) -> None:
    before = trained.weights()
    sent = trained.send(plan_of(trained))
    report, update = carry_out(Device(Workload(FOUR)), sent)
    assert update is not None, report.error
    trained.fold(sent.plan, trained.open(sent.plan, update), weight=report.samples)
    trained.close_version(in_flight=())
    after = trained.weights()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"c", "out"}


def test_a_split_plan_has_its_trunk_instead(trained: Server) -> None:
    part = Part(blocks=("a",), trained=("a",), head=linear_head("a"), auxiliaries=(linear_head("a"),))
    plan = make_plan(trained.workload, 0, part=part, version=1, split=Split(cut="a", mode="local_loss"))
    assert trained.blocks.named(plan) is plan
    assert trained.blocks.num_bytes(plan) == 0
    assert with_cached(plan) is plan


def test_estimates_leave_the_frozen_blocks_out_of_every_versions_weights(trained: Server) -> None:
    plan = plan_of(trained)
    assert with_cached(plan).part.cached == (("a", ""), ("b", ""))
    named = trained.blocks.named(plan)
    assert with_cached(named) is named


def test_what_is_remembered_is_bounded(trained: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_blocks, "MAX_BLOCKS", 2)
    for number in range(4):
        set_block(trained, "a.weight", float(number))
        deliver(trained, trained.send(plan_of(trained, plan_id=number + 1, trained=("b", "c", "out"))))
    assert len(trained.blocks._held[0]) == 2
    assert len(trained.blocks._messages) <= 3
    assert kinds(trained.send(plan_of(trained, plan_id=9, trained=("b", "c", "out"))).messages) == ["weights"]


def test_packets_of_plans_in_flight_stay(trained: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_blocks, "MAX_BLOCKS", 1)
    first = trained.send(plan_of(trained, plan_id=1))
    set_block(trained, "a.weight", 1.0)
    trained.send(plan_of(trained, 1, plan_id=2))
    assert {name for _, name in first.plan.part.cached} <= set(trained.blocks._messages)


def test_a_restored_state_sends_what_the_saved_one_would_have(trained: Server) -> None:
    deliver(trained, trained.send(plan_of(trained, 0)))
    in_flight = trained.send(plan_of(trained, 1, plan_id=2))
    saved = trained.blocks.saved()
    assert set(saved) == set(FrozenBlocks.SAVED)
    restored = FrozenBlocks(LocalChannel(), Workload(FOUR), trained.store["model"], trained._hashes)
    assert restored.num_bytes(plan_of(trained, 0)) > 0
    restored.restore(saved)
    assert restored.num_bytes(plan_of(trained, 0)) == 0
    assert restored.num_bytes(plan_of(trained, 1)) > 0
    restored.ended(in_flight.plan, Report(plan=in_flight.plan), None)
    assert restored.num_bytes(plan_of(trained, 1)) == 0


def test_proxies_are_sent_with_every_version(trained: Server) -> None:
    part = Part(blocks=("a", "b", "out"), trained=("b", "out"), auxiliaries=("proxy@c..c",))
    plan = make_plan(trained.workload, 0, id=3, part=part, version=1)
    deliver(trained, trained.send(plan))
    again = trained.send(replace(plan, id=4))
    assert kinds(again.messages) == ["weights"]
    report, update = carry_out(Device(Workload(FOUR)), again)
    assert update is not None, report.error
    names = [spec.name for spec in trained.workload.submodel(again.plan.part).up(statistics=True)]
    assert "proxy@c..c.weight" in names
    opened = trained.open(again.plan, update)
    before = trained.tensors["proxy@c..c.weight"].clone()
    trained.fold(again.plan, opened, weight=report.samples)
    trained.close_version(in_flight=())
    assert not torch.equal(trained.tensors["proxy@c..c.weight"], before)
