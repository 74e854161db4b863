"""Requests to one actor that answers them in order, and what becomes of them when it dies.

    add ──► unsent ──► sent ──► answered: how it is sent, and with it its arguments, is forgotten
              ▲          └── the actor has died: all that were sent are sent again, to the next actor
              └──────────────┘ the first one was carried out at that moment, so the death counts for it alone

The queue depends neither on Ray nor on the actor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Handle = TypeVar("Handle")


@dataclass(eq=False)
class Request(Generic[Handle]):
    """One request.

    ``send``: calls the actor, and returns the reference of its answer; None: it was answered. ``reference``: of the call; None:
    it was not sent to the present actor. ``deaths``: of actors that carried it out.
    """

    send: Callable[[Handle], Any] | None
    reference: Any = None
    answer: Any = None
    deaths: int = 0

    @property
    def answered(self) -> bool:
        """Whether ``answer`` is known."""
        return self.send is None


class RequestQueue(Generic[Handle]):
    """The requests without an answer, in order."""

    def __init__(self) -> None:
        """Empty."""
        self._open: list[Request[Handle]] = []

    def __len__(self) -> int:
        """Number of requests without an answer."""
        return len(self._open)

    @property
    def sent(self) -> list[Request[Handle]]:
        """The requests that the present actor has, in order."""
        return [request for request in self._open if request.reference is not None]

    def add(self, send: Callable[[Handle], Any]) -> Request[Handle]:
        """Add a request behind all others."""
        self._open.append(Request(send))
        return self._open[-1]

    def send(self, handle: Handle) -> None:
        """Send what was not sent yet."""
        for request in self._open:
            if request.reference is None and request.send is not None:
                request.reference = request.send(handle)

    def answered(self, request: Request[Handle], answer: Any) -> None:
        """A request has ended, with an answer or with an error of its own."""
        self._open.remove(request)
        request.answer, request.send, request.reference = answer, None, None

    def actor_died(self) -> int:
        """The actor has died: what it had is unsent again. How many actors have died at the request that it carried out."""
        sent = self.sent
        for request in sent:
            request.reference = None
        if not sent:
            return 0
        sent[0].deaths += 1
        return sent[0].deaths
