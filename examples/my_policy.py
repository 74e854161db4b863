"""A policy of your own: prefer devices that have taken part least, and of those the faster ones.

Save it as my_policy.py where you start the run, and name it in the experiment's YAML:

    policy: [{name: "my_policy:LeastSeen", cohort: 4}]

or pass it from Python: ``fedbonsai.run(config, policy=LeastSeen(cohort=4))``.
"""

from dataclasses import dataclass

from fedbonsai.policies import Candidates, Decision, State, View


@dataclass(frozen=True)  # the fields are the configuration: they are checked, printed and saved with the run
class LeastSeen:
    """The ``cohort`` devices with the fewest plans so far; of equal ones, the fastest."""

    cohort: int

    def init(self) -> State:
        """No state: the view has the number of plans of each device. A state would be plain numbers, lists and dicts."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Choose at the start of a round only; it is called after every outcome."""
        if view.dispatched:
            return decision, state
        pool = Candidates(view, decision)  # idle devices; those without enough memory are skipped when picking
        order = sorted(pool.devices, key=lambda d: (view.participation.get(d, 0), pool.estimate(d).seconds))
        picked = pool.pick(order, self.cohort)
        return pool.decision(picked, lambda d: f"least seen: {view.participation.get(d, 0)} plans so far"), state
