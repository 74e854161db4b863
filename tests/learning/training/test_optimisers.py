import math

import pytest
import torch
from fedbonsai.learning.spec import Optimiser, ServerOptimiser
from fedbonsai.learning.training.optimisers import LocalOptimiser, server_step
from torch import Tensor, nn


def steps(
    settings: ServerOptimiser, means: list[float], *, start: float = 1.0
) -> tuple[list[float], dict[str, Tensor]]:
    """The scalar after each step, and the final state. Everything in float64, to compare with values computed by hand."""
    value, state, found = torch.tensor([start], dtype=torch.float64), {}, []
    for mean in means:
        value = server_step(
            settings, name="w", value=value, mean=torch.tensor([mean], dtype=torch.float64), state=state
        )
        found.append(value.item())
    return found, state


def test_mean_with_rate_one_is_fedavg() -> None:
    found, state = steps(ServerOptimiser(), [0.5, -0.25])
    assert found == [1.5, 1.25]
    assert state == {}
    assert steps(ServerOptimiser(learning_rate=0.5), [0.5])[0] == [1.25]


def test_momentum_by_hand() -> None:
    # m = 1, then 0.5 * 1 + 2 = 2.5, then 1.25
    found, state = steps(ServerOptimiser(name="momentum", momentum=0.5, learning_rate=2.0), [1, 2, 0], start=0)
    assert found == [2.0, 7.0, 9.5]
    assert state["m/w"].tolist() == [1.25]
    assert state.keys() == {"m/w"}


def test_adam_by_hand() -> None:
    settings = ServerOptimiser(name="adam", momentum=0.5, beta2=0.75, tau=0.1, learning_rate=2.0)
    found, state = steps(settings, [4.0, 2.0], start=0)
    m1, v1 = 0.5 * 4, 0.75 * 0.01 + 0.25 * 16
    x1 = 2 * m1 / (math.sqrt(v1) + 0.1)
    m2, v2 = 0.5 * m1 + 0.5 * 2, 0.75 * v1 + 0.25 * 4
    assert found == pytest.approx([x1, x1 + 2 * m2 / (math.sqrt(v2) + 0.1)], rel=1e-12)
    assert (state["m/w"].item(), state["v/w"].item()) == pytest.approx((m2, v2), rel=1e-12)


def test_yogi_by_hand() -> None:
    settings = ServerOptimiser(name="yogi", momentum=0.5, beta2=0.75, tau=0.1)
    found, state = steps(settings, [4.0, 1.0], start=0)
    m1, v1 = 2.0, 0.01 + 0.25 * 16  # v grows towards 16
    m2, v2 = 0.5 * m1 + 0.5, v1 - 0.25 * 1  # v shrinks towards 1
    x1 = m1 / (math.sqrt(v1) + 0.1)
    assert found == pytest.approx([x1, x1 + m2 / (math.sqrt(v2) + 0.1)], rel=1e-12)
    assert state["v/w"].item() == pytest.approx(v2, rel=1e-12)


@pytest.mark.parametrize("name", ["mean", "momentum", "adam", "yogi"])
def test_slots_are_what_a_step_leaves_behind(name: str) -> None:
    settings = ServerOptimiser(name=name)
    assert len(steps(settings, [1.0, 2.0])[1]) == settings.slots


def test_each_tensor_has_its_own_state() -> None:
    state: dict[str, Tensor] = {}
    for name, mean in (("a", 1.0), ("b", 5.0)):
        value = torch.zeros(1)
        server_step(ServerOptimiser(name="momentum"), name=name, value=value, mean=torch.tensor([mean]), state=state)
    assert {name: slot.item() for name, slot in state.items()} == {"m/a": 1.0, "m/b": 5.0}


def test_a_server_momentum_of_one_would_never_forget() -> None:
    with pytest.raises(ValueError, match=r"server.optimiser.momentum is 1\.0; it must be below 1"):
        ServerOptimiser(name="yogi", momentum=1.0)
    assert ServerOptimiser(name="mean", momentum=1.0).slots == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # gradient 2, weight 10, two steps
        (Optimiser(learning_rate=0.5, momentum=0), [9.0, 8.0]),
        (Optimiser(learning_rate=0.5, momentum=0.5), [9.0, 7.5]),
        (Optimiser(learning_rate=0.5, momentum=0.5, nesterov=True), [8.5, 6.75]),
        (Optimiser(learning_rate=0.5, momentum=0, weight_decay=0.1), [8.5, 7.075]),
        (Optimiser(name="adam", learning_rate=0.5), [9.5, 9.0]),
        (Optimiser(name="adamw", learning_rate=0.5, weight_decay=0.1), [9.0, 8.05]),
    ],
    ids=["sgd", "momentum", "nesterov", "decay", "adam", "adamw"],
)
def test_local_optimisers_by_hand(settings: Optimiser, expected: list[float]) -> None:
    weight = nn.Parameter(torch.tensor([10.0]))
    optimiser, found = LocalOptimiser(settings, [weight]), []
    for _ in expected:
        weight.grad = torch.tensor([2.0])
        optimiser.step()
        found.append(weight.item())
    assert found == pytest.approx(expected, rel=1e-5)


def torchs(settings: Optimiser, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.name == "sgd":
        momentum, nesterov = settings.momentum, settings.nesterov
        return torch.optim.SGD(parameters, rate, momentum, weight_decay=decay, nesterov=nesterov, fused=True)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(parameters, rate, settings.betas, settings.epsilon, decay, fused=True)


@pytest.mark.parametrize(
    "settings",
    [
        Optimiser(momentum=0.0),
        Optimiser(momentum=0.9, weight_decay=5e-4),
        Optimiser(momentum=0.9, nesterov=True),
        Optimiser(name="adam", learning_rate=0.01, weight_decay=0.1),
        Optimiser(name="adamw", learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.99)),
    ],
    ids=str,
)
def test_steps_are_those_of_torchs_fused_optimisers_bit_for_bit(settings: Optimiser) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    kinds = [((300, 7), torch.float32), ((5,), torch.float32), ((40, 3), torch.float64), ((), torch.float32)]
    ours = [nn.Parameter(drawn(*kind)) for kind in kinds]
    theirs = [nn.Parameter(each.detach().clone()) for each in ours]
    local, other = LocalOptimiser(settings, ours), torchs(settings, theirs)
    for step in range(4):
        for mine, its, kind in zip(ours, theirs, kinds, strict=True):
            mine.grad = drawn(*kind)
            its.grad = mine.grad.clone()
        if settings.name != "sgd" and step == 2:  # a branch of the model without gradient (torch's SGD fails on it)
            ours[1].grad = theirs[1].grad = None
        local.step()
        other.step()
        assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True)), step
    local.learning_rate = 0.0
    before = [each.detach().clone() for each in ours]
    local.step()
    assert settings.weight_decay or all(torch.equal(*pair) for pair in zip(ours, before, strict=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nesterov": True, "momentum": 0.0}, "nesterov is true; it needs the name sgd and a momentum above 0"),
        ({"nesterov": True, "name": "adam"}, "nesterov is true"),
        ({"betas": (0.9, 1.0)}, r"betas is \[0\.9, 1\.0\]; both must be below 1"),
    ],
)
def test_local_settings_that_torch_would_refuse_on_every_device(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Optimiser(**fields)


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
def test_the_state_of_a_float16_parameter_is_float32(name: str) -> None:
    state: dict[str, Tensor] = {}
    value = torch.ones(2, dtype=torch.float16)
    server_step(ServerOptimiser(name=name), name="w", value=value, mean=torch.ones(2), state=state)
    assert {slot.dtype for slot in state.values()} == {torch.float32}
