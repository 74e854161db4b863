"""``fedbonsai pretrain``: trains the configured model on public samples, and saves it with the provenance of its weights.

Public samples are the public share of the configured data (``data.public_share``), which no device of any run has, or another
data set. ``init.weights`` takes the file. Its metadata state what it was trained on, so that a run can detect that its devices
hold samples of the pretraining (``reporting.provenance``).
"""

import copy
import json
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from ...clusters.yaml_text import read_yaml
from ...learning.costs.cost import part_cost
from ...learning.data.config import DataConfig
from ...learning.data.load import load, load_public
from ...learning.data.targets import check_targets
from ...learning.data.transforms import apply_checked
from ...learning.data.types import FederatedData
from ...learning.models import build, use_batch_statistics
from ...learning.parts.blocks import cut
from ...learning.parts.part import whole
from ...learning.parts.submodel import compile_part
from ...learning.seeds import derive
from ...learning.sparse.selection import make_sparse
from ...learning.spec import Training
from ...learning.store import model_hash
from ...learning.training.evaluation import evaluate
from ...learning.training.losses import default_metrics, make_loss, make_metric
from ...learning.training.precision import has_layouts
from ...learning.training.pretraining import Epoch, Recipe
from ...learning.training.pretraining import pretrain as train_epochs
from ...learning.training.step_times import alternatives, measured_form, step_times
from ...learning.training.training import train
from ..configuration.config import Config
from ..configuration.convert import convert
from ..configuration.layers import expand_shorthands
from ..configuration.learning_checks import try_model
from ..configuration.resolution import in_form, is_open
from ..configuration.user_modules import find_named_modules
from ..engine.step_measurement import emulating_here
from ..errors import ConfigError, RunError
from ..storage.run_folder import environment


def pretrain(
    config: Config,
    *,
    out: Path,
    data: str | None = None,
    recipe: Recipe | None = None,
    note: Callable[[Epoch], None] = lambda epoch: None,
) -> dict[str, str]:
    """Train the configured model by ``recipe``, and write the best weights to the new file ``out``; returns its metadata.

    ``data``: name of another data set, or a YAML file with a data section (None: the public share of the configured data).
    ``note``: called with each epoch. The initial model follows from the seed; ``config.init`` is ignored.
    Raises ``ConfigError`` for a user's mistake, before training; ``RunError`` if no epoch has a finite loss, or the file can no
    longer be written.
    """
    recipe = recipe or Recipe()
    partial = _reserve(out)
    try:
        source, samples = _data(config, data)
        model = _model(in_form(config), samples, recipe)
        config = _measured(config, model, samples, recipe)
        best = None
        for epoch in train_epochs(
            model,
            samples,
            recipe=recipe,
            training=config.training,
            loss=make_loss(config.training.loss),
            seed=derive(config.seed, "pretrain"),
        ):
            note(epoch)
            best = epoch if epoch.best else best
        if best is None:
            raise RunError("pretraining: no epoch has a finite loss; lower the learning rate", stage="train")
        metadata = _provenance(config, source, samples, model, recipe=recipe, best=best)
        _save(partial, out, model, metadata)
        return metadata
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (IndexError, RuntimeError) as error:  # a label without an output of the model; out of memory
        raise RunError(f"pretraining failed: {error}", stage="train") from error
    finally:
        _remove_unused(out, partial)


def report(metadata: dict[str, str], *, out: Path) -> str:
    """Lines for the user: what was saved, and the settings of a run that uses it."""
    figures = ", ".join(
        f"{n} {metadata[n]}" for n in ("accuracy", "loss", "test_accuracy", "test_loss") if n in metadata
    )
    settings = ["init.mode=partial", f"init.weights={out}"]
    if float(metadata["public_share"]) < 1:
        settings += [f"data.public_share={metadata['public_share']}", f"data.public_seed={metadata['public_seed']}"]
    return (
        f"{out}: epoch {metadata['best_epoch']} of {metadata['epochs']} on {metadata['samples']} samples of "
        f"{metadata['data']}; {figures}\nfor a run: {' '.join(f'--set {setting}' for setting in settings)}"
    )


def _reserve(out: Path) -> Path:
    """Create ``out``, which must not exist, and an empty file beside it, which is returned. Raises ``ConfigError``.

    A file that cannot be written is found before training, no existing file is ever replaced, and of two processes with the
    same ``out`` the second is refused.
    """
    partial = out.with_name(f".{out.name}.{secrets.token_hex(8)}.partial")  # a unique name
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("xb").close()
        partial.open("xb").close()
    except OSError as error:
        if out.exists():
            raise ConfigError(f"--out is {str(out)!r}, which exists already; name a new file") from error
        raise ConfigError(f"--out is {str(out)!r}, which cannot be written: {error.strerror}") from error
    return partial


def _remove_unused(out: Path, partial: Path) -> None:
    """Remove what ``_reserve`` created, unless ``out`` was written."""
    partial.unlink(missing_ok=True)
    if out.is_file() and not out.stat().st_size:
        out.unlink()


def _data(config: Config, other: str | None) -> tuple[DataConfig, FederatedData]:
    """The settings of the public samples, and the samples as those of one device."""
    seed = derive(config.seed, "data")
    if other is None:
        if not config.data.public_share:
            raise ConfigError(
                "data.public_share is 0; pretraining needs a share that no device has (--share 0.1), or other data (--data)"
            )
        return config.data, load_public(config.data, num_devices=config.load_fleet().num_devices, seed=seed)
    source = _section(other) if other.endswith((".yaml", ".yml")) else _named(config.data, other)
    if (source.name, source.root, source.kwargs) == (config.data.name, config.data.root, config.data.kwargs):
        raise ConfigError(f"--data is {other!r}, which is what the devices have; take a share of it (--share 0.1)")
    return source, load(source, num_devices=1, seed=seed)


def _named(own: DataConfig, name: str) -> DataConfig:
    """Another data set with the transforms and the folder of the configured one."""
    return DataConfig(
        name=name,
        root=own.root,
        download=own.download,
        server_test=own.server_test,
        train_transforms=own.train_transforms,
        test_transforms=own.test_transforms,
    )


def _section(path: str) -> DataConfig:
    """The data section in a YAML file."""
    try:
        raw = read_yaml(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--data is {path!r}, which cannot be read: {error}") from error
    source = convert(expand_shorthands({"data": raw})["data"], DataConfig)
    find_named_modules(path, source)
    if source.test_share or source.public_share:
        raise ConfigError(f"--data is {path!r}, which sets test_share or public_share; all its samples are public")
    return source


def _model(config: Config, data: FederatedData, recipe: Recipe) -> nn.Module:
    """The configured model with as many outputs as the public data have classes.

    Raises ``ValueError`` if it does not fit the data.
    """
    model = build(config.model, seed=derive(config.seed, "model"), outputs=data.num_classes)
    if config.server.statistics == "batch":
        use_batch_statistics(model)
    if config.training.sparsity is not None:
        make_sparse(model, config.training.sparsity)
    blocks, samples = cut(model), data.train(0)
    samples = samples.take(np.arange(min(2, len(samples))))
    inputs = apply_checked(data.test_transform, samples.x, field="data.test_transforms")
    training = recipe.training(config.training)
    check_targets(data, loss=config.training.loss, output=try_model(model, inputs, training))
    part_cost(
        compile_part(whole(blocks.spec), blocks),
        example=(inputs[0], samples.y[0]),
        training=training,
        loss=make_loss(config.training.loss),
    )
    return model


def _measured(config: Config, model: nn.Module, data: FederatedData, recipe: Recipe) -> Config:
    """``config`` with the precision and layout in which training steps of ``model`` are fast, where it leaves them open."""
    if not is_open(config.training):
        return config
    samples, loss = data.train(0), make_loss(config.training.loss)
    options = alternatives(recipe.training(config.training), layouts=has_layouts(model), bf16=not emulating_here())

    def steps(training: Training, trial: nn.Module, count: int) -> None:
        training = msgspec.structs.replace(training, steps=count)
        train(trial, samples, training=training, loss=loss, transform=data.train_transform, seed=0)

    # Other threads compute too, so that this one's own time would not tell.
    trials = [partial(steps, each, copy.deepcopy(model)) for each in options]
    seconds = step_times(trials, now=time.perf_counter) if len(trials) > 1 else []
    return in_form(config, measured_form(options, seconds))


def _provenance(
    config: Config, source: DataConfig, data: FederatedData, model: nn.Module, *, recipe: Recipe, best: Epoch
) -> dict[str, str]:
    """The file's metadata, as text: safetensors allows nothing else."""
    test, test_figures = data.server_test(), dict[str, float]()
    if test is not None:
        metrics = {call.name: make_metric(call) for call in default_metrics(config.training.loss, test.y[0])}
        loss = make_loss(config.training.loss)
        test_figures = evaluate(model, test, loss=loss, metrics=metrics, transform=data.test_transform)
    versions = environment()
    return {
        "fedbonsai": str(versions["packages"]["fedbonsai"]),
        "torch": str(versions["packages"]["torch"]),
        "commit": versions["commit"] or "",
        "model": config.model.name,
        "model_kwargs": json.dumps(config.model.kwargs),
        "blocks": ",".join(cut(model).spec.block_names),
        "hash": model_hash(model.state_dict()),
        "data": source.name,
        "data_digest": data.digest()["data"],
        "public_share": f"{source.public_share or 1.0:g}",
        "public_seed": str(source.public_seed),
        "samples": str(data.num_samples(0)),
        "seed": str(config.seed),
        "recipe": msgspec.json.encode(recipe).decode(),
        "epochs": str(recipe.epochs),
        "best_epoch": str(best.number),
        **{name: f"{value:.6g}" for name, value in best.figures.items()},
        **{f"test_{name}": f"{value:.6g}" for name, value in test_figures.items()},
    }


def _save(partial: Path, out: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write the file atomically. Raises ``RunError``."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}
    try:
        save_file(state, partial, metadata=metadata)
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        raise RunError(f"--out is {str(out)!r}, which can no longer be written: {error}", stage="write") from error
