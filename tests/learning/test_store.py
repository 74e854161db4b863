import pytest
import torch
from fedbonsai.learning.store import SECTIONS, Store, model_hash, state_hash
from torch import Tensor

MODEL = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "steps": torch.tensor(7), "none": torch.zeros(0, 2)}


def changed(**changes: Tensor) -> dict[str, Tensor]:
    return MODEL | changes


@pytest.mark.parametrize("hashed", [model_hash, state_hash])
@pytest.mark.parametrize(
    "other",
    [
        {"v" if name == "w" else name: tensor for name, tensor in MODEL.items()},
        {name: tensor for name, tensor in MODEL.items() if name != "none"},
        changed(w=MODEL["w"].view(torch.int32)),
        changed(w=MODEL["w"].reshape(4)),
        changed(w=MODEL["w"].reshape(4, 1)),
        changed(w=MODEL["w"].T),
        changed(none=torch.zeros(2, 0)),
        changed(steps=torch.tensor(8)),
        changed(w=torch.tensor([[1.0, 2.0], [3.0, 4.0000005]])),
    ],
    ids=["name", "missing", "type", "shape", "one more dimension", "transposed", "empty shape", "value", "one bit"],
)
def test_different_models_have_different_hashes(hashed, other: dict[str, Tensor]) -> None:
    assert hashed(other) != hashed(MODEL)


@pytest.mark.parametrize("hashed", [model_hash, state_hash])
def test_a_hash_does_not_depend_on_order_memory_format_or_gradients(hashed) -> None:
    backwards = dict(reversed(MODEL.items()))
    assert hashed(backwards) == hashed(MODEL)
    spread_out = MODEL["w"].T.contiguous().T
    assert not spread_out.is_contiguous()
    assert hashed(changed(w=spread_out)) == hashed(MODEL)
    assert hashed(changed(w=MODEL["w"].clone().requires_grad_())) == hashed(MODEL)


@pytest.mark.parametrize("hashed", [model_hash, state_hash])
def test_zeros_of_either_sign_are_different_bits(hashed) -> None:
    assert hashed({"w": torch.tensor([0.0])}) != hashed({"w": torch.tensor([-0.0])})


def test_hashes_do_not_change_between_releases() -> None:
    assert model_hash({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of nothing
    assert state_hash({}) == 0x2D06800538D394C2  # XXH3 of nothing
    assert 0 <= state_hash(MODEL) < 2**64


def test_the_store_has_its_own_copy() -> None:
    weight = torch.ones(2, 3).T.requires_grad_()
    store = Store({"w": weight})
    held = store["model"]["w"]
    assert held.is_contiguous()
    assert not held.requires_grad
    held.zero_()
    assert weight.sum().item() == 6
    assert all(store[section] == {} for section in SECTIONS if section != "model")


def test_tied_tensors_stay_tied_and_are_counted_once() -> None:
    shared = torch.ones(10)
    store = Store({"embedding": shared, "head": shared.detach(), "other": shared.clone(), "half": shared[:5]})
    model = store["model"]
    model["embedding"].fill_(3)
    assert model["head"].tolist() == [3.0] * 10
    assert model["other"].tolist() == [1.0] * 10
    assert model["half"].tolist() == [1.0] * 5
    assert store.num_bytes == 40 + 40 + 20
    store["optimiser"]["m/embedding"] = torch.zeros(10)
    assert store.num_bytes == 140
