"""The ledger against the counters of a network interface: a real device in a network namespace of its own, on a real Ray.

    namespace of the head: Ray's head, the run, the server ── veth ── namespace of the device: a Ray node with its label

All that passes between the two is on this link: packets, plans and reports, which the ledger counts, and TCP, Ray's calls and
heartbeats, which it does not. Packets of 20 MB leave little room for the latter.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from .processes import command

pytestmark = pytest.mark.usefixtures("own_ray")

HEAD, DEVICE, PORT = "10.77.0.1", "10.77.0.2", 6379
OVERHEAD = 1.06  # headers of a TCP connection without offloading are 66 bytes for every 1448
PARAMETERS, ROUNDS = 65_536 * 75 + 10, 6
MODULE = """
from dataclasses import dataclass

from fedbonsai.comms.codec import CodecSpec
from fedbonsai.comms.links.predict import Residual
from fedbonsai.policies.decision import Decision
from msgspec.structs import replace
from torch import nn


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 65_536), nn.ReLU(), nn.Linear(65_536, 10))


@dataclass(frozen=True)
class Lossless:
    '''Residuals of bit patterns in both directions, with another codec from version 4 on, which takes a dense model.'''

    def init(self):
        return None

    def decide(self, view, state, decision):
        if view.dispatched:
            return decision, state
        plan = replace(
            view.new_plan(0),
            link_down=Residual(rule="stationary", arithmetic="bits"),
            link_up=Residual(rule="drift", arithmetic="bits"),
            codec_down=(CodecSpec("lz4"),) if view.version >= 4 else (),
        )
        return Decision(plans=(plan,)), state
"""
RUN = """
import json
import sys
from pathlib import Path

import fedbonsai

interface = Path("/sys/class/net") / sys.argv[1] / "statistics"


def counters():
    return {"down": int((interface / "tx_bytes").read_text()), "up": int((interface / "rx_bytes").read_text())}


before = counters()
run = fedbonsai.run(json.loads(sys.argv[2]))
list(run)
passed = {direction: count - before[direction] for direction, count in counters().items()}
print(json.dumps({"passed": passed} | run.summary), flush=True)
"""
BOARD = {
    "name": "board",
    "label_selector": {"board": "rpi4"},
    "flop_per_s": 1e9,
    "memory_bytes": 10**9,
    "up_bytes_per_s": 10**7,
    "down_bytes_per_s": 10**7,
}
CONFIG = {
    "backend": "ray",
    "ray": {"address": f"{HEAD}:{PORT}"},
    "clock": "wall",
    "model": "wired:make",
    "policy": ["wired:Lossless"],
    "fleet": {"classes": [BOARD]},
    "data": {"name": "synthetic", "kwargs": {"shape": [1, 8, 8], "samples_per_device": 4, "test_samples": 2}},
    "training": {"batch_size": 4},
    "evaluation": {"where": "none"},
    "stop": {"rounds": ROUNDS},
}


def ip(words):
    return subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)


@pytest.fixture(name="namespaces")
def namespaces_fixture():
    """Two network namespaces joined by a link, the head's and the device's. Each end of the link is named as its namespace."""
    if shutil.which("ip") is None:
        pytest.skip("the command ip, which makes network namespaces, is not there")
    head, device = f"fb{os.getpid()}h", f"fb{os.getpid()}d"
    steps = [f"netns add {head}", f"netns add {device}"]
    steps += [f"link add {head} netns {head} type veth peer name {device} netns {device}"]
    for name, address in ((head, HEAD), (device, DEVICE)):
        steps += [f"-n {name} address add {address}/24 dev {name}"]
        steps += [f"-n {name} link set {link} up" for link in (name, "lo")]
    try:
        for step in steps:
            if (done := ip(step)).returncode:
                pytest.skip(f"this process may not make network namespaces: ip {step}: {done.stderr.strip()}")
        yield head, device
    finally:
        for name in (head, device):
            ip(f"netns delete {name}")


@pytest.fixture(name="start")
def start_fixture(tmp_path):
    """``start(namespace, program, ...)``: a process in a network namespace, ended with its descendants when the test ends."""
    (tmp_path / "wired.py").write_text(MODULE)
    folder = tempfile.mkdtemp(prefix="fb")  # short: paths of sockets have at most 107 characters
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "c" * 64,
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as running:

        def start(namespace, *arguments):
            inside = ["ip", "netns", "exec", namespace, *arguments]
            return running.enter_context(command(inside, env=environment, cwd=tmp_path))

        yield start
    shutil.rmtree(folder, ignore_errors=True)


def test_the_ledger_of_residuals_with_a_real_device_is_what_its_network_interface_counts(namespaces, start):
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--object-store-memory=400000000"]
    on_head = ["--head", f"--port={PORT}", f"--node-ip-address={HEAD}", "--num-cpus=2", "--include-dashboard=false"]
    on_device = [f"--address={HEAD}:{PORT}", f"--node-ip-address={DEVICE}", "--num-cpus=1", "--labels=board=rpi4"]
    head, device = namespaces
    started = any("Ray runtime started" in line for line in start(head, *ray, *on_head).stdout)
    assert started
    start(device, *ray, *on_device)
    run = start(head, sys.executable, "-c", RUN, head, json.dumps(CONFIG))
    output, errors = run.communicate()
    assert run.returncode == 0, errors
    summary = json.loads(output)
    assert summary["outcomes"]["done"] == ROUNDS
    # A model that both ends make from the seed, three residuals as large as it, a dense model, and a coded residual.
    kinds, dense = summary["down_by_kind"], 4 * PARAMETERS
    assert (kinds["agreed"], kinds["resync"]) == (64, 64 + dense)
    assert kinds["weights"] > 3 * dense
    assert summary["up_by_kind"]["weights"] > ROUNDS * dense
    for direction, passed in summary["passed"].items():
        assert summary[f"{direction}_bytes"] <= passed <= OVERHEAD * summary[f"{direction}_bytes"], direction
