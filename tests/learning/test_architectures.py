"""Models at one width: how they are built, and when the full one is built for it."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fedbonsai.learning.architecture import Architecture, Examples
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.randomness import seeded
from fedbonsai.learning.spec import Call
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import WorkloadSettings
from torch import Tensor, nn


class Net(nn.Module):
    """Four channels between one and two; 4x4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.flatten(torch.relu(self.norm(self.conv(x))), 1))


class Shifted(Net):
    """A buffer that only the builder knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.full((1,), 3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


class Indexed(Net):
    """A buffer of whole numbers, which is in the state and is never sent."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, self.order]


class Plain(Net):
    """A tensor that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.full((1,), 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


class Nested(Net):
    """A tensor in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.shifts = {"all": [torch.full((1,), 3.0)]}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shifts["all"][0]


class Measured(Net):
    """A builder that needs values."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = float(torch.linspace(0, 3, 4)[-1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Stubborn(Net):
    """A parameter that is made elsewhere, so that the model is only in part without values."""

    def __init__(self) -> None:
        super().__init__()
        self.out.bias = nn.Parameter(torch.from_numpy(np.full(2, 3.0, np.float32)))


def one() -> tuple[Tensor, Tensor]:
    return torch.ones(1, 4, 4), torch.tensor(1)


def first(count: int) -> tuple[Tensor, Tensor]:
    return torch.ones(count, 1, 4, 4), torch.ones(count, dtype=torch.int64)


def seeded_build(net: type[nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with seeded(7):
            return net()

    return build


def full_of(net: type[nn.Module]) -> Architecture:
    return Architecture(seeded_build(net), Examples(one, first), seed=1)


def half(full: Architecture, *, width: float = 0.5, **fields: object) -> Architecture:
    return Architecture(
        full._build,
        full._examples,
        seed=1,
        full=full,
        part=Part(blocks=(), trained=(), width=width, **fields),  # type: ignore[arg-type]
    )


def test_a_narrow_model_is_built_without_the_full_one() -> None:
    full = full_of(Net)
    assert all(tensor.is_meta for tensor in full.skeleton().state_dict().values())
    model = half(full).new_model()
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "conv.weight": (2, 1, 3, 3), "conv.bias": (2,), "norm.weight": (2,), "norm.bias": (2,), "norm.running_mean": (2,),
        "norm.running_var": (2,), "norm.num_batches_tracked": (), "out.weight": (2, 32), "out.bias": (2,)
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert not tensor.any(), name
    assert model(torch.ones(3, 1, 4, 4)).shape == (3, 2)


@pytest.mark.parametrize("net", [Shifted, Plain, Nested, Measured, Indexed, Stubborn])
def test_a_model_whose_values_only_its_builder_knows_is_built_whole_first(net: type[nn.Module]) -> None:
    full = full_of(net)
    assert not any(tensor.is_meta for tensor in full.skeleton().state_dict().values())
    model, expected = half(full).new_model(), half(full_of(Net)).new_model()
    state = {name: torch.full_like(tensor, 0.1) for name, tensor in expected.state_dict().items()}
    expected.load_state_dict(state)
    model.load_state_dict(state, strict=False)
    inputs = torch.arange(16.0).reshape(1, 1, 4, 4)
    plain = expected.eval()(inputs)
    wanted = {"Shifted": plain + 3, "Plain": plain + 3, "Nested": plain + 3, "Measured": plain * 3}
    assert torch.equal(model.eval()(inputs), wanted.get(net.__name__, plain))


def test_the_same_model_at_every_call() -> None:
    for architecture in (full_of(Net), half(full_of(Net)), half(full_of(Plain))):
        one_model, other = architecture.new_model().state_dict(), architecture.new_model().state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one_model.items())


class Tied(nn.Module):
    """Two layers that share a weight, and a weight in half precision that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(16, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.out = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.out(torch.relu(self.other(torch.relu(self.one(torch.relu(self.first(x.flatten(1))))))))
            * self.scale.float()
        )


def test_tied_tensors_of_a_narrow_model_stay_tied() -> None:
    model = half(full_of(Tied)).new_model()
    assert model.one.weight.shape == (2, 2)
    assert model.one.weight is model.other.weight
    assert model.one.bias is not model.other.bias
    assert (model.scale.dtype, model.scale.requires_grad, model.one.weight.requires_grad) == (
        torch.bfloat16,
        False,
        True,
    )
    assert isinstance(model.scale, nn.Parameter)
    with torch.no_grad():
        model.one.weight.fill_(2.0)
    assert model.state_dict()["other.weight"].tolist() == [[2.0, 2.0]] * 2


def test_structure_is_built_without_weights_from_a_file() -> None:
    def reading() -> nn.Module:
        raise AssertionError("the weights are read")

    full = Architecture(reading, Examples(one, first), seed=1, structure=seeded_build(Plain))
    assert half(full).new_model().out.in_features == 32


def test_outputs_are_scaled_in_training_only() -> None:
    full, inputs = full_of(Net), torch.arange(16.0).reshape(1, 1, 4, 4)
    plain, scaled = half(full), half(full, scaled=True)
    models = [plain.new_model(), scaled.new_model()]
    for model in models:
        model.load_state_dict({name: torch.full_like(t, 0.1) for name, t in model.state_dict().items()})
        model.norm = nn.Identity()
        model.train()
    before, after = models[0].conv(inputs), models[1].conv(inputs)
    assert torch.equal(after, before / 0.5)
    assert torch.equal(models[0].eval()(inputs), models[1].eval()(inputs))


def test_blocks_of_a_narrow_model_have_the_names_of_the_full_one() -> None:
    full = full_of(Net)
    narrow = half(full)
    assert narrow.spec.block_names == full.spec.block_names
    names, roles = ([[getattr(t, field) for block in a.spec.blocks for t in block.tensors] for a in (full, narrow)]
                    for field in ("name", "role"))  # fmt: skip
    assert names[0] == names[1]
    assert roles[0] == roles[1]
    assert narrow.spec.parameters < full.spec.parameters


def test_a_narrow_model_cannot_be_cut_where_the_full_one_cannot() -> None:
    """Of zeros every cut computes the same."""

    class Aside(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + len(self.__dict__)

    class Counting(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x) + type(self).calls

    assert half(full_of(Net)).cut_fault == full_of(Net).cut_fault == ""
    full = full_of(Counting)
    assert full.cut_fault
    assert half(full).cut_fault == full.cut_fault


def test_channels_by_rule() -> None:
    full = full_of(Net)

    def chosen(**fields: object) -> list[bool]:
        part = Part(blocks=(), trained=(), **fields)  # type: ignore[arg-type]
        return full.choose(part).tolist()

    assert chosen(width=0.5) == chosen(width=0.5, turn=3) == [True, True, False, False]
    assert chosen(width=0.5, channels="rolling", turn=3) == [True, False, False, True]
    assert chosen(width=0.5, channels="l1", turn=3) == [True, True, False, False]  # as many
    assert chosen(width=0.1, min_channels=3) == [True, True, True, False]
    scores = np.array([0.0, 3.0, 1.0, 2.0])
    assert full.choose(Part(blocks=(), trained=(), width=0.5), scores=scores).tolist() == [False, True, False, True]
    assert {
        n: [None if i is None else i.tolist() for i in p] for n, p in full.slices(np.array([0, 1, 0, 1], bool)).items()
    }["conv.weight"] == [[1, 3]]


def workload_of(net: str, shape: tuple[int, ...] = (1, 8, 8)) -> Workload:
    data = DataConfig(name="synthetic", kwargs={"shape": shape, "samples_per_device": 2, "test_samples": 2})
    return Workload(WorkloadSettings(model=Call(net), data=data, num_devices=1, seed=1, metrics=()))


def test_parts_with_other_channels_of_the_same_numbers_share_an_architecture() -> None:
    workload = workload_of("digits_cnn")
    parts = [Part(blocks=(), trained=(), width=0.5, channels="rolling", turn=turn) for turn in (0, 1)]
    assert workload.architecture(parts[0]) is workload.architecture(parts[1])
    for changes in ({"width": 0.25}, {"min_channels": 10}, {"scaled": True}):
        other = Part(blocks=(), trained=(), **{"width": 0.5} | changes)  # type: ignore[arg-type]
        assert workload.architecture(other) is not workload.architecture(parts[0])
    assert workload.architecture(Part(blocks=(), trained=(), turn=5)) is workload.family("")


_MEASURE = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.messages import array_specs, weights_stamp
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.comms.codec import IdentityCodec
from fedbonsai.comms.links.receive import context_for
from fedbonsai.comms.packet import seal
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Call, Training
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import WorkloadSettings
from fedbonsai.policies.plan import Plan
import torch_pruning, torch._refs  # imported for narrow models only

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

width = float(sys.argv[1])
data = DataConfig(name="synthetic", kwargs={"shape": (3, 32, 32), "samples_per_device": 2, "test_samples": 2})
settings = WorkloadSettings(model=Call("vgg16_bn", {"hidden": 4096}), data=data, num_devices=1, seed=1, metrics=())
device = Device(Workload(settings))
device.warm_up(model=False)
before = peak()
names = device.workload.architecture(Part(blocks=(), trained=(), width=width)).spec.block_names
part = Part(blocks=names, trained=names, width=width)
specs = array_specs(device.workload.submodel(part).down)
values = {spec.name: np.full(spec.shape, 0.01, spec.dtype) for spec in specs}
packet, _ = seal(values, codec=IdentityCodec(), context=context_for(specs, seed=0), stamp=weights_stamp(0))
plan = Plan(id=1, device=0, version=0, part=part, training=Training(batch_size=2), seed=1)
answer, update, _ = device.run(plan_message(plan), [packet])
assert update is not None, answer
print(peak() - before)
"""


def test_a_device_with_a_narrow_part_never_holds_the_full_model() -> None:
    """In a process of its own: what its peak memory rises by for one plan.

    The whole width needs the model five times and more: in blocks, as a module, as a packet, its gradients and its momentum.
    At a quarter of the channels it is 8 of 128 MiB; finding the channels takes about as much as the full model, once.
    """
    rises = []
    for width in (1.0, 0.25):
        done = subprocess.run([sys.executable, "-c", _MEASURE, str(width)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rises.append(int(done.stdout))
    assert rises[1] < 0.5 * rises[0], rises
    assert rises[1] < 220 * 2**20, rises
