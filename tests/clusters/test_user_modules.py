import os
from pathlib import Path

import pytest
from fedbonsai.clusters.user_modules import python_path, runtime_env_for, user_sources


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder on the import path: a package, a module that imports another, and one that nothing imports."""
    folder = tmp_path / "my code"
    (folder / "kit_xyz").mkdir(parents=True)
    (folder / "kit_xyz" / "__init__.py").write_text("")
    (folder / "kit_xyz" / "inner.py").write_text("import json\nfrom . import other\n")
    (folder / "main_xyz.py").write_text(
        "import numpy\n\ndef make():\n    from helper_xyz import size\n    return size\n"
    )
    (folder / "helper_xyz.py").write_text("import main_xyz\nsize = 3\n")
    (folder / "alone_xyz.py").write_text("")
    monkeypatch.syspath_prepend(str(folder))
    return folder.resolve()


def test_installed_modules_are_not_sent() -> None:
    assert (
        user_sources(["numpy:zeros", "json:loads", "sys", "torch.nn:Linear", "fedbonsai.policies.selection.plain:All"])
        == []
    )
    assert runtime_env_for(["numpy:zeros"], joined=True) == runtime_env_for([], joined=False) == {}


def test_a_package_and_a_module_with_what_it_imports_from_beside_it(home: Path) -> None:
    assert user_sources(["kit_xyz.inner:f"]) == [home / "kit_xyz"]
    assert user_sources(["main_xyz:make", "main_xyz:other"]) == [home / "helper_xyz.py", home / "main_xyz.py"]


def test_a_joined_cluster_gets_the_files(home: Path) -> None:
    assert runtime_env_for(["kit_xyz.inner:f"], joined=True) == {"py_modules": [str(home / "kit_xyz")]}


def test_a_local_worker_gets_the_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    expected = f"{home}{os.pathsep}/elsewhere"
    assert runtime_env_for(["main_xyz:make"], joined=False) == {"env_vars": {"PYTHONPATH": expected}}
    monkeypatch.delenv("PYTHONPATH")
    assert python_path(user_sources(["main_xyz:make"])) == str(home)


@pytest.mark.parametrize("reference", ["no_such_module_xyz:f", ":f", ""])
def test_a_module_that_is_not_there(reference: str) -> None:
    with pytest.raises(ValueError, match=r"names a module that is not on the import path") as caught:
        user_sources([reference])
    assert repr(reference) in str(caught.value)
