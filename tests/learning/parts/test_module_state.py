from collections import deque

import torch
from fedbonsai.learning.parts.module_state import ModuleState
from torch import Tensor, nn


class Statistics:
    """A user's own object in a module."""

    def __init__(self) -> None:
        self.seen = 0
        self.sizes: list[int] = []


class Full(nn.Module):
    """Has attributes of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.register_buffer("mean", torch.zeros(2))
        self.plain = torch.ones(2)
        self.steps, self.scale, self.names = 0, 1.5, ("a", "b")
        self.table, self.queue, self.labels = {"x": [1, 2]}, deque([1]), {3}
        self.statistics = Statistics()


def test_nothing_is_changed_by_reading_and_by_equal_values() -> None:
    model = Full()
    state = ModuleState(model)
    model.scale, model.names = 3.0 / 2, tuple("ab")
    _ = model.inner[0](torch.ones(1, 2)), model.statistics.seen, list(model.queue)
    assert state.changed() == ""


def assign_number(model: Full) -> None:
    model.steps += 1


def assign_buffer(model: Full) -> None:
    model.mean = model.mean + 1


def add_to_buffer(model: Full) -> None:
    model.mean += 1


def add_to_plain_tensor(model: Full) -> None:
    model.plain.add_(1)


def assign_new(model: Full) -> None:
    model.last = torch.ones(1)


def remove(model: Full) -> None:
    del model.table["x"]


def append_inside(model: Full) -> None:
    model.table["x"].append(3)


def append_to_queue(model: Full) -> None:
    model.queue.append(2)


def add_to_set(model: Full) -> None:
    model.labels.add(4)


def count_in_object(model: Full) -> None:
    model.statistics.seen += 1


def append_in_object(model: Full) -> None:
    model.statistics.sizes.append(1)


def replace_layer(model: Full) -> None:
    model.inner[0] = nn.Linear(2, 2)


def change_layer(model: Full) -> None:
    model.inner[1].momentum = 0.5


CHANGES = {
    assign_number: "steps",
    assign_buffer: "mean",
    add_to_buffer: "mean",
    add_to_plain_tensor: "plain",
    assign_new: "last",
    remove: "table.x",
    append_inside: "table.x",
    append_to_queue: "queue",
    add_to_set: "labels",
    count_in_object: "statistics.seen",
    append_in_object: "statistics.sizes",
    replace_layer: "inner.0",
    change_layer: "inner.1.momentum",
}


def told(value: object) -> object:
    """An attribute's value as plain data."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, nn.Module | Statistics):
        return {name: told(inner) for name, inner in vars(value).items()}
    return {key: told(inner) for key, inner in value.items()} if isinstance(value, dict) else repr(value)


def test_every_kind_of_change_is_named_and_undone() -> None:
    for change, name in CHANGES.items():
        model = Full()
        before, state, layer = told(model), ModuleState(model, values=True), model.inner[0]
        change(model)
        assert state.changed() == name
        assert told(model) != before or model.inner[0] is not layer
        state.restore()
        assert told(model) == before
        assert model.inner[0] is layer


def test_values_are_restored_only_if_they_were_kept() -> None:
    model = Full()
    state = ModuleState(model)
    model.mean += 1
    state.restore()
    assert model.mean.tolist() == [1.0, 1.0]


def test_an_object_that_holds_itself_is_followed_once() -> None:
    model = Full()
    model.statistics.owner = model  # type: ignore[attr-defined]
    model.table["self"] = model.table  # type: ignore[assignment]
    assert ModuleState(model).changed() == ""
