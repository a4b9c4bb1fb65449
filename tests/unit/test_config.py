import dataclasses

import pytest
from support import ROOT

from hvd_vgg.config import (
    BenchmarkConfig,
    DemoConfig,
    DoctorConfig,
    EvaluateConfig,
    TrainConfig,
    fingerprint,
    profiled_steps,
    validate,
)
from hvd_vgg.errors import USAGE, Failure
from hvd_vgg.flags import describe_flags, parse_flags, to_flag_file
from hvd_vgg.train.schedule import total_steps


def test_defaults_are_legal_and_are_the_documented_ones():
    config = parse_flags(TrainConfig, [])
    assert validate(config) == []
    assert (config.data_dir, config.global_batch, config.device_batch, config.image_size) == (
        "./imagenet_tfrecord",
        256,
        32,
        224,
    )
    assert (config.model, config.num_classes, config.exchange, config.resume) == ("vgg16", 1000, "auto", "auto")


def test_all_illegal_flags_and_combinations_are_in_one_message():
    flags = [
        "--lr=fast",
        "--global_batch=0",
        "--model=resnet50",
        "--dropuot=0.5",
        "--epochs=nan",
        "--momentum=0",
        "--optimizer=nesterov",
        "--lr_step_epochs=30,20",
        "stray",
    ]
    with pytest.raises(Failure) as raised:
        parse_flags(TrainConfig, flags)
    assert raised.value.code == USAGE
    lines = raised.value.message.splitlines()
    assert lines[0] == "8 illegal flag(s):"
    for part in (
        "--lr=fast: expected a number",
        "--global_batch=0: expected at least 1",
        "--model=resnet50: expected one of vgg11, vgg13, vgg16, vgg19",
        "--dropuot=0.5: no such flag; did you mean --dropout?",
        "--epochs=nan: expected a finite number",
        "--optimizer=nesterov needs --momentum above 0",
        "--lr_step_epochs=30,20: expected rising numbers above 0",
        "stray: no such flag",
    ):
        assert any(part in line for line in lines), part


def test_a_flag_file_is_read_with_comments_and_a_later_flag_wins(tmp_path):
    path = tmp_path / "a.flags"
    path.write_text("# a comment\n--lr=0.5\n--steps=7\n")
    config = parse_flags(TrainConfig, [f"--flagfile={path}", "--lr=0.25"])
    assert (config.lr, config.steps) == (0.25, 7)


@pytest.mark.parametrize("separate", [False, True])
def test_a_flag_file_that_reads_another_is_refused_by_line(tmp_path, separate):
    path = tmp_path / "a.flags"
    path.write_text("--lr=0.5\n  -flagfile=/etc/passwd\n")
    with pytest.raises(Failure) as raised:
        parse_flags(TrainConfig, ["--flagfile", str(path)] if separate else [f"--flagfile={path}"])
    assert raised.value.code == USAGE
    assert "a.flags, line 2: a flag file reads no other" in raised.value.message


def test_a_flag_file_that_is_no_text_is_a_usage_error(tmp_path):
    (tmp_path / "a.flags").write_bytes(b"\xff\xfe--lr=1")
    with pytest.raises(Failure) as raised:
        parse_flags(TrainConfig, [f"--flagfile={tmp_path}/a.flags"])
    assert raised.value.code == USAGE


def test_a_missing_flag_file_is_a_usage_error(tmp_path):
    with pytest.raises(Failure) as raised:
        parse_flags(TrainConfig, [f"--flagfile={tmp_path}/none.flags"])
    assert raised.value.code == USAGE
    assert "none.flags" in raised.value.message


def test_the_written_flag_file_is_complete_and_gives_the_same_config(tmp_path):
    config = parse_flags(
        TrainConfig,
        ["--lr=0.1", "--lr_step_epochs=1.5,3", "--weight_decay=5e-05", "--data_dir=/data/a b-1.0", "--run_dir=v2.0"],
    )
    path = tmp_path / "flags.txt"
    path.write_text(to_flag_file(config))
    assert parse_flags(TrainConfig, [f"--flagfile={path}"]) == config
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}=" in path.read_text()


def test_a_switch_is_true_or_false():
    with pytest.raises(Failure) as refused:
        parse_flags(DoctorConfig, ["--full=maybe", "--gbit=fast"])
    assert "--full=maybe: expected true or false\n  --gbit=fast: expected a number" in refused.value.message
    assert parse_flags(DoctorConfig, ["--full=true", "--nocollectives"]) == DoctorConfig(full=True)


@pytest.mark.parametrize("flag", ["--network=eth0", "--rsh_agent=rsh"])
def test_doctor_refuses_what_it_would_not_use(flag):
    with pytest.raises(Failure) as refused:
        parse_flags(DoctorConfig, [flag])
    assert f"{flag} needs --hostfile; ranks get it from hvd-vgg launch {flag} doctor" in refused.value.message
    assert parse_flags(DoctorConfig, [flag, "--hostfile=hosts"]).hostfile == "hosts"


def test_shards_without_images_are_refused():
    with pytest.raises(Failure) as raised:
        parse_flags(DemoConfig, ["--shards=100", "--train_images=10"])
    assert "--shards=100: expected at least one image" in raised.value.message


@pytest.mark.parametrize("kind", [TrainConfig, EvaluateConfig, DemoConfig])
def test_help_names_every_flag_with_its_default_by_group(kind):
    text = describe_flags(kind, "usage")
    for field in dataclasses.fields(kind):
        assert f"\n  --{field.name}=" in text
        assert f"\n{field.metadata['group']}:" in text
    assert "--help" not in text.splitlines()[0]


def test_steps_of_a_run_are_the_ceiling_of_epochs_times_records_over_batch():
    assert total_steps(TrainConfig(epochs=90, global_batch=256), 1_281_167) == 450_411
    assert total_steps(TrainConfig(epochs=2, global_batch=32), 75) == 5
    assert total_steps(TrainConfig(epochs=0.001, global_batch=32), 75) == 1
    assert total_steps(TrainConfig(epochs=2, steps=7), 75) == 7


def test_identity_holds_what_is_learned_and_nothing_of_ranks_or_places():
    same = dict(data_dir="/x", run_dir="/y", device_batch=1, log_every_steps=3, keep_checkpoints=9, epochs=100.0)
    assert fingerprint(TrainConfig(**same)) == fingerprint(TrainConfig())
    assert fingerprint(TrainConfig(lr_schedule="cosine", epochs=100.0)) != fingerprint(TrainConfig(lr_schedule="cosine"))
    for change in (dict(seed=2), dict(lr=0.02), dict(width=0.5), dict(augment="flip"), dict(global_batch=128)):
        assert fingerprint(TrainConfig(**change)) != fingerprint(TrainConfig())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.flags")), ids=lambda p: p.stem)
def test_each_config_is_legal_and_says_its_command_hardware_and_result(path):
    parse_flags(TrainConfig, [f"--flagfile={path}"])
    head = path.read_text().split("\n--")[0]
    for part in ("Command:", "Hardware:", "Expected:"):
        assert part in head


def test_the_steps_to_profile_are_two_numbers_in_order():
    assert list(profiled_steps(TrainConfig(profile_steps="3:5"))) == [3, 4, 5]
    assert list(profiled_steps(TrainConfig())) == []
    for text in ("3", "5:3", "a:b", "-1:2", "1:2:3"):
        assert any("--profile_steps" in error for error in validate(TrainConfig(profile_steps=text))), text


def test_numbers_of_ranks_are_whole_and_what_benchmark_cannot_do_is_refused():
    assert any("--profile_ranks" in error for error in validate(TrainConfig(profile_ranks=(0.5,))))
    assert not validate(BenchmarkConfig(ranks=(1.0, 2.0)))
    for flags in ({"ranks": (1.5,)}, {"steps": 1}, {"profile_steps": "1:2"}, {"console": "dllogger"}):
        (name,) = flags
        assert any(f"--{name}" in error for error in validate(BenchmarkConfig(**flags))), name
