"""Requests to one actor: sent in order, kept until they are answered, and sent again when the actor dies."""

import weakref

import pytest
from fedbonsai.actors.ray_backend.request_queue import RequestQueue


class Actor:
    """Notes what it is sent."""

    def __init__(self):
        self.given = []

    def call(self, argument):
        self.given.append(argument)
        return self, argument  # in place of a reference


@pytest.fixture
def queue():
    return RequestQueue()


def ask(queue, argument):
    return queue.add(lambda actor: actor.call(argument))


def test_each_request_is_sent_once_in_order(queue):
    actor = Actor()
    first = ask(queue, "a")
    assert (len(queue), queue.sent, first.answered) == (1, [], False)
    queue.send(actor)
    second = ask(queue, "b")
    queue.send(actor)
    assert actor.given == ["a", "b"]
    assert queue.sent == [first, second]
    assert (first.reference, second.reference) == ((actor, "a"), (actor, "b"))


def test_an_answer_is_kept_and_the_arguments_are_not(queue):
    class Packet:
        pass

    packet = Packet()
    gone = weakref.ref(packet)
    request = ask(queue, packet)
    del packet
    queue.send(actor := Actor())
    queue.answered(request, 7)
    actor.given.clear()
    assert gone() is None
    assert (request.answered, request.answer, len(queue), queue.sent) == (True, 7, 0, [])


def test_a_request_whose_answer_is_none_is_answered(queue):
    queue.answered(request := ask(queue, "a"), None)
    assert request.answered


def test_what_a_dead_actor_had_is_sent_to_the_next_one_in_the_same_order(queue):
    requests = [ask(queue, argument) for argument in "abc"]
    queue.send(Actor())
    queue.answered(requests[0], 1)
    ask(queue, "d")
    assert queue.actor_died() == 1
    assert queue.sent == []
    queue.send(heir := Actor())
    assert heir.given == ["b", "c", "d"]
    assert queue.sent[0] is requests[1]


def test_a_death_counts_for_the_request_that_was_carried_out(queue):
    first, second = ask(queue, "a"), ask(queue, "b")
    assert queue.actor_died() == 0, "nothing was sent to it"
    deaths = []
    for _ in range(2):
        queue.send(Actor())
        deaths.append(queue.actor_died())
    queue.send(Actor())
    queue.answered(first, 1)
    deaths.append(queue.actor_died())
    assert deaths == [1, 2, 1]
    assert (first.deaths, second.deaths) == (2, 1)
