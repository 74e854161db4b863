"""Contents, contexts and stamps of messages, which both ends derive."""

from fedbonsai.actors.messages.messages import (
    Dispatch,
    Message,
    array_specs,
    update_context,
    update_stamp,
    weights_stamp,
)
from fedbonsai.actors.messages.plan_message import plan_message, read_plan
from fedbonsai.comms.codec import ArraySpec
from fedbonsai.comms.packet import PacketKind, Stamp
from fedbonsai.learning.spec import Call, Optimiser, Training
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan

from ..steps import IMAGES, make_plan


def plan(**changes: object) -> Plan:
    return make_plan(Workload(IMAGES), **changes)


def test_a_dispatch_adds_up_its_packets_in_their_order() -> None:
    dispatch = Dispatch(plan(), (Message("agreed", 64, "agreed"), Message("residual", 500, "weights")), None)
    assert dispatch.packets == ("agreed", "residual")
    assert dispatch.num_bytes == 564
    nothing = Dispatch(plan(), (), None)
    assert (nothing.packets, nothing.num_bytes) == ((), 0)


def test_stamps_by_hand() -> None:
    assert weights_stamp(4) == Stamp(kind=PacketKind.WEIGHTS, version=4)
    update = update_stamp(plan(id=17, version=3, attempt=2), state_hash=5)
    assert update == Stamp(kind=PacketKind.UPDATE, version=3, state_hash=5, plan=17, attempt=2)
    assert update_stamp(plan()).state_hash == 0


def test_a_packets_contents_are_the_models_tensors_with_their_roles() -> None:
    workload = Workload(IMAGES)
    tensors = workload.submodel(make_plan(workload).part).down
    specs = array_specs(tensors)
    assert [(s.name, s.shape, s.dtype, s.role) for s in specs] == [(t.name, t.shape, t.dtype, t.role) for t in tensors]
    assert {spec.role for spec in specs} == {"weight", "vector", "statistic"}
    assert all(spec.exact and spec.nonzeros is None for spec in specs)


def test_the_codecs_seed_of_an_update_is_its_plans() -> None:
    context = update_context((ArraySpec("w", (1,), "<f4", role="weight"),), plan(seed=99))
    assert (context.seed, context.roles) == (99, {"w": "weight"})


def test_arguments_and_settings_of_any_value_arrive() -> None:
    """Including None, zero and empty."""
    for loss in (
        Call("my_models:half_square", {"reduction": None, "weight": 0.0, "names": []}),
        Call("cross_entropy", {"label_smoothing": None}),
        Call("my_models:half_square"),
    ):
        sent = plan(training=Training(loss=loss, optimiser=Optimiser(momentum=0.0), epochs=0, steps=3))
        assert read_plan(plan_message(sent)) == sent


def test_reasons_cost_nothing() -> None:
    quiet = plan()
    assert plan_message(quiet.with_("a reason of many words")) == plan_message(quiet)
