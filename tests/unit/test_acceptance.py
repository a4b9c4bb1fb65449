"""The plan of `hvd-vgg acceptance` and what its verdict makes of the results."""

import json

import pytest

from hvd_vgg.commands.acceptance import precisions, rank_counts, stages
from hvd_vgg.commands.acceptance_report import Bundle, assess, format_page
from hvd_vgg.config import AcceptanceConfig, LaunchConfig
from hvd_vgg.errors import USAGE, Failure
from hvd_vgg.flags import parse_flags
from hvd_vgg.launcher.supervisor import LaunchSpec, rank_count
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING

STAGES = [{"stage": name, "command": ["hvd-vgg"], "code": 0, "seconds": 1.5} for name in ("doctor", "benchmark-float32")]


def facts_of(ranks=8, **flags):
    """Returns the facts of an acceptance of VGG16 on `ranks` ranks."""
    values = {
        "model": "vgg16",
        "width": 1.0,
        "image_size": 224,
        "global_batch": 256,
        "device_batch": 32,
        "data_dir": "/data",
    }
    return {
        "date": "2026-11-29T12:00:00Z",
        "seconds": 3.0,
        "code": {"version": "1", "commit": None, "sha256": "ab" * 32},
        "machine": {
            "ranks": ranks,
            "hosts": 1,
            "vendor": "Iluvatar",
            "driver": "4.2",
            "processor": "P",
            "instructions": "avx",
        },
        "flags": {**values, "precision": "float32", "equal_steps": 4, **flags},
        "stages": STAGES,
    }


def write_benchmark(bundle, fps, precision="float32", gpu="Iluvatar BI-V100", alone=900.0):
    """Writes measurements on 1 and 8 ranks."""
    row = {"fps_standard_deviation": 1.0, "fps_updates": 190, "efficiency": 0.9, "bottleneck": "compute"}
    rows = [{**row, "ranks": ranks, "input": kind, "fps": fps} for ranks in (1, 8) for kind in ("device", "host", "real")]
    rows.append({"ranks": 8, "input": "alone", "fps": alone, "efficiency": 1.0})
    content = {"machine": {"hosts": [{"gpu": gpu}]}, "rows": rows, "software": {"tensorflow": "2.6.5"}}
    bundle.benchmark(precision).write_text(json.dumps(content))


def write_result(bundle, ranks, state, steps=4):
    bundle.run(ranks).mkdir(parents=True)
    (bundle.run(ranks) / "result.json").write_text(json.dumps({"steps": steps, "state_sha256": state}))


def verdicts(bundle, facts, about, planned=2):
    return [finding.verdict for finding in assess(bundle, facts, planned) if finding.about == about]


@pytest.mark.parametrize(("ranks", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 3]), (8, [1, 4, 8]), (16, [1, 8, 16])])
def test_acceptance_compares_one_half_and_all_ranks(ranks, expected):
    assert rank_counts(ranks) == expected


def test_stages_compare_all_runs_with_that_on_all_ranks(tmp_path):
    """Of which the last is made in two starts, so that a checkpoint has been read."""
    config = AcceptanceConfig(half_precision="float16", updates=7, equal_steps=5)
    plan = {stage.name: stage for stage in stages(config, 8, Bundle(tmp_path), tmp_path / "work")}
    assert list(plan) == [
        *("data", "doctor", "benchmark-float32", "benchmark-float16", "train-1", "train-4", "train-8-begin", "train-8"),
        *("verify", "equal-1", "equal-4"),
    ]
    assert [name for name, stage in plan.items() if stage.needed] == ["data", "doctor"]
    assert {"--ranks=1,4,8", "--steps=7", "--precision=float16"} <= set(plan["benchmark-float16"].words)
    assert {"--ranks=8", "--steps=2"} <= set(plan["train-8-begin"].words) and "--steps=5" in plan["train-8"].words
    assert plan["equal-4"].words == [
        "hvd-vgg",
        "verify-run",
        f"{tmp_path}/work/ranks-8",
        f"--same_as={tmp_path}/work/ranks-4",
    ]
    assert "--time_limit_seconds=7200.0" in plan["doctor"].words
    assert {stage.words[0] for stage in plan.values()} == {"hvd-vgg"}


def test_sixteen_devices_are_tried_by_default():
    """256 images an update are enough for them."""
    config = AcceptanceConfig(ranks=16)
    assert rank_count(LaunchConfig(ranks=16), LaunchSpec([], shared=config), []) == 16


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--num_classes=5"], "--num_classes=5: expected at least 10"),
        (["--label_base=0"], "--label_base=0 needs --data_dir"),
        (["--reproducible=rounding"], "--reproducible=rounding: states"),
        (["--gloo", "--network=eth0"], "--gloo is for the ranks of one host"),
    ],
)
def test_what_cannot_be_accepted_is_refused_at_once(flags, wrong):
    with pytest.raises(Failure) as raised:
        parse_flags(AcceptanceConfig, flags)
    assert raised.value.code == USAGE and wrong in raised.value.message


def test_stages_of_a_horovod_without_mpi(tmp_path):
    plan = stages(AcceptanceConfig(half_precision="none", gloo=True), 4, Bundle(tmp_path), tmp_path / "work")
    started = [stage.words[:6] for stage in plan if stage.words[0] == "horovodrun"]
    assert started == [
        ["horovodrun", "--gloo", "-np", str(count), "hvd-vgg", command]
        for count, command in [(4, "doctor"), (4, "benchmark"), (1, "train"), (2, "train"), (4, "train"), (4, "train")]
    ]


@pytest.mark.parametrize(
    ("half", "precision", "expected"),
    [
        ("none", "float32", ["float32"]),
        ("float16", "float32", ["float32", "float16"]),
        ("bfloat16", "bfloat16", ["bfloat16"]),
    ],
)
def test_precisions_are_each_measured_once(half, precision, expected):
    assert precisions(AcceptanceConfig(half_precision=half, precision=precision)) == expected


@pytest.mark.parametrize(
    ("fps", "verdict", "share"),
    [(450.0, OK, "1.03"), (425.0, OK, "0.97"), (400.0, WARNING, "0.92"), (380.0, FAILURE, "0.87")],
)
def test_published_figure_is_compared(tmp_path, fps, verdict, share):
    """435.9 images/s, of VGG16 at 224 pixels on 8 BI-V100."""
    write_benchmark(Bundle(tmp_path), fps)
    (finding,) = (each for each in assess(Bundle(tmp_path), facts_of(), 2) if each.about == "published")
    assert finding.verdict == verdict
    assert f"{fps:.1f} images/s (read and decoded) is {share} of the published 435.9" in finding.text


@pytest.mark.parametrize("flags", [{"model": "vgg11"}, {"width": 0.5}, {"image_size": 128}, {"precision": "float16"}])
def test_another_network_is_not_compared(tmp_path, flags):
    write_benchmark(Bundle(tmp_path), 100.0, precision=flags.get("precision", "float32"))
    (finding,) = (each for each in assess(Bundle(tmp_path), facts_of(**flags), 2) if each.about == "published")
    assert finding.verdict == OK and finding.text.startswith("no figure is known for")


def test_input_hardly_faster_than_training_is_a_warning(tmp_path):
    for alone, verdict in ((110.0, WARNING), (130.0, OK)):
        write_benchmark(Bundle(tmp_path), 100.0, alone=alone, gpu="")
        assert verdicts(Bundle(tmp_path), facts_of(), "input") == [verdict]


def test_unequal_states_are_a_failure(tmp_path):
    """A run that did not come to its end is not compared."""
    bundle = Bundle(tmp_path)
    write_result(bundle, 1, "aa" * 32)
    write_result(bundle, 8, "aa" * 32)
    write_result(bundle, 2, "cc" * 32, steps=2)
    assert verdicts(bundle, facts_of(), "equality") == [OK]
    write_result(bundle, 4, "bb" * 32)
    (finding,) = (each for each in assess(bundle, facts_of(), 2) if each.about == "equality")
    assert finding.verdict == FAILURE and "4 ranks bbbbbbbbbbbbbbbb" in finding.text


def test_stage_that_failed_or_is_missing_is_a_failure(tmp_path):
    assert verdicts(Bundle(tmp_path), facts_of(), "stages") == [OK]
    assert verdicts(Bundle(tmp_path), facts_of(), "stages", planned=3) == [FAILURE]
    ended = {**facts_of(), "stages": [STAGES[0], {**STAGES[1], "code": 75}]}
    (finding,) = (each for each in assess(Bundle(tmp_path), ended, 2) if each.about == "stages")
    assert finding.verdict == FAILURE and finding.text == "benchmark-float32 ended with exit code 75"


def test_page_says_what_was_found(tmp_path):
    """What --precision names comes first; a stage that left nothing is no error."""
    bundle = Bundle(tmp_path)
    write_benchmark(bundle, 440.0)
    write_benchmark(bundle, 500.0, precision="bfloat16")
    bundle.doctor.write_text("{")  # half a file
    page = format_page(bundle, facts_of(), assess(bundle, facts_of(), 2))
    assert page.startswith("hvd-vgg acceptance, 2026-11-29T12:00:00Z, 3 s: ACCEPTED\n")
    assert "8 ranks on 1 host; Iluvatar BI-V100, Iluvatar, 4.2; P (avx)" in page
    assert page.index("\nfloat32 ") < page.index("\nbfloat16 ")
    assert f"{'float32':10s} {'read and decoded':22s} {8:5d} {440.0:9.1f}" in page
