"""The distiller on Ray: one supervised actor, and the server's requests to it.

The actor is replaced when it dies or hangs, and what it had not answered is sent again with the same packets: it has no state
but caches, so the answers are the same. Ray neither restarts it nor repeats a call. If its bundle cannot be placed any more, it
runs beside the server.

Everything is done in ``_wait``, which the calls of the server enter; between them nothing is noticed, but the actor works on
what was sent.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ...comms.codec import Array
from ...comms.ray_channel import raising_store_full
from ...learning.workload_settings import WorkloadSettings
from ..messages.distiller_messages import DistilRequest, PublicInfo, StudentResult, TeacherRequest
from ..pool import WorkerFailure
from .actor_group import ActorGroup, GroupMember
from .actor_placement import ActorPlacement
from .distiller_actor import DistillerActor, start_distiller
from .failures import ACTOR_DIED, earliest, first_line, node_failure
from .hang_detector import HangDetector
from .request_queue import Request, RequestQueue

_MOST_WAITING = 8  # teachers without logits: their models are in the object store, however many devices there are
_MAX_DEATHS = 3  # of distillers at one request, which may be what kills them


@dataclass(eq=False)
class _Ready(GroupMember):
    """A distiller that is ready."""

    handle: DistillerActor


class RayDistiller:
    """A ``DistillerClient``. Every method raises ``WorkerFailure`` if the actor cannot be started, or dies again and again."""

    def __init__(
        self,
        settings: WorkloadSettings,
        *,
        placement: ActorPlacement,
        placement_timeout_s: float,
        stuck_after_s: float | None = None,
        start: Callable[[ActorPlacement], DistillerActor] = start_distiller,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is started yet. ``stuck_after_s``: an actor that is at one request for longer is replaced (None: never).

        ``start``: starts the actor; its handle.
        """

        def create(placement: ActorPlacement) -> tuple[Any, Any]:
            handle = start(placement)
            return handle, handle.make.remote(settings)

        self._placement = placement
        self._notices: list[str] = []
        self._group = ActorGroup(create, _Ready, placement_timeout_s=placement_timeout_s, report=self._notices.append)
        self._hangs = HangDetector[_Ready](stuck_after_s, now=now)
        self._requests = RequestQueue[DistillerActor]()
        self._teachers: deque[Request[DistillerActor]] = deque()  # whose logits were not returned yet

    def start(self) -> None:
        """Start the actor, if it does not exist; it is not waited for. Every request does that too."""
        if self._member is None and not self._group.pending:
            self._group.start(self._placement)

    def public(self, held_out: float) -> PublicInfo:
        """Load the public set. Raises ``ValueError`` if there is none, or if it is not disjoint from the other data."""
        info: PublicInfo = self._result(lambda actor: actor.public.remote(held_out))
        return info

    @raising_store_full()
    def teach(self, request: TeacherRequest, packet: Array) -> None:
        """Start to compute a teacher's logits. Waits while there are too many teachers without logits."""
        stored = ray.put(packet)  # of this process, so that it outlives the actor
        self._teachers.append(self._requests.add(lambda actor: actor.logits.remote(request, stored)))
        self._wait(0.0)
        while len(self._requests) > _MOST_WAITING:
            self._wait(None)

    def logits(self, *, wait: bool) -> list[Array]:
        """Logits of teachers, in the order of ``teach``, that were not returned before.

        Raises ``ValueError`` for a model that gives none, or does not fit the label counts.
        """
        if self._teachers:
            self._wait(0.0)
        while wait and not all(request.answered for request in self._teachers):
            self._wait(None)
        logits = []
        while self._teachers and self._teachers[0].answered:
            logits.append(self._teachers.popleft().answer)
        return logits

    def distil(
        self, request: DistilRequest, targets: Array, packets: Sequence[Array]
    ) -> tuple[list[StudentResult], list[Array]]:
        """Train the students. Raises ``ValueError`` for a model that gives no logits."""
        with raising_store_full():
            stored, *models = [ray.put(array) for array in (targets, *packets)]
        result: tuple[list[StudentResult], list[Array]] = self._result(
            lambda actor: actor.distil.remote(request, stored, *models)
        )
        return result

    def notices(self) -> list[str]:
        """What happened to the actor since the last call."""
        notices, self._notices[:] = list(self._notices), []
        return notices

    def close(self) -> None:
        """End the actor."""
        self._group.close()

    @property
    def _member(self) -> _Ready | None:
        """The actor, if it is ready."""
        return self._group.ready.get(self._placement)

    def _result(self, send: Callable[[DistillerActor], Any]) -> Any:
        """The answer to a request. Raises what the actor raised."""
        request = self._requests.add(send)
        while not request.answered:
            self._wait(None)
        return request.answer

    @raising_store_full()
    def _wait(self, timeout_s: float | None) -> None:
        """Wait until a call or a start has ended, ``timeout_s`` have passed, or something is late; and handle it.

        There is a request without an answer, unless ``timeout_s`` is 0.
        """
        self.start()
        self._send()
        references = [*self._group.references, *(request.reference for request in self._requests.sent)]
        if references:
            left_s = earliest(timeout_s, self._group.left_s(), self._hangs.left_s())
            ray.wait(references, num_returns=1, timeout=left_s)
        for reference in self._come(self._group.references):
            self._group.arrived(reference)
        self._receive()
        self._send()
        self._group.check_late()  # after all that came, so that no actor is given up which has answered
        for _ in self._hangs.hung():
            self._replace(f"stuck: it was at one request for more than {self._hangs.limit_s:g} s")
        for failure in self._group.take_failed():
            raise failure.error() from None

    def _send(self) -> None:
        """Send what is unsent, if the actor is ready."""
        member = self._member
        if member is not None:
            was_idle = not self._requests.sent
            self._requests.send(member.handle)
            if was_idle and self._requests.sent:
                self._hangs.restart(member)

    def _receive(self) -> None:
        """Take the answers that have come."""
        come = self._come([request.reference for request in self._requests.sent])
        for request in self._requests.sent:
            if request.reference not in come:
                break
            try:
                answer = ray.get(request.reference)
            except ACTOR_DIED as error:
                self._replace(first_line(error))
                break
            except RayTaskError as error:
                self._requests.answered(request, None)
                raise error.cause if isinstance(error.cause, ValueError) else error from None
            self._answered(request, answer)

    def _answered(self, request: Request[DistillerActor], answer: Any) -> None:
        """The actor has answered a request, and goes on with the next one."""
        self._requests.answered(request, answer)
        member = self._member
        assert member is not None
        if self._requests.sent:
            self._hangs.restart(member)
        else:
            self._hangs.stop(member)

    def _replace(self, reason: str) -> None:
        """The actor has died, or hangs: its requests are sent to another one."""
        member = self._member
        assert member is not None
        self._hangs.stop(member)
        reason = node_failure(member.node) or reason
        if self._requests.actor_died() == _MAX_DEATHS:
            raise WorkerFailure(f"{self._placement.name} died {_MAX_DEATHS} times at the same request: {reason}")
        self._group.replace(member, reason)

    @staticmethod
    def _come(references: Sequence[Any]) -> list[Any]:
        """Those of some references that have come."""
        return list(ray.wait(list(references), num_returns=len(references), timeout=0)[0]) if references else []
