"""A local Ray ends with the process that started it, and reports in one sentence why it has not started."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray
from fedbonsai.clusters.ray_backend.local_ray import LocalRay
from fedbonsai.clusters.ray_backend.ray_cluster import start_local

from ...runtime.processes import alive, descendants, wait_until

pytestmark = pytest.mark.usefixtures("own_ray")

STORE_BYTES = 80 * 1024**2

DRIVER = f"""
import subprocess
import sys
import ray
from fedbonsai.clusters.ray_backend.ray_cluster import start_local
from fedbonsai.clusters.scratch import Scratch
with start_local(num_cpus=1, object_store_bytes={STORE_BYTES}):
    @ray.remote
    class Actor:
        def begin(self):
            self.child = subprocess.Popen(["sleep", "1000"])
            self.folder = Scratch().folder("replay")
            return str(self.folder.path)
    actor = Actor.remote()
    print(ray._private.worker._global_node.get_session_dir_path(), ray.get(actor.begin.remote()), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def before():
    """Child processes before the test; those that the test leaves are ended."""
    found = descendants(os.getpid())
    yield found
    for pid in descendants(os.getpid()) - found:
        os.kill(pid, signal.SIGKILL)


def sessions():
    """Session folders of Rays that child processes have started."""
    return {path for path in Path("/tmp/ray").glob("session_*") if not path.is_symlink()}


def kill_gcs(before):
    """Kill the ``gcs_server`` of the Ray that starts, as soon as it exists."""

    found = []

    def is_there():
        found[:] = [pid for pid in descendants(os.getpid()) - before if "gcs_server" in command(pid)[0]]
        return found

    wait_until(is_there)
    os.kill(found[0], signal.SIGKILL)


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]


def test_a_ray_that_does_not_start_in_time_is_one_sentence_and_leaves_nothing(before):
    local = LocalRay(num_cpus=1, object_store_bytes=STORE_BYTES, start_s=0.01)
    launcher = local._process.pid
    with pytest.raises(RuntimeError, match=r"^a local Ray could not be started: it has not started within 0\.01 s$"):
        local.address()
    assert descendants(os.getpid()) == before
    assert not [path for path in sessions() if path.name.endswith(f"_{launcher}")]


def test_a_ray_that_loses_a_process_while_it_starts_is_one_sentence_and_leaves_nothing(before):
    killer = threading.Thread(target=kill_gcs, args=[before])
    killer.start()
    with pytest.raises(
        RuntimeError, match=r"^a local Ray could not be started: its gcs_server has ended \(exit code -9\)$"
    ):
        start_local(num_cpus=1, object_store_bytes=STORE_BYTES)
    killer.join()
    assert not ray.is_initialized()
    assert descendants(os.getpid()) == before


def test_a_ray_without_a_dashboard_that_loses_a_process_later_reports_it(before):
    with start_local(num_cpus=1, object_store_bytes=STORE_BYTES) as cluster:
        assert cluster.ended() == ""
        commands = [" ".join(command(pid)) for pid in descendants(os.getpid()) - before]
        assert any("raylet" in each for each in commands)
        assert not any("dashboard/dashboard.py" in each for each in commands)  # it would take a second to start
        kill_gcs(before)
        wait_until(cluster.ended)
        assert cluster.ended() == "its gcs_server has ended (exit code -9)"
    assert descendants(os.getpid()) == before


def test_everything_that_a_killed_driver_has_started_ends(before):
    process = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        session, folder = map(Path, process.stdout.readline().split())
        started = descendants(process.pid)
        assert len(started) >= 6
        assert folder.exists()
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: not any(map(alive, started)), told="what the driver has started has not ended")
    assert not session.exists()
    assert not folder.exists()


def test_a_setting_that_is_refused_is_a_value_error(before):
    with pytest.raises(ValueError, match=r"^ray\.object_store_bytes is 1; it must be at least 78643200"):
        start_local(object_store_bytes=1)
    assert descendants(os.getpid()) == before
