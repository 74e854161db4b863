"""What a device does with a part that is not the whole model: train behind frozen blocks, imitate, collect, evaluate."""

from typing import Any

import pytest
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.device.module import Module
from fedbonsai.actors.messages.dense_packets import open_update
from fedbonsai.actors.server.server import Server
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.tensors import as_tensors
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.training import train
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Objective, Plan
from fedbonsai.policies.report import Outcome, Report
from msgspec.structs import replace
from torch import Tensor, nn

from ..steps import FOUR, carry_out, make_plan, make_server

NAMES = ("a", "b", "c", "out")
PROXY = "proxy@b..c"
TRAINING = Training(optimiser=Optimiser(learning_rate=0.1), epochs=2, batch_size=4)


@pytest.fixture(name="server")
def server_fixture() -> Server:
    return make_server(FOUR)


@pytest.fixture(name="device")
def device_fixture() -> Device:
    return Device(Workload(FOUR))


def plan_of(server: Server, kind: str = "train", **part: Any) -> Plan:
    fields: dict[str, Any] = {"blocks": NAMES, "trained": ()} | part
    objective = Objective(kind=kind)  # type: ignore[arg-type]
    return make_plan(server.workload, part=Part(**fields), objective=objective, training=TRAINING)


def answer(server: Server, device: Device, plan: Plan) -> tuple[Report, dict[str, Tensor]]:
    """The report of a plan, and the differences in its update, by name."""
    sent = server.send(plan)
    report, update = carry_out(device, sent)
    assert update is not None, report.error
    opened = server.open(sent.plan, update)
    server.fold(sent.plan, opened, weight=report.samples)
    before = {name: tensor.clone() for name, tensor in server.tensors.items()}
    server.close_version(in_flight=())
    changed = {name: tensor - before[name] for name, tensor in server.tensors.items() if tensor.is_floating_point()}
    return report, {name: difference for name, difference in changed.items() if difference.any()}


def blocks_of(differences: dict[str, Tensor]) -> set[str]:
    return {name.split(".")[0].removeprefix("n") if not name.startswith("proxy") else name for name in differences}


def test_behind_frozen_blocks_only_the_trained_ones_change(server: Server, device: Device) -> None:
    report, found = answer(server, device, plan_of(server, trained=("c", "out")))
    assert (report.outcome, report.steps, report.samples) == (Outcome.DONE, 6, 12)
    assert blocks_of(found) == {"c", "out"}
    assert report.loss is not None


def test_with_a_proxy_it_trains_the_network_of_its_stages(server: Server, device: Device) -> None:
    """The same bits as the training of that network by itself."""
    part = {"blocks": ("a", "out"), "trained": ("a", "out"), "auxiliaries": (PROXY,)}
    plan = plan_of(server, **part)
    workload = server.workload
    model = nn.Sequential()
    blocks = workload.family("").blocks.modules
    for name in ("a", PROXY, "out"):
        module = workload.family("").new_auxiliary(name) if name == PROXY else blocks[name]
        model.add_module(name.replace(".", "_"), module)
    expected = train(
        model,
        workload.data.train(0),
        training=TRAINING,
        loss=make_loss(TRAINING.loss),
        transform=workload.data.train_transform,
        seed=plan.seed,
    )
    report, found = answer(server, device, plan)
    assert (report.loss, report.loss_square, report.steps) == (expected.loss, expected.loss_square, expected.steps)
    assert blocks_of(found) == {"a", "out", f"{PROXY}.weight"}


def test_with_the_head_alone_proxies_stay_as_they_are(server: Server, device: Device) -> None:
    part = {"blocks": ("a", "out"), "trained": ("out",), "auxiliaries": (PROXY,)}
    report, found = answer(server, device, plan_of(server, **part, untrained=(PROXY,)))
    assert blocks_of(found) == {"out"}
    # A later plan on the same worker trains the proxy again.
    plan = replace(plan_of(server, **part), version=1)
    again, found = answer(server, device, plan)
    assert blocks_of(found) == {"out", f"{PROXY}.weight"}
    assert (report.steps, again.steps) == (6, 6)


def test_the_order_of_plans_on_a_worker_does_not_matter(server: Server, device: Device) -> None:
    first = plan_of(server, blocks=("a", "out"), trained=("a", "out"), auxiliaries=(PROXY,))
    others = [
        plan_of(server, "imitate", blocks=("a", "b", "c"), auxiliaries=(PROXY,)),
        plan_of(server, "collect", blocks=("a", "b")),
        plan_of(server, blocks=("a", "out"), trained=("out",), auxiliaries=(PROXY,), untrained=(PROXY,)),
        plan_of(server, trained=NAMES),
        plan_of(server, "evaluate", blocks=("a", "out"), auxiliaries=(PROXY,)),
    ]
    wanted = carry_out(device, server.send(first))[1]
    assert wanted is not None
    for other in others:
        report, _ = carry_out(device, server.send(other))
        assert report.error == ""
        found = carry_out(device, server.send(first))[1]
        assert found is not None
        assert found.tobytes() == wanted.tobytes()


def test_a_proxy_learns_what_its_blocks_do(server: Server, device: Device) -> None:
    plan = plan_of(server, "imitate", blocks=("a", "b", "c"), auxiliaries=(PROXY,))
    plan = replace(plan, training=replace(TRAINING, optimiser=Optimiser(learning_rate=1e-4)))
    losses = []
    for version in range(4):
        report, found = answer(server, device, replace(plan, version=version))
        assert blocks_of(found) == {f"{PROXY}.weight"}
        losses.append(report.loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_statistics_are_collected_of_the_parts_blocks(server: Server, device: Device) -> None:
    report, found = answer(server, device, plan_of(server, "collect", blocks=("a", "b")))
    assert set(found) == {f"n{block}.running_{kind}" for block in "ab" for kind in ("mean", "var")}
    assert (report.steps, report.loss, report.samples, report.outcome) == (3, None, 12, Outcome.DONE)
    # By hand: the mean of the first convolution's output over three batches of four.
    x = server.workload.data.train(0).x
    conv = nn.functional.conv2d(x, server.tensors["a.weight"], padding=1)
    torch.testing.assert_close(server.tensors["na.running_mean"], conv.mean(dim=(0, 2, 3)))
    batches = torch.stack([each.transpose(0, 1).flatten(1).var(dim=1) for each in conv.split(4)])
    torch.testing.assert_close(server.tensors["na.running_var"], batches.mean(dim=0))


def test_a_part_with_proxies_is_evaluated_by_its_stages(server: Server, device: Device) -> None:
    plan = plan_of(server, "evaluate", blocks=("a", "out"), auxiliaries=(PROXY,))
    report, update = carry_out(device, server.send(plan))
    assert (report.error, update) == ("", None)
    samples = server.workload.data.test(0)
    assert samples is not None
    blocks = server.workload.family("").blocks.modules
    stages = nn.Sequential(blocks["a"], server.workload.family("").new_auxiliary(PROXY), blocks["out"]).eval()
    with torch.no_grad():
        right = (stages(samples.x).argmax(dim=1) == samples.y).float().mean()
    assert report.metrics["accuracy"] == pytest.approx(float(right))


def test_blocks_that_are_not_held_take_no_memory(server: Server) -> None:
    architecture = server.workload.family("")
    part, whole = (
        Module(architecture, layout="contiguous", blocks=("a", "out")),
        Module(architecture, layout="contiguous"),
    )
    sizes = {name: tensor.numel() for name, tensor in part.model.state_dict().items()}
    for name, tensor in whole.model.state_dict().items():
        held = name.split(".")[0] in ("a", "na", "out") or "tracked" in name
        assert sizes[name] == (tensor.numel() if held else 0), name
    assert part.blocks.spec.block_names == NAMES
    state = architecture.new_model().state_dict()
    part.load({name: state[name] for name, size in sizes.items() if size and "tracked" not in name})
    x = server.workload.data.train(0).x
    torch.testing.assert_close(part.blocks.modules["a"].eval()(x), whole.blocks.modules["a"].eval()(x))


def test_it_works_with_channels_last_and_other_precisions(server: Server, device: Device) -> None:
    for version, training in enumerate(
        (
            replace(TRAINING, layout="channels_last"),
            replace(TRAINING, precision="bf16"),
            replace(TRAINING, accumulation=2),
        )
    ):
        for number, part in enumerate(
            ({"trained": ("c", "out")}, {"blocks": ("a", "out"), "trained": ("a", "out"), "auxiliaries": (PROXY,)})
        ):
            plan = replace(plan_of(server, **part), training=training, id=100 + 10 * version + number)
            report, update = carry_out(device, server.send(plan))
            assert (report.error, update is not None) == ("", True)


def test_weights_in_place_of_differences(server: Server, device: Device) -> None:
    plan = plan_of(server, "collect", blocks=("a",))
    plan = replace(plan, upload=replace(plan.upload, payload="weights"))
    sent = server.send(plan)
    report, update = carry_out(device, sent)
    assert update is not None, report.error
    opened = as_tensors(open_update(update, sent.plan, server.workload.submodel(sent.plan.part)))
    assert set(opened) == {"na.running_mean", "na.running_var"}
    assert opened["na.running_var"].min() > 0
