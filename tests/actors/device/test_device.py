import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.actors.device.device import Device, update_stamp
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.codec import NO_CONTEXT, CodecSpec, IdentityCodec, specs_of
from fedbonsai.comms.errors import PacketError
from fedbonsai.comms.packet import read_stamp, unseal
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Call
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Objective, Upload
from fedbonsai.policies.report import Outcome

from ..steps import IMAGES, LINE, ONE_STEP, TRAINING, make_plan, make_server, run, weights_packet

LZ4 = (CodecSpec("lz4"),)


@pytest.fixture
def server() -> Server:
    return make_server(IMAGES)


@pytest.fixture
def device() -> Device:
    return Device(Workload(IMAGES))


def test_a_round_from_packet_bytes_to_packet_bytes_by_hand() -> None:
    device = Device(Workload(LINE))
    down = weights_packet(0, {"w": np.array([[0.5]], "<f4")})
    plan = make_plan(device.workload, 1, training=ONE_STEP)
    report, update = run(device, plan, down)
    assert (report.plan, report.outcome, report.stage, report.error) == (plan, Outcome.DONE, "", "")
    assert (report.samples, report.steps) == (3, 1)
    assert (report.loss, report.loss_square) == (1.5**2 / 2, (1.5**2 / 2) ** 2)
    assert report.measured.wall_s > report.measured.train_s > 0
    assert update is not None
    assert read_stamp(update) == update_stamp(plan)
    expected = specs_of({"w": np.zeros((1, 1), "<f4")})
    assert unseal(update, codec=IdentityCodec(), expected=expected, context=NO_CONTEXT)["w"].tolist() == [[-1.5]]


def test_weights_instead_of_differences() -> None:
    device = Device(Workload(LINE))
    down = weights_packet(0, {"w": np.array([[0.5]], "<f4")})
    plan = make_plan(device.workload, 0, training=ONE_STEP, upload=Upload(payload="weights"))
    _, update = run(device, plan, down)
    expected = specs_of({"w": np.zeros((1, 1), "<f4")})
    assert update is not None
    assert unseal(update, codec=IdentityCodec(), expected=expected, context=NO_CONTEXT)["w"].tolist() == [[2.0]]


def test_a_device_keeps_no_memory(server: Server, device: Device) -> None:
    """Plan A, then others of every kind, then A again: A's bytes again, and those of a device that is new."""
    first, other = make_plan(server.workload, 0), make_plan(server.workload, 1)
    names = server.workload.spec.block_names
    frozen = make_plan(server.workload, 2, part=Part(blocks=names, trained=names[-1:]))
    failing = make_plan(server.workload, 1, training=msgspec.structs.replace(TRAINING, loss=Call("my_models:failing")))
    asked = make_plan(server.workload, 1, objective=Objective(kind="evaluate"))
    packet = server.send(first).packets[0]
    _, wanted = run(device, first, packet)
    assert wanted is not None
    for between in (other, frozen, failing, asked):
        run(device, between, packet)
        assert np.array_equal(run(device, first, packet)[1], wanted)
    assert np.array_equal(run(Device(Workload(IMAGES)), first, packet)[1], wanted)
    assert not np.array_equal(run(device, msgspec.structs.replace(first, seed=5), packet)[1][56:], wanted[56:])


def test_timed_steps_leave_no_trace(server: Server, device: Device) -> None:
    """In each layout, and of a plan that fails; then a plan has the bits of a device that is new."""
    settings = ({}, {"layout": "channels_last"}, {"precision": "bf16"}, {"loss": Call("my_models:failing")})
    plans = [make_plan(server.workload, training=msgspec.structs.replace(TRAINING, **each)) for each in settings]
    seconds = device.time_steps([plan_message(plan) for plan in plans])
    assert [each is not None and each > 0 for each in seconds] == [True, True, True, False]
    packet = server.send(plans[0]).packets[0]
    for plan in plans[:2]:
        assert np.array_equal(run(device, plan, packet)[1], run(Device(Workload(IMAGES)), plan, packet)[1])


def test_counters_and_constants_are_reset(server: Server, device: Device) -> None:
    plan = make_plan(server.workload)
    for _ in range(2):
        run(device, plan, server.send(plan).packets[0])
        module = device._modules.get(device.workload.family(""), layout="contiguous")
        model = module.model
        assert model.norm.num_batches_tracked.item() == 6  # 12 training samples, batches of 5, 5, 2; two passes
        assert model.memory.calls.item() == 7
        assert model.memory.order.tolist() == list(range(63, -1, -1))


def test_tied_weights_are_trained(device: Device) -> None:
    tied = msgspec.structs.replace(IMAGES, model=Call("my_models:Tied"))
    server, device = make_server(tied), Device(Workload(tied))
    plan = make_plan(server.workload)
    report, update = run(device, plan, server.send(plan).packets[0])
    before = server.weights()
    assert update is not None
    assert update.nbytes < 200  # one of the two, 64 bytes
    server.fold(plan, server.open(plan, update), weight=report.samples)
    server.close_version(in_flight=())
    after = server.weights()
    assert torch.equal(after["first.weight"], after["second.weight"])
    assert 0 < (after["first.weight"] - before["first.weight"]).abs().max() < 1


def test_frozen_blocks_stay_out_of_the_update(server: Server, device: Device) -> None:
    names = server.workload.spec.block_names
    plan = make_plan(server.workload, part=Part(blocks=names, trained=names[-1:]))
    sent = server.send(plan)
    plan = sent.plan
    report, update = run(device, plan, sent.packets[0])
    assert (report.outcome, len(names)) == (Outcome.DONE, 2)
    assert update is not None
    server.fold(plan, server.open(plan, update), weight=1)
    before = server.weights()
    server.close_version(in_flight=())
    after = server.weights()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["out.weight", "out.bias"]
    model = device._modules.get(device.workload.family(""), layout="contiguous", part=plan.part).model
    assert model.norm.num_batches_tracked.item() == 0


@pytest.mark.parametrize("codecs", [{"codec_down": LZ4}, {"codec_up": LZ4}, {"codec_down": LZ4, "codec_up": LZ4}])
def test_lossless_codecs_change_no_bit_of_the_result(server: Server, device: Device, codecs: dict) -> None:
    hashes = []
    for options in ({}, codecs):
        server = make_server(IMAGES)
        plan = make_plan(server.workload, **options)
        report, update = run(device, plan, server.send(plan).packets[0])
        assert update is not None
        server.fold(plan, server.open(plan, update), weight=report.samples)
        server.close_version(in_flight=())
        hashes.append(server.model_hash())
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("settings", [{"layout": "channels_last"}, {"precision": "bf16"}, {"accumulation": 2}])
def test_other_training_settings_are_done_and_repeat(server: Server, device: Device, settings: dict) -> None:
    plan = make_plan(server.workload, training=msgspec.structs.replace(TRAINING, **settings))
    packet = server.send(plan).packets[0]
    report, update = run(device, plan, packet)
    assert (report.outcome, report.steps) == (Outcome.DONE, 6)
    run(device, make_plan(server.workload), packet)
    assert np.array_equal(run(device, plan, packet)[1], update)


def test_evaluation_on_the_devices_own_share(server: Server, device: Device) -> None:
    plan = make_plan(server.workload, objective=Objective(kind="evaluate"))
    report, update = run(device, plan, server.send(plan).packets[0])
    assert update is None
    assert (report.outcome, report.samples, report.steps, report.loss) == (Outcome.DONE, 3, 0, None)
    assert report.metrics.keys() == {"loss", "accuracy"}
    assert report.metrics["accuracy"] in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
    trained, _ = run(device, make_plan(server.workload), server.send(plan).packets[0])
    assert trained.metrics == {}
    assert run(device, plan, server.send(plan).packets[0])[0].metrics == report.metrics


def test_a_device_without_a_test_share_has_no_metrics() -> None:
    settings = msgspec.structs.replace(
        IMAGES, data=DataConfig(name="synthetic", kwargs={"shape": [1, 4, 4], "classes": 3})
    )
    server = make_server(settings)
    plan = make_plan(server.workload, objective=Objective(kind="evaluate"))
    report, update = run(Device(Workload(settings)), plan, server.send(plan).packets[0])
    assert (report.outcome, report.samples, report.metrics, update) == (Outcome.DONE, 0, {}, None)


@pytest.mark.parametrize(
    ("loss", "outcome", "error"),
    [
        ("my_models:failing", Outcome.FAILED, "ValueError: this loss has no value"),
        ("my_models:rigid", Outcome.FAILED, "Rigid: cannot be written on"),
        ("my_models:hungry", Outcome.OUT_OF_MEMORY, "MemoryError: no more"),
        ("my_models:enormous", Outcome.OUT_OF_MEMORY, "allocate"),
        ("my_models:missing", Outcome.FAILED, "has no 'missing'"),
    ],
)
def test_errors_in_training(server: Server, device: Device, loss: str, outcome: Outcome, error: str) -> None:
    plan = make_plan(server.workload, training=msgspec.structs.replace(TRAINING, loss=Call(loss)))
    packet = server.send(plan).packets[0]
    report, update = run(device, plan, packet)
    assert (report.plan, report.outcome, report.stage, update) == (plan, outcome, "train", None)
    assert error in report.error
    assert (report.samples, report.loss) == (0, None)
    assert run(device, make_plan(server.workload), packet)[0].outcome == Outcome.DONE


def test_a_failing_loss_in_evaluation_names_its_stage(server: Server, device: Device) -> None:
    training = msgspec.structs.replace(TRAINING, loss=Call("my_models:failing"))
    plan = make_plan(server.workload, training=training, objective=Objective(kind="evaluate"))
    assert run(device, plan, server.send(plan).packets[0])[0].stage == "evaluate"


def test_packets_that_cannot_be_opened(server: Server, device: Device) -> None:
    plan = make_plan(server.workload)
    packet = server.send(plan).packets[0]
    damaged = packet.copy()
    damaged[100] ^= 1
    later = msgspec.structs.replace(plan, version=1)
    for requested, bytes_, error in (
        (plan, damaged, "CorruptPacket: the checksum does not match"),
        (plan, packet[:-1], "TruncatedPacket"),
        (plan, np.zeros(0, np.uint8), "TruncatedPacket"),
        (later, packet, "MismatchedPacket: a packet's version is 0, expected 1"),
        (msgspec.structs.replace(plan, codec_down=LZ4), packet, "MismatchedPacket"),
    ):
        report, update = run(device, requested, bytes_)
        assert (report.plan, report.outcome, report.stage, update) == (requested, Outcome.FAILED, "open", None)
        assert report.error.startswith(error)
    assert run(device, plan, packet)[0].outcome == Outcome.DONE


def test_a_codec_that_is_not_known_fails_when_sealing(server: Server, device: Device) -> None:
    plan = make_plan(server.workload, codec_up=(CodecSpec("zstd"),))
    report, update = run(device, plan, server.send(plan).packets[0])
    assert (report.outcome, report.stage, update) == (Outcome.FAILED, "seal", None)
    assert "unknown codec 'zstd'" in report.error


def test_a_long_error_is_cut(server: Server, device: Device) -> None:
    plan = make_plan(server.workload, codec_up=(CodecSpec("z" * 5000),))
    report, _ = run(device, plan, server.send(plan).packets[0])
    assert len(report.error) == 2000


def test_an_update_answers_one_attempt_of_one_plan(server: Server, device: Device) -> None:
    plan = make_plan(server.workload, attempt=2)
    _, update = run(device, plan, server.send(plan).packets[0])
    assert update is not None
    for field in ("id", "attempt"):
        with pytest.raises(PacketError, match="expected"):
            server.fold(
                msgspec.structs.replace(plan, **{field: 1}),
                server.open(msgspec.structs.replace(plan, **{field: 1}), update),
                weight=1,
            )
    assert server.folded == 0


def test_warming_up_changes_nothing(server: Server) -> None:
    cold, warm = Device(Workload(IMAGES)), Device(Workload(IMAGES))
    warm.warm_up()
    plan = make_plan(server.workload)
    updates = [run(device, plan, server.send(plan).packets[0])[1] for device in (cold, warm)]
    assert np.array_equal(*updates)
