"""Traces in CSV files: what happened to devices when. A fleet names them, and is loaded with their rows in it."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load_rows(
    source: str | Sequence[tuple[Any, ...]],
    *,
    head: Sequence[str],
    devices: range,
    num_devices: int,
    folder: Path,
    field: str,
) -> tuple[tuple[Any, ...], ...]:
    """The rows of ``devices``, sorted, of a file or of rows that are read already: a device's number, and other numbers.

    ``head``: the file's first line; a relative path starts from ``folder``. Raises ``ValueError`` in one sentence.
    """
    rows = (
        _read(Path(source) if Path(source).is_absolute() else folder / source, head, field)
        if isinstance(source, str)
        else source
    )
    for row in rows:
        if not 0 <= row[0] < num_devices:
            raise ValueError(f"{field} has a line of device {row[0]}; devices are 0 to {num_devices - 1}")
    kept = tuple(sorted(row for row in rows if row[0] in devices))
    if not kept:
        raise ValueError(f"{field} has no line of devices {devices[0]} to {devices[-1]}, those of its class")
    return kept


def _read(path: Path, head: Sequence[str], field: str) -> list[tuple[Any, ...]]:
    """The rows in a CSV file."""
    if "\0" in str(path):
        raise ValueError(f"{field} is {str(path)!r}, which holds a NUL; no file can be named so")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{field} is {str(path)!r}, which cannot be read: {error}") from error
    if not rows or [name.strip() for name in rows[0][1]] != list(head):
        raise ValueError(f"{field} is {str(path)!r}, whose first line must be {','.join(head)}")
    found = []
    for number, row in rows[1:]:
        try:
            found.append((int(row[0]), *(float(value) for value in row[1:])))
        except ValueError:
            found.append(())
        if len(found[-1]) != len(head):
            text = f"{field}: line {number} of {str(path)!r} is {','.join(row)!r}"
            raise ValueError(f"{text}; it must be a device's number and {len(head) - 1} numbers")
    return found
