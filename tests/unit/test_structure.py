"""The house: who may import whom, what may not occur, that Python 3.8 can read it."""

import ast
import subprocess
import sys

import pytest
from support import BIN, ROOT
from symbols import dotted

PACKAGE = ROOT / "hvd_vgg"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower floors know nothing of higher ones; modules on one floor may use each other.
FLOORS = [
    {"run.health", "run.output"},
    {"run.watch", "run.lock", "run.coverage", "run.receipt", "run.hosts", "run.files", "run.findings"},
    {"run.host", "run.accelerators", "run.machine", "run.mpi", "run.network", "run.reach"},
    {"config", "model.layers", "data.order", "data.records", "run.log", "run.throughput", "run.advice", "train.schedule"},
    {"data.images", "data.pipeline", "data.index", "model.vgg", "parallel.comm", "parallel.exchange", "parallel.cost"},
    {"data.bad"},
    {
        "data.demo",
        "data.survey",
        "parallel.conformance",
        "parallel.plan",
        "run.devices",
        "train.checkpoint",
        "train.writer",
        "train.optimizer",
        "train.step",
        "train.evaluate",
        "train.state",
        "run.mpirun",
    },
    {"train.tell", "train.profile", "train.nonfinite", "train.history", "run.launch"},
    {"train.loop", "train.benchmark", "train.replay", "train.verify", "run.doctor"},
    {"__main__"},
]
NO_TENSORFLOW = {"config", "data.records", "data.order", "train.schedule", "run.health", "run.log", "run.throughput"}
NO_TENSORFLOW |= {
    "run.watch",
    "run.lock",
    "run.coverage",
    "run.receipt",
    "train.checkpoint",
    "train.history",
    "train.verify",
}
NO_TENSORFLOW |= {"run.files", "run.output", "run.hosts", "run.mpirun", "run.launch"}
NO_TENSORFLOW |= {
    "run.findings",
    "run.host",
    "run.accelerators",
    "run.machine",
    "run.mpi",
    "run.network",
    "run.reach",
    "run.advice",
    "run.doctor",
}
NO_TENSORFLOW |= {"model.layers", "parallel.cost", "parallel.plan"}


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(name):
    return next(number for number, floor in enumerate(FLOORS) if name in floor)


def test_every_module_has_its_floor_and_imports_point_downwards():
    names = {name_of(path) for path in FILES if path.name != "__init__.py"}
    assert names == set().union(*FLOORS)
    for path in FILES:
        if path.name == "__init__.py":
            continue
        for imported in imports_of(path):
            target = imported[len("hvd_vgg.") :] if imported.startswith("hvd_vgg.") else ""
            if target in names:
                assert floor_of(target) <= floor_of(name_of(path)), f"{path} imports {imported}"


@pytest.mark.parametrize(
    ("module", "only"),
    [
        ("horovod", {"parallel.comm"}),
        ("mpi4py", {"parallel.comm"}),
        ("dllogger", {"run.log"}),
        ("absl", {"config"}),
        ("cv2", {"data.images"}),
    ],
)
def test_some_libraries_have_one_importer(module, only):
    users = {name_of(path) for path in FILES if any(name.split(".")[0] == module for name in imports_of(path))}
    assert users == only


def test_plain_modules_import_without_tensorflow():
    program = "import sys\n" + "\n".join(f"import hvd_vgg.{name}" for name in sorted(NO_TENSORFLOW | {"__main__"}))
    program += "\nassert not {'tensorflow', 'horovod', 'mpi4py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_nothing_unsafe_and_nothing_of_keras_is_used():
    for path in FILES:
        text = path.read_text()
        tree = ast.parse(text, feature_version=(3, 8))
        for name in imports_of(path):
            assert name.split(".")[0] not in {"pickle", "cPickle", "marshal", "shelve", "joblib", "keras", "yaml"}, path
            assert not name.startswith(("tensorflow.python", "tensorflow.keras"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = dotted(node.func)
                assert called not in {"eval", "exec", "compile", "shutil.rmtree", "os.system"}, path
                if called in {"np.load", "numpy.load"}:
                    assert {k.arg: k.value.value for k in node.keywords}["allow_pickle"] is False
        assert "ignore_errors" not in text
        assert "tf.keras" not in text


def test_the_loop_can_be_read_in_a_minute():
    tree = ast.parse((PACKAGE / "train" / "loop.py").read_text())
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_train")
    assert train.end_lineno - train.lineno <= 85


def test_the_shell_of_every_script_is_sound():
    scripts = [path for kind in ("*.sh", "*.sbatch", "*/*.sh", "container/*ssh") for path in (ROOT / "launch").glob(kind)]
    scripts.append(ROOT / ".ci" / "run")
    assert len(scripts) >= 17
    subprocess.run([BIN / "shellcheck", "-x", "-P", "SCRIPTDIR", *scripts], check=True)
