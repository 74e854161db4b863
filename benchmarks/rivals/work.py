"""The work that all contenders do: sealed images and weights, two networks, one device's epoch, and the lines that they write.

Needs torch alone, so that each environment can import it. The environment variable ``WORK`` holds the settings, ``STARTED`` the
time at which the process was started, and ``LINES`` the file to which a contender appends lines:

    {"round": 1, "at_s": 3.1, "clients": 10, "steps": 40}
    {"end": true, "losses": [2.31, ...], "norm": 158.2}

``at_s``: seconds since the start. ``clients``: results in the new model. ``losses``: of the first batch of each device in
round 1 (fedbonsai gives the mean of the epoch, which is the same where that is one batch). ``norm``: sum of squares of the
parameters at the end (None: nothing was aggregated).
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEARNING_RATE, MOMENTUM, CLASSES = 0.01, 0.9, 10
sgd = partial(torch.optim.SGD, momentum=MOMENTUM, fused=True)  # the fastest of torch's


@dataclass(frozen=True, kw_only=True)
class Work:
    """Settings of one run. ``mode``: a way in which this contender can run. ``workers``: devices that train at a time."""

    folder: str
    net: str
    rounds: int
    devices: int
    cohort: int
    batch: int
    workers: int
    mode: str = ""
    channels_last: bool = False
    bf16: bool = False

    def seal(self) -> str:
        """As the environment variable."""
        return json.dumps(asdict(self))

    @property
    def layout(self) -> torch.memory_format:
        """Of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def model(self) -> nn.Module:
        """The network with the sealed weights."""
        model = NETS[self.net]()
        model.load_state_dict(torch.load(Path(self.folder) / f"{self.net}.pt", weights_only=True))
        return model.to(memory_format=self.layout)

    def shard(self, device: int) -> tuple[Tensor, Tensor]:
        """Images ``[sample, channel, row, column]`` and labels of a device."""
        images, labels = sealed(self.folder)
        return images[device], labels[device]


def work() -> Work:
    """The settings of this process."""
    return Work(**json.loads(os.environ["WORK"]))


@lru_cache(maxsize=1)
def sealed(folder: str) -> tuple[Tensor, Tensor]:
    """Images ``[device, sample, channel, row, column]`` and labels ``[device, sample]``, mapped: processes share them."""
    found = torch.load(Path(folder) / "shards.pt", mmap=True, weights_only=True)
    return found["images"], found["labels"]


def train_device(model: nn.Module, device: int, *, work: Work, seed: int) -> tuple[int, float]:
    """One epoch of a device, from the weights that ``model`` has; optimiser steps, and loss of the first batch."""
    images, labels = work.shard(device)
    model.train()
    optimiser = sgd(model.parameters(), lr=LEARNING_RATE)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    losses = []
    for chosen in order.split(work.batch):
        inputs = images[chosen].contiguous(memory_format=work.layout)
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.bf16):
            loss = nn.functional.cross_entropy(model(inputs), labels[chosen])
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return len(losses), losses[0]


def write_round(number: int, *, clients: int, steps: int) -> None:
    """A round is over."""
    _append({"round": number, "at_s": time.time() - float(os.environ["STARTED"]), "clients": clients, "steps": steps})


def write_end(losses: list[float], model: nn.Module | None) -> None:
    """The run is over. ``model``: the global one, if there is one."""
    norm = None if model is None else sum(float(p.detach().double().square().sum()) for p in model.parameters())
    _append({"end": True, "losses": losses, "norm": norm})


def _append(line: dict[str, Any]) -> None:
    with open(os.environ["LINES"], "a") as file:
        file.write(json.dumps(line) + "\n")


class ConvNet(nn.Module):
    """Convolutions, then a classifier on the flattened map; tensors have the names that fedbonsai gives them."""

    def __init__(self, features: list[nn.Module], classifier: list[nn.Module]) -> None:
        super().__init__()
        self.features, self.classifier = nn.Sequential(*features), nn.Sequential(*classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.classifier(self.features(x).flatten(1))


def small() -> nn.Module:
    """Two 5x5 convolutions with pooling, 512 units; 2,156,490 parameters."""
    features = [nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return ConvNet(features, [nn.Linear(4096, 512), nn.ReLU(), nn.Linear(512, CLASSES)])


def resfed_cnn() -> nn.Module:
    """Five 3x3 convolutions, batch normalisation, one linear layer; 1,020,160 parameters."""
    features: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()]
    channels = 32
    for width, pooled in ((64, True), (128, False), (256, True), (256, True)):
        features += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        features += [nn.MaxPool2d(2)] if pooled else []
        channels = width
    return ConvNet(features, [nn.Linear(4096, CLASSES, bias=False)])


NETS = {"small": small, "resfed_cnn": resfed_cnn}
