"""The distiller: requests and packets in, logits and models out."""

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.actors.distiller.distiller import Distiller, InlineDistiller
from fedbonsai.actors.messages.distiller_messages import DistilRequest, Execution, TeacherRequest
from fedbonsai.actors.messages.model_packets import open_model, seal_model
from fedbonsai.comms.codec import Array
from fedbonsai.comms.errors import PacketError
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.spec import Call, Distillation
from fedbonsai.learning.training.distillation import adjust, teacher_logits
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import WorkloadSettings

SETTINGS = WorkloadSettings(
    model=Call("digits_cnn"),
    models={"other": Call("digits_cnn")},
    data=DataConfig(name="digits", public_share=0.03),
    metrics=(),
    num_devices=2,
    seed=1,
)
HELD_OUT = 0.25
EXECUTION = Execution(batch_size=16)
TASK = Distillation(steps=6, learning_rate=0.01, batch_size=8, held_out=HELD_OUT, check_every=2)


@pytest.fixture(name="distiller", scope="module")
def distiller_fixture() -> Distiller:
    return Distiller(Workload(SETTINGS))


def part_of(workload: Workload, *, family: str = "", width: float = 1.0) -> Part:
    return msgspec.structs.replace(whole(workload.family(family).spec, model=family), width=width)


def model_of(part: Part, *, value: float | None = None, settings: WorkloadSettings = SETTINGS) -> torch.nn.Module:
    """A model of a part with random weights of its own, or with one value everywhere."""
    model = Workload(settings).architecture(part).new_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator) - (0.0 if "running_var" in name else 0.5)
                tensor.copy_(drawn if value is None else torch.full_like(tensor, value))
    return model


def sealed(part: Part, **how: float | None) -> Array:
    return seal_model(model_of(part, **how).state_dict(), Workload(SETTINGS).submodel(part))  # type: ignore[arg-type]


def logits_of(distiller: Distiller, part: Part, **fields: object) -> Array:
    request = TeacherRequest(part=part, execution=EXECUTION, held_out=HELD_OUT, **fields)  # type: ignore[arg-type]
    return distiller.logits(request, sealed(part))


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_logits_are_those_of_the_model_in_the_packet(distiller: Distiller, width: float) -> None:
    part, public = part_of(distiller.workload, width=width), Workload(SETTINGS).public(HELD_OUT)
    expected = teacher_logits(model_of(part), public.samples, transform=public.transform, batch_size=16)
    found = logits_of(distiller, part)
    assert (found.shape, found.dtype) == ((len(public), 10), np.float32)
    assert np.array_equal(found, expected.numpy())
    logits_of(distiller, part_of(distiller.workload, family="other"))  # another model in between
    assert np.array_equal(logits_of(distiller, part), found)


def test_logits_are_corrected_for_classes_on_demand(distiller: Distiller) -> None:
    part = part_of(distiller.workload)
    plain, counts = logits_of(distiller, part), (5, 0, 3, *[1] * 7)
    corrected = logits_of(distiller, part, label_counts=counts, class_prior=0.5)
    assert np.array_equal(corrected, adjust(torch.from_numpy(plain), counts, 0.5).numpy())
    assert np.isneginf(corrected[:, 1]).all()
    assert np.array_equal(logits_of(distiller, part, label_counts=counts), plain)


def test_each_student_is_trained_from_its_packet(distiller: Distiller) -> None:
    workload = distiller.workload
    parts = tuple(part_of(workload, family=name) for name in ("", "other"))
    packets = [sealed(part) for part in parts]
    targets = logits_of(distiller, parts[0])
    request = DistilRequest(parts=parts, settings=TASK, execution=EXECUTION, seed=4)
    with torch.no_grad():  # as in a process that has switched gradients off
        results, models = distiller.distil(request, targets, packets)
    public = workload.public(HELD_OUT)
    assert [(result.steps, result.processed) for result in results] == [(6, 6 * 8)] * 2
    assert [result.evaluated for result in results] == [4 * len(public.held_out)] * 2
    # The first is its own teacher, whose loss is 0; so is the second, with the same random weights.
    assert [result.loss_before for result in results] == [pytest.approx(0.0, abs=1e-6)] * 2
    for result, packet, model in zip(results, packets, models, strict=True):
        assert (model.tobytes() == packet.tobytes()) == (result.best_step == 0)

    again, same = Distiller(Workload(SETTINGS)).distil(request, targets, packets)
    assert (again, [model.tobytes() for model in same]) == (results, [model.tobytes() for model in models])


def test_a_student_moves_towards_its_teachers(distiller: Distiller) -> None:
    part = part_of(distiller.workload)
    start = seal_model(Workload(SETTINGS).new_model().state_dict(), distiller.workload.submodel(part))
    task = msgspec.structs.replace(TASK, steps=30, check_every=10)
    request = DistilRequest(parts=(part,), settings=task, execution=EXECUTION, seed=4)
    targets = np.zeros((len(distiller.workload.public(HELD_OUT)), 10), np.float32)
    targets[:, 3] = 5.0
    (result,), (model,) = distiller.distil(request, targets, [start])
    moved = open_model(model, distiller.workload.submodel(part), finite=True)
    before = open_model(start, distiller.workload.submodel(part))
    assert list(moved) == list(before)
    if result.best_step:
        assert any(not torch.equal(moved[name], before[name]) for name in moved)
    else:
        assert all(torch.equal(moved[name], before[name]) for name in moved)


@pytest.mark.parametrize("short", [True, False])
def test_packets_of_models_are_checked(distiller: Distiller, short: bool) -> None:
    part = part_of(distiller.workload)
    packet = sealed(part)
    other = packet[:-1] if short else sealed(part_of(distiller.workload, width=0.5))
    request = TeacherRequest(part=part, execution=EXECUTION, held_out=HELD_OUT)
    with pytest.raises(PacketError):
        distiller.logits(request, other)
    with pytest.raises(PacketError):
        open_model(sealed(part, value=float("nan")), distiller.workload.submodel(part), finite=True)
    assert open_model(sealed(part, value=float("nan")), distiller.workload.submodel(part))


def test_the_public_set_is_described_or_refused(distiller: Distiller) -> None:
    info, public = distiller.public(HELD_OUT), Workload(SETTINGS).public(HELD_OUT)
    assert (info.samples, info.num_bytes, info.dropped) == (len(public), public.num_bytes, public.dropped)
    without = Distiller(Workload(msgspec.structs.replace(SETTINGS, data=DataConfig(name="digits"))))
    with pytest.raises(ValueError, match=r"server.public is not set and data.public_share is 0"):
        without.public(HELD_OUT)


def test_in_this_process_logits_are_known_at_once_and_returned_once(distiller: Distiller) -> None:
    client, part = InlineDistiller(distiller), part_of(distiller.workload)
    request = TeacherRequest(part=part, execution=EXECUTION, held_out=HELD_OUT)
    client.teach(request, sealed(part))
    client.teach(request, sealed(part, value=0.0))
    first, second = client.logits(wait=False)
    assert np.array_equal(first, logits_of(distiller, part))
    assert not second.any()
    assert client.logits(wait=True) == client.notices() == []
    assert client.public(HELD_OUT) == distiller.public(HELD_OUT)
    client.close()
