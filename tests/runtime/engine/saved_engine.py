"""An engine after its first version, and what is found wrong with a state that was saved of it."""

from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.policy_checks import configured_policy
from fedbonsai.runtime.engine.engine import Engine
from fedbonsai.runtime.engine.saved_loop import state_problem
from fedbonsai.runtime.events import VersionClosed

from ..resuming import BASE


def after_a_version(**changes):
    """The engine of ``BASE`` with these changes, after the first version."""
    config = load_config(BASE | changes)
    engine = Engine(config, configured_policy(config))
    for event in engine.events():
        if isinstance(event, VersionClosed):
            return engine
    raise AssertionError("no version has closed")


def problem_of(engine, saved):
    """The sentence on a saved state of the loop; "" if it fits the engine's experiment."""
    return state_problem(
        saved,
        model=engine.server.store["model"],
        workload=engine.workload,
        profiles=engine._fleet.profiles(),
        hosts=engine.num_hosts,
    )
