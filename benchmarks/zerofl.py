"""ZeroFL: bytes of updates beside the paper's files, seconds of training steps beside dense ones, and accuracy.

    python benchmarks/zerofl.py --quick                            the network for FEMNIST at 95 %
    python benchmarks/zerofl.py                                    both networks of the paper
    python benchmarks/zerofl.py --accuracy writers --data ROOT     accuracy alone, three seeds (zerofl_accuracy.py)

The last line is JSON.
"""

import argparse
import json
from typing import Any

import torch
from common import RESULTS, finish
from zerofl_accuracy import ROWS, TASKS, accuracy


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--accuracy", choices=list(TASKS))
    parser.add_argument("--data", help="folder of the data (data.root)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--add", action="store_true", help="keep the saved rows that are not measured now")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.accuracy:
        name = f"zerofl_{options.accuracy}"
        saved = RESULTS / f"{name}.json"
        known = json.loads(saved.read_text())["rows"] if options.add and saved.exists() else {}

        def save(result: dict[str, Any]) -> None:
            """After each row, since all of them take long."""
            finish(result, name=name, save=options.save)

        accuracy(
            options.accuracy,
            root=options.data,
            rows=options.rows,
            seeds=options.seeds,
            rounds=options.rounds,
            known=known,
            save=save,
        )


if __name__ == "__main__":
    main()
