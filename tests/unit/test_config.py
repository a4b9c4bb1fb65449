"""Configuration by sections, and the flags made of them."""

import dataclasses
import re

import pytest
from support import ROOT

from hvd_vgg.config import (
    BenchmarkConfig,
    DemoConfig,
    DoctorConfig,
    EvaluateConfig,
    LaunchConfig,
    PlanConfig,
    PredictConfig,
    ReplayConfig,
    TrainConfig,
    VerifyConfig,
    fingerprint,
    profiled_steps,
    reference_points,
    unused_hyperparameters,
)
from hvd_vgg.errors import CONFIGURATION, USAGE, Failure
from hvd_vgg.flags import describe_flags, parse_flags, to_flag_file, validate
from hvd_vgg.launcher.hostfile import read_hostfile


def test_config_defaults_are_the_documented_ones():
    """And they are legal."""
    config = parse_flags(TrainConfig, [])
    assert validate(config) == []
    assert (config.data_dir, config.global_batch, config.device_batch, config.image_size) == (
        "./imagenet_tfrecord",
        256,
        32,
        224,
    )
    assert (config.model, config.num_classes, config.exchange, config.resume) == ("vgg16", 1000, "auto", "auto")


def test_flags_errors_are_all_in_one_message():
    """Unknown flags, illegal values and conflicts are reported together, each on a line."""
    flags = [
        "--lr=fast",
        "--global_batch=0",
        "--model=resnet50",
        "--dropuot=0.5",
        "--epochs=nan",
        "--momentum=0",
        "--optimizer=nesterov",
        "--lr_step_epochs=30,20",
        "--no_decay=bias,gamma",
        "--lr_schedule=cosine",
        "--lr_min=1",
        "--reference_curve=10:0.3,9:0.4",
        "--checkpoint_copy_dir=run/",
        "stray",
    ]
    with pytest.raises(Failure) as raised:
        parse_flags(TrainConfig, flags)
    assert raised.value.code == USAGE
    lines = raised.value.message.splitlines()
    assert lines[0] == "12 illegal flag(s):"
    for part in (
        "--lr=fast: expected a number",
        "--global_batch=0: expected at least 1",
        "--model=resnet50: expected one of vgg11, vgg13, vgg16, vgg19, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn",
        "--dropuot=0.5: no such flag of this command; did you mean --dropout?",
        "--epochs=nan: expected a finite number",
        "--optimizer=nesterov needs --momentum above 0",
        "--lr_step_epochs=30,20: expected rising numbers above 0",
        "--no_decay=bias,gamma: expected one of bias, norm",
        "--lr_min=1: expected at most --lr=0.01",
        "--reference_curve=10:0.3,9:0.4: expected EPOCH:ACC@1 pairs such as",
        "--checkpoint_copy_dir=run/: expected a directory outside --run_dir",
        "stray: no such flag of this command",
    ):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--eval_size=16"], "--eval_size=16: expected at least 32 pixels, or 0 for --image_size"),
        (
            ["--augment=shift", "--eval_size=64"],
            "--eval_size=64 needs --augment=crop: --augment=shift evaluates whole images",
        ),
        (["--augment=none", "--eval_crop=1"], "--eval_crop=1 needs --augment=crop"),
        (["--random_erasing=1.5"], "--random_erasing=1.5: expected at most 1"),
    ],
)
def test_image_flags_that_cannot_work_are_refused(flags, expected):
    """And those of evaluation without effect."""
    with pytest.raises(Failure, match=re.escape(expected)):
        parse_flags(TrainConfig, flags)
    assert parse_flags(TrainConfig, ["--augment=shift", "--eval_flip"]).evaluated_size == 224
    assert parse_flags(EvaluateConfig, ["--eval_size=288", "--eval_crop=1"]).evaluated_size == 288


def test_copies_of_checkpoints_are_outside_the_run(tmp_path, monkeypatch):
    """Whatever links lead to either, and a loop of links is a path as any other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "loop").symlink_to("loop")
    for run, copy in (
        ("run", "run/checkpoints"),
        ("link", "real/x/y"),
        ("real", "x/../link/y"),
        ("run", str(tmp_path / "run")),
    ):
        with pytest.raises(Failure, match="expected a directory outside --run_dir") as raised:
            parse_flags(TrainConfig, [f"--run_dir={run}", f"--checkpoint_copy_dir={copy}"])
        assert raised.value.code == USAGE
    for run, copy in (("run", "run2"), ("run/a", "run/b"), ("run", "loop/checkpoints"), ("run/a", "run")):
        assert parse_flags(TrainConfig, [f"--run_dir={run}", f"--checkpoint_copy_dir={copy}"])


def test_flag_file_comments_and_later_flags(tmp_path):
    """A flag file may have comments, and a later flag wins."""
    path = tmp_path / "a.flags"
    path.write_text("# a comment\n--lr=0.5\n--steps=7\n")
    config = parse_flags(TrainConfig, [f"--flagfile={path}", "--lr=0.25"])
    assert (config.lr, config.steps) == (0.25, 7)


@pytest.mark.parametrize("separate", [False, True])
def test_flag_file_that_names_another_is_refused(tmp_path, separate):
    """Whoever sends a flag file would choose what else is read; the message names the line."""
    path = tmp_path / "a.flags"
    path.write_text("--lr=0.5\n  -flagfile=/etc/passwd\n")
    with pytest.raises(Failure) as raised:
        parse_flags(TrainConfig, ["--flagfile", str(path)] if separate else [f"--flagfile={path}"])
    assert raised.value.code == USAGE
    assert "a.flags, line 2: a flag file cannot name another" in raised.value.message


def test_flag_file_that_is_not_text_is_a_usage_error(tmp_path):
    """Bytes that are not UTF-8."""
    (tmp_path / "a.flags").write_bytes(b"\xff\xfe--lr=1")
    with pytest.raises(Failure) as raised:
        parse_flags(TrainConfig, [f"--flagfile={tmp_path}/a.flags"])
    assert raised.value.code == USAGE


def test_flag_file_that_is_missing_is_a_usage_error(tmp_path):
    """The message names it."""
    with pytest.raises(Failure) as raised:
        parse_flags(TrainConfig, [f"--flagfile={tmp_path}/none.flags"])
    assert raised.value.code == USAGE
    assert "none.flags" in raised.value.message


def test_flag_file_round_trip_gives_the_same_config(tmp_path):
    """A run's flags.txt has every flag, and running it again is the same run."""
    config = parse_flags(
        TrainConfig,
        ["--lr=0.1", "--lr_step_epochs=1.5,3", "--weight_decay=5e-05", "--data_dir=/data/a b-1.0", "--run_dir=v2.0"]
        + ["--no_decay=bias, norm", "--lars_skip=", "--reference_curve=1:0.25,2.5:0.5"],
    )
    assert (config.no_decay, config.lars_skip) == (("bias", "norm"), ())
    path = tmp_path / "flags.txt"
    path.write_text(to_flag_file(config))
    assert parse_flags(TrainConfig, [f"--flagfile={path}"]) == config
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}=" in path.read_text()


def test_flags_booleans_are_true_or_false():
    """--full, --full=true and --nofull."""
    with pytest.raises(Failure) as refused:
        parse_flags(DoctorConfig, ["--full=maybe", "--gbit=fast"])
    assert "--full=maybe: expected true or false\n  --gbit=fast: expected a number" in refused.value.message
    assert parse_flags(DoctorConfig, ["--full=true", "--nocollectives"]) == DoctorConfig(full=True)


@pytest.mark.parametrize("flag", ["--network=eth0", "--rsh_agent=rsh"])
def test_config_doctor_refuses_flags_without_effect(flag):
    """--network and --rsh_agent need --hostfile."""
    with pytest.raises(Failure) as refused:
        parse_flags(DoctorConfig, [flag])
    assert f"{flag} needs --hostfile; ranks get it from hvd-vgg launch {flag} doctor" in refused.value.message
    assert parse_flags(DoctorConfig, [flag, "--hostfile=hosts"]).hostfile == "hosts"


def test_config_demo_shards_without_images_are_refused():
    """Each shard of both splits has an image."""
    with pytest.raises(Failure) as raised:
        parse_flags(DemoConfig, ["--shards=100", "--train_images=10"])
    assert "--shards=100: expected at least one image" in raised.value.message


@pytest.mark.parametrize("kind", [TrainConfig, EvaluateConfig, DemoConfig])
def test_help_has_every_flag_with_its_default(kind):
    """By group."""
    text = describe_flags(kind, "usage")
    for field in dataclasses.fields(kind):
        assert f"\n  --{field.name}=" in text
        assert f"\n{field.metadata['group']}:" in text
    assert "--help" not in text.splitlines()[0]


def test_fingerprint_has_hyperparameters_only():
    """Nothing of ranks or places; the length of the run only where the schedule depends on it."""
    same = dict(
        data_dir="/x",
        run_dir="/y",
        compute_threads=3,
        exchange="factored",
        log_every_steps=3,
        keep_checkpoints=9,
        epochs=100.0,
    )
    assert fingerprint(TrainConfig(**same)) == fingerprint(TrainConfig())
    assert fingerprint(TrainConfig(lr_schedule="cosine", epochs=100.0)) != fingerprint(TrainConfig(lr_schedule="cosine"))
    learned = [dict(seed=2), dict(lr=0.02), dict(width=0.5), dict(augment="flip"), dict(global_batch=128)]
    for change in (*learned, dict(device_batch=1), dict(reproducible="rounding")):
        assert fingerprint(TrainConfig(**change)) != fingerprint(TrainConfig())
    longer = dict(lr_schedule="polynomial", epochs=100.0)
    assert fingerprint(TrainConfig(**longer)) != fingerprint(TrainConfig(lr_schedule="polynomial"))
    rounding = TrainConfig(reproducible="rounding")
    assert fingerprint(dataclasses.replace(rounding, device_batch=1)) == fingerprint(rounding)


@pytest.mark.parametrize(
    ("change", "other"),
    [
        (dict(lr_min=0.001), dict(lr_schedule="polynomial")),
        (dict(lr_power=1.0), dict(lr_schedule="polynomial")),
        (dict(warmup_lr=0.001), dict(warmup_epochs=1.0)),
        (dict(lars_eta=0.1), dict(optimizer="lars")),
        (dict(lars_skip=()), dict(optimizer="lars")),
        (dict(no_decay=("bias",)), dict()),
    ],
    ids=lambda value: ",".join(value),
)
def test_fingerprint_has_what_decides_beside_the_others(change, other):
    """The weights without decay, but not if there is none; a floor, but not of a rate that is divided; and so on."""
    assert fingerprint(TrainConfig(**change, **other)) != fingerprint(TrainConfig(**other))
    assert set(unused_hyperparameters(TrainConfig(**other))).isdisjoint(change)
    without = TrainConfig(weight_decay=0.0)
    assert set(change) <= set(unused_hyperparameters(without))
    assert fingerprint(dataclasses.replace(without, **change)) == fingerprint(without)


@pytest.mark.parametrize(
    "text", ["", "5", "5:", "1:0.2;2:0.3", "1:0.2,1:0.3", "1:1.2", "-1:0.2", "1:nan", "inf:0.5", "1:0:0"]
)
def test_reference_points_are_rising_epochs_and_fractions(text):
    assert reference_points(text) == []
    assert reference_points("0.5:0.25,1:0,20:1") == [(0.5, 0.25), (1.0, 0.0), (20.0, 1.0)]


@pytest.mark.parametrize("flag", ["--wire_dtype=float16", "--xla"])
@pytest.mark.parametrize("kind", [TrainConfig, BenchmarkConfig])
def test_flags_that_bits_cannot_have_need_rounding(kind, flag):
    parse_flags(kind, [flag, "--reproducible=rounding"])
    with pytest.raises(Failure, match=f"{flag} needs --reproducible=rounding: "):
        parse_flags(kind, [flag])


@pytest.mark.parametrize(("global_batch", "device_batch"), [(40, 32), (64, 16), (40, 16)])
def test_flags_of_batches_are_whole_groups(global_batch, device_batch):
    """With BatchNorm alone, whose groups are then part of what decides a run."""
    flags = [f"--global_batch={global_batch}", f"--device_batch={device_batch}"]
    plain = parse_flags(TrainConfig, flags)
    assert fingerprint(plain) == fingerprint(dataclasses.replace(plain, norm_batch=8))
    with pytest.raises(Failure) as raised:
        parse_flags(TrainConfig, [*flags, "--model=vgg16_bn"])
    wrong = [each for each in sorted(flags) if int(each.partition("=")[2]) % 32]
    lines = [f"  {each}: expected a multiple of --norm_batch=32" for each in wrong]
    assert raised.value.message.splitlines() == [f"{len(wrong)} illegal flag(s):", *lines]
    groups = [fingerprint(TrainConfig(model="vgg16_bn", norm_batch=each)) for each in (16, 32)]
    assert groups[0] != groups[1]


PLAN_FLAGS = {"model", "width", "image_size", "num_classes", "global_batch", "exchange", "wire_dtype"}
PLAN_FLAGS |= {"link_flops_per_byte", "head", "train_only"}
PLAN_FLAGS |= {"ranks", "ranks_per_host", "gbit", "fps_per_rank", "sweep_ranks", "out", "save_seconds", "failure_hours"}


def test_config_plan_has_the_flags_it_uses():
    """Nothing of data, recipe or run."""
    assert {field.name for field in dataclasses.fields(PlanConfig)} == PLAN_FLAGS


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        (PlanConfig, "--lr=0.1"),
        (EvaluateConfig, "--global_batch=64"),
        (EvaluateConfig, "--save_every_steps=1"),
        (ReplayConfig, "--data_dir=/data"),
        (ReplayConfig, "--epochs=3"),
        (BenchmarkConfig, "--resume=never"),
        (BenchmarkConfig, "--profile_steps=1:2"),
        (VerifyConfig, "--model=vgg11"),
        (DemoConfig, "--global_batch=8"),
        (LaunchConfig, "--lr=0.1"),
    ],
)
def test_flags_of_other_commands_are_refused(kind, flag):
    """A command accepts the flags it uses and no other."""
    with pytest.raises(Failure) as raised:
        parse_flags(kind, [flag])
    assert raised.value.code == USAGE
    assert f"{flag}: no such flag of this command" in raised.value.message


def test_flag_file_of_a_run_serves_other_commands(tmp_path):
    """In a flag file, flags of `train` that a command does not use are passed over; unknown ones are not."""
    path = tmp_path / "a.flags"
    path.write_text("--lr=0.5\n--noxla\n--width=0.25\n")
    config = parse_flags(PlanConfig, [f"--flagfile={path}", "--ranks=4"], shared=TrainConfig)
    assert (config.width, config.ranks) == (0.25, 4)
    path.write_text("--widht=0.25\n")
    with pytest.raises(Failure, match="did you mean --width"):
        parse_flags(PlanConfig, [f"--flagfile={path}"], shared=TrainConfig)


def test_flags_of_a_run_are_defaults_of_the_command_line():
    """What `evaluate` takes from the run's own flags."""
    run = TrainConfig(width=0.5, device_batch=7, augment="none")
    config = parse_flags(EvaluateConfig, ["--device_batch=9"], defaults=run)
    assert (config.width, config.device_batch, config.augment, config.checkpoint) == (0.5, 9, "none", "best")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.flags")), ids=lambda p: p.stem)
def test_config_files_are_legal_and_documented(path):
    """Each names its command, hardware and expected result."""
    parse_flags(TrainConfig, [f"--flagfile={path}"])
    head = path.read_text().split("\n--")[0]
    for part in ("Command:", "Hardware:", "Expected:"):
        assert part in head


def test_profiled_steps_are_two_integers_in_order():
    """FIRST:LAST, both included."""
    assert list(profiled_steps("3:5")) == [3, 4, 5]
    assert list(profiled_steps("")) == []
    for text in ("3", "5:3", "a:b", "-1:2", "1:2:3"):
        assert any("--profile_steps" in error for error in validate(TrainConfig(profile_steps=text))), text


def test_config_benchmark_refuses_what_it_cannot_do():
    """Ranks are integers; one update measures nothing."""
    assert any("--profile_ranks" in error for error in validate(TrainConfig(profile_ranks=(0.5,))))
    assert not validate(BenchmarkConfig(ranks=(1, 2)))
    for flags in ({"ranks": (1.5,)}, {"steps": 1}, {"console": "dllogger"}):
        (name,) = flags
        assert any(f"--{name}" in error for error in validate(BenchmarkConfig(**flags))), name


CONFIGS = [
    TrainConfig,
    EvaluateConfig,
    ReplayConfig,
    VerifyConfig,
    BenchmarkConfig,
    PlanConfig,
    PredictConfig,
    DoctorConfig,
    LaunchConfig,
    DemoConfig,
]
PATH_FLAGS = [
    (kind, field.name)
    for kind in CONFIGS
    for field in dataclasses.fields(kind)
    if field.metadata["unit"] == "path" and not (kind in (PlanConfig, PredictConfig) and field.name == "out")
]


def test_path_flags_are_marked_as_such():
    """By their unit, on which what follows rests; rsh_agent is a command."""
    named = {name for kind in CONFIGS for name in (field.name for field in dataclasses.fields(kind))}
    marked = {name for _, name in PATH_FLAGS}
    own = {"data_dir", "run_dir", "same_as", "out", "hostfile", "checkpoint", "init_from"}
    own |= {"weights", "names_file"}
    assert marked == {*own, "checkpoint_copy_dir", "metrics_file", "predictions_file"}
    assert not {name for name in named - marked if name.endswith(("dir", "file", "path"))}


@pytest.mark.parametrize(("kind", "name"), PATH_FLAGS)
def test_path_flags_take_home(kind, name, tmp_path, monkeypatch):
    """The shell leaves ~ in --flag=~/x as it is; on the command line and in a flag file it is the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    ending = {"predictions_file": "csv", "out": "json"}.get(name, "prom")
    (tmp_path / "own.flags").write_text(f"--{name}=~/a b.{ending}\n")
    for argument in (f"--{name}=~/a b.{ending}", "--flagfile=~/own.flags"):
        assert getattr(parse_flags(kind, [argument]), name) == f"{tmp_path}/a b.{ending}"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gs://bucket/x", "gs://bucket/x: expected a path on this host: files are not read from gs:// storage; mount it"),
        ("s3://bucket/x", "s3://bucket/x: expected a path on this host"),
        ("hdfs://name:8020/x", "hdfs://name:8020/x: expected a path on this host"),
        ("file:///data/x", "file:///data/x: expected a path without file://, as /data/x"),
        ("~no-such-user/x", "~no-such-user/x: expected the home directory of a user of this host"),
        ("/data/\udcff", "expected text in UTF-8; for a file or directory of another name, make a link"),
    ],
)
@pytest.mark.parametrize(("kind", "name"), PATH_FLAGS)
def test_path_flags_that_are_no_paths(kind, name, path, expected):
    """64, and the value as it was written."""
    with pytest.raises(Failure) as raised:
        parse_flags(kind, [f"--{name}={path}"])
    assert raised.value.code == USAGE
    assert f"--{name}={path}: expected" in raised.value.message and expected in raised.value.message


@pytest.mark.parametrize(
    ("path", "expected"),
    [("s3://x/y", "--flagfile=s3://x/y: expected a path on this host"), ("~no-such-user/x", "a user of this host")],
)
def test_flag_file_elsewhere(path, expected):
    """64, and the value as it was written."""
    with pytest.raises(Failure, match=expected):
        parse_flags(TrainConfig, [f"--flagfile={path}"])


def test_flag_file_and_host_file_that_are_no_text(tmp_path):
    """In GBK, for example: the message has the place."""
    path = tmp_path / "file"
    path.write_bytes(b"# \xca\xfd\n")
    with pytest.raises(Failure, match=f"--flagfile={path}, byte 2: expected text in UTF-8") as raised:
        parse_flags(TrainConfig, [f"--flagfile={path}"])
    assert raised.value.code == USAGE
    with pytest.raises(Failure, match=f"--hostfile={path}, byte 2: expected text in UTF-8") as raised:
        read_hostfile(str(path))
    assert raised.value.code == CONFIGURATION
