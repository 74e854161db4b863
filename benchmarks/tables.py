"""The tables of docs/methods.md, from the committed result of methods.py, as Markdown.

    python benchmarks/tables.py

It measures nothing; a result that changes needs new tables.
"""

from typing import Any

from common import saved

TARGETS = {"to_60": "60 %", "to_70": "70 %"}
COSTS = {"up_MB": "MB up", "down_MB": "MB down", "other_MB": "other MB", "seconds": "seconds"}


def number(value: float) -> str:
    """With three digits or more, without an exponent."""
    decimals = next((n for n in range(3) if abs(value) >= 10 ** (2 - n)), 3)
    return f"{value:,.{decimals}f}" if value else "0"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def outcomes(rows: dict[str, Any]) -> str:
    """Accuracy, its range over several seeds, and what the whole run has cost."""
    head = ["method", "accuracy, %", "range", *COSTS.values(), "peak MB", "devices that trained, %"]
    return table(head, [
        [name, f"{100 * row['accuracy']:.1f}", f"{100 * row['accuracy_spread']:.1f}" if len(row["by_seed"]) > 1 else "-",
         *(number(row[key]) for key in COSTS), number(row["peak_MB"]), f"{100 * row['participation']:.0f}"]
        for name, row in rows.items()
    ])  # fmt: skip


def ways(rows: dict[str, Any]) -> str:
    """What it has cost to the first evaluation with an accuracy; methods that reach none are left out."""
    head, cells = ["method"], [[name] for name, row in rows.items() if any(row[target] for target in TARGETS)]
    for target, shown in TARGETS.items():
        head += [f"to {shown}: rounds", *COSTS.values()]
        for row in cells:
            cost = rows[row[0]][target]
            row += (
                [f"{cost['rounds']:.0f}", *(number(cost[key]) for key in COSTS)] if cost else ["-"] * (1 + len(COSTS))
            )
    return table(head, cells)


def main() -> None:
    """Print both tables."""
    rows = saved("methods")["rows"]
    print(outcomes(rows), ways(rows), sep="\n\n")


if __name__ == "__main__":
    main()
