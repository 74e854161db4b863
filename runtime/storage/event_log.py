"""The log of a run: its events as lines of JSON, numbered from 1, so that a line that is missing or there twice is noticed.

    {"number":1,"type":"RunStarted",...}

What is read back are the *sound* lines: those from the first on whose numbers follow one another. A line that repeats the one
before it is left out, and reading ends at a garbled or missing line.
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
    """Writes the log of one run. What fails raises ``OSError``."""

    def __init__(self, folder: Path) -> None:
        """Open the log of a run folder, at its end. Raises ``ConfigError`` where another process is writing it."""
        self._path = folder / NAME
        self._file: TextIO = self._open()
        self._number = 0  # of the last line that was written; ``cut`` says it for a log that goes on

    @property
    def num_events(self) -> int:
        """Sound lines of the log."""
        return sum(1 for _ in self._sound())

    def cut(self, num_events: int) -> None:
        """Keep so many of the sound lines, in one step: what happened after them will happen again."""
        partial = self._path.with_name(f"{NAME}.partial")
        with partial.open("wb") as kept:
            kept.writelines(islice((line for line, _ in self._sound()), num_events))
            kept.flush()
            os.fsync(kept.fileno())
        partial.replace(self._path)
        self._file.close()
        self._file = self._open()
        self._number = num_events

    def events(self) -> Iterator[AnyEvent]:
        """The sound lines, as events."""
        return (event for _, event in self._sound())

    def note(self, event: AnyEvent) -> None:
        """Append an event; it is on its way to the disk when this returns."""
        self._number += 1
        line = msgspec.json.encode(event).decode()
        self._file.write(f'{{"number":{self._number},{line[1:]}\n')
        self._file.flush()

    @property
    def closed(self) -> bool:
        """Whether no more is written."""
        return self._file.closed

    def close(self) -> None:
        """No more events."""
        self._file.close()

    def _sound(self) -> Iterator[tuple[bytes, AnyEvent]]:
        """The sound lines, and their events."""
        before, expected = b"", 1
        with self._path.open("rb") as file:
            for line in file:
                if line == before:
                    continue
                try:
                    number, event = _read(line)
                except ValueError:
                    return
                if number != expected:
                    return
                yield line, event
                before, expected = line, expected + 1

    def _open(self) -> TextIO:
        """Open and lock the file: the second process that would write it is refused. The lock ends with its process."""
        file = self._path.open("a", encoding="utf-8")
        try:
            import fcntl
        except ImportError:  # not a POSIX system: there is no such lock
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            folder = str(self._path.parent)
            raise ConfigError(f"out is {folder!r}, which another process is writing") from error
        return file


class _Numbered(msgspec.Struct):
    """What of a line says which it is."""

    number: int


def _read(line: bytes) -> tuple[int, AnyEvent]:
    """The number and the event of a line. Raises ``ValueError`` for one that is not whole, or holds none."""
    if not line.endswith(b"\n"):
        raise ValueError("it is not whole")
    event = read_event(line)
    return msgspec.json.decode(line, type=_Numbered).number, event
