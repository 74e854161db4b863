import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from fedbonsai.clusters.ray_backend.ray_cluster import Cluster, join, start_local
from fedbonsai.clusters.ray_backend.ray_launcher import DEFAULT_STORE_BYTES, store_bytes

from ...runtime.processes import descendants

pytestmark = pytest.mark.usefixtures("own_ray")

STORE_BYTES = 80 * 1024**2

# A Ray in another process, started by the code under test: prints its address and token, and ends when its input does.
OTHER = f"""
import sys
from fedbonsai.clusters.ray_backend.ray_cluster import start_local
with start_local(num_cpus=1, object_store_bytes={STORE_BYTES}) as cluster:
    print(cluster.address, cluster.token, flush=True)
    sys.stdin.read()
"""

# A Ray from start to end, with a worker that dies and an actor that is killed: nothing may be printed.
LIFE = f"""
import os
import ray
from fedbonsai.clusters.ray_backend.ray_cluster import start_local
with start_local(num_cpus=1, object_store_bytes={STORE_BYTES}):
    @ray.remote(max_retries=0)
    def die():
        os._exit(1)
    @ray.remote
    class Actor:
        def speak(self):
            print("from a worker")
            return 1
    actor = Actor.options(num_cpus=0).remote()
    ray.get(actor.speak.remote())
    ray.kill(actor)
    try:
        ray.get(die.remote())
    except ray.exceptions.WorkerCrashedError:
        print("seen")
"""


def listening(pids: set[int]) -> dict[str, int]:
    """TCP sockets on which any of ``pids`` listens: local address in /proc/net's hexadecimal, to the number of them."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found: dict[str, int] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address = fields[1].partition(":")[0]
                found[address] = found.get(address, 0) + 1
    return found


def environment() -> dict[str, str]:
    """The environment without pytest's own variable."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.fixture(scope="module")
def other() -> Iterator[tuple[str, str]]:
    """Address and token of a Ray that another process has started."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address, token = process.stdout.readline().split()
        yield address, token
        process.stdin.close()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def local(other: tuple[str, str]) -> Iterator[Cluster]:
    """A Ray of this process, beside the other one. None of its processes is left afterwards."""
    before, others = environment(), descendants(os.getpid())
    with start_local(num_cpus=2, object_store_bytes=STORE_BYTES, env_vars={"GREETING": "hello"}) as cluster:
        assert environment() == before
        ours = descendants(os.getpid()) - others
        yield cluster
    assert not ray.is_initialized()
    assert ours
    assert not ours & descendants(os.getpid())
    assert environment() == before


def test_two_rays_at_the_same_time_share_nothing(local: Cluster, other: tuple[str, str]) -> None:
    assert local.started
    assert local.address != other[0]
    assert local.token != other[1]
    assert ray.cluster_resources()["CPU"] == 2


def test_everything_listens_on_loopback_only(local: Cluster) -> None:
    pids = {os.getpid(), *descendants(os.getpid())}
    found = listening(pids)
    assert sum(found.values()) >= 3  # head, node, driver
    assert set(found) <= LOOPBACK


def test_workers_see_the_variables_they_were_given(local: Cluster) -> None:
    @ray.remote
    def variables() -> tuple[str | None, str | None]:
        return os.environ.get("GREETING"), os.environ.get("RAY_USAGE_STATS_ENABLED")

    assert ray.get(variables.remote()) == ("hello", "0")


def test_a_ray_that_is_initialised_already_is_used_and_left(local: Cluster) -> None:
    for again in (start_local(), join("127.0.0.1:1", runtime_env={"env_vars": {"A": "b"}})):
        assert (again.address, again.started) == (local.address, False)
        assert again.namespace != local.namespace
        again.close()
        assert ray.is_initialized()
    assert again.runtime_env == {"env_vars": {"A": "b"}}


def run_join(address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Join in a fresh process, with the environment's own token variables replaced by ``variables``."""
    code = f"""
import sys
import time
from fedbonsai.clusters.ray_backend.ray_cluster import join
from fedbonsai.clusters.user_modules import runtime_env_for
start = time.monotonic()
try:
    modules = ["their_model:make"] if "PYTHONPATH" in {list(variables)} else []
    with join({address!r}, runtime_env=runtime_env_for(modules, joined=True)) as cluster:
        import ray
        def make():
            import their_model
            return their_model.make()
        same = ray.get_runtime_context().namespace == cluster.namespace
        print("joined", ray.cluster_resources()["CPU"], cluster.started, same)
        if modules:
            print(ray.get(ray.remote(make).remote()))
except ValueError as error:
    print("refused", time.monotonic() - start < 10, error)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)


def test_joining_needs_the_token(other: tuple[str, str]) -> None:
    address, _ = other
    advice = "; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to that cluster's\n"
    wrong = run_join(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="d" * 64)
    assert wrong.stdout == f"refused True ray.address is '{address}', which refuses our token{advice}"
    none = run_join(address)
    assert none.stdout == f"refused True ray.address is '{address}', which refuses us without a token{advice}"
    assert wrong.stderr == none.stderr == ""


def test_a_joined_cluster_gets_the_users_modules_and_lives_on(other: tuple[str, str], tmp_path: Path) -> None:
    address, token = other
    (tmp_path / "their_model.py").write_text("import their_helper\ndef make(): return their_helper.SIZE\n")
    (tmp_path / "their_helper.py").write_text("SIZE = 42\n")
    first = run_join(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, PYTHONPATH=str(tmp_path))
    assert (first.stdout, first.stderr) == ("joined 1.0 False True\n42\n", "")
    second = run_join(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert (second.stdout, second.stderr) == ("joined 1.0 False True\n", "")


def test_nothing_reaches_the_terminal() -> None:
    process = subprocess.run([sys.executable, "-c", LIFE], capture_output=True, text=True, check=True)
    assert process.stdout == "seen\n"
    assert process.stderr == ""


@pytest.mark.parametrize("size", [1, 10**15])
def test_a_store_that_does_not_fit(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^ray.object_store_bytes is {size}; it must be at least 78643200"):
        store_bytes(size)


def test_a_store_is_chosen_that_fits() -> None:
    assert 75 * 1024**2 <= store_bytes(None) <= DEFAULT_STORE_BYTES
    assert store_bytes(100_000_000) == 100_000_000
