"""Actors that start, on Ray: one that dies is tried again, one without a place is waited for as long as its caller likes."""

import os

import pytest
import ray
from fedbonsai.actors.ray_backend.pending_actors import NotStarted, PendingActors
from fedbonsai.clusters.ray_backend.placement import is_placed
from ray.exceptions import RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

pytestmark = pytest.mark.usefixtures("cluster")


@ray.remote(num_cpus=0, max_restarts=0)
class Beginner:
    """Dies, or raises, as often as it is told before it is ready. ``tries``: a file that remembers."""

    def begin(self, tries, deaths, mistake):
        with open(tries, "a+") as file:
            file.write("x")
            file.seek(0)
            number = len(file.read())
        if number <= deaths:
            os._exit(1)
        if mistake:
            raise ValueError("no such model")
        return ray.get_runtime_context().get_node_id()


@pytest.fixture
def group():
    """A placement group of one bundle, which has a place."""
    made = placement_group([{"CPU": 0.1}])
    assert made.wait(30)
    yield made
    remove_placement_group(made)


@pytest.fixture
def waiting():
    """A placement group that will never have a place."""
    made = placement_group([{"unheard_of": 1}])
    yield made
    remove_placement_group(made)


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def starts_of(tmp_path, now):
    """``starts_of(group, deaths=1)``: of one kind of beginner; what it told."""

    def make(group, *, deaths=0, mistake=False, has_room=()):
        told = []

        def start(place):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
            actor = Beginner.options(scheduling_strategy=strategy).remote()
            return actor, actor.begin.remote(tmp_path / place, deaths, mistake)

        starts = PendingActors(
            start,
            has_room=lambda place: is_placed(group) or bool(has_room),
            timeout_s=10.0,
            tell=lambda *each: told.append(each),
            now=lambda: now[0],
        )
        return starts, told

    return make


def arrive(starts):
    """Take whoever comes next until somebody is ready."""
    while starts.references:
        for reference in ray.wait(starts.references, timeout=60)[0]:
            if arrived := starts.came(reference):
                return arrived
    return None


def test_who_is_ready_has_a_place_an_actor_and_a_node(group, starts_of):
    starts, told = starts_of(group)
    starts.send_for("a")
    assert (starts.places, len(starts.references)) == (["a"], 1)
    arrived = arrive(starts)
    assert (arrived.place, arrived.node) == ("a", ray.get_runtime_context().get_node_id())
    assert (starts.places, starts.left_s(), told) == ([], None, [])
    ray.kill(arrived.actor)


def test_one_that_dies_is_told_and_tried_again_three_times_in_all(group, starts_of):
    starts, told = starts_of(group, deaths=2)
    starts.send_for("a")
    ray.kill(arrive(starts).actor)
    assert [place for place, _ in told] == ["a", "a"]
    starts, told = starts_of(group, deaths=9)
    starts.send_for("b")
    with pytest.raises(NotStarted, match=r"^it died while it started: .*died") as caught:
        arrive(starts)
    assert (caught.value.place, len(told)) == ("b", 2)
    assert starts.references == []


def test_what_one_raises_is_not_tried_again(group, starts_of):
    starts, told = starts_of(group, mistake=True)
    starts.send_for("a")
    with pytest.raises(NotStarted, match=r"^no such model$") as caught:
        arrive(starts)
    assert isinstance(caught.value.__cause__, RayTaskError)
    assert (starts.places, told) == ([], [])


def test_one_without_a_place_is_late_until_it_is_dropped(waiting, starts_of, now):
    starts, _ = starts_of(waiting)
    starts.send_for("a")
    now[0] += 9.0
    assert (list(starts.late()), starts.left_s()) == ([], 1.0)
    now[0] += 1000.0
    assert list(starts.late()) == [("a", False, "its bundle has found no place within 10 s")]
    assert starts.left_s() == 1.0
    starts.drop("a")
    assert (starts.places, starts.left_s(), list(starts.late())) == ([], None, [])


def test_one_that_has_a_place_may_load_for_two_minutes(group, starts_of, now):
    starts, _ = starts_of(group)
    starts.send_for("a")
    assert starts.left_s() == 10.0
    now[0] += 129.0
    assert list(starts.late()) == []
    now[0] += 1.0
    assert list(starts.late()) == [("a", True, "it was not ready 120 s after it had a place")]
    starts.close()
    assert starts.places == []


def test_one_that_was_placed_late_has_its_two_minutes_from_then_on(waiting, starts_of, now):
    placed = []
    starts, _ = starts_of(waiting, has_room=placed)
    starts.send_for("a")
    now[0] += 500.0
    assert [placed for _, placed, _ in starts.late()] == [False]
    placed.append(True)
    now[0] += 119.0
    assert list(starts.late()) == []
    now[0] += 1.0
    assert [placed for _, placed, _ in starts.late()] == [True]
    starts.close()


def test_a_bundle_whose_group_is_gone_has_no_place():
    group = placement_group([{"CPU": 0.1}])
    assert group.wait(30)
    assert is_placed(group)
    remove_placement_group(group)
    assert not is_placed(group)
