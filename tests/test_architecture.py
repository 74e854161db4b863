"""Rules of the repository as tests: allowed imports, modules without Ray and torch, packages, docstrings, links.

The reasons are in docs/architecture.md, "Folders" and "Packaging".
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import fedbonsai
import fedbonsai.policies
import pytest
from fedbonsai.policies.plan import SPLIT_METHODS
from fedbonsai.policies.resolve_policy import BUILT_IN

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
    "actors/ray_backend/actor_group.py",
    "actors/ray_backend/actor_placement.py",
    "actors/ray_backend/distiller_actor.py",
    "actors/ray_backend/failures.py",
    "actors/ray_backend/host_actor.py",
    "actors/ray_backend/partition_hosts.py",
    "actors/ray_backend/ray_distiller.py",
    "actors/ray_backend/ray_pool.py",
    "actors/ray_backend/worker_actor.py",
    "actors/ray_backend/worker_group.py",
    "clusters/ray_backend/checks.py",
    "clusters/ray_backend/nodes.py",
    "clusters/ray_backend/placement.py",
    "clusters/ray_backend/ray_cluster.py",
    "clusters/ray_backend/ray_launcher.py",
    "clusters/ray_backend/reach.py",
    "runtime/execution/ray_session.py",
    "runtime/execution/server_actor.py",
}
# Contract files: pure data, which can be imported without torch.
TORCH_FREE = [
    "learning.parts.part",
    "learning.spec",
    "learning.parts.structure",
    "learning.workload_settings",
    "learning.data.batches",
    "learning.seeds",
    "comms.codec",
]
# Inside a folder, from the top down: each sub-package, or file at its root, may import what stands below it, and itself.
LAYERS = {
    "runtime": [
        "cli", "api", "execution", "checkpointing", "engine", "advice", "storage", "reporting", "configuration", "simulation",
        "events", "errors",
    ],
    "actors": [
        "ray_backend", "inline_pool", "enforcement", "pool", "lifecycle", "host", "distiller", "device", "server", "support",
        "replay", "messages", "plan_listener",
    ],
    "policies": [
        "resolve_policy", "advice", "presets", "scheduling", "compression", "partitioning", "progressive", "pruning",
        "sparsity", "aggregation",
        "selection", "policy", "checks", "decision", "tasks", "view", "report", "estimate", "plan",
    ],
    "comms": ["links", "codecs", "entropy", "ray_channel", "packet", "channel", "ledger", "stages", "codec", "errors"],
    "learning": [
        "workload", "pretrained", "architecture", "aggregation", "movement", "costs", "training", "models", "narrowing",
        "parts", "sparse", "workload_settings", "data",
    ],
    "clusters": ["ray_backend", "fleet"],
}  # fmt: skip
# Known circular imports: sorted lists of files. There should be none.
CIRCLES = []
LIBRARY = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OUTSIDE = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
OWN_ROOT = [ROOT / "__init__.py", ROOT / "__main__.py"]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def module_of(path):
    parts = ["fedbonsai", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, nodes=None):
    """Absolute names of all modules that a file imports, at its top or inside functions; or of those in ``nodes``."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in nodes or ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_the_folders_are_those_that_exist():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(FOLDERS) == set(MAY_IMPORT)


def test_imports_between_folders_are_allowed():
    wrong = []
    for path in LIBRARY:
        folder = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            first, *rest = name.split(".")
            allowed = rest[0] in MAY_IMPORT[folder] if first == "fedbonsai" else first != "ray" or name_of(path) in RAY
            if not allowed:
                wrong.append(f"{name_of(path)} imports {name}")
    assert not wrong


def layer(folder, parts):
    """Rank of a module of a folder among its layers, 0 at the top; files in no layer are below all."""
    layers = LAYERS[folder]
    return layers.index(parts[0]) if parts and parts[0] in layers else len(layers)


def test_imports_inside_a_folder_go_down():
    wrong = []
    for path in LIBRARY:
        folder, *inner = path.relative_to(ROOT).with_suffix("").parts
        for name in imports(path):
            own, *rest = name.split(".")
            if (
                own == "fedbonsai"
                and rest[0] == folder
                and len(rest) > 1
                and layer(folder, rest[1:]) < layer(folder, inner)
            ):
                wrong.append(f"{name_of(path)} imports {name}")
    assert not wrong


def imported_first(statements):
    """The import statements that run when a module is imported: not those in functions and under ``if TYPE_CHECKING``."""
    for node in statements:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING":
            yield from imported_first(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "handlers", "finalbody"):
                yield from imported_first(getattr(node, field, []))


def import_graph():
    """For each module of the library, by file name, the other modules that it imports when it is imported."""
    files = {module_of(path): name_of(path) for path in LIBRARY}
    graph = {}
    for path in LIBRARY:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = imports(path, imported_first(tree.body))
        modules = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[name_of(path)] = {files[module] for module in modules if module in files} - {name_of(path)}
    return graph


def reachable(graph, start):
    """All modules that ``start`` imports, directly or through others."""
    found, waiting = set(), [start]
    while waiting:
        for name in graph[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def test_no_modules_import_each_other_in_a_circle():
    graph = import_graph()
    found = {name: reachable(graph, name) for name in graph}
    circles = {
        frozenset({other for other in found[name] if name in found[other]}) for name in graph if name in found[name]
    }
    assert sorted(sorted(circle) for circle in circles) == CIRCLES


def test_a_sub_package_says_what_is_in_it_and_has_few_files():
    packages = [path for path in LIBRARY if path.name == "__init__.py" and path.parent.parent != ROOT]
    assert not [name_of(path) for path in packages if not ast.get_docstring(ast.parse(path.read_text()))]
    sizes = {name_of(path.parent): len(list(path.parent.glob("*.py"))) - 1 for path in packages}
    assert not {name: size for name, size in sizes.items() if size > 15}


def test_the_list_of_files_that_import_ray_is_true():
    importing = {name_of(path) for path in LIBRARY if any(name.split(".")[0] == "ray" for name in imports(path))}
    assert importing == RAY


def froms(path):
    """All ``from ... import`` of a file."""
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]


def test_imports_inside_are_relative_and_those_outside_absolute():
    absolute = [(path, node.module) for path in LIBRARY for node in froms(path) if node.level == 0]
    assert not [name_of(path) for path, module in absolute if str(module).split(".")[0] == "fedbonsai"]
    assert not [name_of(path) for path in OUTSIDE for node in froms(path) if node.level]


def run_blocked(blocked, code, **environment):
    """Run code in a new process in which importing any of these fails; returns its standard output."""
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
    folders = ("policies", "clusters")
    paths = [path for path in LIBRARY if path.relative_to(ROOT).parts[0] in folders and name_of(path) not in RAY]
    modules = [module_of(path) for path in paths]
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
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.spec import ServerOptimiser
from fedbonsai.learning.parts.part import whole
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
report, update, state = Device(Workload(settings)).run(plan_message(plan), [bytearray_of(packet)])
assert msgspec.msgpack.decode(report, type=Answer).outcome.value == "done"
server.fold(plan, server.open(plan, bytearray_of(update)), weight=1.0)
server.close_version(in_flight=())
assert server.model_hash() != before
print("ok")
"""


def test_one_device_round_from_bytes_to_bytes_without_ray():
    """Only bytes pass between the two: each packet is copied out of the process's own arrays."""
    copy = "import numpy as np\nbytearray_of = lambda array: np.frombuffer(bytearray(array.tobytes()), np.uint8)\n"
    assert run_blocked(POSIX_ONLY, copy + DEVICE_ROUND) == "ok\n"


EXPORTING = [fedbonsai, fedbonsai.policies]


@pytest.mark.parametrize("package", EXPORTING, ids=lambda package: package.__name__)
def test_importing_a_package_that_exports_imports_nothing_heavy(package):
    code = f"import {package.__name__}\nprint([m for m in ('torch', 'ray', 'numpy', 'msgspec') if m in sys.modules])"
    assert run_blocked(set(), code) == "[]\n"


@pytest.mark.parametrize("package", EXPORTING, ids=lambda package: package.__name__)
def test_every_exported_name_exists(package):
    version = ["__version__"] if hasattr(package, "__version__") else []
    assert package.__all__ == [*version, *sorted(package._EXPORTS)]
    assert dir(package) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=rf"^module '{package.__name__}' has no attribute 'nonsense'$"):
        _ = package.nonsense


def test_policies_export_the_built_in_ones():
    assert {each.__name__ for each in BUILT_IN.values()} <= set(fedbonsai.policies.__all__)


def declared(field):
    """A field of pyproject.toml that is also Python (Python 3.10 has no reader for TOML)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(rf"^{field} = (\[.*?^\]|\".*?\")$", text, re.DOTALL | re.MULTILINE)[1])


def test_the_package_list_is_complete():
    packages = declared("packages")
    assert sorted(packages) == sorted({module_of(path) for path in [*OWN_ROOT, *LIBRARY] if path.name == "__init__.py"})
    # A folder of code without an __init__.py would be missing from the wheel without an error.
    assert {module_of(path.parent / "__init__.py") for path in LIBRARY} <= set(packages)


def test_the_version_is_the_same_in_both_places():
    assert declared("version") == fedbonsai.__version__


def test_no_other_module_is_at_the_root():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]


def public(tree):
    """Public functions, classes and methods of a module, with their names."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
                yield from ((f"{node.name}.{inner.name}", inner) for inner in methods if not inner.name.startswith("_"))


def test_every_public_name_has_a_docstring():
    trees = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in [*OWN_ROOT, *LIBRARY]}
    assert not [name for name, tree in trees.items() if not (name.endswith("__init__.py") or ast.get_docstring(tree))]
    assert not [
        (name, each) for name, tree in trees.items() for each, node in public(tree) if not ast.get_docstring(node)
    ]


def test_functions_fit_on_a_screen():
    long = []
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{name_of(path)}: {node.name}")
    assert not long


def texts(node):
    """All text constants in an expression or a pattern."""
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def comparisons_of(tree, attribute):
    """Places where an attribute of this name is compared or matched: the line, and the texts that it is compared with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            subjects, others = [node.left, *node.comparators], [node]
        elif isinstance(node, ast.Match):
            subjects, others = [node.subject], [case.pattern for case in node.cases]
        elif isinstance(node, ast.Subscript):
            subjects, others = [node.slice], [node.value]
        else:
            continue
        if any(isinstance(each, ast.Attribute) and each.attr == attribute for each in subjects):
            yield node.lineno, set().union(*map(texts, others))


def test_only_the_table_of_split_methods_tells_them_apart_by_name():
    found = []
    for path in LIBRARY:
        if name_of(path) != "policies/plan.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [
                (name_of(path), line) for line, names in comparisons_of(tree, "mode") if names & set(SPLIT_METHODS)
            ]
    assert not found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("plan.split.mode == 'ecofed'", True),
        ("split.mode in ('splitfed', 'local_loss')", True),
        ("'ecofed' != split.mode", True),
        ("{'ecofed': 1}[split.mode]", True),
        ("match split.mode:\n    case 'ecofed':\n        pass", True),
        ("init.mode == 'random'", False),
        ("Split(cut='a', mode='ecofed')", False),
        ("split.method.trains_front", False),
    ],
)
def test_a_comparison_of_a_mode_with_a_method_is_found(code, found):
    names = set().union(*(names for _, names in comparisons_of(ast.parse(code), "mode")))
    assert bool(names & set(SPLIT_METHODS)) is found


def test_nothing_is_left_undone():
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    assert not [name_of(path) for path in LIBRARY if marks.search(path.read_text(encoding="utf-8"))]


# These check input from outside: files, packets, messages, objects of users. Python drops asserts with -O.
NO_ASSERTS = {
    "actors/device/device_leg.py",
    "actors/messages/plan_message.py",
    "clusters/availability.py",
    "clusters/units.py",
    "clusters/yaml_text.py",
    "comms/packet.py",
    "comms/links/receive.py",
    "policies/checks/answer.py",
    "policies/checks/fields.py",
    "policies/resolve_policy.py",
    "policies/checks/type_check.py",
    "runtime/engine/call_policy.py",
    "runtime/engine/folding.py",
    "runtime/storage/files.py",
    "runtime/checkpointing/folder.py",
    "runtime/checkpointing/types.py",
    "runtime/checkpointing/checkpoints.py",
    "runtime/configuration/config.py",
    "runtime/storage/event_log.py",
    "runtime/events.py",
    "runtime/configuration/layers.py",
    "runtime/engine/saved_loop.py",
    "runtime/storage/marker.py",
    "runtime/execution/resume.py",
    "runtime/storage/run_folder.py",
    "runtime/execution/saver.py",
    "runtime/checkpointing/snapshot.py",
    "runtime/engine/saved_state.py",
    "runtime/checkpointing/restore.py",
}


def test_input_from_outside_is_not_checked_by_asserts():
    trees = {name: ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in sorted(NO_ASSERTS)}
    found = [
        (name, node.lineno) for name, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.Assert)
    ]
    assert not found


HIDDEN = {".venv", ".git", ".typecheck"}
PAGES = sorted(path for path in ROOT.rglob("*.md") if not HIDDEN & set(path.relative_to(ROOT).parts))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_has_a_target(page):
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
