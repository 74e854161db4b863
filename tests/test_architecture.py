"""Rules of the repository that can be tests: who may import whom, where Ray and torch stay out, packages, docstrings, links.

The reasons are in docs/architecture.md, "Folders" and "Packaging".
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import fedbonsai
import pytest

from .runtime.processes import LIMIT_S

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("runtime", "actors", "policies", "clusters", "comms", "learning")
# Of our own folders, which ones each may import. Policies see learning's data types only (TORCH_FREE says which).
MAY_IMPORT = {
    "runtime": set(FOLDERS),
    "actors": {"actors", "policies", "clusters", "comms", "learning"},
    "policies": {"policies", "clusters", "comms", "learning"},
    "clusters": {"clusters"},
    "comms": {"comms"},
    "learning": {"learning"},
}
RAY = {
    "comms/ray_channel.py",
    "actors/ray_crew.py",
    "actors/ray_place.py",
    "actors/ray_host_crew.py",
    "actors/ray_starts.py",
    "actors/ray_faults.py",
    "actors/ray_host.py",
    "actors/ray_hosts.py",
    "actors/ray_link.py",
    "actors/ray_pool.py",
    "actors/ray_worker.py",
    "clusters/checks.py",
    "clusters/nodes.py",
    "clusters/placement.py",
    "clusters/ray_cluster.py",
    "clusters/ray_launcher.py",
    "clusters/ray_signals.py",
    "clusters/reach.py",
    "runtime/ray_session.py",
}
# Contract files: pure data, readable where there is no torch.
TORCH_FREE = [
    "learning.part",
    "learning.spec",
    "learning.structure",
    "learning.amount",
    "learning.seeds",
    "comms.codecs",
]
LIBRARY = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OUTSIDE = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
OWN_ROOT = [ROOT / "__init__.py", ROOT / "__main__.py"]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def module_of(path):
    parts = ["fedbonsai", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Absolute names of all modules that a file imports, at its top or inside functions."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_the_folders_are_those_that_exist():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(FOLDERS) == set(MAY_IMPORT)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_point_the_right_way(path):
    folder = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "fedbonsai":
            assert rest[0] in MAY_IMPORT[folder], f"{name_of(path)} imports {name}"
        assert first != "ray" or name_of(path) in RAY, f"{name_of(path)} imports Ray"


def test_the_list_of_files_that_import_ray_is_true():
    importing = {name_of(path) for path in LIBRARY if any(name.split(".")[0] == "ray" for name in imports(path))}
    assert importing == RAY


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_inside_are_relative(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert not [node.module for node in absolute if str(node.module).split(".")[0] == "fedbonsai"]


@pytest.mark.parametrize("path", OUTSIDE, ids=name_of)
def test_imports_outside_are_absolute(path):
    assert not [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
    ]


def run_blocked(blocked, code, **environment):
    """Run code in a new process in which importing any of these fails; its standard output."""
    block = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Block())
for name in list(sys.modules):
    if name.split(".")[0] in {blocked!r}:
        del sys.modules[name]
"""
    result = subprocess.run(
        [sys.executable, "-c", block + code],
        capture_output=True, text=True, timeout=LIMIT_S, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_preset_of_resfed_finishes_without_constriction():
    code = """
import fedbonsai
settings = ["stop.rounds=3", "evaluation.where=server"]
run = fedbonsai.run("examples/digits.yaml", preset="resfed", backend="inline", settings=settings)
assert {type(event).__name__ for event in run} >= {"RunEnded"}
print(run.summary["outcomes"]["done"], run.summary["up_by_kind"]["weights"])
"""
    done, size = map(int, run_blocked({"constriction"}, code).split())
    assert done == 24
    assert size < 24 * 2000


def test_policies_and_contracts_need_no_torch():
    modules = [module_of(path) for path in LIBRARY if path.parts[-2] in ("policies", "clusters")]
    modules = [module for module in modules if module.split(".")[-1] not in {Path(name).stem for name in RAY}]
    modules += [f"fedbonsai.{name}" for name in TORCH_FREE]
    code = "".join(f"import {module}\n" for module in modules)
    code += "assert not [name for name in sys.modules if name.split('.')[0] == 'torch']\n"
    # A policy can be named, made and asked for its fields without torch.
    code += "from fedbonsai.policies.resolve_policy import make_policy\nprint(make_policy([{'name': 'random', 'cohort': 2}]))"
    assert run_blocked({"torch", "torchvision", "ray"}, code) == "RandomCohort(cohort=2)\n"


POSIX_ONLY = {"ray", "resource", "fcntl", "grp", "pwd", "termios"}
WHOLE_RUN = """
import fedbonsai
settings = ["stop.rounds=2", "evaluation.where=both", "data.test_share=0.2"]
run = fedbonsai.run(backend="inline", settings=settings, out=sys.argv[-1])
assert [type(event).__name__ for event in run][-1] == "RunEnded"
assert run.summary["rounds"] == 2, run.summary
run.model()
print(run.summary["model_hash"])
"""


def test_a_whole_experiment_runs_without_ray_and_without_posix(tmp_path):
    found = run_blocked(POSIX_ONLY, f"sys.argv.append({str(tmp_path / 'run')!r})\n" + WHOLE_RUN)
    settings = ["stop.rounds=2", "evaluation.where=both", "data.test_share=0.2"]
    here = fedbonsai.run(backend="inline", settings=settings)
    for _ in here:
        pass
    assert found.strip() == here.summary["model_hash"]


DEVICE_ROUND = """
import msgspec
from fedbonsai.actors.device import Device
from fedbonsai.actors.plan_message import plan_message
from fedbonsai.actors.server import Server
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.spec import ServerOptimiser
from fedbonsai.learning.part import whole
from fedbonsai.learning.spec import Call, Training
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import WorkloadSettings
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.report import Answer

settings = WorkloadSettings(model=Call("digits_cnn"), data=DataConfig(), metrics=(), num_devices=20, seed=1)
server = Server(Workload(settings), channel=LocalChannel(), optimiser=ServerOptimiser())
plan = Plan(id=1, device=3, version=0, part=whole(server.workload.spec), training=Training(), seed=2)
before = server.model_hash()
packet = server.send(plan).packets[0]
report, update, state = Device(settings).run(plan_message(plan), [bytearray_of(packet)])
assert msgspec.msgpack.decode(report, type=Answer).outcome.value == "done"
server.fold(plan, server.open(plan, bytearray_of(update)), weight=1.0)
server.close_version(in_flight=())
assert server.model_hash() != before
print("ok")
"""


def test_one_device_round_from_bytes_to_bytes_without_ray():
    """Nothing but bytes passes between the two: each packet is copied out of the process's own arrays."""
    copy = "import numpy as np\nbytearray_of = lambda array: np.frombuffer(bytearray(array.tobytes()), np.uint8)\n"
    assert run_blocked(POSIX_ONLY, copy + DEVICE_ROUND) == "ok\n"


def test_importing_the_package_imports_nothing_heavy():
    code = "import fedbonsai\nprint([m for m in ('torch', 'ray', 'numpy', 'msgspec') if m in sys.modules])"
    assert run_blocked(set(), code) == "[]\n"


def test_every_exported_name_is_there():
    assert fedbonsai.__all__ == ["__version__", *sorted(fedbonsai._EXPORTS)]
    assert dir(fedbonsai) == sorted(fedbonsai.__all__)
    for name in fedbonsai.__all__:
        assert getattr(fedbonsai, name) is not None
    with pytest.raises(AttributeError, match=r"^module 'fedbonsai' has no attribute 'nonsense'$"):
        _ = fedbonsai.nonsense


def declared(field):
    """A field of pyproject.toml that is also Python (Python 3.10 has no reader for TOML)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(rf"^{field} = (\[.*?^\]|\".*?\")$", text, re.DOTALL | re.MULTILINE)[1])


def test_the_package_list_is_complete():
    packages = declared("packages")
    assert sorted(packages) == sorted({module_of(path) for path in [*OWN_ROOT, *LIBRARY] if path.name == "__init__.py"})
    # A folder of code without an __init__.py would be missing from the wheel without a word.
    assert {module_of(path.parent / "__init__.py") for path in LIBRARY} <= set(packages)


def test_the_version_is_told_once():
    assert declared("version") == fedbonsai.__version__


def test_no_other_module_lies_at_the_root():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]


def public(tree):
    """Public functions, classes and methods of a module, with their names."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
                yield from ((f"{node.name}.{inner.name}", inner) for inner in methods if not inner.name.startswith("_"))


@pytest.mark.parametrize("path", [*OWN_ROOT, *LIBRARY], ids=name_of)
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert path.name == "__init__.py" or ast.get_docstring(tree), "the module"
    assert not [name for name, node in public(tree) if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_functions_fit_on_a_screen(path):
    functions = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 60]


def test_nothing_is_left_undone():
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    assert not [name_of(path) for path in LIBRARY if marks.search(path.read_text(encoding="utf-8"))]


# They judge what comes from outside: files, packets, messages, users' objects. Python drops asserts when it is told to (-O).
NO_ASSERTS = {
    "actors/device_leg.py",
    "actors/plan_message.py",
    "clusters/traces.py",
    "clusters/units.py",
    "clusters/yaml_text.py",
    "comms/packet.py",
    "comms/receive.py",
    "policies/answer.py",
    "policies/fields.py",
    "policies/resolve_policy.py",
    "policies/type_check.py",
    "runtime/ask.py",
    "runtime/checkpoint_files.py",
    "runtime/checkpoint_place.py",
    "runtime/checkpoint_types.py",
    "runtime/checkpoints.py",
    "runtime/config.py",
    "runtime/event_log.py",
    "runtime/events.py",
    "runtime/layers.py",
    "runtime/loop_state.py",
    "runtime/manifest.py",
    "runtime/marker.py",
    "runtime/resume.py",
    "runtime/run_folder.py",
    "runtime/saver.py",
    "runtime/snapshot.py",
    "runtime/state.py",
    "runtime/thaw.py",
}


@pytest.mark.parametrize("name", sorted(NO_ASSERTS))
def test_what_comes_from_outside_is_not_checked_by_asserts(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


HIDDEN = {".venv", ".git", ".typecheck"}
PAGES = sorted(path for path in ROOT.rglob("*.md") if not HIDDEN & set(path.relative_to(ROOT).parts))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:|#", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve()
        assert found.exists(), f"{name_of(page)} links to {target}"
        if anchor and found.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{name_of(page)} links to {target}"
