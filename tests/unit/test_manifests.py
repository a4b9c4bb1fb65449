"""The Kubernetes manifests: against the published schemas of the MPI operator and of Trainer, and what no schema knows."""

import json
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from support import ROOT

from hvd_vgg.config import DoctorConfig, LaunchConfig, TrainConfig
from hvd_vgg.errors import CONFIGURATION, DATA, USAGE
from hvd_vgg.flags import parse_flags
from hvd_vgg.launcher.hostfile import Host, read_hostfile

TRAINER_KINDS = ("ClusterTrainingRuntime", "TrainJob")
HERE = Path(__file__).parent
FOLDER = ROOT / "launch" / "kubernetes"
SCHEMA = json.loads((HERE / "mpijob_v2beta1.schema.json").read_text())
# Of Kubeflow Trainer v2: what a cluster has, and a run in it.
TRAINER = {kind: json.loads((HERE / f"{kind.lower()}_v1alpha1.schema.json").read_text()) for kind in TRAINER_KINDS}
RUNTIMES = {path.stem[8:]: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("runtime-*.yaml"))}
TRAINJOBS = {path.stem[9:]: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("trainjob-*.yaml"))}
JOBS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("mpijob-*.yaml"))}


def strict(schema):
    """Returns a schema that refuses fields it does not know, as the API server does under strict validation."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(value) for name, value in schema.items()}
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def container_of(job, role):
    """Returns the only container of a role's pods, and the pod's spec."""
    pod = job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]
    (container,) = pod["containers"]
    return container, pod


def replicated(runtime, name):
    """Returns one of a runtime's replicated jobs, its only container, and the pod's spec."""
    (job,) = [each for each in runtime["spec"]["template"]["spec"]["replicatedJobs"] if each["name"] == name]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return job, container, pod


def test_manifests_are_there_for_both_vendors():
    assert set(JOBS) == {"mpijob-bi-v150", "mpijob-nvidia"}
    assert set(RUNTIMES) == set(TRAINJOBS) == {"bi-v150", "nvidia"}


@pytest.mark.parametrize("name", JOBS)
def test_manifest_fits_the_operators_schema(name):
    jsonschema.validate(JOBS[name], strict(SCHEMA))


@pytest.mark.parametrize("name", TRAINJOBS)
def test_manifests_fit_the_schema_of_trainer(name):
    for document in (RUNTIMES[name], TRAINJOBS[name]):
        assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        jsonschema.validate(document, strict(TRAINER[document["kind"]]))


@pytest.mark.parametrize("kind", TRAINER_KINDS)
def test_schema_of_trainer_finds_what_is_wrong(kind):
    """A misspelt word, and a number that is a text."""
    document = (RUNTIMES if kind == "ClusterTrainingRuntime" else TRAINJOBS)["nvidia"]
    for part, field, value in {
        "ClusterTrainingRuntime": [("mlPolicy", "mpii", {}), ("mlPolicy", "numNodes", "1")],
        "TrainJob": [("trainer", "nodes", 2), ("trainer", "numNodes", "2")],
    }[kind]:
        wrong = json.loads(json.dumps(document))
        wrong["spec"][part][field] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, strict(TRAINER[kind]))


@pytest.mark.parametrize("name", TRAINJOBS)
def test_trainer_finds_what_it_looks_for_in_the_runtime(name):
    """By its source at the schema's commit: names of jobs and containers, and one launcher; numNodes are the workers."""
    runtime, job = RUNTIMES[name], TRAINJOBS[name]
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }
    policy = runtime["spec"]["mlPolicy"]
    assert policy["numNodes"] == 1 and policy["mpi"]["runLauncherAsNode"] is False
    launcher, container, _ = replicated(runtime, "launcher")
    assert launcher["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert launcher["dependsOn"] == [{"name": "node", "status": "Ready"}]
    node, worker, _ = replicated(runtime, "node")
    assert "metadata" not in node["template"]
    assert container["name"] == worker["name"] == "node" and container["image"] == worker["image"]
    assert runtime["spec"]["template"]["spec"]["successPolicy"]["targetReplicatedJobs"] == ["launcher"]
    # These reach the launcher alone.
    assert set(job["spec"]["trainer"]) == {"numNodes", "command", "args"}


@pytest.mark.parametrize("name", TRAINJOBS)
def test_pods_of_trainer_are_those_of_the_mpijob(name):
    """The same images, commands, limits, volumes and rights."""
    mpi = JOBS[f"mpijob-{name}"]
    for role, other in (("launcher", "Launcher"), ("node", "Worker")):
        _, container, pod = replicated(RUNTIMES[name], role)
        wanted, around = container_of(mpi, other)
        policy = {"restartPolicy": "Never" if role == "launcher" else mpi["spec"]["mpiReplicaSpecs"][other]["restartPolicy"]}
        assert {**pod, "containers": 1} == {**around, **policy, "containers": 1}
        training = {"command": container["command"]} if role == "launcher" else {}
        assert {**container, "name": "", "args": []} == {**wanted, **training, "name": "", "args": []}
    policy = RUNTIMES[name]["spec"]["mlPolicy"]["mpi"]
    assert policy["sshAuthMountPath"] == mpi["spec"]["sshAuthMountPath"]
    assert policy["numProcPerNode"] == mpi["spec"]["slotsPerWorker"]
    arguments = TRAINJOBS[name]["spec"]["trainer"]["args"]
    assert arguments == container_of(mpi, "Launcher")[0]["args"]


@pytest.mark.parametrize("name", TRAINJOBS)
def test_launcher_of_trainer_starts_a_rank_in_every_slot(name, tmp_path):
    """By the host file that Trainer writes: of JOB-node-0-INDEX.JOB for each worker."""
    job, runtime = TRAINJOBS[name], RUNTIMES[name]
    count, slots = job["spec"]["trainer"]["numNodes"], runtime["spec"]["mlPolicy"]["mpi"]["numProcPerNode"]
    own = job["metadata"]["name"]
    names = [f"{own}-node-0-{index}.{own}" for index in range(count)]
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{each} slots={slots}\n" for each in names))
    assert read_hostfile(str(path)) == [Host(each, slots) for each in names]


def test_trainer_ends_jobs_that_would_fail_again():
    """Their launcher's pod is not started again, which Kubernetes wants for such rules."""
    for runtime in RUNTIMES.values():
        job, container, pod = replicated(runtime, "launcher")
        rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
        assert pod["restartPolicy"] == "Never"
        codes = {"containerName": container["name"], "operator": "In", "values": [USAGE, DATA, CONFIGURATION]}
        assert rules[0] == {"action": "FailJob", "onExitCodes": codes}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "slotsPerWorkers"], 8),
        (["spec", "slotsPerWorker"], "8"),
        (["spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers", 0, "securityContext", "runAsuser"], 1000),
        (
            ["spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers", 0, "resources", "limits", "memory"],
            "many",
        ),
    ],
)
def test_schema_finds_what_is_wrong(path, value):
    job = json.loads(json.dumps(JOBS["mpijob-nvidia"]))
    at = job
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, strict(SCHEMA))


def test_volumes_are_those_that_the_jobs_claim():
    """And fit the schema of a claim."""
    pod = SCHEMA["properties"]["spec"]["properties"]["mpiReplicaSpecs"]["additionalProperties"]["properties"]["template"]
    volume = pod["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
    claim = volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    documents = list(yaml.safe_load_all((FOLDER / "volumes.yaml").read_text()))
    for document in documents:
        assert (document["apiVersion"], document["kind"]) == ("v1", "PersistentVolumeClaim")
        jsonschema.validate(document["spec"], strict(claim))
    made = {document["metadata"]["name"] for document in documents}
    for job in JOBS.values():
        for role in ("Launcher", "Worker"):
            volumes = container_of(job, role)[1]["volumes"]
            assert {
                each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each
            } == made


@pytest.mark.parametrize("name", JOBS)
def test_pods_are_not_root_and_cannot_write_data(name):
    for role in ("Launcher", "Worker"):
        container, pod = container_of(JOBS[name], role)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000  # the image's
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
        assert mounts["/data"]["readOnly"] is True
        assert "readOnly" not in mounts["/runs"]
    memory = [volume for volume in pod["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory"]
    assert [mounts["/dev/shm"]["name"]] == [volume["name"] for volume in memory]  # noqa: S108 (a mount, no temporary file)


@pytest.mark.parametrize(
    ("name", "resource", "devices"), [("mpijob-bi-v150", "iluvatar.com/gpu", 2), ("mpijob-nvidia", "nvidia.com/gpu", 1)]
)
def test_worker_has_a_rank_for_each_device(name, resource, devices):
    limits = container_of(JOBS[name], "Worker")[0]["resources"]["limits"]
    assert JOBS[name]["spec"]["slotsPerWorker"] == devices * limits[resource]
    assert resource not in container_of(JOBS[name], "Launcher")[0]["resources"]["limits"]


@pytest.mark.parametrize("name", JOBS)
def test_launcher_starts_a_rank_in_every_slot(name, tmp_path):
    spec = JOBS[name]["spec"]
    container, _ = container_of(JOBS[name], "Launcher")
    assert (container["command"], container["args"][0]) == (["hvd-vgg"], "launch")
    at = container["args"].index("train")
    launching = parse_flags(LaunchConfig, container["args"][1:at])
    assert (launching.hostfile, launching.rsh_agent, launching.ranks) == ("/etc/mpi/hostfile", "hvd-vgg-ssh", 0)
    flags = [each.replace("/opt/hvd_vgg", str(ROOT)) for each in container["args"][at + 1 :]]
    training = parse_flags(TrainConfig, flags)
    assert (training.data_dir, training.run_dir) == ("/data", "/runs/vgg16_imagenet")
    assert training.expect_hosts == spec["mpiReplicaSpecs"]["Worker"]["replicas"]
    # What the operator writes for these workers.
    names = [f"{name}-worker-{number}.{name}.default.svc" for number in range(spec["mpiReplicaSpecs"]["Worker"]["replicas"])]
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{each} slots={spec['slotsPerWorker']}\n" for each in names))
    assert read_hostfile(str(path)) == [Host(each, spec["slotsPerWorker"]) for each in names]


@pytest.mark.parametrize("name", JOBS)
def test_workers_listen_where_the_launcher_connects(name):
    """With the key of the job."""
    container, _ = container_of(JOBS[name], "Worker")
    words = (ROOT / "launch" / "container" / "sshd_config").read_text().split()
    keys = JOBS[name]["spec"]["sshAuthMountPath"]
    assert words[words.index("HostKey") + 1] == f"{keys}/id_rsa"
    assert words[words.index("AuthorizedKeysFile") + 1] == f"{keys}/authorized_keys"
    agent = (ROOT / "launch" / "container" / "hvd-vgg-ssh").read_text()
    assert f"\nkeys={keys}\n" in agent
    port = int(words[words.index("Port") + 1])
    assert f" -p {port} " in agent
    assert container["readinessProbe"]["tcpSocket"] == {"port": port}
    assert container["command"] + container["args"] == ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/hvd-vgg/sshd_config"]


def doctor(*words):
    """Runs the script that makes a job of doctor of a job of training, and returns it, ended."""
    return subprocess.run(["bash", FOLDER / "doctor.sh", *words], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", JOBS)
def test_doctor_runs_in_the_pods_that_would_train(name):
    flags = ["--network=eth0", "--collectives", "--out=/runs/it's here.json"]
    ended = doctor(FOLDER / f"{name}.yaml", *flags)
    assert ended.returncode == 0, ended.stderr
    assert not [line for line in ended.stdout.splitlines() if line.lstrip().startswith("#")]  # they tell of training
    made = yaml.safe_load(ended.stdout)
    jsonschema.validate(made, strict(SCHEMA))
    container, _ = container_of(made, "Launcher")
    at = container["args"].index("doctor")
    launching = parse_flags(LaunchConfig, container["args"][1:at])
    assert (launching.hostfile, launching.rsh_agent) == ("/etc/mpi/hostfile", "hvd-vgg-ssh")
    assert launching.network == "eth0"
    looking = parse_flags(DoctorConfig, [each.replace("/opt/hvd_vgg", str(ROOT)) for each in container["args"][at + 1 :]])
    assert (looking.data_dir, looking.collectives, looking.out) == ("/data", True, "/runs/it's here.json")
    # Once, and all else is as it was.
    assert made["metadata"]["name"] == JOBS[name]["metadata"]["name"] + "-doctor"
    assert made["spec"]["runPolicy"]["backoffLimit"] == 0
    assert made["spec"]["mpiReplicaSpecs"]["Launcher"]["restartPolicy"] == "Never"
    container["args"] = container_of(JOBS[name], "Launcher")[0]["args"]
    made["metadata"]["name"] = JOBS[name]["metadata"]["name"]
    made["spec"]["runPolicy"]["backoffLimit"] = JOBS[name]["spec"]["runPolicy"]["backoffLimit"]
    made["spec"]["mpiReplicaSpecs"]["Launcher"]["restartPolicy"] = "OnFailure"
    assert made == JOBS[name]


@pytest.mark.parametrize("name", TRAINJOBS)
def test_doctor_runs_in_the_pods_of_a_trainjob(name):
    ended = doctor(FOLDER / f"trainjob-{name}.yaml", "--network=eth0", "--collectives")
    assert ended.returncode == 0, ended.stderr
    made = yaml.safe_load(ended.stdout)
    jsonschema.validate(made, strict(TRAINER["TrainJob"]))
    arguments = made["spec"]["trainer"]["args"]
    at = arguments.index("doctor")
    launching = parse_flags(LaunchConfig, arguments[1:at])
    assert (launching.hostfile, launching.network) == ("/etc/mpi/hostfile", "eth0")
    looking = parse_flags(DoctorConfig, [each.replace("/opt/hvd_vgg", str(ROOT)) for each in arguments[at + 1 :]])
    assert (looking.data_dir, looking.collectives, looking.expect_hosts) == ("/data", True, 2)
    made["spec"]["trainer"]["args"] = TRAINJOBS[name]["spec"]["trainer"]["args"]
    made["metadata"]["name"] = made["metadata"]["name"][: -len("-doctor")]
    assert made == TRAINJOBS[name]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 78, "doctor.sh: expected a manifest, such as "),
        (["none.yaml"], 78, "doctor.sh: none.yaml: no such file"),
        (
            [FOLDER / "mpijob-bi-v150.yaml", "acceptance"],
            78,
            "doctor.sh: acceptance starts the ranks itself: only doctor here\n",
        ),
        (
            [FOLDER / "mpijob-bi-v150.yaml", "bogus"],
            64,
            "doctor.sh: bogus: expected --FLAG=VALUE, or the word doctor or acceptance\n",
        ),
        ([FOLDER / "mpijob-bi-v150.yaml", "--network", "eth0"], 64, "doctor.sh: --network eth0: expected --network=eth0\n"),
        ([FOLDER / "volumes.yaml"], 78, f"doctor.sh: {FOLDER / 'volumes.yaml'}: no line like `^    Launcher:$`"),
    ],
)
def test_doctor_refuses_what_it_cannot_make_a_job_of(words, code, message):
    """Before anything is printed."""
    ended = doctor(*words)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith(message)
