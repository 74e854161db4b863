"""Which actors hang, by a clock that the test sets."""

import pytest
from fedbonsai.actors.ray_backend.hang_detector import HangDetector, Heartbeats


class Actor:
    """Gives a token for each heartbeat that it is asked for."""

    def __init__(self):
        self.asked = []
        self.handle = self.heartbeat = self

    def remote(self):
        self.asked.append(object())
        return self.asked[-1]


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def detector(now):
    return HangDetector(60.0, now=lambda: now[0])


@pytest.fixture
def heartbeats(now):
    return Heartbeats(8.0, now=lambda: now[0])


def test_an_actor_without_activity_hangs_and_one_from_which_none_is_expected_does_not(detector, now):
    detector.restart("slow")
    detector.restart("idle")
    now[0] += 59.0
    detector.restart("quick")
    detector.stop("idle")
    assert (detector.hung(), detector.left_s()) == ([], 1.0)
    now[0] += 1.0
    assert (detector.hung(), detector.left_s()) == (["slow"], 0.0)


def test_actors_that_are_ignored_are_not_judged(detector, now):
    detector.restart("waits")
    now[0] += 40.0
    detector.restart("works")
    now[0] += 30.0
    assert detector.hung(ignoring=["waits"]) == []
    assert detector.left_s(ignoring=["waits"]) == 30.0
    assert detector.left_s(ignoring=["waits", "works"]) is None
    assert detector.hung() == ["waits"]


def test_activity_restarts_the_stopwatch(detector, now):
    detector.restart("worker")
    now[0] += 100.0
    detector.restart("worker")
    assert (detector.hung(), detector.left_s()) == ([], 60.0)


def test_without_a_limit_no_actor_hangs(now):
    detector = HangDetector(None, now=lambda: now[0])
    detector.restart("slow")
    now[0] += 1e6
    assert (detector.hung(), detector.left_s()) == ([], None)


def test_an_actor_is_asked_for_one_heartbeat_and_hangs_when_nothing_comes(heartbeats, now):
    actor = Actor()
    (reference,) = heartbeats.request([actor])
    now[0] += 7.9
    assert heartbeats.request([actor]) == [reference]
    assert len(actor.asked) == 1
    assert heartbeats.is_pending(actor)
    assert (heartbeats.hung(), heartbeats.left_s()) == ([], pytest.approx(0.1))
    now[0] += 0.1
    assert (heartbeats.hung(), heartbeats.left_s()) == ([actor], 0.0)


def test_a_heartbeat_is_asked_for_again_a_quarter_of_the_limit_after_the_last(heartbeats, now):
    actor = Actor()
    (reference,) = heartbeats.request([actor])
    assert not heartbeats.received(object())
    assert heartbeats.received(reference)
    assert not heartbeats.is_pending(actor)
    assert heartbeats.left_s() == 2.0
    now[0] += 1.9
    assert heartbeats.request([actor]) == []
    now[0] += 0.1
    assert len(heartbeats.request([actor])) == 1


def test_any_other_answer_counts_as_activity(heartbeats, now):
    silent, busy = Actor(), Actor()
    heartbeats.request([silent, busy])
    now[0] += 7.0
    heartbeats.note_activity(busy)
    now[0] += 1.0
    assert heartbeats.hung() == [silent]


def test_an_actor_that_has_ended_is_forgotten(heartbeats, now):
    actor = Actor()
    heartbeats.request([actor])
    heartbeats.forget(actor)
    now[0] += 99.0
    assert (heartbeats.hung(), heartbeats.left_s(), heartbeats.is_pending(actor)) == ([], None, False)


def test_without_a_limit_no_heartbeat_is_asked_for(now):
    unlimited, actor = Heartbeats(None, now=lambda: now[0]), Actor()
    assert unlimited.request([actor]) == []
    unlimited.note_activity(actor)
    now[0] += 1e6
    assert (unlimited.hung(), unlimited.left_s()) == ([], None)
