"""The slow imports of a command: torch takes seconds, its compiler and Ray as long again; each only where it is used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SLOW = ("torch", "ray", "torchvision", "torch._dynamo", "sympy")
COMMAND = """
import json, sys
from fedbonsai.runtime.cli.main import main
slow = json.loads(sys.argv.pop(1))
try:
    main()
except SystemExit as end:
    print()
    print(json.dumps([end.code, [name for name in slow if name in sys.modules]]))
"""
LOSS = """
import sys
from pathlib import Path
import torch

def loss(output, target):
    Path(__file__).with_name("of_a_worker").write_text(" ".join(sys.modules))
    return torch.nn.functional.cross_entropy(output, target)
"""


def imported_by(*arguments, folder):
    """The exit code of a command in a new process, and the slow modules that it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, json.dumps(SLOW), *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["presets"], 0),
        (["run", EXAMPLES / "digits.yaml", "--set", "training.batch_size=0"], 2),
        (["run", EXAMPLES / "digits.yaml", "--set", "fleet=none"], 2),
        (["run", "missing.yaml"], 2),
    ],
)
def test_commands_without_a_model_import_no_torch(arguments, code, tmp_path):
    assert imported_by(*arguments, folder=tmp_path) == [code, []]


def test_help_imports_neither(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fedbonsai", "--help"], capture_output=True, text=True, check=True
    )
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fedbonsai.runtime.cli.main" in names
    assert not names.intersection(SLOW)


def test_a_run_in_process_imports_neither_ray_nor_torchs_compiler(tmp_path):
    run = ["run", EXAMPLES / "digits.yaml", "--backend", "inline", "--set", "stop.rounds=1"]
    assert imported_by(*run, folder=tmp_path) == [0, ["torch"]]


@pytest.mark.usefixtures("own_ray")
def test_the_driver_of_a_run_on_ray_imports_no_torch_and_workers_not_its_compiler(tmp_path):
    (tmp_path / "noted.py").write_text(LOSS)
    config = tmp_path / "digits.yaml"
    config.write_text((EXAMPLES / "digits.yaml").read_text())
    run = ["run", config, "--workers", "1", "--set", "stop.rounds=1", "--set", "training.loss=noted:loss"]
    assert imported_by(*run, folder=tmp_path) == [0, ["ray"]]
    assert not {"torch._dynamo", "sympy"}.intersection((tmp_path / "of_a_worker").read_text().split())
