"""A user's own model, data, transform, loss and metric: a regression from sequences to one number, without classes."""

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.spec import Call, Optimiser, Training
from fedbonsai.learning.store import model_hash
from fedbonsai.learning.training.evaluation import evaluate
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.training import train
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import Initialisation, WorkloadSettings
from safetensors.torch import save_file

MODULE = """
import torch
from torch import nn
from fedbonsai.learning.data.types import SamplePool, Samples

class Recurrent(nn.Module):
    def __init__(self, *, hidden):
        super().__init__()
        self.cells = nn.GRU(3, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x):
        return self.out(self.cells(x)[0][:, -1])

def sums(*, num_devices, seed, root, steps):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40 * num_devices + 50, steps, 3, generator=generator)
    samples = Samples(x, x[:, :, 0].mean(dim=1, keepdim=True))
    train = torch.arange(40 * num_devices)
    return SamplePool(train=samples.take(train), test=samples.take(torch.arange(len(train), len(x))))

class Flat(nn.Sequential):
    def __init__(self, *, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))

class Normal(nn.Sequential):
    def __init__(self, *, num_classes):
        super().__init__(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, num_classes))

def louder(x, generator, *, by):
    return x * by

def quartic(output, target, *, scale):
    return scale * ((output - target) ** 4).mean()

def within(output, target, *, distance):
    return ((output - target).abs() < distance).squeeze(1)
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_sequences.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def settings(**changes: Any) -> WorkloadSettings:
    usual = WorkloadSettings(
        model=Call("my_sequences:Recurrent", {"hidden": 8}),
        data=DataConfig(
            name="my_sequences:sums",
            kwargs={"steps": 5},
            train_transforms=(Call("my_sequences:louder", {"by": 2.0}),),
            test_transforms=(Call("my_sequences:louder", {"by": 2.0}),),
        ),
        metrics=(Call("absolute_error"), Call("my_sequences:within", {"distance": 0.25})),
        num_devices=3,
        seed=1,
    )
    return msgspec.structs.replace(usual, **changes)


def test_a_sequence_regression_trains_and_is_evaluated() -> None:
    workload = Workload(settings())
    data, model = workload.data, workload.new_model()
    assert data.num_classes is None
    loss = make_loss(Call("my_sequences:quartic", {"scale": 10.0}))
    training = Training(epochs=10, batch_size=10, optimiser=Optimiser(name="adam", learning_rate=0.02))

    def figures() -> dict[str, float]:
        return evaluate(model, data.server_test(), loss=loss, metrics=workload.metrics, transform=data.test_transform)

    before = figures()
    result = train(model, data.train(2), training=training, loss=loss, transform=data.train_transform, seed=0)
    after = figures()
    assert (result.steps, result.processed) == (40, 400)
    assert before.keys() == after.keys() == {"loss", "absolute_error", "within"}
    assert after["loss"] < before["loss"] / 4
    assert after["absolute_error"] < before["absolute_error"]
    assert after["within"] > before["within"]


def test_example_shows_one_transformed_sample() -> None:
    inputs, target = Workload(settings()).example()
    assert (inputs.shape, target.shape) == ((5, 3), (1,))
    raw = Workload(settings()).data.train(0)
    assert torch.equal(inputs, 2 * raw.x[0])
    assert torch.equal(target, raw.y[0])


def test_the_same_settings_give_the_same_bits_in_every_process() -> None:
    def hashes(seed: int) -> list[Any]:
        workload = Workload(settings(seed=seed))
        return [model_hash(workload.new_model().state_dict()), workload.data.digest(), workload.spec.blocks]

    assert hashes(1) == hashes(1)
    assert all(one != other for one, other in zip(hashes(1)[:2], hashes(2)[:2], strict=True))


def test_every_new_model_is_new() -> None:
    workload = Workload(settings())
    first, second = workload.new_model(), workload.new_model()
    with torch.no_grad():
        first.out.bias.fill_(9)
    assert not torch.equal(first.out.bias, second.out.bias)


def test_settings_survive_serialisation() -> None:
    sent = msgspec.msgpack.encode(settings())
    assert msgspec.msgpack.decode(sent, type=WorkloadSettings) == settings()


def test_blocks_and_spec_name_every_tensor_once() -> None:
    workload = Workload(settings())
    names = [tensor.name for block in workload.spec.blocks for tensor in block.tensors]
    assert sorted(names) == sorted(workload.new_model().state_dict())


def test_the_classes_in_the_data_size_the_model() -> None:
    workload = Workload(
        settings(model=Call("digits_cnn"), data=DataConfig(kwargs={}), metrics=(Call("accuracy"),), num_devices=2)
    )
    assert workload.data.num_classes == 10
    assert workload.new_model()(workload.example()[0][None]).shape == (1, 10)


def test_batch_statistics_leave_no_statistic_in_the_model() -> None:
    calls = {"model": Call("resfed_cnn", {"in_channels": 1, "image_size": 8}), "data": DataConfig(), "metrics": ()}
    roles = {
        setting: {t.role for b in Workload(settings(**calls, batch_statistics=setting)).spec.blocks for t in b.tensors}
        for setting in (False, True)
    }
    assert roles[False] == {"weight", "vector", "statistic", "counter"}
    assert roles[True] == {"weight", "vector"}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (("accuracy", "accuracy"), "evaluation.metrics names 'accuracy', which is taken"),
        (("accuracy", "my_other:accuracy"), "'accuracy', which is taken; each metric needs its own name"),
        (("my_other:loss",), "evaluation.metrics names 'loss', which is taken"),
        (("accurracy",), "evaluation.metrics is 'accurracy'; it must be one of"),
    ],
)
def test_metrics_that_reports_could_not_tell_apart(metrics: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _ = Workload(settings(metrics=tuple(Call(name) for name in metrics))).metrics


def test_a_fleet_without_a_single_sample() -> None:
    data = DataConfig(name="my_sequences:sums", kwargs={"steps": 5})
    workload = Workload(settings(data=data))
    workload.data = Empty()
    with pytest.raises(ValueError, match="data: no device has a single sample"):
        workload.example()


class Empty:
    def num_samples(self, device: int) -> int:
        return 0


SMALL_DATA = DataConfig(name="synthetic", kwargs={"shape": (1, 8, 8), "samples_per_device": 6, "test_samples": 4})
FAMILIES = WorkloadSettings(
    model=Call("digits_cnn"),
    models={"same": Call("digits_cnn"), "linear": Call("my_sequences:Flat")},
    data=SMALL_DATA,
    metrics=(),
    num_devices=2,
    seed=1,
)


def test_families_have_models_of_their_own() -> None:
    workload = Workload(FAMILIES)
    assert workload.families == ("", "same", "linear")
    own, same = workload.family("").new_model().state_dict(), workload.family("same").new_model().state_dict()
    assert list(own) == list(same)
    assert any(not torch.equal(own[name], same[name]) for name in own)  # from seeds of their own
    assert model_hash(same) == model_hash(Workload(FAMILIES).family("same").new_model().state_dict())
    assert workload.family("same") is workload.family("same")
    assert workload.blocks is workload.family("").blocks
    assert (workload.submodel(whole(workload.family("same").spec, model="same")).prefix) == "same:"
    assert workload.submodel(whole(workload.spec)).prefix == ""


def test_an_unknown_family_is_named_with_those_that_there_are() -> None:
    expected = "part.model is 'tiny'; allowed: '' for the global model, or a name in models: 'same', 'linear'"
    with pytest.raises(ValueError, match=re.escape(expected)):
        Workload(FAMILIES).family("tiny")
    with pytest.raises(ValueError, match="a name in models: none are configured"):
        Workload(msgspec.structs.replace(FAMILIES, models={})).family("tiny")


def test_pretrained_weights_are_of_the_global_model_alone(tmp_path: Path) -> None:
    state = {name: torch.full_like(t, 2.0) for name, t in Workload(FAMILIES).new_model().state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    init = Initialisation(mode="holistic", weights=str(tmp_path / "weights.safetensors"))
    workload = Workload(msgspec.structs.replace(FAMILIES, init=init))
    assert all(bool((t == 2).all()) for t in workload.new_model().state_dict().values())
    assert model_hash(workload.family("same").new_model().state_dict()) == model_hash(
        Workload(FAMILIES).family("same").new_model().state_dict()
    )
    # A narrow model does not need them: the file may be gone.
    (tmp_path / "weights.safetensors").unlink()
    fresh = Workload(msgspec.structs.replace(FAMILIES, init=init))
    fresh.architecture(Part(blocks=(), trained=(), width=0.5)).new_model()
    with pytest.raises(ValueError, match="cannot be read"):
        fresh.new_model()


def test_parts_are_compiled_once() -> None:
    workload = Workload(FAMILIES)
    part = whole(workload.spec)
    assert workload.submodel(part) is workload.submodel(msgspec.structs.replace(part))
    narrow = msgspec.structs.replace(part, width=0.5)
    first = workload.submodel(narrow)
    assert workload.submodel(narrow) is first
    for turn in range(300):  # more than are kept
        workload.submodel(msgspec.structs.replace(narrow, channels="rolling", turn=turn))
    assert workload.submodel(narrow) is not first
    assert workload.submodel(narrow).down == first.down


def test_the_architectures_that_were_used_last_are_kept() -> None:
    workload = Workload(FAMILIES)
    used, other = (Part(blocks=(), trained=(), width=width) for width in (0.5, 0.4))
    first, second = workload.architecture(used), workload.architecture(other)
    for number in range(15):
        workload.architecture(Part(blocks=(), trained=(), width=0.01 * (number + 1)))
        assert workload.architecture(used) is first
    assert workload.architecture(other) is not second


def test_a_twin_shares_data_and_structures_and_has_index_maps_of_its_own() -> None:
    workload = Workload(FAMILIES)
    twin = workload.twin()
    part = whole(workload.spec)
    assert twin.data is workload.data
    assert twin.blocks is workload.blocks
    narrow = msgspec.structs.replace(part, width=0.5)
    assert twin.architecture(narrow) is workload.architecture(narrow)
    name = workload.add_map(workload.channels(narrow))
    named = msgspec.structs.replace(narrow, index_map=name)
    assert workload.channels(named).any()
    with pytest.raises(ValueError, match="a map that this process does not have"):
        twin.channels(named)
    first, second = twin.new_model(), workload.new_model()
    assert model_hash(first.state_dict()) == model_hash(second.state_dict())
    assert all(one is not other for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_index_maps_decide_the_channels_of_parts_that_name_them() -> None:
    workload = Workload(FAMILIES)
    groups = workload.family("").groups
    kept = np.zeros(groups.channels, bool)
    kept[-8:] = kept[:8] = True
    for start in groups.starts:
        kept[start] = True
    name = workload.add_map(kept)
    part = Part(blocks=workload.spec.block_names, trained=(), width=0.5, channels="l1", index_map=name)
    assert workload.channels(part) is kept
    assert workload.submodel(part).slices.keys() == workload.slices(part).keys()
    unnamed = msgspec.structs.replace(part, index_map="")
    assert workload.channels(unnamed).tolist() == workload.family("").choose(unnamed).tolist()
    assert workload.slices(whole(workload.spec)) == {}

    compiled = workload.submodel(part)
    workload.drop_map(name)
    with pytest.raises(ValueError, match=f"part.index_map is '{name}', a map that this process does not have"):
        workload.channels(part)
    assert workload.submodel(part) is not compiled
    workload.drop_map(name)  # nothing happens


def test_the_public_set_is_read_once_for_each_division() -> None:
    workload = Workload(msgspec.structs.replace(FAMILIES, data=DataConfig(name="digits", public_share=0.05)))
    assert workload.public(0.5) is workload.public(0.5)
    assert len(workload.public(0.5).held_out) != len(workload.public(0.25).held_out)
    assert len(workload.public(0.5)) == len(workload.public(0.25)) > 0
    without = Workload(msgspec.structs.replace(FAMILIES, data=DataConfig(name="digits")))
    with pytest.raises(ValueError, match=r"data.public_share is 0"):
        without.public(0.5)


def test_a_family_that_needs_two_samples_decides_who_can_take_part() -> None:
    one_each = msgspec.structs.replace(SMALL_DATA, kwargs=SMALL_DATA.kwargs | {"samples_per_device": 1})
    plain = msgspec.structs.replace(FAMILIES, model=Call("my_sequences:Flat"), models={}, data=one_each)
    normal = msgspec.structs.replace(plain, models={"normal": Call("my_sequences:Normal")})
    assert Workload(plain).alone_fault == ""
    assert "more than 1 value per channel" in Workload(normal).alone_fault
    assert [Workload(settings).data.num_samples(0) for settings in (plain, normal)] == [1, 1]
    assert [Workload(settings).min_samples for settings in (plain, normal)] == [1, 2]
