"""The commands and their options. Each imports what it needs when it runs, so that ``--help`` is fast.

``run`` calls ``runtime.api``; ``pretrain``, ``advise`` and ``probe`` have a file each.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ...clusters.allocator import keep_freed_memory
from ..errors import ConfigError
from .exit_codes import INTERRUPTED, TERMINATED, Sigterm, exit_code_of

SIGTERM = Sigterm()

app = typer.Typer(
    name="fedbonsai",
    help="Federated learning that fits each device, every round.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file of the experiment", show_default=False)],
    preset: Annotated[str | None, typer.Option(help="method by name; see `fedbonsai presets`")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="one setting; repeatable")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds at most")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/NAME-TIME")] = None,
    backend: Annotated[str | None, typer.Option(help="ray or inline")] = None,
    workers: Annotated[int | None, typer.Option(help="device workers; default one a core")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN|auto", help="resume the run in this folder; auto: start it, or resume it"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print summary.json as the last line")] = False,
) -> None:
    """Train as CONFIG says."""
    from ..api import Run
    from ..configuration.config import load_config
    from ..configuration.user_modules import find_named_modules
    from ..reporting.progress import Progress
    from ..storage.run_folder import default_path

    overrides: dict[str, Any] = {"seed": seed, "backend": backend, "workers": workers}
    settings = [*(set_ or []), *([f"stop.rounds={rounds}"] if rounds is not None else [])]
    overrides = {name: value for name, value in overrides.items() if value is not None}
    loaded = load_config(config, preset=preset, settings=settings, overrides=overrides)
    find_named_modules(config, loaded)
    folder = default_path(loaded) if out is None and loaded.out is None and resume is None else out
    with Progress(loaded, quiet=json_) as progress, Run(loaded, out=folder, resume=resume) as running:
        SIGTERM.grace, SIGTERM.grace_s = running.leave, loaded.checkpoint.grace_s
        for event in running:
            progress.show(event)
    progress.finish(running.summary, running.reports, folder=running.folder.path if running.folder else None)
    if json_:
        print(json.dumps(running.summary))


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML file of the experiment", show_default=False)],
    out: Annotated[Path, typer.Option(help="safetensors file to write; a new one")],
    data: Annotated[str | None, typer.Option(help="other data, by name or as a YAML file of a data section")] = None,
    share: Annotated[
        float | None, typer.Option(help="data.public_share: part of the samples that no device has")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="method by name; see `fedbonsai presets`")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="one setting; repeatable")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="seed of model, order and transforms")] = None,
    epochs: Annotated[int, typer.Option(help="passes over the samples")] = 100,
    learning_rate: Annotated[float, typer.Option(help="x0.1 at 1/2 and at 4/5 of the epochs")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Nesterov's")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="L2")] = 5e-4,
    batch_size: Annotated[int, typer.Option(help="samples of a step")] = 128,
    json_: Annotated[bool, typer.Option("--json", help="print the file's metadata as the last line")] = False,
) -> None:
    """Train CONFIG's model centrally on public data, for `init.weights`."""
    from ...learning.training.pretraining import Recipe
    from ..configuration.config import load_config
    from ..configuration.convert import convert
    from ..configuration.user_modules import find_named_modules
    from .pretrain import pretrain as train
    from .pretrain import report

    if data is not None and share is not None:
        raise ConfigError(f"--share is {share:g} and --data is {data!r}; only one of them can name the public samples")
    settings = [*(set_ or []), *([f"data.public_share={share}"] if share is not None else [])]
    loaded = load_config(config, preset=preset, settings=settings, overrides={} if seed is None else {"seed": seed})
    find_named_modules(config, loaded, {"name": data})
    fields = {"epochs": epochs, "learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
    recipe = convert(fields | {"batch_size": batch_size}, Recipe)
    stream = sys.stderr if json_ else sys.stdout
    metadata = train(
        loaded, out=out, data=data, recipe=recipe, note=lambda epoch: print(epoch, file=stream, flush=True)
    )
    print(report(metadata, out=out), file=stream)
    if json_:
        print(json.dumps(metadata))


@app.command()
def advise(
    config: Annotated[Path, typer.Argument(help="YAML file of the experiment", show_default=False)],
    preset: Annotated[str | None, typer.Option(help="method by name; see `fedbonsai presets`")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="one setting; repeatable")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print rows and verdict as one line")] = False,
) -> None:
    """Compare what FedAvg and split training would cost CONFIG's fleet; trains nothing."""
    from rich.console import Console

    from ..configuration.config import load_config
    from ..configuration.user_modules import find_named_modules
    from .advise import COLUMNS, table
    from .advise import advise as compare

    loaded = load_config(config, preset=preset, settings=set_ or [])
    find_named_modules(config, loaded)
    with Console(stderr=True).status("costs of the model") as status:
        advice = compare(loaded, note=status.update)
    if json_:
        print(json.dumps(advice.to_dict()))
        return
    print_table(COLUMNS, table(advice.methods))
    print(advice.verdict)


@app.command()
def presets() -> None:
    """List the methods for `--preset`."""
    from ...policies.presets import PRESETS

    print_table(("preset", "what it does", "source"), [(name, p.description, p.source) for name, p in PRESETS.items()])


@app.command()
def fleets() -> None:
    """List the built-in fleets."""
    from ...clusters import fleet

    rows = []
    for name in fleet.names():
        loaded = fleet.load_fleet(name)
        classes = ", ".join(f"{c.count} {c.name}" for c in loaded.classes)
        rows.append((name, loaded.description, classes))
    print_table(("fleet", "what it is", "classes"), rows)


@app.command()
def models() -> None:
    """List the built-in models for `model:`."""
    from ...learning.models import names

    print_table(("model", "what it is"), list(names().items()))


@app.command()
def probe(
    seconds: Annotated[float, typer.Option(help="how long to measure")] = 3.0,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
) -> None:
    """Measure this machine and print a fleet class for it."""
    from .probe import probe as measure
    from .probe import render_yaml

    if seconds <= 0:
        raise ConfigError(f"--seconds is {seconds:g}; it must be above 0")
    if threads < 1:
        raise ConfigError(f"--threads is {threads}; it must be 1 or more")
    print(render_yaml(measure(seconds=seconds, threads=threads)), end="")


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table to standard output; plain and tab-separated unless that is a terminal."""
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """Run the command line: every error becomes one sentence and an exit code."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own modules in the current folder
    keep_freed_memory()  # in process, this process trains
    with SIGTERM:
        code = exit_code_of(lambda: app(standalone_mode=False))
    sys.exit(TERMINATED if SIGTERM.received and code == INTERRUPTED else code)
