"""Broadcasts: the model with which one starts, the one whose model is the server's, and when one ends."""

import numpy as np
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.comms.links.predict import Residual
from fedbonsai.comms.packet import PacketKind
from fedbonsai.learning.tensors import as_arrays
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.report import Outcome
from msgspec.structs import replace

from ..steps import IMAGES, make_server
from .test_links import SPARSE, carry_out, finish, in_step, kinds, linked

PLAIN = {"link_down": None, "codec_down": (), "link_up": None, "codec_up": ()}


def by_density(server: Server, device: int, number: int, density: float) -> Plan:
    """Each density is a broadcast of its own."""
    return linked(server, device, number, codec_down=(CodecSpec("topk", {"density": density}), *SPARSE[1:]))


def one_round(server: Server, device: Device, *plans: Plan) -> list[list[str]]:
    """The kinds of messages that each plan was sent."""
    kinds_ = []
    for plan in plans:
        sent = server.send(plan)
        kinds_.append([message.kind for message in sent.messages])
        assert finish(server, sent, carry_out(device, sent), fold=True).outcome == Outcome.DONE
    server.close_version(in_flight=())
    return kinds_


def densities(server: Server) -> list[float]:
    """Of the broadcasts that are kept, in the order of their use."""
    return [float(key.partition("'density': ")[2].partition("}")[0]) for key in server.links.downlinks._broadcasts]


def test_broadcasts_without_a_device_end() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number in range(1, 6):
        one_round(server, device, by_density(server, 0, number, number / 10))
    assert densities(server) == [0.5]


def test_of_unused_broadcasts_those_used_last_are_kept() -> None:
    server, device = make_server(replace(IMAGES, num_devices=12)), Device(Workload(replace(IMAGES, num_devices=12)))
    for device_id in range(12):  # each takes part once, in a broadcast of its own
        one_round(server, device, by_density(server, device_id, device_id + 1, (device_id + 1) / 100))
    assert densities(server) == [number / 100 for number in range(4, 13)]  # eight unused ones, and the one just used
    # A device whose broadcast has ended is sent a dense model first; one whose broadcast was kept is sent residuals.
    assert one_round(server, device, by_density(server, 1, 20, 0.02)) == [["resync"]]
    assert one_round(server, device, by_density(server, 1, 21, 0.02)) == [["weights"]]
    assert one_round(server, device, by_density(server, 11, 22, 0.12)) == [["weights", "weights"]]


def test_all_broadcasts_in_use_are_kept() -> None:
    server, device = make_server(replace(IMAGES, num_devices=10)), Device(Workload(replace(IMAGES, num_devices=10)))
    for version in range(3):
        plans = [
            by_density(server, device_id, 100 * version + device_id + 1, (device_id + 1) / 20)
            for device_id in range(10)
        ]
        assert one_round(server, device, *plans) == [["weights"] if version else ["agreed"]] * 10
    assert len(densities(server)) == 10


def test_a_broadcast_that_starts_late_starts_with_the_current_model() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number in (1, 2):
        one_round(server, device, by_density(server, 0, number, 0.1))
    exact = {name: tensor.clone() for name, tensor in server.store["model"].items()}
    for name, rest in server.store["pending"].items():
        exact[name] += rest
    sent = server.send(by_density(server, 0, 3, 0.05))
    assert [message.kind for message in sent.messages] == ["resync"]
    held = server.links.sent(sent.plan).arrays
    wanted = as_arrays({name: exact[name] for name in held})
    assert all(np.array_equal(held[name], array) for name, array in wanted.items())
    finish(server, sent, carry_out(device, sent), fold=True)
    assert in_step(server, 0)


def test_a_broadcast_that_no_plan_of_a_version_used_does_not_set_the_model() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for number in range(1, 4):
        one_round(server, device, linked(server, 0, number))
    assert server.store["pending"]
    changes = {"codec_up": (), "link_up": None}
    # With plans without memory alone, the model has no pending difference after this version.
    one_round(server, device, linked(server, 0, 4, **PLAIN))
    assert not server.store["pending"]
    sent = server.send(linked(server, 0, 5, **PLAIN))
    assert kinds(sent) == [PacketKind.WEIGHTS]
    finish(server, sent, carry_out(device, sent), fold=True)
    server.close_version(in_flight=())
    # Once used again, the broadcast continues where it was: with the versions 3 and 5.
    assert one_round(server, device, linked(server, 0, 6, **changes)) == [["weights", "weights"]]
    assert server.store["pending"]


def test_a_version_without_a_plan_keeps_the_broadcast_that_sets_the_model() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    one_round(server, device, linked(server, 0, 1))
    server.close_version(in_flight=())
    server.close_version(in_flight=())
    sent = server.send(linked(server, 0, 2))
    held = server.links.sent(sent.plan).arrays
    assert all(np.array_equal(array, as_arrays(server.store["model"])[name]) for name, array in held.items())


def test_another_part_of_the_initial_model_is_agreed_on_again() -> None:
    """A device that holds the initial model can follow any broadcast, but it holds only the part of its first plan."""
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    blocks = server.workload.spec.block_names
    last = linked(server, 0, 1)
    one_round(server, device, replace(last, part=replace(last.part, trained=blocks[-1:])))
    sent = server.send(linked(server, 0, 2))
    assert kinds(sent) == [PacketKind.AGREED, PacketKind.RESIDUAL]
    assert finish(server, sent, carry_out(device, sent), fold=True).outcome == Outcome.DONE
    assert in_step(server, 0)


def test_another_part_of_the_initial_model_is_no_base_for_own_residuals() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    blocks, own = server.workload.spec.block_names, {"link_down": Residual(rule="half_step")}
    last = linked(server, 0, 1, **own)
    one_round(server, device, replace(last, part=replace(last.part, trained=blocks[-1:])))
    sent = server.send(linked(server, 0, 2, **own))
    assert [message.kind for message in sent.messages] == ["resync"]
    assert finish(server, sent, carry_out(device, sent), fold=True).outcome == Outcome.DONE
    assert in_step(server, 0)


def test_a_device_with_an_uplink_history_restarts_at_both_ends_when_it_joins_a_broadcast() -> None:
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    drift = {"link_up": Residual(rule="drift", feedback=True)}
    one_round(server, device, linked(server, 0, 1, link_down=None, codec_down=(), **drift))
    sent = server.send(linked(server, 0, 2, **drift))
    assert kinds(sent)[0] == PacketKind.AGREED
    finish(server, sent, carry_out(device, sent), fold=True)
    assert in_step(server, 0)
