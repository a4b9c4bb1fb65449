"""A run is its configuration and its seed: the same records, losses, weights and momentum on any number of ranks.

Under --reproducible=bits nothing here has a tolerance: runs are the same if `state_sha256` and all losses are. No hash is
kept from one session to the next.
"""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from oracles import (
    FLAGS,
    RECORDS,
    SEED,
    STEPS,
    assert_same_run,
    assert_true,
    events,
    ids_by_step,
    injected_ranks,
    losses,
    newest,
    result,
    run,
    start,
)
from support import ROOT, TINY, Started, full, wait_for

from hvd_vgg.commands.same_run import compare_runs
from hvd_vgg.data.sampler import positions
from hvd_vgg.provenance import instruction_sets
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint

# 5 micro-batches, of 6, 6, 6, 6 and 5 images, which neither 2 nor 3 nor 4 ranks can share evenly.
LONG = [
    *("--steps=30", "--global_batch=29", "--device_batch=6", "--optimizer=nesterov", "--weight_decay=0.0005"),
    *("--lr=0.02", "--save_every_steps=0", "--eval_every_epochs=5"),
]
# Two recipes that together have what `optimizer`, `schedule` and `loss` know; both clip some steps and not all.
_RECIPE = ["--label_smoothing=0.1", "--warmup_epochs=1", "--warmup_lr=0.001", "--lr_min=0.001", "--lr_base_batch=29"]
LARS = ["--optimizer=lars", "--lars_eta=0.2", "--lr=0.1", "--lr_schedule=polynomial", "--clip_norm=2", *_RECIPE]
LISTS = ["--no_decay=bias,norm", "--lr_schedule=cosine", "--clip_norm=1.5", *_RECIPE, "--exchange=allreduce"]
# With BatchNorm 5 micro-batches of 3, 3, 3, 3 and 2 groups.
GROUPS = ("--model=vgg11_bn", "--norm_batch=2", "--global_batch=28")
AUGMENTED = [
    *("--augment=crop", "--auto_augment=trivial", "--color_jitter=0.4", "--pca_lighting=0.1", "--random_erasing=0.5"),
    *("--resize=pillow", "--eval_crop=1", "--eval_size=64", "--eval_flip"),
]
MIXED = ["--mixup=0.3", "--cutmix=1", "--mix_batch=2", "--ema_decay=0.9"]
# A layer in the middle is frozen.
LAYERS = ["--train_only=block1,block2,block3_conv1,block4,block5,fc,predictions", "--lr_multipliers=block:0.5,block5:2"]
EVERYTHING = [*GROUPS, "--exchange=factored", *LARS, "--no_decay=bias,norm", *MIXED, *AUGMENTED, *LAYERS]


def planned(block=1):
    """Returns {step: ids} as the sampler has them."""
    return {step: positions(32 * step, 32 * step + 32, RECORDS, SEED, block).ids.tolist() for step in range(STEPS)}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, data):
    """Returns the function that yields the folder of LONG with more flags on one rank, without a launcher."""
    made = {}

    def on_one_rank(*flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("long")
            run(made[flags], data, 0, *LONG, *flags)
            first, *_, last = losses(made[flags] / "run").values()
            assert abs(first - last) > 1e-2  # else equal runs would show little
        return made[flags]

    return on_one_rank


def test_undisturbed_run_learns_and_reads_what_is_planned(undisturbed):
    """Else all the comparisons with it would show little."""
    assert ids_by_step(undisturbed, 2) == planned()
    found = losses(undisturbed / "run")
    assert list(found) == list(range(1, STEPS + 1)) and abs(found[STEPS] - found[1]) > 1e-3
    tensors = newest(undisturbed).tensors
    assert min(np.linalg.norm(value) for name, value in tensors.items() if name.endswith("momentum")) > 0


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (4, ["--exchange=allreduce"]),
        *full(*((ranks, ["--exchange=factored"]) for ranks in (1, 2, 3, 4))),
        *full((1, ["--exchange=allreduce"]), (2, ["--exchange=allreduce"]), (3, ["--exchange=allreduce"])),
        *full((3, ["--compute_threads=2"]), (2, AUGMENTED), (3, AUGMENTED)),
        *full((1, EVERYTHING), (2, EVERYTHING), (3, EVERYTHING), (4, EVERYTHING), (2, [*MIXED, "--global_batch=28"])),
        *full((2, LARS), (3, LARS), (4, LARS), (3, [*LARS, "--compute_threads=2"]), (2, LISTS), (3, LISTS), (4, LISTS)),
        *full(
            *((ranks, [*GROUPS, "--exchange=factored"]) for ranks in (1, 2, 3, 4)), (2, [*GROUPS, "--exchange=allreduce"])
        ),
        *full((3, [*GROUPS, "--device_batch=2"]), (4, [*GROUPS, "--precision=float16"])),
        *[pytest.param(3, [f"--precision={each}"], marks=pytest.mark.fault(tier=3)) for each in ("bfloat16", "float16")],
    ],
    ids=lambda value: value if isinstance(value, int) else " ".join([*value[:4], *value[8:]]),
)
@pytest.mark.fault("F31")
def test_every_bit_is_the_same_on_any_ranks(tmp_path, data, long_run, ranks, flags):
    if "--precision=bfloat16" in flags and "avx512_bf16" not in instruction_sets(Path("/")):
        pytest.skip("capability: convolutions in bfloat16 need a processor that has it")
    run(tmp_path, data, ranks, *LONG, *flags)
    assert_same_run(tmp_path, long_run(*flags))


@pytest.mark.parametrize(
    "launcher",
    [*full(["horovodrun", "-np", "2"]), ["horovodrun", "--gloo", "-np", "3"]],
    ids=lambda words: " ".join(words[:2]),
)
def test_every_bit_is_the_same_under_any_launcher(launch, tmp_path, data, long_run, launcher):
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, *LONG, "--exchange=allreduce"]
    launch(0, "train", *flags, program=[*launcher, sys.executable, "-m", "hvd_vgg"], PYTHONPATH=str(ROOT), code=0)
    assert_same_run(tmp_path, long_run("--exchange=allreduce"))


@pytest.mark.parametrize(("fault", "step"), [*full(("twice@1:7", 7), ("drop_by_rank@1:5", 5)), ("sum_in_floats", 1)])
def test_a_defect_of_a_bit_is_seen(tmp_path, data, long_run, fault, step):
    """One sample twice, dropout by rank, sums whose result depends on order: the loss of the same or of the next step."""
    flags = ["--exchange=allreduce", "--drift_every_steps=0"]
    faults = [fault] if "@" in fault else [f"{fault}@0:0", f"{fault}@1:0"]
    run(tmp_path, data, 2, *faults, *LONG, *flags)
    found = difference(tmp_path, long_run("--exchange=allreduce"))
    assert f"losses part at step {step} (" in found and "state SHA-256 differs at step" in found


def difference(out, wanted):
    """Returns how verify-run --same_as says that two runs differ."""
    assert_true(out / "run")
    (text,) = compare_runs(RunDir(out / "run"), RunDir(wanted / "run"))
    return text


def test_a_rank_that_computes_otherwise_is_refused(tmp_path, data):
    """At the start, before it has trained."""
    ended = run(tmp_path, data, 2, "drop_by_rank@1:0", code=78)
    assert "the bits that rank 1 computes for the same images are not those of rank 0" in ended.err


@pytest.mark.fault(tier=3)
def test_lost_momentum_is_seen(tmp_path, data, undisturbed):
    """A run that goes on without it has the loss of its first update still."""
    run(tmp_path, data, 2, "usr1@0:6", code=80)
    stopped_at = newest(tmp_path).meta["step"]
    run(tmp_path, data, 2, "forget_momentum@0:0")
    assert f"losses part at step {stopped_at + 1} (" in difference(tmp_path, undisturbed)


@pytest.mark.fault("F21", tier=3)
def test_killed_at_random_and_resumed_on_other_ranks(tmp_path, data, undisturbed):
    """It is the run that was never killed, whichever step it was killed at."""
    draw = random.Random()
    moments = sorted(draw.sample(range(2, STEPS), 3))
    print("killed after", moments)
    for ranks, moment in zip((3, 1, 4), moments):
        run(tmp_path, data, ranks, f"kill@{ranks - 1}:{moment}", "--save_every_steps=2", code=137)
    run(tmp_path, data, 2, "--save_every_steps=2")
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("ranks", [(2, 3), *full(((1, 4),), ((4, 2),), ((3, 1),))], ids=str)
@pytest.mark.fault("F21")
def test_every_ingredient_killed_and_resumed(tmp_path, data, long_run, ranks):
    """With every other ingredient too: the same bits, moving moments among them, and a comparison says where they differ."""
    flags = [*LONG, *EVERYTHING, "--save_every_steps=4"]
    run(tmp_path, data, ranks[0], f"kill@{ranks[0] - 1}:13", *flags, code=137)
    run(tmp_path, data, ranks[1], *flags)
    wanted = long_run(*EVERYTHING)
    assert_same_run(tmp_path, wanted)
    found, (name, moment) = newest(tmp_path), next(each for each in newest(tmp_path).tensors.items() if "moving" in each[0])
    assert np.abs(moment).min() > 0 and result(tmp_path / "run")["state_sha256"] == result(wanted / "run")["state_sha256"]
    other = {**found.tensors, name: np.nextafter(moment, np.float32(9))}
    checkpoint.save(RunDir(tmp_path / "run"), other, found.meta, 5, [])
    assert list(compare_runs(RunDir(tmp_path / "run"), RunDir(wanted / "run"))) == [
        f"moving moments first differ in {name} (checkpoint of step 30)"
    ]


@pytest.mark.fault("F21", tier=3)
def test_killed_on_two_ranks_and_resumed_on_one(tmp_path, data, undisturbed):
    """No record is left out or read twice, from whichever step it was killed at."""
    started = start(tmp_path, data, 2, "--save_every_steps=2")
    ids = tmp_path / "ids.rank1"
    wait_for(lambda: ids.exists() and len(ids.read_text().splitlines()) >= 5)
    os.kill(injected_ranks(started)[1], signal.SIGKILL)
    started.wait(code=137)
    before, found = ids_by_step(tmp_path, 2), newest(tmp_path)
    resumed_at = found.meta["step"] if found else 0
    for rank in (0, 1):
        (tmp_path / f"ids.rank{rank}").unlink()
    ended = run(tmp_path, data, 1, "--save_every_steps=2")
    assert f"steps {resumed_at} to {STEPS}" in ended.out
    assert {**{step: before[step] for step in range(resumed_at)}, **ids_by_step(tmp_path, 1)} == planned()
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("recipe", [LARS, LISTS], ids=lambda flags: flags[0])
@pytest.mark.fault("F21", tier=3)
def test_recipe_killed_and_resumed_on_other_ranks(tmp_path, data, long_run, recipe):
    """It is the run that was never killed; that it is far below a curve, both starts find, and one says."""
    flags = [*LONG, *recipe, "--save_every_steps=7", "--reference_curve=1:0.9,20:1"]
    run(tmp_path, data, 3, "kill@2:25", *flags, code=137)
    ended = run(tmp_path, data, 2, *flags)
    assert_same_run(tmp_path, long_run(*recipe))
    assert ended.out.count("  reference 0.9") > 0 and "below --reference_curve" not in ended.out
    assert len(events(tmp_path / "run", "below_reference")) == 1


@pytest.mark.fault(tier=3)
def test_two_hosts_over_a_slow_link_are_one_rank(emulated_hosts, tmp_path, data, long_run):
    emulated_hosts.slow(2, 50)
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, *LONG, "--exchange=allreduce"]
    words = [sys.executable, "-m", "hvd_vgg", "launch", *emulated_hosts.flags, "train", *flags]
    Started(emulated_hosts.on(1, words), tmp_path, PYTHONPATH=str(ROOT)).wait(code=0)
    assert_same_run(tmp_path, long_run("--exchange=allreduce"))


@pytest.mark.fault(tier=3)
def test_going_on_with_other_threads_is_said(tmp_path, data):
    """And not refused: equal to rounding only."""
    run(tmp_path, data, 2, "--steps=4")
    ended = run(tmp_path, data, 2, "--compute_threads=2")
    assert "equal to rounding only from here" in ended.out and "threads" in ended.out
    (event,) = events(tmp_path / "run", "arithmetic_changed")
    assert (event["before"], event["after"]) == ({"threads": "1"}, {"threads": "2"})


@pytest.mark.parametrize(
    ("flag", "value"), [("exchange", "allreduce"), ("device_batch", "16"), ("reproducible", "rounding")]
)
@pytest.mark.fault(tier=3)
def test_going_on_with_other_sums_is_refused(tmp_path, data, flag, value):
    """Unless it is allowed by name."""
    run(tmp_path, data, 2, "--steps=4", "--exchange=factored")
    ended = run(tmp_path, data, 2, "--exchange=factored", f"--{flag}={value}", code=78)
    assert f"--allow_config_change={flag}" in ended.err
    ended = run(tmp_path, data, 2, "--exchange=factored", f"--{flag}={value}", f"--allow_config_change={flag}")
    assert ended.out.count(" from here on") == 1 and f"--{flag} was " in ended.out


@pytest.mark.fault(tier=3)  # test_variables.py has it among others in tier 1
def test_tensorflow_deterministic_ops_of_a_user_work(tmp_path, data):
    """With sums that depend on order too."""
    run(tmp_path, data, 2, "--reproducible=rounding", "--steps=2", TF_DETERMINISTIC_OPS="1")


# ---- to rounding


@pytest.mark.parametrize(
    ("ranks", "device_batch", "exchange"), [(3, 4, "factored"), *full((0, 32, "allreduce"), (4, 16, "factored"))]
)
def test_ranks_and_micro_batches_change_rounding_alone(tmp_path, data, undisturbed, ranks, device_batch, exchange):
    """With parts that differ by one image, gradients summed in floats, and any micro-batches."""
    flags = ["--reproducible=rounding", f"--device_batch={device_batch}", f"--exchange={exchange}", "--drift_every_steps=3"]
    run(tmp_path, data, ranks, *flags)
    assert ids_by_step(tmp_path, ranks) == planned()
    found, expected = losses(tmp_path / "run"), losses(undisturbed / "run")
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    for name, distance in distances(newest(tmp_path), newest(undisturbed)).items():
        # A ReLU or a maximum whose inputs differ in the last bit may go the other way, and moves a gradient by a whole term.
        assert distance <= (1e-5 if name.endswith("/kernel") else 0.02), name


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.fault(tier=3)
def test_batch_norm_under_rounding_shares_groups(tmp_path, data, ranks):
    """Parts are whole groups, of 11; the same run to rounding, which groups of 2 images amplify 1000 times by step 5."""
    flags = [*GROUPS, "--global_batch=22", "--device_batch=8", "--reproducible=rounding", "--steps=3"]
    run(tmp_path, data, ranks, *flags)
    shares = [len((tmp_path / f"ids.rank{rank}").read_text().splitlines()[0].split()) - 1 for rank in range(ranks)]
    assert sum(shares) == 22 and {share % 2 for share in shares} == {0} and max(shares) - min(shares) <= 2
    run(tmp_path / "bits", data, 1, *flags, "--reproducible=bits")
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "bits" / "run")
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    assert max(distances(newest(tmp_path), newest(tmp_path / "bits")).values()) <= 1e-4


@pytest.mark.parametrize("reproducible", ["bits", "rounding"])
@pytest.mark.fault(tier=3)
def test_batch_norm_on_more_ranks_than_groups_is_refused(tmp_path, data, reproducible):
    flags = [*GROUPS, "--global_batch=4", "--device_batch=4", f"--reproducible={reproducible}"]
    ended = run(tmp_path, data, 3, *flags, code=64)
    assert "fewer than the 3 ranks, each of which computes whole ones" in ended.err
    assert f"start at most {1 if reproducible == 'bits' else 2}\n" in ended.err


def distances(found, wanted):
    """Returns the norm of the difference over the norm, of each weight, moment and momentum that is not 0 in both."""
    names = [name for name in wanted.tensors if name in found.tensors and "/" in name and "loss_scale" not in name]
    names = [name for name in names if found.tensors[name].any() or wanted.tensors[name].any()]
    norms = {name: np.linalg.norm(wanted.tensors[name]) for name in names}
    return {name: np.linalg.norm(found.tensors[name] - wanted.tensors[name]) / norms[name] for name in names}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.fault(tier=3)
def test_low_precision_changes_rounding_alone(tmp_path, data, undisturbed, precision):
    run(tmp_path, data, 0, f"--precision={precision}", "--drift_every_steps=3")
    assert (precision == "float16") == ("loss_scale" in newest(tmp_path).tensors)
    moved = [each for name, each in distances(newest(tmp_path), newest(undisturbed)).items() if name.endswith("/kernel")]
    assert min(moved) > 0 and max(moved) < 0.1


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.fault(tier=3)
def test_shuffled_blocks_and_input_threads_on_ranks(tmp_path, data, ranks):
    """The order is the sampler's, which knows of no ranks and no threads."""
    run(tmp_path, data, ranks, "--shuffle_block_records=8", f"--input_threads={1 + ranks}")
    assert ids_by_step(tmp_path, ranks) == planned(8)


@pytest.mark.fault(tier=3)
def test_float16_run_goes_on_with_its_loss_scale(tmp_path, data):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, data, 1, "--precision=float16")
    run(parts, data, 1, "--precision=float16", "--steps=4")
    assert newest(parts).tensors["loss_scale/good_steps"] in (3, 4)
    run(parts, data, 2, "--precision=float16")
    for name in ("loss_scale", "loss_scale/good_steps"):
        assert newest(parts).tensors[name] == newest(whole).tensors[name]


@pytest.mark.fault(tier=3)
def test_run_goes_on_in_another_precision_where_allowed(tmp_path, data):
    """The loss scale, which it had none of, begins at its first value."""
    run(tmp_path, data, 2, "--steps=4")
    run(tmp_path, data, 2, "--precision=float16", "--allow_config_change=precision")
    assert newest(tmp_path).tensors["loss_scale"] in (65536.0, 32768.0)
    assert newest(tmp_path).tensors["loss_scale/good_steps"] in (STEPS - 5, STEPS - 4)


@pytest.mark.fault(tier=3)
def test_another_seed_is_another_run(tmp_path, data, undisturbed):
    run(tmp_path, data, 2, "--seed=2")
    assert ids_by_step(tmp_path, 2) != planned()
    assert min(distances(newest(tmp_path), newest(undisturbed)).values()) > 1e-2


@pytest.mark.fault(tier=3)
def test_one_inter_op_thread_does_not_hang_a_run(tmp_path, data, undisturbed):
    run(tmp_path, data, 2, TF_NUM_INTEROP_THREADS="1", TF_NUM_INTRAOP_THREADS="1")
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("model", full(["--device_batch=5"], ["--model=vgg11_bn", "--norm_batch=4"]), ids=" ".join)
def test_evaluation_gives_the_same_integers_on_ranks(launch, tmp_path, data, model):
    """On 2 after training in batches of 5, on 3 by the command."""
    flags = [f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=20", *model]
    ended = launch(2, "train", *flags, code=0)
    found = result(tmp_path / "run")
    assert found["records_evaluated"] == 37
    ended = launch(3, "evaluate", f"--run_dir={tmp_path / 'run'}", code=0)
    assert f"({found['top1_hits']} and {found['top5_hits']} of 37 records, each once" in ended.out
