"""Resuming on Ray: a run that began in process goes on there to the same bits, also if the server's actor dies."""

import os
import signal

import fedbonsai
import pytest
from fedbonsai.runtime.errors import RunError
from fedbonsai.runtime.events import Notice, VersionClosed

from .processes import actor_pids
from .resuming import BASE, METHODS, facts, started, told, uninterrupted


def on_ray(config, *, kills_in=None, **how):
    """A run with two workers whose server is killed when a version has closed; its summary and notices."""
    run = fedbonsai.run(config, backend="ray", workers=2, **how)
    notices = []
    for event in run:
        notices += [event.text] if isinstance(event, Notice) else []
        if isinstance(event, VersionClosed) and event.version == kills_in:
            kills_in = None
            (server,) = actor_pids("ServerActor")
            os.kill(server, signal.SIGKILL)
    return run.summary, notices


@pytest.mark.usefixtures("own_ray")  # the server that takes over starts another Ray
def test_with_plans_in_flight_it_goes_on_there_and_with_another_server(tmp_path):
    config = BASE | METHODS["fedbuff"]
    expected = uninterrupted(config, tmp_path / "whole")
    started(config, tmp_path / "run")
    summary, notices = on_ray(config, resume=tmp_path / "run", kills_in=5)
    assert told(summary) == told(expected)
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    assert notices[0] == "the run goes on after version 2, from its checkpoint"
    died, went_on = notices[-2:]
    assert died.startswith("the server actor died: ")
    assert died.endswith("; it is replaced")
    assert went_on == "the run goes on after version 4, from its checkpoint"


@pytest.mark.usefixtures("cluster")
def test_views_are_put_back_into_the_hosts(tmp_path):
    config = BASE | METHODS["ecofed"]
    expected = uninterrupted(config, tmp_path / "whole")
    started(config, tmp_path / "run", stops=4)
    summary, _ = on_ray(config, resume=tmp_path / "run")
    assert told(summary) == told(expected)
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


@pytest.mark.usefixtures("cluster")
def test_without_checkpoints_the_server_s_death_is_the_end(tmp_path):
    with pytest.raises(
        RunError, match=r"^stage server: the server actor died: .*; there is no checkpoint to go on from$"
    ):
        on_ray(BASE | {"checkpoint": {"every": None}}, kills_in=1, out=tmp_path / "run")
    assert "VersionClosed" in {event["type"] for event in facts(tmp_path / "run")}  # the log is left as it was
