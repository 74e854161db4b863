"""What hosts have buffered, as a policy that replays it wants it: for each device, its newest view."""

from dataclasses import dataclass

from ..view import View


@dataclass(frozen=True)
class BufferedView:
    """One complete upload: where it was cut, its id, and its age in versions."""

    cut: str
    name: str
    age: int


def newest_views(view: View) -> dict[int, BufferedView]:
    """The newest buffered view of each idle device."""
    found: dict[int, BufferedView] = {}
    for _, cut, device, name, age, _ in sorted(view.replay, key=lambda entry: -entry[4]):
        if device not in view.in_flight:
            found[device] = BufferedView(cut, name, age)
    return found
