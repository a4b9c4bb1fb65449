"""The structure of the package: which folder may import which, what no code may do, how long functions may be."""

import ast
import subprocess
import sys

import pytest
from support import ROOT
from tensorflow_names import dotted

PACKAGE = ROOT / "hvd_vgg"
# From low to high: a module imports from its own folder and from lower layers, not from the other folders of its layer.
LAYERS = [
    {"root"},
    {"data", "models", "parallel", "reporting", "weights"},
    {"training", "pages"},
    {"export"},
    {"launcher"},
    {"doctor"},
    {"commands"},
    {"__main__"},
]
ALLOWED = {("parallel.cost", "models"), ("parallel.exchange", "models"), ("weights.source", "models")}
ALLOWED |= {(f"weights.{module}", "models") for module in ("files", "keras", "pieces", "torch_names")}
# What answers at once, or on a host whose TensorFlow is broken: it, and all that it imports, imports without TensorFlow.
NO_TENSORFLOW = (
    "__main__",
    "launcher.supervisor",
    "doctor.runner",
    "commands.plan",
    "commands.runs",
    "commands.report",
    "commands.verify",
    "commands.history",
    "commands.prepare",
)
TENSORFLOW = {"tensorflow", "horovod", "mpi4py"}
TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(), str(path), feature_version=(3, 8))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def folder_of(module):
    """Returns the folder of a module; __main__ and the other modules at the top are `__main__` and `root`."""
    folder, _, rest = module.partition(".")
    return folder if rest or folder == "__main__" else "root"


def imports_of(tree):
    """Yields all that is imported anywhere in a module, by its full name, with the name that holds it where it is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_of(tree):
    """Returns the modules of the package that a module imports."""
    return {name[len("hvd_vgg.") :] for name in imports_of(tree) if name.startswith("hvd_vgg.")} & set(TREES)


def layer_of(folder):
    return next(number for number, layer in enumerate(LAYERS) if folder in layer)


def functions():
    """Yields (module, function) for all functions of the package."""
    for module, tree in TREES.items():
        yield from ((module, node) for node in ast.walk(tree) if isinstance(node, FUNCTION))


def lines_of(function):
    return function.end_lineno - function.lineno + 1


def test_imports_point_downwards():
    """Folders are layers, so that no cycle of packages is possible."""
    wrong = [
        f"{module} imports {imported}"
        for module, tree in TREES.items()
        for imported in modules_of(tree)
        if folder_of(imported) != folder_of(module)
        and layer_of(folder_of(imported)) >= layer_of(folder_of(module))
        and (module, folder_of(imported)) not in ALLOWED
    ]
    assert not wrong


def test_imports_make_no_cycle_of_modules():
    left = {module: modules_of(tree) for module, tree in TREES.items()}
    while True:
        free = {module for module, needed in left.items() if not needed & set(left)}
        if not free:
            break
        left = {module: needed for module, needed in left.items() if module not in free}
    assert not left, f"in a cycle, or above one: {sorted(left)}"


@pytest.mark.parametrize(
    ("library", "users"),
    [
        ("horovod", "parallel."),
        ("mpi4py", "parallel."),
        ("absl", "flags"),
        ("cv2", "data."),
        ("PIL", "data."),
        ("dllogger", "reporting.log"),
    ],
)
def test_imports_of_a_library_are_in_one_place(library, users):
    found = {module for module, tree in TREES.items() if any(name.split(".")[0] == library for name in imports_of(tree))}
    assert found and all(module.startswith(users) for module in found)


def test_imports_without_tensorflow_work():
    """Each in order, in one process in which TensorFlow, Horovod and mpi4py cannot be imported."""
    program = f"import sys\nsys.modules.update(dict.fromkeys({sorted(TENSORFLOW)}))\n"
    program += "\n".join(f"import hvd_vgg.{name}" for name in NO_TENSORFLOW)
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_package_uses_nothing_unsafe():
    for module, tree in TREES.items():
        for name in imports_of(tree):
            assert name.split(".")[0] not in {"pickle", "cPickle", "marshal", "shelve", "joblib", "keras", "yaml"}, module
            assert not name.startswith(("tensorflow.python", "tensorflow.keras")), module
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = dotted(node.func)
                assert called not in {"eval", "exec", "compile", "shutil.rmtree", "os.system"}, module
                named = {keyword.arg: keyword.value for keyword in node.keywords}
                assert "ignore_errors" not in named, module
                if called in {"np.load", "numpy.load"}:
                    assert named["allow_pickle"].value is False, module
            assert not (isinstance(node, ast.Attribute) and dotted(node).startswith("tf.keras")), module


def root_of(node):
    """Returns the name `a` of targets such as a, a.b, a[0].b."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def changed_names(function):
    """Yields the names whose value a function changes in place: assigns to parts of, or calls a method that changes it."""
    changing = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popleft", "popitem", "remove"}
    changing |= {"discard", "clear", "appendleft", "sort", "reverse"}
    for node in ast.walk(function):
        targets = getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(node, ast.stmt) else []
        yield from (root_of(each) for each in targets if isinstance(each, (ast.Attribute, ast.Subscript)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changing:
            yield root_of(node.func.value)


def test_parallel_has_no_mutable_module_state():
    """A group of ranks is an argument: no `global`, and no module-level value that a function changes in place."""
    for module, tree in TREES.items():
        if folder_of(module) != "parallel":
            continue
        held = {
            root_of(t)
            for node in tree.body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for t in getattr(node, "targets", [getattr(node, "target", None)])
        }
        for function in (node for node in ast.walk(tree) if isinstance(node, FUNCTION)):
            assert not [node for node in ast.walk(function) if isinstance(node, ast.Global)], (module, function.name)
            local = {
                node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
            assert not (set(changed_names(function)) - local) & held, (module, function.name)


def test_functions_are_short():
    long = {f"{module}.{node.name}": lines_of(node) for module, node in functions() if lines_of(node) > 60}
    assert not long


def test_loop_is_read_in_a_minute():
    (fit,) = [node for module, node in functions() if (module, node.name) == ("training.loop", "fit")]
    assert lines_of(fit) <= 45


def test_names_of_tests_are_short():
    """At most 60 characters; the sentence is in the docstring."""
    names = [
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, FUNCTION) and node.name.startswith("test_")
    ]
    assert not [name for name in names if len(name) > 60]
