"""The connection of this process to Ray, for one run at a time; and a local Ray that starts while the rest is imported.

Imports neither Ray nor torch.
"""

import os
import sys
import threading

from ...actors.ray_backend.allocator import HUGE_PAGES
from ...clusters.ray_backend.local_ray import LocalRay
from ...clusters.user_modules import runtime_env_for
from ...policies.policy import Policy
from ..configuration.config import Config
from ..configuration.user_modules import named_modules

_taken = threading.Lock()  # by a run that has connected this process to Ray, or is about to


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Connection:
    """The right to connect this process to Ray. ``local``: the Ray that has begun to start for it, if it is a local one."""

    def __init__(self, config: Config, policy: Policy) -> None:
        """Take it. Nothing is taken where the caller has connected this process: the run uses that connection.

        Raises ``ValueError`` where another run of this process has it.
        """
        self.local: LocalRay | None = None
        ray = sys.modules.get("ray")
        self._has = not (ray is not None and ray.is_initialized() and not _taken.locked())
        if not self._has:
            return
        if not _taken.acquire(blocking=False):
            raise ValueError(
                "backend is 'ray', and another run of this process is on Ray, to which one at a time can connect; allowed: one "
                "after the other, a process for each, or a Ray to which the process is connected before (ray.init)"
            )
        try:
            if config.ray.address is None:
                self.local = _start_local(config, policy)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give it back; a local Ray is ended."""
        if self.local is not None:
            self.local.close()
        if self._has:
            self._has = False
            _taken.release()


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
