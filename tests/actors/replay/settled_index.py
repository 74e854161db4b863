"""A replay index that returns its settlements, for tests."""

from fedbonsai.actors.plan_listener import PlanResult
from fedbonsai.actors.replay.replay_index import ReplayIndex


class SettledIndex(ReplayIndex):
    def __init__(self, settings, *, num_hosts):
        self._settled = []
        super().__init__(settings, num_hosts=num_hosts, settle=self._settled.append)

    def end(self, plan, lengths, *, version, sound):
        """The plan's result arrives; the settlement, or None."""
        self.arrived(PlanResult(plan, tuple(lengths), sound=sound, version=version))
        return self._settled.pop() if self._settled else None
