"""Initial weights from a file: each mode copies exactly its tensors, and every process uses the same ones."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.learning.compat import import_torchvision
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.models import build
from fedbonsai.learning.pretrained import initialise, read_weights, with_weights_hash
from fedbonsai.learning.spec import Call, ServerOptimiser
from fedbonsai.learning.store import model_hash
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import Initialisation, WorkloadSettings
from safetensors.torch import save_file
from torch import Tensor, nn

FRONT = {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
BACK = {"3.weight", "3.bias"}


def net(outputs: int = 2, *, value: float | None = None) -> nn.Module:
    """Blocks ``0`` (a layer of 3 numbers, normalised) and ``3``; all tensors are filled with ``value``, if given."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, outputs))
    if value is not None:
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def taken(model: nn.Module, value: float) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if bool((tensor == value).all())}


def holistic(**changes: Any) -> Initialisation:
    return Initialisation(**{"mode": "holistic", "weights": "w.safetensors"} | changes)


def partial(**changes: Any) -> Initialisation:
    return holistic(mode="partial", **changes)


def test_partial_takes_the_blocks_up_to_the_trunk_and_their_running_statistics() -> None:
    found = net(value=7.0).state_dict()
    model = net()
    assert initialise(model, found, partial()) == ()
    assert taken(model, 7.0) == FRONT
    whole = net()
    initialise(whole, found, partial(trunk="3"))
    assert taken(whole, 7.0) == FRONT | BACK


def test_holistic_takes_everything_where_the_shapes_agree() -> None:
    model = net()
    assert initialise(model, net(value=7.0).state_dict(), holistic()) == ()
    assert taken(model, 7.0) == FRONT | BACK


def test_holistic_leaves_a_classifier_of_other_classes_random_and_says_so() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert initialise(model, net(5, value=7.0).state_dict(), holistic()) == ("3.weight", "3.bias")
    assert taken(model, 7.0) == FRONT
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in BACK)


def test_further_tensors_are_passed_over_other_float_types_converted_and_counters_may_be_missing() -> None:
    found = {name: tensor.half() for name, tensor in net(value=7.0).state_dict().items() if tensor.is_floating_point()}
    model = net()
    initialise(model, found | {"head.weight": torch.zeros(1)}, holistic())
    assert taken(model, 7.0) == (FRONT | BACK) - {"1.num_batches_tracked"}
    assert model.state_dict()["0.weight"].dtype == torch.float32


def changed(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    found: dict[str, Any] = net(value=7.0).state_dict() | {name: tensor}
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("init", "found", "sentence"),
    [
        (holistic(), changed("0.bias", None),
         "init.weights is 'w.safetensors', which has no such tensor: the model expects '0.bias' of shape (3,)"),
        (holistic(), changed("3.bias", None),
         "init.weights is 'w.safetensors', which has no such tensor: the model expects '3.bias' of shape (2,)"),
        (holistic(), changed("0.bias", torch.zeros(9)),
         "init.weights is 'w.safetensors', where '0.bias' has shape (9,); the model expects '0.bias' of shape (3,)"),
        (partial(trunk="3"), changed("3.bias", torch.zeros(9)),
         "init.weights is 'w.safetensors', where '3.bias' has shape (9,); the model expects '3.bias' of shape (2,)"),
        (partial(), changed("0.bias", torch.zeros(3, dtype=torch.int64)),
         "init.weights is 'w.safetensors', where '0.bias' is of type torch.int64; the model's is <f4"),
        (partial(), changed("0.bias", torch.tensor([0.0, float("nan"), 0.0])),
         "init.weights is 'w.safetensors', where '0.bias' has values that are not finite"),
        (partial(trunk="2"), changed("0.bias", torch.zeros(3)),
         "init.trunk is '2', which is not a block of this model; its blocks are: 0, 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(init: Initialisation, found: dict[str, Tensor], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        initialise(net(), found, init)
    assert str(caught.value) == sentence


def test_a_file_of_which_nothing_fits_is_refused() -> None:
    layer = nn.Linear(2, 2)  # a single block, which is also the last one
    with pytest.raises(ValueError, match="of whose tensors none fits"):
        initialise(layer, {"weight": torch.zeros(5, 2), "bias": torch.zeros(5)}, holistic())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mode": "partial"}, "init.mode is 'partial', which needs init.weights: a safetensors file, or 'torchvision'"),
        ({"weights": "a"}, "init.weights is 'a', but init.mode is 'random'; use 'partial' or 'holistic'"),
        ({"mode": "holistic", "weights": "a", "trunk": "0"},
         "init.trunk is '0', which is for the mode 'partial'; init.mode is 'holistic'"),
    ],
)  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        Initialisation(**fields)
    assert str(caught.value) == sentence


def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"init.weights is '.*nothing', which cannot be read: No such file"):
        read_weights(holistic(weights=str(tmp_path / "nothing")), model="m")
    (tmp_path / "text").write_text("not weights at all")
    with pytest.raises(ValueError, match=r"init.weights is '.*text', which is not a safetensors file"):
        read_weights(holistic(weights=str(tmp_path / "text")), model="m")


def settings(init: Initialisation = Initialisation()) -> WorkloadSettings:  # noqa: B008, frozen
    return WorkloadSettings(model=Call("digits_cnn"), data=DataConfig(), metrics=(), num_devices=3, seed=1, init=init)


@pytest.fixture
def digits_file(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    save_file(build(Call("digits_cnn"), seed=99, outputs=10).state_dict(), path)
    return path


def test_server_and_device_build_the_same_model_by_hash(digits_file: Path) -> None:
    init = with_weights_hash(partial(weights=str(digits_file), trunk="features.2"), model="digits_cnn")
    server = Server(Workload(settings(init)), channel=LocalChannel(), optimiser=ServerOptimiser())
    device = Device(Workload(settings(init)))
    hashes = [server.model_hash(), model_hash(device.workload.new_model().state_dict())]
    assert hashes[0] == hashes[1] != model_hash(Workload(settings()).new_model().state_dict())
    model, random = device.workload.new_model().state_dict(), Workload(settings()).new_model().state_dict()
    file = read_weights(init, model="digits_cnn")
    for name, tensor in model.items():
        assert torch.equal(tensor, (file if name.startswith("features.") else random)[name]), name


def test_a_worker_with_another_file_is_detected(digits_file: Path) -> None:
    init = with_weights_hash(holistic(weights=str(digits_file)), model="digits_cnn")
    save_file(build(Call("digits_cnn"), seed=98, outputs=10).state_dict(), digits_file)
    with pytest.raises(ValueError, match=rf"whose tensors have the hash \w{{64}} here; expected is {init.hash}"):
        Workload(settings(init)).new_model()


def test_random_pins_nothing() -> None:
    assert with_weights_hash(Initialisation(), model="m") == Initialisation()
    assert msgspec.convert({}, Initialisation).mode == "random"


# torchvision's loader checks its cache first: the file there replaces a download.


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    models = import_torchvision().models
    state: dict[str, Tensor] = models.get_model("squeezenet1_1").state_dict()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / models.get_model_weights("squeezenet1_1").DEFAULT.url.rpartition("/")[2])
    return state


def test_torchvisions_published_weights_come_through_its_own_loader(published: dict[str, Tensor]) -> None:
    name = "torchvision/squeezenet1_1"
    init = with_weights_hash(holistic(weights="torchvision"), model=name)
    assert init.hash == model_hash(published)
    model = build(Call(name), seed=1, outputs=10)
    assert initialise(model, read_weights(init, model=name), init) == ("classifier.1.weight", "classifier.1.bias")
    assert torch.equal(model.state_dict()["features.0.weight"], published["features.0.weight"])


def test_torchvisions_weights_of_other_models_or_cut_off_are_one_sentence(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    init = holistic(weights="torchvision")
    with pytest.raises(ValueError) as caught:
        read_weights(init, model="resnet18")
    assert str(caught.value) == (
        "init.weights is 'torchvision', which is for models torchvision/NAME; model.name is 'resnet18'"
    )
    (file,) = (tmp_path / "hub" / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"init.weights is 'torchvision'; SqueezeNet1_1_Weights.* could not be loaded"):
        read_weights(init, model="torchvision/squeezenet1_1")
