"""The client of the distiller on Ray, with small actors in its place: order, deaths, errors, hangs."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from fedbonsai.actors.messages.distiller_messages import DistilRequest, Execution, TeacherRequest
from fedbonsai.actors.pool import WorkerFailure
from fedbonsai.actors.ray_backend.actor_placement import ActorPlacement
from fedbonsai.actors.ray_backend.ray_distiller import RayDistiller
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Distillation
from ray.util import placement_group, remove_placement_group

from ...runtime.processes import wait_until

pytestmark = pytest.mark.usefixtures("cluster")

PART = Part(blocks=("a",), trained=())
TEACHER = TeacherRequest(part=PART, execution=Execution(), held_out=0.5)
STUDENT = DistilRequest(parts=(PART,), settings=Distillation(), execution=Execution(), seed=1)
WAITING = 8  # teachers without logits


@ray.remote
class Little:
    """Its logits are the packet doubled. It dies in a method as often as there are files of that name.

    It waits at a gate, that of all packets or that of one. A packet of 99 is a mistake, one of 98 an error of the
    program; at one of 97 it dies.
    """

    def __init__(self, folder):
        self._folder = Path(folder)

    def make(self, mistake):
        self._die("make")
        if mistake:
            raise ValueError(mistake)
        return ray.get_runtime_context().get_node_id()

    def public(self, held_out):
        return held_out

    def logits(self, request, packet):
        self._die("logits")
        if packet[0] == 97:
            os._exit(1)
        if packet[0] == 98:
            raise KeyError("lost")
        if packet[0] == 99:
            raise ValueError("no such model")
        while (self._folder / "gate").exists() or (self._folder / f"gate {packet[0]:g}").exists():
            time.sleep(0.01)
        return 2 * packet

    def distil(self, request, targets, *packets):
        self._die("distil")
        return [request.seed] * len(packets), [packet + targets for packet in packets]

    def _die(self, method):
        for file in self._folder.glob(f"{method}.*"):
            file.unlink()
            os._exit(1)


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def client(tmp_path, now):
    """``client()``: a client whose actor reads and writes files in ``tmp_path``."""
    made, bundle = [], placement_group([{"CPU": 0.1}])
    assert bundle.wait(30)

    def make(*, mistake="", stuck_after_s=None):
        made.append(
            RayDistiller(
                mistake,
                placement=ActorPlacement(name="distiller", bundle=bundle),
                placement_timeout_s=30.0,
                stuck_after_s=stuck_after_s,
                start=lambda placement: Little.options(**placement.options()).remote(str(tmp_path)),
                now=lambda: now[0],
            )
        )
        return made[-1]

    yield make
    for each in made:
        each.close()
    remove_placement_group(bundle)


def teach(distiller, *values):
    for value in values:
        distiller.teach(TEACHER, np.array([value], np.float32))


def taught(distiller, *values):
    teach(distiller, *values)
    return numbers(distiller.logits(wait=True))


def numbers(logits):
    return [float(each[0]) for each in logits]


def test_logits_come_in_the_order_of_teaching_and_once(client):
    distiller = client()
    assert taught(distiller, *range(1, 21)) == [2.0 * value for value in range(1, 21)]
    assert (distiller.logits(wait=True), distiller.logits(wait=False)) == ([], [])
    assert distiller.public(0.5) == 0.5
    seeds, models = distiller.distil(STUDENT, np.array([10.0]), [np.array([1.0]), np.array([2.0])])
    assert (seeds, numbers(models)) == ([1, 1], [11.0, 12.0])
    assert distiller.notices() == []


def test_without_waiting_only_what_is_known_is_returned(client, tmp_path):
    distiller = client()
    teach(distiller, 1)
    distiller.public(0.5)  # when that is answered, so is the teacher
    (tmp_path / "gate").touch()
    teach(distiller, 2, 3)
    assert numbers(distiller.logits(wait=False)) == [2.0]
    assert distiller.logits(wait=False) == []
    (tmp_path / "gate").unlink()
    assert numbers(distiller.logits(wait=True)) == [4.0, 6.0]


def test_there_are_never_many_models_of_teachers_at_once(client, tmp_path):
    distiller = client()
    (tmp_path / "gate").touch()
    teach(distiller, *range(WAITING))
    done = []
    thread = threading.Thread(target=lambda: done.append(teach(distiller, WAITING)))
    thread.start()
    thread.join(1.0)
    assert not done
    (tmp_path / "gate").unlink()
    thread.join()
    assert numbers(distiller.logits(wait=True)) == [2.0 * value for value in range(WAITING + 1)]


def test_one_that_dies_is_replaced_and_its_requests_are_sent_again(client, tmp_path):
    for name in ("make.1", "logits.1", "logits.2", "distil.1"):
        (tmp_path / name).touch()
    distiller = client()
    assert taught(distiller, 1, 2, 3) == [2.0, 4.0, 6.0]
    starting, *notices = distiller.notices()
    assert starting.startswith("distiller died while it started (")
    assert len(notices) == 2
    seeds, models = distiller.distil(STUDENT, np.array([10.0]), [np.array([1.0])])
    assert (seeds, numbers(models)) == ([1], [11.0])
    notices += distiller.notices()
    assert [(text[:16], text[-15:]) for text in notices] == [("distiller died (", "and is replaced")] * 3
    assert not list(tmp_path.glob("*.*"))


def test_logits_that_were_there_before_it_died_are_not_computed_again(client, tmp_path):
    distiller = client()
    teach(distiller, 1)
    distiller.public(0.5)
    (tmp_path / "logits.1").touch()
    assert taught(distiller, 2) == [2.0, 4.0]
    assert len(distiller.notices()) == 1


def test_a_request_at_which_every_distiller_dies_is_given_up(client):
    distiller = client()
    assert taught(distiller, 1) == [2.0]
    with pytest.raises(WorkerFailure, match=r"^distiller died 3 times at the same request: "):
        taught(distiller, 97)
    assert len(distiller.notices()) == 2


def test_one_that_cannot_be_started_is_an_error(client, tmp_path):
    for number in range(3):
        (tmp_path / f"make.{number}").touch()
    with pytest.raises(WorkerFailure, match=r"^distiller could not be started \(it died while it started: "):
        client().public(0.5)
    with pytest.raises(ValueError, match=r"^no such data$"):
        client(mistake="no such data").public(0.5)


def test_what_the_actor_raises_is_raised(client):
    distiller = client()
    with pytest.raises(ValueError, match=r"^no such model$"):
        taught(distiller, 1, 99)
    distiller = client()
    with pytest.raises(KeyError, match="lost"):
        taught(distiller, 98)
    assert distiller.notices() == []


def test_one_that_hangs_is_replaced(client, tmp_path, now):
    distiller = client(stuck_after_s=60.0)
    distiller.public(0.5)
    now[0] += 1000.0  # idle, it does not hang
    for number in (3, 1):
        (tmp_path / f"gate {number}").touch()
    teach(distiller, 3, 1, 2)
    now[0] += 59.0
    (tmp_path / "gate 3").unlink()
    found = []
    wait_until(lambda: found.extend(distiller.logits(wait=False)) or found)
    assert numbers(found) == [6.0]
    now[0] += 59.0  # since then
    assert (distiller.logits(wait=False), distiller.notices()) == ([], [])
    now[0] += 1.0
    assert distiller.logits(wait=False) == []
    assert distiller.notices() == ["distiller died (stuck: it was at one request for more than 60 s) and is replaced"]
    (tmp_path / "gate 1").unlink()
    assert numbers(distiller.logits(wait=True)) == [2.0, 4.0]
    assert distiller.notices() == []
