"""An invalid update is rejected and changes nothing at the server: no model, no sum, no memory."""

from typing import Any

import pytest
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.messages import array_specs
from fedbonsai.actors.server.peers import Peer
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.codec import Array, CodecSpec
from fedbonsai.comms.codecs.make_codec import make_codec
from fedbonsai.comms.errors import OutOfSync, PacketError
from fedbonsai.comms.links.memory import DeviceEnd
from fedbonsai.comms.links.predict import Residual, residual_specs
from fedbonsai.comms.links.state import to_state
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ...comms.mutations import mutated
from ...comms.receivers import Case, sparse
from ..steps import IMAGES, make_server
from .test_links import carry_out, finish, linked

SETTINGS: dict[str, dict[str, Any]] = {
    "delta by the residual chain": {
        "link_up": Residual(rule="delta", feedback=True),
        "codec_up": sparse(0.1, 2, coder="ans"),
    },
    "drift by the portable coder": {
        "link_up": Residual(rule="drift", feedback=True),
        "codec_up": sparse(0.1, 1, coder="rans"),
    },
    "half_step of bit patterns by lz4": {
        "link_up": Residual(rule="half_step", arithmetic="bits"),
        "link_down": Residual(rule="half_step", arithmetic="bits"),
        "codec_up": (CodecSpec("lz4"),),
        "codec_down": (),
    },
    "no memory, uniform": {"link_up": None, "link_down": None, "codec_up": (CodecSpec("uniform"), CodecSpec("auto"))},
}
WEIGHT = 3.0


def second_round(name: str) -> tuple[Server, Plan, Array]:
    """A server whose devices 0 and 1 were folded once, and a sound update of the second round's first device."""
    server, device = make_server(IMAGES), Device(Workload(IMAGES))
    for device_id in range(2):
        sent = server.send(linked(server, device_id, device_id + 1, **SETTINGS[name]))
        finish(server, sent, carry_out(device, sent), fold=True)
    server.close_version(in_flight=())
    sent = server.send(linked(server, 0, 3, **SETTINGS[name]))
    _, update, _ = carry_out(device, sent)
    assert update is not None
    return server, sent.plan, update


def remembered(peer: Peer | None) -> dict[str, Any]:
    """All of a link's memory but ``lost`` and ``resync_plan``."""
    if peer is None:
        return {}
    arrays = {name: array.tobytes() for name, array in to_state(DeviceEnd(memory=peer.memory)).items()}
    arrays |= {f"state {name}": array.tobytes() for name, array in (peer.state or {}).items()}
    in_flight = peer.in_flight.hash if peer.in_flight is not None else None
    return arrays | {"held": peer.held, "folded": peer.folded, "stream": peer.stream, "in_flight": in_flight}


def case_of(server: Server, plan: Plan, update: Array) -> Case:
    """The receiver of updates of this plan."""
    specs = array_specs(server.workload.submodel(plan.part).up(statistics=plan.upload.statistics))
    carried_specs = residual_specs(specs, plan.link_up) if plan.link_up else specs
    chain = plan.codec_up
    symbols = make_codec(chain[:-1]).layout(carried_specs) if chain[-1].name == "entropy" else ()
    return Case("fold", (update,), lambda packet: {}, specs, make_codec(chain).layout(carried_specs), symbols)


@pytest.mark.parametrize("name", SETTINGS)
@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8, unique=True))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mutated_updates_change_nothing(name: str, seeds: list[int]) -> None:
    server, plan, update = second_round(name)
    case, peers = case_of(server, plan, update), server.links.peers
    accepted = 0
    for seed in seeds:
        packet = mutated(case, (seed,))
        model, memory, lost = (
            server.model_hash(),
            [remembered(peers.peek(device_id)) for device_id in range(2)],
            _lost(server),
        )
        try:
            server.fold(plan, server.open(plan, packet), weight=WEIGHT)
        except PacketError as error:
            assert [remembered(peers.peek(device_id)) for device_id in range(2)] == memory
            lost = lost or isinstance(error, OutOfSync)
        else:
            accepted += 1
        assert _lost(server) == lost
        assert server.model_hash() == model
        assert server.folded == accepted
        if accepted:  # the packet was valid: later packets would show nothing
            return
    untouched = second_round(name)[0]
    for each in (server, untouched):
        each.fold(plan, each.open(plan, update), weight=WEIGHT)
        each.close_version(in_flight=())
    assert server.model_hash() == untouched.model_hash()


def _lost(server: Server) -> bool:
    peer = server.links.peers.peek(0)
    return peer is not None and peer.lost
