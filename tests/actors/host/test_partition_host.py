"""The partition host: slots, streams in order, and invalid packets, which fail their own plan only."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.host.partition_host import HostAnswer, PartitionHost
from fedbonsai.actors.messages.host_messages import StreamFault
from fedbonsai.actors.messages.messages import update_stamp
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.messages.stream import ActivationStream
from fedbonsai.actors.replay.upload import view_key
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.codec import Array
from fedbonsai.comms.errors import MismatchedPacket
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan, Split
from fedbonsai.policies.report import Answer, Outcome

from ..steps import IMAGES, make_plan, make_server

# 12 training samples in batches of 5, 5 and 2, twice: six packets.
SAMPLES, PACKETS = 12, 6


def cut_plan(server: Server, device: int = 0, **changes: Any) -> Plan:
    front = Part(blocks=("conv",), trained=("conv",))
    return make_plan(server.workload, device, **({"part": front, "split": Split(cut="conv")} | changes))


def begun(server: Server, host: PartitionHost, plan: Plan) -> ActivationStream:
    """The plan's slot made, and the device's end of its stream."""
    sent = server.send(plan)
    host.begin(plan_message(plan), SAMPLES, *(message.reference for message in sent.host_messages))
    return ActivationStream(plan, server.workload)


def batch(stream: ActivationStream, number: int, samples: int = 5, value: float = 1.0) -> Array:
    """A packet of equal activations."""
    activations = torch.full((samples, *stream.crossing.shape), value)
    return stream.seal_activations(number, activations, torch.zeros(samples, dtype=torch.int64))


class Direct:
    """A device's connection to a host in the same process."""

    def __init__(self, host: PartitionHost, plan: Plan) -> None:
        self.host, self.plan, self.sent = host, plan, 0
        self.answers: list[Array] = []

    def send(self, packet: Array, *, window: int) -> None:
        self.sent += 1
        self.answers += self.host.take(self.plan.id, self.plan.attempt, packet)

    def answer(self) -> Array:
        return self.answers.pop(0)

    def flush(self) -> None:
        """All packets are processed at once."""


def test_both_legs_make_the_update_of_the_whole_and_the_slot_is_freed() -> None:
    whole, server = make_server(IMAGES), make_server(IMAGES)
    device, host = Device(Workload(IMAGES)), PartitionHost(Workload(IMAGES))
    plan = make_plan(whole.workload)
    report, update, _ = device.run(plan_message(plan), whole.send(plan).packets)
    assert update is not None
    whole.fold(plan, whole.open(plan, update), weight=1.0)
    whole.close_version(in_flight=())

    for repeated in range(2):  # the module of the first slot serves the second
        plan, link = cut_plan(server, id=10 + repeated), None
        begun(server, host, plan)
        link = Direct(host, plan)
        own, front, _ = device.run(plan_message(plan), server.send(plan).packets, None, link)
        assert (host.num_slots, link.sent) == (1, PACKETS)
        answer, back = host.end(plan.id, plan.attempt)
        assert host.num_slots == 0
        found = msgspec.msgpack.decode(answer, type=HostAnswer)
        expected = msgspec.msgpack.decode(report, type=Answer)
        assert (found.steps, found.loss, found.loss_square) == (expected.steps, expected.loss, expected.loss_square)
        assert len(found.up_bytes) == len(found.down_bytes) == PACKETS
        assert msgspec.msgpack.decode(own, type=Answer).samples == SAMPLES
    assert front is not None
    server.fold(plan, server.open(plan, front, host=back), weight=1.0)
    server.close_version(in_flight=())
    assert server.model_hash() == whole.model_hash()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda stream, plan: batch(stream, 1), "packet 1 was received where 0 is next and the window is 1"),
        (lambda stream, plan: batch(stream, 0, samples=4), "bytes"),
        (lambda stream, plan: batch(stream, 0, value=float("nan")), "'activations' holds NaN or infinity"),
        (lambda stream, plan: batch(stream, 0)[:-9], "bytes"),
        (lambda stream, plan: stream.seal_gradient(0, torch.zeros(5, *stream.crossing.shape)), "kind is 4, expected 3"),
        (lambda stream, plan: np.zeros(3, np.uint8), "shorter than its fixed part"),
    ],
    ids=["out of order", "another shape", "NaN", "cut short", "another kind", "no packet"],
)
def test_an_invalid_packet_fails_its_plan_and_no_other(spoil: Any, words: str) -> None:
    server, host = make_server(IMAGES), PartitionHost(Workload(IMAGES))
    plan, other = cut_plan(server), cut_plan(server, 1)
    stream, second = begun(server, host, plan), begun(server, host, other)
    with pytest.raises(StreamFault, match=words):
        host.take(plan.id, plan.attempt, spoil(stream, plan))
    assert host.num_slots == 1
    answer, update = host.end(plan.id, plan.attempt)
    assert update is None
    assert words in msgspec.msgpack.decode(answer, type=HostAnswer).error
    assert host.take(other.id, other.attempt, batch(second, 0))[0].nbytes > 0


def test_packets_of_another_plan_or_attempt_are_not_taken() -> None:
    server, host = make_server(IMAGES), PartitionHost(Workload(IMAGES))
    plan, other = cut_plan(server), cut_plan(server, 1)
    begun(server, host, plan)
    foreign = batch(begun(server, host, other), 0)
    with pytest.raises(StreamFault, match="plan is 11, expected 10"):
        host.take(plan.id, plan.attempt, foreign)
    with pytest.raises(StreamFault, match="attempt 1 of plan 11 has no slot here"):
        host.take(other.id, 1, foreign)
    assert host.take(other.id, 0, foreign)[0].nbytes > 0


def test_the_next_attempt_takes_the_place_of_the_one_before() -> None:
    server, host = make_server(IMAGES), PartitionHost(Workload(IMAGES))
    plan = cut_plan(server)
    first = batch(begun(server, host, plan), 0)
    (answer,) = host.take(plan.id, 0, first)
    again = msgspec.structs.replace(plan, attempt=1)
    stream = begun(server, host, again)
    with pytest.raises(StreamFault, match="attempt 0 of plan 10 has no slot here"):
        host.take(plan.id, 0, first)
    (repeated,) = host.take(plan.id, 1, batch(stream, 0))
    assert torch.equal(
        stream.open_gradient(0, repeated, 5), ActivationStream(plan, server.workload).open_gradient(0, answer, 5)
    )
    assert host.num_slots == 1


def test_a_stream_that_is_too_short_or_too_long() -> None:
    server, host = make_server(IMAGES), PartitionHost(Workload(IMAGES))
    plan = cut_plan(server)
    stream = begun(server, host, plan)
    host.take(plan.id, 0, batch(stream, 0))
    answer, update = host.end(plan.id, 0)
    assert update is None
    decoded = msgspec.msgpack.decode(answer, type=HostAnswer)
    assert "ended after 1 packets; more were expected" in decoded.error
    assert (len(decoded.up_bytes), len(decoded.down_bytes)) == (1, 1)  # the bytes received are reported
    stream = begun(server, host, plan)
    for number in range(PACKETS):
        host.take(plan.id, 0, batch(stream, number, samples=(5, 5, 2)[number % 3]))
    with pytest.raises(StreamFault, match="packet 6 was received after the end of the stream"):
        host.take(plan.id, 0, batch(stream, PACKETS))


def test_messages_that_no_server_sends_fail_their_plan_only() -> None:
    """A plan that is not split, one without its packet, and a replay that names no view."""
    server, host = make_server(IMAGES), PartitionHost(Workload(IMAGES))
    whole, split = make_plan(server.workload, 0), cut_plan(server, 1)
    packet = server.send(whole).packets[0]
    for plan, packets, decoded in (
        (whole, (packet,), "was sent to a host, and is not split"),
        (split, (), "0 packets with the host's blocks were received; 1 expected"),
    ):
        host.begin(plan_message(plan), SAMPLES, *packets)
        with pytest.raises(StreamFault, match=decoded):
            host.take(plan.id, plan.attempt, packet)
    again = server.send(cut_plan(server, 2)).host_messages[0].reference
    answer, update = host.replay(plan_message(cut_plan(server, 2)), SAMPLES, again)
    assert msgspec.msgpack.decode(answer, type=HostAnswer).error.endswith("is to replay a view, and names none")
    assert update is None


def test_a_host_that_could_not_begin_raises_that_to_the_device() -> None:
    server, host, device = make_server(IMAGES), PartitionHost(Workload(IMAGES)), Device(Workload(IMAGES))
    plan = cut_plan(server)
    host.begin(plan_message(plan), SAMPLES, server.send(plan).packets[0])  # the device's blocks, not the host's
    report, update, _ = device.run(plan_message(plan), server.send(plan).packets, None, Direct(host, plan))
    decoded = msgspec.msgpack.decode(report, type=Answer)
    assert (decoded.outcome, decoded.stage, update) == (Outcome.FAILED, "train", None)
    assert "StreamFault: MismatchedPacket" in decoded.error


def test_the_server_folds_both_legs_or_none() -> None:
    server, host, device = make_server(IMAGES), PartitionHost(Workload(IMAGES)), Device(Workload(IMAGES))
    plan = cut_plan(server)
    begun(server, host, plan)
    _, front, _ = device.run(plan_message(plan), server.send(plan).packets, None, Direct(host, plan))
    _, back = host.end(plan.id, 0)
    assert front is not None
    with pytest.raises(MismatchedPacket, match="its host's update is missing"):
        server.fold(plan, server.open(plan, front), weight=1.0)
    with pytest.raises(MismatchedPacket, match="sequence"):
        server.fold(plan, server.open(plan, front, host=front), weight=1.0)
    assert server.folded == 0
    server.fold(plan, server.open(plan, front, host=back), weight=1.0)
    assert server.folded == 1
    assert update_stamp(plan) != update_stamp(plan, leg=1)


def frozen_plan(server: Server, **changes: Any) -> Plan:
    split = Split(cut="conv", depth="conv", mode="ecofed", **({"window": 3} | changes.pop("split", {})))
    return cut_plan(server, part=Part(blocks=("conv",), trained=()), split=split, **changes)


def frozen_begun(server: Server, host: PartitionHost, plan: Plan) -> tuple[Plan, ActivationStream]:
    """As ``begun``; the plan as it was sent, with its trunk named."""
    sent = server.send(plan)
    host.begin(plan_message(sent.plan), SAMPLES, *(message.reference for message in sent.host_messages))
    return sent.plan, ActivationStream(sent.plan, server.workload)


def upload(server: Server, host: PartitionHost, plan: Plan, order: list[int]) -> tuple[HostAnswer, Array | None]:
    """Packets in this order, and the end."""
    plan, stream = frozen_begun(server, host, plan)
    for number in order:
        host.take(plan.id, plan.attempt, batch(stream, number, samples=(5, 5, 2)[number % 3], value=number + 1.0))
    answer, update = host.end(plan.id, plan.attempt)
    return msgspec.msgpack.decode(answer, type=HostAnswer), update


def test_packets_within_the_window_are_put_in_order() -> None:
    server = make_server(IMAGES)
    _, in_order = upload(server, PartitionHost(Workload(IMAGES)), frozen_plan(server), [0, 1, 2, 3, 4, 5])
    answer, mixed = upload(server, PartitionHost(Workload(IMAGES)), frozen_plan(server), [2, 0, 1, 4, 3, 5])
    assert in_order is not None
    assert mixed is not None
    assert in_order.tobytes() == mixed.tobytes()
    assert answer.error == ""


def test_early_packets_are_answered_with_those_before_them() -> None:
    server = make_server(IMAGES)
    plan = cut_plan(server, split=Split(cut="conv", window=3))
    answers, took = [], []
    for order in ([0, 1, 2, 3, 4, 5], [2, 0, 1, 4, 3, 5]):
        host = PartitionHost(Workload(IMAGES))
        stream = begun(server, host, plan)
        packets = [batch(stream, number, (5, 5, 2)[number % 3], number + 1.0) for number in range(PACKETS)]
        found = {number: host.take(plan.id, plan.attempt, packets[number]) for number in order}
        took.append([len(found[number]) for number in range(PACKETS)])
        answers.append([answer.tobytes() for number in range(PACKETS) for answer in found[number]])
        decoded = msgspec.msgpack.decode(host.end(plan.id, plan.attempt)[0], type=HostAnswer)
        assert (decoded.error, len(decoded.down_bytes)) == ("", PACKETS)
    assert took == [[1] * PACKETS, [1, 2, 0, 2, 0, 1]]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("order", "words"), [([3], "packet 3 was received where 0 is next"), ([0, 0], "packet 0 was received where 1")]
)
def test_a_packet_out_of_the_window_or_twice_ends_the_plan(order: list[int], words: str) -> None:
    server, host = make_server(IMAGES), PartitionHost(Workload(IMAGES))
    with pytest.raises(StreamFault, match=words):
        upload(server, host, frozen_plan(server), order)


def test_a_view_is_replayed_as_it_was_sent_and_a_failed_upload_leaves_the_view_before() -> None:
    server, host = make_server(IMAGES), PartitionHost(Workload(IMAGES))
    answer, uploaded = upload(server, host, frozen_plan(server, id=20), [0, 1, 2, 3, 4, 5])
    key = view_key(frozen_plan(server, id=20), "20")
    key = msgspec.structs.replace(key, trunk=server.send(frozen_plan(server)).plan.split.trunk)
    host.settle(99, True, ())
    assert host.bodies([key]) == {}  # an upload becomes a view when its own plan is settled
    host.settle(20, True, ())
    assert list(host.bodies([key])) == [key]
    # The device dies during an upload: its packets are dropped, the view before stays.
    broken, stream = frozen_begun(server, host, frozen_plan(server, id=21))
    host.take(broken.id, 0, batch(stream, 0))
    host.drop(broken.id)
    sent = server.send(frozen_plan(server, id=22, split={"view": "20"}))
    packets = [message.reference for message in sent.host_messages]
    answered, update = host.replay(plan_message(sent.plan), SAMPLES, *packets)
    replayed = msgspec.msgpack.decode(answered, type=HostAnswer)
    assert replayed.error == ""
    assert (replayed.steps, replayed.loss, replayed.up_bytes) == (answer.steps, answer.loss, [])
    host.settle(22, False, ())
    assert uploaded is not None
    assert update is not None
    # Packets name their plan; what they hold is the same: the same training on the same activations.
    assert update[48:-8].tobytes() == uploaded[48:-8].tobytes()
    host.settle(22, False, (key,))
    gone, update = host.replay(plan_message(sent.plan), SAMPLES, *packets)
    assert update is None
    decoded = msgspec.msgpack.decode(gone, type=HostAnswer)
    assert decoded.gone
    assert "is not in the replay buffer" in decoded.error


def test_an_upload_that_is_made_again_is_the_same_view_and_trains_nothing() -> None:
    server, host, other = make_server(IMAGES), PartitionHost(Workload(IMAGES)), PartitionHost(Workload(IMAGES))
    upload(server, host, frozen_plan(server, id=20), [0, 1, 2, 3, 4, 5])
    host.settle(20, True, ())
    again = server.send(frozen_plan(server, id=20, attempt=1)).plan
    key = view_key(again, "20")
    other.record(plan_message(again), SAMPLES)
    stream = ActivationStream(again, server.workload)
    for number in (2, 0, 1, 4, 3, 5):
        other.take(20, 1, batch(stream, number, (5, 5, 2)[number % 3], number + 1.0))
    answer, update = other.end(20, 1)
    decoded = msgspec.msgpack.decode(answer, type=HostAnswer)
    assert (decoded.error, decoded.steps, decoded.loss, len(decoded.up_bytes), update) == ("", 0, None, PACKETS, None)
    first, second = host.bodies([key])[key], other.bodies([key])[key]
    assert len(first) == len(second)  # packets name their attempt, and nothing else of them differs
    sent = server.send(frozen_plan(server, id=22, split={"view": "20"}))
    packets = [message.reference for message in sent.host_messages]
    one, another = (each.replay(plan_message(sent.plan), SAMPLES, *packets)[1] for each in (host, other))
    assert one is not None
    assert another is not None
    assert one.tobytes() == another.tobytes()


def test_an_upload_that_breaks_off_when_it_is_made_again_is_no_view() -> None:
    server, host = make_server(IMAGES), PartitionHost(Workload(IMAGES))
    again = server.send(frozen_plan(server, id=20, attempt=1)).plan
    host.record(plan_message(again), SAMPLES)
    host.take(20, 1, batch(ActivationStream(again, server.workload), 0))
    assert "ended after 1 packets" in msgspec.msgpack.decode(host.end(20, 1)[0], type=HostAnswer).error
    assert host.bodies([view_key(again, "20")]) == {}
    replaying = server.send(frozen_plan(server, id=21, split={"view": "20"})).plan
    host.record(plan_message(replaying), SAMPLES)
    with pytest.raises(StreamFault, match="plan 21 is to repeat an upload, and uploads no view"):
        host.take(21, 0, batch(ActivationStream(replaying, server.workload), 0))


def test_a_host_with_another_trunk_refuses() -> None:
    server, host = make_server(IMAGES), PartitionHost(Workload(IMAGES))
    sent = server.send(frozen_plan(server))
    split = msgspec.structs.replace(sent.plan.split, trunk="0" * 16)
    plan = msgspec.structs.replace(sent.plan, split=split)
    host.begin(plan_message(plan), SAMPLES, *(message.reference for message in sent.host_messages))
    with pytest.raises(StreamFault, match="OutOfSync: the trunk up to 'conv' is"):
        host.take(plan.id, 0, batch(ActivationStream(plan, server.workload), 0))


def test_the_hash_of_the_trunk_changes_when_it_is_trained() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    before = server.send(frozen_plan(server)).plan.split
    plan = make_plan(server.workload)
    _, update, _ = device.run(plan_message(plan), server.send(plan).packets)
    assert update is not None
    server.fold(plan, server.open(plan, update), weight=1.0)
    server.close_version(in_flight=())
    after = server.send(frozen_plan(server, version=1)).plan.split
    assert before is not None
    assert after is not None
    assert before.trunk != after.trunk


def test_an_upload_whose_plan_is_lost_is_dropped_and_the_view_before_stays() -> None:
    server, host = make_server(IMAGES), PartitionHost(Workload(IMAGES))
    upload(server, host, frozen_plan(server, id=20), [0, 1, 2, 3, 4, 5])
    host.settle(20, True, ())
    trunk = server.send(frozen_plan(server)).plan.split.trunk
    keys = [msgspec.structs.replace(view_key(frozen_plan(server), name), trunk=trunk) for name in ("20", "21", "22")]
    upload(server, host, frozen_plan(server, id=21), [0, 1, 2, 3, 4, 5])
    host.settle(21, False, ())
    assert list(host.bodies(keys)) == keys[:1]
    upload(server, host, frozen_plan(server, id=22), [0, 1, 2, 3, 4, 5])
    upload(server, host, frozen_plan(server, id=22, attempt=1), [0, 1, 2, 3, 4, 5])  # repeated
    host.settle(22, True, (keys[0],))
    assert list(host.bodies(keys)) == keys[2:]
