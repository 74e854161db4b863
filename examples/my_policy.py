"""A policy of your own: prefer devices with the fewest plans so far, and among these the faster ones.

Save it as my_policy.py in the folder in which you start the run, and name it in the experiment's YAML:

    policy: [{name: "my_policy:LeastSeen", cohort: 4}]

or pass it from Python: ``fedbonsai.run(config, policy=LeastSeen(cohort=4))``.
"""

from dataclasses import dataclass

from fedbonsai.policies import Candidates, Decision, State, View


@dataclass(frozen=True)  # the fields are the configuration: they are checked, printed and saved with the run
class LeastSeen:
    """Selects the ``cohort`` devices with the fewest plans so far; ties are resolved by estimated time."""

    cohort: int

    def init(self) -> State:
        """No state: the view counts participation. A state would consist of plain numbers, lists and dicts."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Called at the start, after every version and after every outcome; acts only at the start of a round."""
        if view.dispatched:
            return decision, state
        pool = Candidates(view, decision)  # idle devices; ``pick`` skips those without enough memory
        order = sorted(pool.devices, key=lambda d: (view.participation.get(d, 0), pool.estimate(d).seconds))
        picked = pool.pick(order, self.cohort)
        return pool.decision(picked, lambda d: f"least seen: {view.participation.get(d, 0)} plans so far"), state
