"""One run of a process at a time is connected to a Ray of its own."""

import os

import fedbonsai
import pytest
from fedbonsai.runtime.errors import ConfigError

from ..processes import descendants

CONFIG = {"fleet": "uniform-10", "evaluation": {"where": "none"}, "stop": {"rounds": 1}}

pytestmark = pytest.mark.usefixtures("own_ray")


def test_a_second_run_on_ray_is_refused_until_the_first_has_ended():
    before = descendants(os.getpid())
    with fedbonsai.run(CONFIG, backend="ray", workers=1) as first:
        next(first)
        with pytest.raises(ConfigError, match=r"^backend is 'ray', and another run of this process is on Ray"):
            next(fedbonsai.run(CONFIG, backend="ray", workers=1))
        inline = fedbonsai.run(CONFIG, backend="inline")
        list(inline)
        assert inline.summary["rounds"] == 1
    assert descendants(os.getpid()) == before
    with fedbonsai.run(CONFIG, backend="ray", workers=1) as run:
        list(run)
    assert run.summary["model_hash"] == inline.summary["model_hash"]
    assert descendants(os.getpid()) == before
