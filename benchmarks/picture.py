"""The picture of the README, from the committed results of peers.py and methods.py: docs/pictures/speed_and_savings.svg.

    pip install -c constraints.txt -e '.[picture]'
    python benchmarks/picture.py

Left: seconds of a later round, beside bare PyTorch and other simulators (float32). Right: accuracy against what a device sends
and receives, by method, with the range over the seeds; dashed: the network trained on the public images alone. It measures
nothing, and a result that changes needs a new picture.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from adjustText import adjust_text
from common import saved

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "speed_and_savings.svg"
OURS, OTHERS = "#b5482a", "#8a9aa8"
PLANS = 1000  # of a run: ten devices in each of 100 rounds
SHOWN = {  # the names in peers.json, and those of the picture
    "bare, processes": "bare PyTorch, processes",
    "pfl, processes": "pfl, processes",
    "flower": "Flower, Ray simulation",
    "blazefl, processes": "BlazeFL, processes",
    "blazefl, threads": "BlazeFL, threads",
    "fedbonsai, Ray": "fedbonsai, Ray",
}


def speed(axes: Axes, peers: dict[str, Any]) -> None:
    """Bars: seconds of a later round in float32."""
    nets = list(dict.fromkeys(row["net"] for row in peers["rows"] if row["format"] == "float32"))
    rows = {(row["net"], row["contender"]): row for row in peers["rows"] if row["format"] == "float32"}
    names = [name for name in SHOWN if all(rows.get((net, name), {}).get("steady_s") for net in nets)]
    labels, values, colours = list[str](), list[float](), list[str]()
    for net in nets:
        fastest = rows[net, "bare, processes"]["steady_s"]
        for name in names:
            labels.append(f"{net}: {SHOWN[name]}")
            values.append(rows[net, name]["steady_s"] / fastest)
            colours.append(OURS if name.startswith("fedbonsai") else OTHERS)
    places = [len(values) - n + (0.6 if n < len(names) else 0.0) for n in range(len(values))]
    bars = axes.barh(places, values, color=colours)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_xlim(0, 1.12 * max(values))
    axes.set_xlabel("seconds of a round, relative to bare processes")
    axes.set_title("Speed (measured, float32, two cores)", fontsize=10)


def savings(axes: Axes, methods: dict[str, Any]) -> None:
    """Points: accuracy against bytes up and down of one device in one round, by method."""
    places, labels = list[tuple[float, float]](), list[Any]()
    for name, row in methods["rows"].items():
        megabytes = (row["up_MB"] + row["down_MB"]) / PLANS
        each = [100 * figures["accuracy"] for figures in row["by_seed"].values()]
        middle = 100 * row["accuracy"]
        spread = [[middle - min(each)], [max(each) - middle]]
        axes.errorbar(megabytes, middle, yerr=spread, fmt="o", color=OURS, markersize=4, linewidth=1)
        places.append((megabytes, middle))
        labels.append(axes.text(megabytes, middle, name, fontsize=7))
    public = 100 * methods["public"]["accuracy"]
    axes.axhline(public, color=OTHERS, linestyle="--", linewidth=1)
    axes.text(
        1.0, public, "public images alone", transform=axes.get_yaxis_transform(), fontsize=7, ha="right", va="bottom"
    )
    axes.set_xscale("log")
    axes.set_xlabel("MB up and down for a device and round")
    axes.set_ylabel("accuracy after 100 rounds, %")
    axes.set_title("Savings (CIFAR-10, 100 simulated devices)", fontsize=10)
    x, y = zip(*places, strict=True)
    line = {"arrowstyle": "-", "color": OTHERS, "linewidth": 0.6}
    adjust_text(labels, x, y, ax=axes, expand=(1.1, 1.5), iter_lim=500, arrowprops=line)


def main() -> None:
    """Draw both, and write the file."""
    mpl.rcParams |= {
        "svg.hashsalt": "fedbonsai",
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    speed(left, saved("peers"))
    savings(right, saved("methods"))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})
    print(PICTURE)


if __name__ == "__main__":
    main()
