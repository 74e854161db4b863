"""Sentences that say which method is cheaper, from the rows of ``compare_methods``."""

from collections.abc import Sequence

from ...clusters.units import format_quantity
from .compare_methods import MethodCost

PLAIN = "FedAvg"  # the method that the others are compared with
# Factor by which the first guess of coded activations, and so of the time, may be too high. Measured: up to 1.75, with 4 and 8
# bit at seven cuts of digits_cnn and vgg11_bn; 3 leaves room for activations with more zeros.
GUESS = 3.0
MANY = 10.0  # times the bytes of plain FedAvg: none of these methods is intended to send more


def verdict(rows: Sequence[MethodCost]) -> str:
    """One sentence: the methods with the fewest bytes and the least time, compared with plain FedAvg or the next best."""
    able = [row for row in rows if row.seconds is not None]
    if not able:
        return "no device can take part in any of these methods"
    if len(able) == 1:
        return f"only {able[0].method} can be carried out"
    whole = [row for row in able if not row.one_stage]
    return (
        _best(whole) + _doubt(whole) if len(whole) > 1 else f"only {whole[0].method} trains in one stage"
    ) + "".join(
        f"; {number} device{'s' if number > 1 else ''} cannot take part in {row.method}"
        for row in able
        if (number := sum(count for _, count in row.unable))
    )


def cheaper(rows: Sequence[MethodCost], method: str) -> str:
    """One sentence if another row needs fewer bytes or less time than that of ``method``; else "".

    Where the figures of ``method`` are a guess, the lowest possible values are compared.
    """
    own = next((row for row in rows if row.method == method), None)
    if own is None or own.seconds is None:
        return ""
    least = "at least " if own.guessed else ""
    num_bytes, seconds, better = own.num_bytes / _slack(own), own.seconds / _slack(own), []
    for row in rows:
        if row.seconds is None or row is own or row.one_stage:
            continue
        gains = []
        if row.num_bytes < num_bytes:
            gains.append(f"{least}{_times(num_bytes, row.num_bytes)} fewer bytes")
        if row.seconds < seconds:
            gains.append(f"{least}{_times(seconds, row.seconds)} less time")
        if gains:
            better.append(f"{row.method} {' and '.join(gains)}")
    return f"a round of {method} costs more than it must at these settings: {', '.join(better)}" if better else ""


def many_bytes(plain: MethodCost, own: MethodCost) -> str:
    """One sentence if a row needs ``MANY`` times the bytes of plain FedAvg even by the lowest guess; else ""."""
    least = own.num_bytes / _slack(own)
    if None in (plain.seconds, own.seconds) or least < MANY * plain.num_bytes:
        return ""
    about = "at least " if own.guessed else ""
    size = format_quantity(least, kind="bytes")
    return (
        f"{own.method} sends {about}{size} a round and device, {_times(least, plain.num_bytes)} what whole models take "
        f"({format_quantity(plain.num_bytes, kind='bytes')})"
    )


def _slack(row: MethodCost) -> float:
    """Factor by which the figures of a row may be too high."""
    return GUESS if row.guessed else 1.0


def _doubt(able: Sequence[MethodCost]) -> str:
    """A remark on each row that could be the best within the uncertainty of its guess."""
    small, quick = min(row.num_bytes for row in able), min(map(_seconds, able))
    return "".join(
        f"; what {row.method} sends is a first guess, which may be up to {GUESS:g}x too high"
        for row in able
        if small < row.num_bytes < _slack(row) * small or quick < _seconds(row) < _slack(row) * quick
    )


def _best(able: Sequence[MethodCost]) -> str:
    """The comparison of the best rows, of at least two that can be carried out."""
    small = min(able, key=lambda row: row.num_bytes)
    quick = min(able, key=_seconds)
    bytes_ = f"{_times(_against(able, small).num_bytes, small.num_bytes)} fewer bytes"
    time = f"{_times(_seconds(_against(able, quick)), _seconds(quick))} less time"
    if small is quick:
        text = f"{bytes_} and {time} than {_against(able, small).method}"
        return f"plain {PLAIN} is cheaper: {text}" if small.method == PLAIN else f"{small.method}: {text}"
    return (
        f"{small.method}: {bytes_} than {_against(able, small).method}; "
        f"{quick.method}: {time} than {_against(able, quick).method}"
    )


def _against(rows: Sequence[MethodCost], best: MethodCost) -> MethodCost:
    """The row that the best one is compared with: plain FedAvg, or the cheapest other row where that is the best."""
    plain = next((row for row in rows if row.method == PLAIN), None)
    if plain is not None and plain is not best:
        return plain
    return min((row for row in rows if row is not best), key=lambda row: (row.num_bytes, _seconds(row)))


def _seconds(row: MethodCost) -> float:
    assert row.seconds is not None
    return row.seconds


def _times(more: float, less: float) -> str:
    """The ratio with two digits, as ``2.5x``."""
    ratio = more / less if less else float("inf")
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"
