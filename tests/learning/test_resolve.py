"""module:function is imported, or refused in one sentence."""

import math

import pytest
from fedbonsai.learning.resolve import error_line, resolve


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder on the import path with a user's code in it."""
    (tmp_path / "code_of_user.py").write_text("class Maker:\n    @staticmethod\n    def make():\n        return 7\n")
    (tmp_path / "code_with_fault.py").write_text("import module_that_is_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_finds_functions_and_dotted_attributes(modules):
    assert resolve("math:sqrt", what="model.name") is math.sqrt
    assert resolve("code_of_user:Maker.make", what="model.name")() == 7


@pytest.mark.parametrize("path", ["resnet18", "a b:c", "module:", ":function", "my-module:f", "m:f:g", "..m:f"])
def test_malformed_path(path):
    with pytest.raises(ValueError, match=r"^loss\.name is .*module:function"):
        resolve(path, what="loss.name")


@pytest.mark.parametrize("module", ["module_that_is_nowhere", "code_of_user.inner", "nowhere.inner"])
def test_missing_module(module, modules):
    with pytest.raises(ValueError, match=f"^data.name is '{module}:f', but there is no module"):
        resolve(f"{module}:f", what="data.name")


def test_missing_attribute(modules):
    with pytest.raises(
        ValueError, match=r"^model\.name is 'code_of_user:Maker\.other', but 'code_of_user' has no 'Maker"
    ):
        resolve("code_of_user:Maker.other", what="model.name")


def test_fault_inside_the_users_module_keeps_its_own_error(modules):
    with pytest.raises(ModuleNotFoundError, match="module_that_is_nowhere"):
        resolve("code_with_fault:f", what="model.name")


def test_an_exception_is_reported_on_one_line():
    assert error_line(KeyError("x")) == "KeyError: 'x'"
    assert error_line(RuntimeError("no kernel\n\nCPU: registered at ...")) == "RuntimeError: no kernel"
    assert error_line(AssertionError()) == "AssertionError"
