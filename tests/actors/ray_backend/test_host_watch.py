"""Which hosts are silent, by a clock that the test sets."""

import pytest
from fedbonsai.actors.ray_backend.host_watch import HostWatch


class Host:
    """Gives a token for each sign that it is asked for."""

    def __init__(self):
        self.asked = []
        self.sign = self

    def remote(self):
        self.asked.append(object())
        return self.asked[-1]


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def watch(now):
    return HostWatch(8.0, now=lambda: now[0])


def test_a_host_is_asked_once_and_stuck_when_nothing_comes(watch, now):
    host = Host()
    (sign,) = watch.ask({0: host})
    now[0] += 7.9
    assert watch.ask({0: host}) == [sign]
    assert len(host.asked) == 1
    assert watch.is_silent(0)
    assert (watch.stuck(), watch.left_s()) == ([], pytest.approx(0.1))
    now[0] += 0.1
    assert (watch.stuck(), watch.left_s()) == ([0], 0.0)


def test_a_sign_is_asked_for_again_a_quarter_of_the_time_after_the_last(watch, now):
    host = Host()
    (sign,) = watch.ask({0: host})
    assert not watch.came(object())
    assert watch.came(sign)
    assert not watch.is_silent(0)
    assert watch.left_s() == 2.0
    now[0] += 1.9
    assert watch.ask({0: host}) == []
    now[0] += 0.1
    assert len(watch.ask({0: host})) == 1


def test_whatever_else_comes_is_a_sign_too(watch, now):
    watch.ask({0: Host(), 1: Host()})
    now[0] += 7.0
    watch.heard(1)
    now[0] += 1.0
    assert watch.stuck() == [0]


def test_who_is_gone_is_waited_for_no_more(watch, now):
    watch.ask({0: Host()})
    watch.forget(0)
    now[0] += 99.0
    assert (watch.stuck(), watch.left_s(), watch.is_silent(0)) == ([], None, False)


def test_without_a_limit_nobody_is_asked(now):
    patient = HostWatch(None, now=lambda: now[0])
    assert patient.ask({0: Host()}) == []
    now[0] += 1e6
    assert (patient.stuck(), patient.left_s()) == ([], None)
