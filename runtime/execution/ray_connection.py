"""The connection of this process to Ray, which one run at a time has; a local Ray starts while other modules are imported.

Imports neither Ray nor torch.
"""

import os
import sys
import threading

from ...clusters.allocator import HUGE_PAGES
from ...clusters.ray_backend.local_ray import LocalRay
from ...clusters.user_modules import runtime_env_for
from ...policies.policy import Policy
from ..configuration.config import Config
from ..configuration.user_modules import named_modules

_connected = threading.Lock()  # held by the run that has connected this process to Ray, or is about to


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Connection:
    """The right of one run to connect this process to Ray. ``local``: the local Ray that is starting for it, if any."""

    def __init__(self, config: Config, policy: Policy) -> None:
        """Acquire the right. If the caller has connected this process before, the run uses that connection instead.

        Raises ``ValueError`` if another run of this process has it.
        """
        self.local: LocalRay | None = None
        ray = sys.modules.get("ray")
        self._holds_lock = False
        if ray is not None and ray.is_initialized() and not _connected.locked():
            return
        if not _connected.acquire(blocking=False):
            raise ValueError(
                "backend is 'ray', and another run of this process is on Ray, to which one at a time can connect; allowed: one "
                "after the other, a process for each, or a Ray to which the process is connected before (ray.init)"
            )
        self._holds_lock = True
        try:
            if config.ray.address is None:
                self.local = _start_local(config, policy)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the right, and end the local Ray."""
        if self.local is not None:
            self.local.close()
        if self._holds_lock:
            self._holds_lock = False
            _connected.release()


def _start_local(config: Config, policy: Policy) -> LocalRay:
    options = config.ray
    runtime_env = runtime_env_for(named_modules(config, policy), joined=False)
    return LocalRay(
        num_cpus=cores(),
        num_gpus=0,
        object_store_bytes=options.object_store_bytes,
        preallocate=options.preallocate,
        dashboard=options.dashboard,
        env_vars=({} if "GLIBC_TUNABLES" in os.environ else HUGE_PAGES) | runtime_env.get("env_vars", {}),
    )
