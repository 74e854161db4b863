"""A pool around the in-process one, for tests that look at what passes through it, or change it."""

from dataclasses import dataclass

from fedbonsai.actors.inline_pool import InlinePool


@dataclass
class WrappedPool:
    """Passes everything on; for runs under the virtual clock, which asks for results by plan."""

    inner: InlinePool
    num_workers = 1

    def settle(self, settlement):
        self.inner.settle(settlement)

    def submit(self, task):
        return self.inner.submit(task)

    def result(self, plan_id):
        return self.inner.result(plan_id)

    def next(self, timeout_s):
        raise AssertionError("the virtual clock fetches results by plan")

    def cancel(self, plan_id):
        self.inner.cancel(plan_id)

    def notices(self):
        return []

    def ready(self):
        pass

    def time_steps(self, plans):
        return self.inner.time_steps(plans)

    def unreachable(self):
        return frozenset()

    def take_lost_devices(self):
        return []

    def close(self):
        self.inner.close()
