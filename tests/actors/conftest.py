"""A user's module on the import path: small models whose tensors are of every role, losses that fail, and data by hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

MODULE = """
import torch
from torch import nn
from fedbonsai.learning.data.types import SamplePool, Samples

class Remembering(nn.Module):
    '''A constant index, and a memory outside the state: it must not outlive the plan.'''

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.arange(63, -1, -1))
        self.register_buffer("calls", torch.ones(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x[:, self.order] / self.calls

class Everything(nn.Module):
    '''Two blocks with weights, vectors, statistics, counters, buffers of all kinds, and dropout.'''

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(64, num_classes)
        self.memory = Remembering()

    def forward(self, x):
        x = self.drop(self.norm(self.conv(x)).relu()).flatten(1)
        return self.out(self.memory(x))

class Small(nn.Module):
    '''Four channels that can be removed.'''

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.out(torch.flatten(torch.relu(self.norm(self.conv(x))), 1))

class Four(nn.Module):
    '''Blocks a, b, c and out; a and b have running statistics.'''

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.nb = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.c, self.out = nn.Conv2d(4, 6, 2, stride=2), nn.Linear(24, num_classes)

    def forward(self, x):
        x = self.nb(self.b(self.na(self.a(x)).relu())).relu()
        return self.out(self.c(x).relu().flatten(1))

class Tied(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x.flatten(1)[:, :4]).tanh())

class Scaled(nn.Module):
    '''A parameter without dimensions.'''

    def __init__(self, num_classes):
        super().__init__()
        self.out = nn.Linear(16, num_classes)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.out(x.flatten(1)) * self.scale

class Line(nn.Module):
    '''One weight: y = w x.'''

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 1))

    def forward(self, x):
        return x @ self.w

class HalfLine(Line):
    '''The same in float16.'''

    def __init__(self):
        super().__init__()
        self.half()

class HalfLayers(nn.Sequential):
    '''y = w2 w1 x in float16, from zeros.'''

    def __init__(self):
        super().__init__(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        for parameter in self.half().parameters():
            nn.init.zeros_(parameter)

class Masked(Line):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

def points(*, num_devices, seed, root):
    '''Device 0 has one sample, y = 2 x at x = 1; device 1 has three, y = -1 x at x = 1; two test samples, y = 0.'''
    ys = torch.tensor([[2.0], [-1.0], [-1.0], [-1.0]])
    train = Samples(torch.ones(4, 1), ys)
    import numpy as np
    return SamplePool(train=train, test=Samples(torch.ones(2, 1), torch.zeros(2, 1)), owners=np.array([0, 1, 1, 1]))

def half_square(output, target):
    return (output - target).square().mean() / 2

def failing(output, target):
    raise ValueError("this loss has no value")

def hungry(output, target):
    raise MemoryError("no more")

def enormous(output, target):
    return (torch.empty(1 << 50) * output.sum()).sum()

def large(output, target):
    '''50 MB inside a loss, which a prediction does not see.'''
    import numpy as np
    return half_square(output, target) + 0 * float(np.ones(50_000_000, np.uint8)[0])

def without_ray(output, target):
    import sys
    assert "fedbonsai.actors.enforcement.child" in sys.modules
    assert "ray" not in sys.modules
    print("what user code prints")
    return half_square(output, target)

def deadly(output, target):
    '''Ends its process: always, or only the first time if $MY_FLAG names a file.'''
    import os, signal
    from pathlib import Path
    flag = os.environ.get("MY_FLAG")
    if flag is None or not Path(flag).exists():
        if flag is not None:
            Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return half_square(output, target)

def endless(output, target):
    import time
    while True:
        time.sleep(60)

def no_points(*, num_devices, seed, root):
    raise ValueError("these points do not exist")

def rigid(output, target):
    raise Rigid("cannot be written on")

class Rigid(Exception):
    def __setattr__(self, name, value):
        if not name.startswith("__"):
            raise AttributeError(name)
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in workers. (Threads that compete with other processes for a core spin, and make small models ten times slower.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def my_module(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder: Path = tmp_path_factory.mktemp("mine")
    (folder / "my_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
