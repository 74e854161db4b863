"""Supervised actors on Ray: retried when they die, given up or moved when they are not placed in time."""

import os

import pytest
import ray
from fedbonsai.actors.ray_backend.actor_group import ActorGroup, GroupMember
from fedbonsai.actors.ray_backend.actor_placement import ActorPlacement
from fedbonsai.clusters.ray_backend.placement import is_placed
from ray.exceptions import RayTaskError
from ray.util import placement_group, remove_placement_group

pytestmark = pytest.mark.usefixtures("cluster")

UNPLACED = "its bundle has found no place within 10 s"


@ray.remote
class Beginner:
    """Dies, or raises, a given number of times before it is ready. ``tries``: a file that counts them."""

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
def bundles():
    """``bundles({"CPU": 0.1})``: a placement group of one bundle."""
    made = []

    def make(resources):
        made.append(placement_group([resources]))
        return made[-1]

    yield make
    for group in made:
        remove_placement_group(group)


@pytest.fixture
def placed(bundles):
    """A bundle that is placed."""
    made = bundles({"CPU": 0.1})
    assert made.wait(30)
    return made


@pytest.fixture
def never(bundles):
    """A bundle that will never be placed."""
    return bundles({"unheard_of": 1})


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def group_of(tmp_path, now):
    """``group_of(deaths=1)``: a group of beginners, and what it reports."""
    made = []

    def make(*, deaths=0, mistake=False, seems_placed=()):
        reported = []

        def start(placement):
            actor = Beginner.options(**placement.options()).remote()
            return actor, actor.begin.remote(tmp_path / placement.name, deaths, mistake)

        made.append(
            ActorGroup(
                start,
                GroupMember,
                placement_timeout_s=10.0,
                report=reported.append,
                is_placed=lambda placement: placement.is_placed() or bool(seems_placed),
                now=lambda: now[0],
            )
        )
        return made[-1], reported

    yield make
    for group in made:
        group.close()


def at(bundle, name="a", **how):
    return ActorPlacement(name=name, bundle=bundle, **how)


def arrive(group):
    """Handle starts until an actor is ready, or all have ended."""
    while group.references:
        for reference in ray.wait(group.references, timeout=60)[0]:
            if member := group.arrived(reference):
                return member
    return None


def late(group, now, seconds):
    """What is reported or fails after so many seconds."""
    now[0] += seconds
    group.check_late()
    return [str(failure) for failure in group.take_failed()]


def test_a_ready_actor_has_a_placement_a_handle_and_a_node(placed, group_of):
    group, reported = group_of()
    group.start(at(placed))
    assert (group.pending, len(group.references), group.is_loading(at(placed))) == ([at(placed)], 1, True)
    member = arrive(group)
    assert (member.placement, member.node) == (at(placed), ray.get_runtime_context().get_node_id())
    assert group.ready == {at(placed): member}
    assert group.on_node(member.node) == [member]
    assert (group.pending, group.left_s(), reported) == ([], None, [])


def test_one_that_dies_while_it_starts_is_retried_three_times_in_all(placed, group_of):
    group, reported = group_of(deaths=2)
    group.start(at(placed))
    assert arrive(group) is not None
    assert [text.startswith("a died while it started (") for text in reported] == [True, True]
    group, reported = group_of(deaths=9)
    group.start(at(placed, "b"))
    assert arrive(group) is None
    (failure,) = group.take_failed()
    assert str(failure).startswith("b could not be started (it died while it started: ")
    assert (failure.placement, len(reported), group.references, group.take_failed()) == (at(placed, "b"), 2, [], [])


def test_an_error_that_an_actor_raises_is_not_retried(placed, group_of):
    group, reported = group_of(mistake=True)
    group.start(at(placed))
    assert arrive(group) is None
    (failure,) = group.take_failed()
    assert str(failure) == "a could not be started (no such model)"
    assert isinstance(failure.cause, RayTaskError)
    assert (group.pending, reported) == ([], [])


def test_an_actor_that_dies_is_replaced_and_one_that_cannot_be_has_a_reason(placed, group_of):
    group, reported = group_of()
    group.start(at(placed))
    first = arrive(group)
    group.replace(first, "power cut")
    second = arrive(group)
    assert second is not first
    assert (group.ready, reported) == ({at(placed): second}, ["a died (power cut) and is replaced"])
    group, _ = group_of(deaths=9)
    group.replace(GroupMember(at(placed, "b"), None, ""), "power cut")
    assert arrive(group) is None
    assert str(group.take_failed()[0]).startswith("b died (power cut) and could not be replaced (it died while ")


def test_starts_are_staggered(placed, group_of):
    group, _ = group_of()
    placements = [at(placed, name) for name in "abc"]
    group.start_staggered(placements, at_once=1)
    for number, placement in enumerate(placements, start=1):
        assert (len(group.references), len(group.pending)) == (1, 4 - number)
        assert arrive(group).placement == placement
    assert group.pending == []


def test_one_that_is_not_placed_is_given_up_where_its_group_has_no_other(never, group_of, now):
    group, _ = group_of()
    group.start(at(never))
    assert (late(group, now, 9.0), group.left_s()) == ([], 1.0)
    assert late(group, now, 1.0) == [f"a could not be started ({UNPLACED})"]
    assert (group.pending, group.left_s()) == ([], None)


def test_one_that_is_not_placed_is_waited_for_while_another_of_its_group_works(placed, never, group_of, now):
    group, reported = group_of()
    group.start(at(placed))
    member = arrive(group)
    group.start(at(never, "b"))
    group.start(at(never, "c", group="board"))
    assert late(group, now, 1000.0) == [f"c could not be started ({UNPLACED})"]
    assert late(group, now, 1000.0) == []
    assert reported == ["b has found no place yet; 1 others are ready"]
    group.discard(member.placement)
    assert late(group, now, 1.0) == [f"b could not be started ({UNPLACED})"]


def test_one_that_is_not_placed_goes_on_at_its_fallback_and_comes_back_when_it_is_replaced(
    placed, never, bundles, group_of, now
):
    group, reported = group_of()
    placement = at(never, fallback=placed)
    group.start(placement)
    assert late(group, now, 10.0) == []
    member = arrive(group)
    assert reported == [f"a: {UNPLACED}; it goes on beside the server"]
    assert member.placement == placement
    group.replace(member, "power cut")
    assert not group.is_loading(placement)


def test_one_that_is_placed_may_load_for_two_minutes(placed, group_of, now):
    group, _ = group_of()
    group.start(at(placed))
    assert group.left_s() == 10.0
    assert late(group, now, 129.0) == []
    assert late(group, now, 1.0) == ["a could not be started (it was not ready 120 s after it was placed)"]


def test_one_that_was_placed_late_has_its_two_minutes_from_then_on(placed, never, group_of, now):
    seems_placed = []
    group, _ = group_of(seems_placed=seems_placed)
    group.start(at(placed, "other"))
    assert arrive(group) is not None
    group.start(at(never))
    assert late(group, now, 500.0) == []
    seems_placed.append(True)
    assert late(group, now, 119.0) == []
    assert late(group, now, 1.0) == ["a could not be started (it was not ready 120 s after it was placed)"]


def test_a_bundle_whose_group_is_gone_is_not_placed():
    group = placement_group([{"CPU": 0.1}])
    assert group.wait(30)
    assert is_placed(group)
    remove_placement_group(group)
    assert not is_placed(group)
