"""Makes a user's own code (``module:function`` in a configuration) available on the workers.

A local worker reads the same files, and needs their folder in PYTHONPATH. A node of a joined cluster needs the files: Ray
sends packages and single files named in its runtime environment, here with the modules of the same folder that these import.
Installed modules (site-packages, the standard library, fedbonsai itself) must be on every node and are never sent.

The folder of a configuration is not put on the import path, since any file in it could then be mistaken for a module that some
library tries to import; ``find_beside`` makes only the modules available that the configuration names.
"""

import ast
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class ModulesBeside:
    """Finds modules of given names in one folder, and the modules that these import from there; after all other finders."""

    def __init__(self, folder: Path) -> None:
        """Without names at first."""
        self.folder = folder
        self.names: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``."""
        if path is not None or name not in self.names:
            return None
        spec = PathFinder.find_spec(name, [str(self.folder)])
        if spec is not None and spec.has_location:
            self.names.update(found.stem for found in _neighbours(_location(spec)))
        return spec


def find_beside(folder: Path, modules: Iterable[str]) -> None:
    """Also look in ``folder`` for the modules of ``module`` or ``module:function`` references, in this process."""
    names = {reference.partition(":")[0].partition(".")[0] for reference in modules}
    if not names:
        return
    finder = next((each for each in sys.meta_path if isinstance(each, ModulesBeside) and each.folder == folder), None)
    if finder is None:
        finder = ModulesBeside(folder)
        sys.meta_path.append(finder)
    finder.names |= names
    importlib.invalidate_caches()


def runtime_env_for(modules: Iterable[str], *, joined: bool) -> dict[str, Any]:
    """Ray's runtime environment for the user's ``module`` or ``module:function`` references; {} where none is needed.

    ``joined``: whether the cluster may have nodes that do not have the user's files. Raises ``ValueError`` for a module that
    is not found.
    """
    sources = user_sources(modules)
    if not sources:
        return {}
    if joined:
        return {"py_modules": [str(path) for path in sources]}
    return {"env_vars": {"PYTHONPATH": python_path(sources)}}


def python_path(sources: Iterable[Path]) -> str:
    """PYTHONPATH with the folders of ``sources`` first, for local workers."""
    folders = dict.fromkeys(str(path.parent) for path in sources)
    return os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])


def user_sources(modules: Iterable[str]) -> list[Path]:
    """Files and package folders of the user's own modules, and of those beside them that these import; sorted."""
    found: dict[Path, None] = {}
    pending = []
    for reference in modules:
        name = reference.partition(":")[0].partition(".")[0]
        path = _source(importlib.util.find_spec(name) if name else None, name, reference)
        pending += [path] if path is not None else []
    while pending:
        path = pending.pop()
        if path not in found:
            found[path] = None
            pending += _neighbours(path)
    return sorted(found)


def _source(spec: ModuleSpec | None, name: str, reference: str) -> Path | None:
    """Path of a top-level module; None where it is installed."""
    if spec is None:
        raise ValueError(
            f"{reference!r} names a module that is not on the import path; its folder must be in PYTHONPATH"
        )
    if name == "fedbonsai" or spec.origin in ("built-in", "frozen"):
        return None
    path = _location(spec)
    installed = [Path(sysconfig.get_paths()[kind]).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    return None if any(path.is_relative_to(folder) for folder in installed) else path


def _location(spec: ModuleSpec) -> Path:
    """The file of a module, or the folder of a package."""
    locations = list(spec.submodule_search_locations or [])
    return Path(locations[0] if locations else str(spec.origin)).resolve()


def _neighbours(path: Path) -> list[Path]:
    """Modules beside ``path`` that its files import. Files that cannot be parsed are skipped; importing them fails later."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    names: set[str] = set()
    for file in files:
        try:
            tree = ast.parse(file.read_bytes(), filename=str(file))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    beside = [(path.parent / f"{name}.py", path.parent / name) for name in sorted(names)]
    return [
        folder if (folder / "__init__.py").is_file() else file
        for file, folder in beside
        if file.is_file() or (folder / "__init__.py").is_file()
    ]
