"""torchvision can be imported with a torch that it was not built for, and a working one is not changed."""

import subprocess
import sys

# Each in a new process, since declarations cannot be undone. Warnings are errors there too.
TWICE = """
from fedbonsai.learning.compat import declare_missing_operators, import_torchvision
declare_missing_operators()
first = import_torchvision()
assert import_torchvision() is first
import torch
assert hasattr(torch.ops.torchvision, "nms") and hasattr(torch.ops.torchvision, "qnms")
assert first.models.resnet18(num_classes=2).fc.out_features == 2
import torchvision.datasets, torchvision.transforms.v2
print("fine")
"""
# A working extension declares the operators and their kernels when it is loaded.
HEALTHY = """
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl(name, lambda dets, scores, iou_threshold: scores + 1, "CPU")
from fedbonsai.learning.compat import import_torchvision
import_torchvision()
assert torch.ops.torchvision.nms(torch.zeros(1, 4), torch.tensor([2.0]), 0.5).item() == 3.0
print("fine")
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_idempotent_and_declares_what_is_missing():
    assert run(TWICE) == "fine\n"


def test_healthy_operators_keep_their_kernels():
    assert run(HEALTHY) == "fine\n"
