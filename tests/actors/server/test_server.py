import copy
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.dense_packets import open_weights, seal_update
from fedbonsai.actors.server.server import NotFinite, Server
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.comms.errors import CorruptPacket, MismatchedPacket, PacketError, TruncatedPacket, UnfitPacket
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Call, ServerOptimiser
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Split, Upload

from ..steps import IMAGES, LINE, ONE_STEP, TRAINING, make_plan, make_server, one_round, pack, run


def line_update(server: Server, device: int, value: float, **changes: Any) -> None:
    """Fold a difference of one weight, for a device that need not exist; device 1 has three samples."""
    plan = make_plan(server.workload, device, version=server.version, **changes)
    server.fold(plan, server.open(plan, pack(plan, {"w": np.array([[value]], "<f4")})), weight=[1, 3][device])


def weight(server: Server) -> float:
    return server.weights()["w"].item()


def test_fedavg_of_two_devices_by_hand() -> None:
    server, device = make_server(LINE), Device(Workload(LINE))
    plans = [make_plan(server.workload, number, training=ONE_STEP) for number in (0, 1)]
    one_round(server, device, plans)
    assert server.version == 1
    assert weight(server) == (1 * 2.0 + 3 * -1.0) / 4
    # and again from there: device 0 sends 2 - w, device 1 sends -1 - w
    one_round(server, device, [msgspec.structs.replace(plan, version=1) for plan in plans])
    assert weight(server) == -0.25
    assert server.folded == 0


def test_evaluation_is_of_the_current_version() -> None:
    server = make_server(LINE)
    assert server.evaluate(ONE_STEP, batch_size=1) == {"loss": 0.0}
    server.send(make_plan(server.workload))
    line_update(server, 0, 3.0)
    server.close_version(in_flight=())
    assert server.evaluate(ONE_STEP, batch_size=1) == {"loss": 4.5}


def test_a_server_without_data_has_no_figures() -> None:
    server = make_server(msgspec.structs.replace(LINE, data=DataConfig(name="my_models:points", server_test=False)))
    assert server.evaluate(ONE_STEP, batch_size=1) == {}


def test_evaluation_covers_tied_weights() -> None:
    server = make_server(
        msgspec.structs.replace(IMAGES, model=msgspec.structs.replace(IMAGES.model, name="my_models:Tied"))
    )
    plan = make_plan(server.workload)
    server.fold(plan, server.open(plan, pack(plan, {"first.weight": np.full((4, 4), 0.5, "<f4")})), weight=1)
    server.close_version(in_flight=())
    expected = server.workload.new_model()
    with torch.no_grad():
        expected.first.weight.add_(0.5)
    samples = server.workload.data.server_test()
    assert samples is not None
    loss = torch.nn.functional.cross_entropy(expected(samples.x), samples.y).item()
    assert server.evaluate(TRAINING, batch_size=20)["loss"] == pytest.approx(loss)


def test_equal_parts_share_one_packet_and_others_do_not() -> None:
    server = make_server(IMAGES)
    plan, twin = make_plan(server.workload, 0), make_plan(server.workload, 1)
    sent = server.send(plan)
    packet, num_bytes = sent.packets[0], sent.num_bytes
    assert server.send(twin).packets[0] is packet
    assert packet.nbytes == num_bytes
    names = server.workload.spec.block_names
    other_codec = msgspec.structs.replace(plan, codec_down=(CodecSpec("lz4"),))
    frozen = msgspec.structs.replace(plan, part=Part(blocks=names, trained=names[-1:]))
    assert server.send(other_codec).packets[0] is not packet
    assert server.send(frozen).packets[0] is not packet


def test_packets_are_kept_as_long_as_a_plan_needs_them() -> None:
    server = make_server(LINE)
    old = make_plan(server.workload)
    packet = server.send(old).packets[0]
    assert server.send(old).packets[0] is packet
    server.close_version(in_flight={0})
    server.fold(old, server.open(old, pack(old, {"w": np.array([[2.0]], "<f4")})), weight=1)
    server.close_version(in_flight={1})
    with pytest.raises(AssertionError, match="a plan of version 0 cannot start at version 2"):
        server.send(old)


def test_a_sealed_packet_does_not_follow_the_model() -> None:
    server = make_server(LINE)
    packet = server.send(make_plan(server.workload)).packets[0]
    before = packet.tobytes()
    line_update(server, 0, 3.0)
    server.close_version(in_flight={0})
    assert packet.tobytes() == before


@pytest.mark.parametrize("codecs", [(), (CodecSpec("lz4"),)], ids=["identity", "lz4"])
def test_weights_sent_up_equal_differences_bit_for_bit(codecs: tuple[CodecSpec, ...]) -> None:
    # not only up to rounding: device and server subtract the same float32 numbers
    hashes = []
    for payload in ("difference", "weights"):
        server, device = make_server(IMAGES), Device(Workload(IMAGES))
        plans = [
            make_plan(server.workload, number, upload=Upload(payload=payload), codec_down=codecs) for number in range(3)
        ]
        one_round(server, device, plans)
        hashes.append(server.model_hash())
    assert hashes[0] == hashes[1]


def test_weights_are_taken_against_the_version_that_was_sent() -> None:
    server = make_server(LINE)
    plan = make_plan(server.workload, upload=Upload(payload="weights"))
    server.send(plan)
    line_update(server, 0, 8.0)
    server.close_version(in_flight={0})
    server.fold(
        plan, server.open(plan, pack(plan, {"w": np.array([[1.0]], "<f4")})), weight=1
    )  # a difference of 1 to version 0
    server.close_version(in_flight=())
    assert weight(server) == 9.0


def test_weights_without_the_version_that_was_sent_are_refused() -> None:
    server = make_server(LINE)
    plan = make_plan(server.workload, upload=Upload(payload="weights"))
    server.send(plan)
    server.close_version(in_flight=())
    with pytest.raises(MismatchedPacket, match="the packet of version 0 that plan 10 started from is gone"):
        server.fold(plan, server.open(plan, pack(plan, {"w": np.ones((1, 1), "<f4")})), weight=1)
    assert server.folded == 0


def test_a_rejected_update_changes_nothing() -> None:
    server, clean = make_server(IMAGES), make_server(IMAGES)
    device = Device(Workload(IMAGES))
    plan, bad = make_plan(server.workload, 0), make_plan(server.workload, 1)
    _, good = run(device, plan, server.send(plan).packets[0])
    _, update = run(device, bad, server.send(bad).packets[0])
    assert good is not None
    assert update is not None
    flipped = update.copy()
    flipped[60] ^= 1
    shapes = {t.name: (t.shape, t.dtype) for b in server.workload.spec.blocks for t in b.tensors if t.role != "counter"}
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    last = arrays["out.bias"] = arrays["out.bias"].copy()
    last[-1] = np.nan
    less = {name: array for name, array in arrays.items() if name != "out.bias"}
    rejected: list[tuple[Any, type[PacketError]]] = [
        (flipped, CorruptPacket),
        (update[:-3], TruncatedPacket),
        (good, MismatchedPacket),  # another plan's
        (pack(bad, arrays), UnfitPacket),
        (pack(bad, less), MismatchedPacket),
    ]
    server.fold(plan, server.open(plan, good), weight=12)
    for packet, error in rejected:
        with pytest.raises(error):
            server.fold(bad, server.open(bad, packet), weight=12)
        assert server.folded == 1
    clean.fold(plan, clean.open(plan, good), weight=12)
    assert server.model_hash() == clean.model_hash() == make_server(IMAGES).model_hash()
    for one in (server, clean):
        one.close_version(in_flight=())
    assert server.model_hash() == clean.model_hash()


def test_a_version_without_updates_leaves_the_model_as_it_is() -> None:
    for name in ("mean", "momentum", "adam", "yogi"):
        server = make_server(IMAGES, name=name)
        before = server.model_hash()
        server.close_version(in_flight=())
        assert (server.version, server.model_hash(), server.store["optimiser"]) == (1, before, {})


def test_momentum_is_kept_between_rounds() -> None:
    server = make_server(LINE, name="momentum", momentum=0.5)
    found = []
    for value in (4.0, 1.0):
        line_update(server, 0, value)
        server.close_version(in_flight=())
        found.append(weight(server))
    assert found == [4.0, 7.0]  # the second step is 0.5 * 4 + 1
    assert server.store["optimiser"]["m/w"].tolist() == [[3.0]]


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
def test_statistics_are_averaged_with_every_optimiser(name: str) -> None:
    plain, server = make_server(IMAGES), make_server(IMAGES, name=name, learning_rate=0.5)
    before = server.weights()
    for one in (plain, server):
        one_round(one, Device(Workload(IMAGES)), [make_plan(one.workload, number) for number in range(3)])
    wanted, found = plain.weights(), server.weights()
    for statistic in ("norm.running_mean", "norm.running_var"):
        assert not torch.equal(found[statistic], before[statistic])
        assert torch.equal(found[statistic], wanted[statistic])
    assert not torch.equal(found["conv.weight"], wanted["conv.weight"])
    slots = {slot.partition("/")[2] for slot in server.store["optimiser"]}
    assert slots == {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "out.weight", "out.bias"}


@pytest.mark.parametrize(("name", "rate"), [("mean", 3e38), ("momentum", 3e38)])
def test_a_version_that_would_not_be_finite_is_not_closed(name: str, rate: float) -> None:
    server = make_server(LINE, name=name, learning_rate=rate)
    plan = make_plan(server.workload, 0)
    server.fold(plan, server.open(plan, pack(plan, {"w": np.array([[2.0]], "<f4")})), weight=1)
    sentence = (
        r"version 1 would hold values that are not finite in 'w', so it is not closed.*"
        r"largest value of its mean update is 2, and server.optimiser.learning_rate is 3e\+38"
    )
    with pytest.raises(NotFinite, match=sentence):
        server.close_version(in_flight=())
    assert server.version == 0
    assert server.weights()["w"].tolist() == [[0.0]]


def test_a_model_that_is_not_finite_before_the_first_round_is_refused() -> None:
    settings = msgspec.structs.replace(LINE, model=Call("my_models:Masked"))
    with pytest.raises(ValueError, match=r"'mask' holds values that are not finite.*persistent=False"):
        Server(Workload(settings), channel=LocalChannel(), optimiser=ServerOptimiser())


def test_statistics_by_hand() -> None:
    server = make_server(IMAGES, name="adam")
    tensors = {
        t.name: np.zeros(t.shape, t.dtype) for t in server.workload.spec.tensors_of(server.workload.spec.block_names)
    }
    for number, (difference, samples) in enumerate([(2.0, 1), (-2.0, 3)]):
        plan = make_plan(server.workload, number)
        update = {n: a for n, a in tensors.items() if n not in ("norm.num_batches_tracked", "memory.order")}
        update["norm.running_mean"] = np.full(4, difference, "<f4")
        server.fold(plan, server.open(plan, pack(plan, update)), weight=samples)
    server.close_version(in_flight=())
    assert server.weights()["norm.running_mean"].tolist() == [(2 - 6) / 4] * 4


def test_counters_and_constants_stay_on_the_server() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    one_round(server, device, [make_plan(server.workload)])
    weights = server.weights()
    assert weights["norm.num_batches_tracked"].item() == 0
    assert weights["memory.order"].tolist() == list(range(63, -1, -1))
    assert weights.keys() == server.workload.new_model().state_dict().keys()


def test_statistics_can_stay_on_the_device() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    before = server.weights()
    one_round(server, device, [make_plan(server.workload, upload=Upload(statistics=False))])
    after = server.weights()
    assert torch.equal(after["norm.running_mean"], before["norm.running_mean"])
    assert not torch.equal(after["norm.weight"], before["norm.weight"])


def test_returned_weights_are_a_copy() -> None:
    server = make_server(LINE)
    before = copy.deepcopy(server.weights())
    server.weights()["w"].fill_(9)
    assert torch.equal(server.weights()["w"], before["w"])
    assert server.model_hash() == make_server(LINE).model_hash()


def test_digits_are_learned_in_process() -> None:
    settings = msgspec.structs.replace(
        IMAGES, model=msgspec.structs.replace(IMAGES.model, name="digits_cnn"), data=DataConfig(), num_devices=4
    )
    server = Server(Workload(settings), channel=LocalChannel(), optimiser=ServerOptimiser())
    device = Device(Workload(settings))
    training = msgspec.structs.replace(
        TRAINING, batch_size=16, optimiser=msgspec.structs.replace(TRAINING.optimiser, learning_rate=0.05)
    )
    for version in range(3):
        plans = [
            make_plan(server.workload, number, training=training, version=version, seed=version * 4 + number)
            for number in range(4)
        ]
        one_round(server, device, plans)
    assert server.evaluate(training, batch_size=256)["accuracy"] > 0.9


def test_auxiliaries_start_from_the_seed_are_averaged_and_leave_the_model_alone() -> None:
    server, name = make_server(IMAGES), "linear@conv"
    part = Part(blocks=("conv",), trained=("conv",), head=name, auxiliaries=(name,))
    split = Split(cut="conv", mode="local_loss")
    plans = [make_plan(server.workload, device, part=part, split=split) for device in (0, 1)]
    before, hash_before = server.workload.family("").new_auxiliary(name).weight.detach().clone(), server.model_hash()
    sent = open_weights(server.send(plans[0]).packets[0], plans[0], server.workload.submodel(part))
    assert list(sent)[-2:] == [f"{name}.weight", f"{name}.bias"]
    assert torch.equal(torch.from_numpy(sent[f"{name}.weight"].copy()), before)
    server.send(plans[1])
    for plan, (step, weight) in zip(plans, ((4.0, 1.0), (-1.0, 2.0)), strict=True):
        base = {key: torch.zeros(array.shape) for key, array in sent.items()}
        trained = base | {f"{name}.weight": torch.full(base[f"{name}.weight"].shape, step)}
        own = seal_update(trained, base, plan, submodel=server.workload.submodel(part))
        others = server.workload.submodel(part).rest()
        still = {t.name: torch.zeros(t.shape) for t in server.workload.submodel(others).up(statistics=True)}
        host = seal_update(still, still, plan, submodel=server.workload.submodel(others), leg=1)
        server.fold(plan, server.open(plan, own, host=host), weight=weight)
    server.close_version(in_flight=())
    after = server.store["auxiliaries"][f"{name}.weight"]
    torch.testing.assert_close(after, before + (4 * 1 - 1 * 2) / 3)
    assert server.model_hash() == hash_before
    assert not [key for key in server.weights() if key.startswith("linear@")]


HALF = msgspec.structs.replace(LINE, model=Call("my_models:HalfLine"))


@pytest.mark.parametrize("optimiser", [{}, {"name": "momentum", "momentum": 0.0}], ids=str)
def test_updates_of_float16_are_averaged_in_float32(optimiser: dict[str, Any]) -> None:
    """Three of 0.5 with 60,000 samples each: their sum is above what float16 holds."""
    server = make_server(HALF, **optimiser)
    for device in range(3):
        plan = make_plan(server.workload, 0, id=10 + device)
        server.fold(plan, server.open(plan, pack(plan, {"w": np.array([[0.5]], "<f2")})), weight=60_000)
    server.close_version(in_flight=())
    assert (server.weights()["w"].dtype, weight(server)) == (torch.float16, 0.5)


def test_a_version_that_would_not_be_finite_in_float16_is_not_closed() -> None:
    server = make_server(HALF, learning_rate=2.0)
    plan = make_plan(server.workload)
    server.fold(plan, server.open(plan, pack(plan, {"w": np.array([[60_000]], "<f2")})), weight=1)
    with pytest.raises(NotFinite, match="would hold values that are not finite in 'w'"):
        server.close_version(in_flight=())
    assert weight(server) == 0.0
