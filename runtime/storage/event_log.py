"""The log of a run: its events as lines of JSON, numbered from 1, so that missing and doubled lines are detected.

    {"number":1,"type":"RunStarted",...}

Only *intact* lines are read back: those from the first on whose numbers are consecutive. A line that repeats the one before
it is skipped, and reading ends at a garbled or missing line.
"""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

import msgspec

from ..errors import ConfigError
from ..events import AnyEvent, read_event

NAME = "events.jsonl"


class EventLog:
    """Writes the log of one run. Failures raise ``OSError``."""

    def __init__(self, folder: Path) -> None:
        """Open the log of a run folder for appending. Raises ``ConfigError`` if another process is writing it."""
        self._path = folder / NAME
        self._file: TextIO = self._open()
        self._number = 0  # of the last line; ``cut`` sets it for a run that is resumed

    @property
    def num_events(self) -> int:
        """Number of intact lines."""
        return sum(1 for _ in self._intact())

    def cut(self, num_events: int) -> None:
        """Keep only the first so many intact lines, atomically; a resumed run repeats the events after them."""
        partial = self._path.with_name(f"{NAME}.partial")
        with partial.open("wb") as kept:
            kept.writelines(islice((line for line, _ in self._intact()), num_events))
            kept.flush()
            os.fsync(kept.fileno())
        partial.replace(self._path)
        self._file.close()
        self._file = self._open()
        self._number = num_events

    def events(self) -> Iterator[AnyEvent]:
        """The events of the intact lines."""
        return (event for _, event in self._intact())

    def note(self, event: AnyEvent) -> None:
        """Append an event, and flush it to the operating system."""
        self._number += 1
        line = msgspec.json.encode(event).decode()
        self._file.write(f'{{"number":{self._number},{line[1:]}\n')
        self._file.flush()

    @property
    def closed(self) -> bool:
        """Whether the log is closed."""
        return self._file.closed

    def close(self) -> None:
        """Close the log."""
        self._file.close()

    def _intact(self) -> Iterator[tuple[bytes, AnyEvent]]:
        """The intact lines, and their events."""
        previous, expected = b"", 1
        with self._path.open("rb") as file:
            for line in file:
                if line == previous:
                    continue
                try:
                    number, event = _read(line)
                except ValueError:
                    return
                if number != expected:
                    return
                yield line, event
                previous, expected = line, expected + 1

    def _open(self) -> TextIO:
        """Open and lock the file, so that a second process is refused. The lock ends with the process."""
        file = self._path.open("a", encoding="utf-8")
        try:
            import fcntl
        except ImportError:  # not a POSIX system: no lock
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            folder = str(self._path.parent)
            raise ConfigError(f"out is {folder!r}, which another process is writing") from error
        return file


class _Numbered(msgspec.Struct):
    """The number of a line."""

    number: int


def _read(line: bytes) -> tuple[int, AnyEvent]:
    """The number and the event of a line. Raises ``ValueError`` for a line that is incomplete or holds no event."""
    if not line.endswith(b"\n"):
        raise ValueError("it is incomplete")
    event = read_event(line)
    return msgspec.json.decode(line, type=_Numbered).number, event
