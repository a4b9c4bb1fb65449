"""What the vendor's script gets wrong is found in ours: idle devices, a constant rate, flags without effect."""

import pytest

from hvd_vgg.config import TrainConfig
from hvd_vgg.doctor.settings import (
    check_environment,
    check_flags,
    check_rank_count,
    check_schedule,
    check_visible_devices,
    link_variables,
)
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING


def test_rank_count_differs_from_devices():
    (two_of_eight,) = check_rank_count(8, 2, False, "")
    assert (two_of_eight.verdict, "6 devices would idle" in two_of_eight.text) == (WARNING, True)
    assert check_rank_count(8, 9, False, "0,1,2,3,4,5,6,7")[0].verdict == FAILURE
    assert check_rank_count(16, 16, False, "")[0].verdict == OK
    assert "mpirun -np 16" in check_rank_count(16, 1, True, "")[0].text
    assert check_rank_count(0, 4, False, "") == []


def test_visible_devices_are_fewer_than_nodes():
    (masked,) = check_visible_devices(8, 2, "0,1")
    assert masked.verdict == WARNING
    assert "TensorFlow sees 2 of 8 devices on this host (CUDA_VISIBLE_DEVICES=0,1)" in masked.text
    assert check_visible_devices(8, 0, None)[0].verdict == FAILURE
    assert check_visible_devices(8, 0, "-1")[0].verdict == WARNING
    assert check_visible_devices(8, 8, "") == check_visible_devices(0, 0, "") == []


def test_visible_devices_by_the_variable_of_iluvatar():
    (masked,) = check_visible_devices(16, 4, None, "0,1,2,3")
    assert "(COREX_VISIBLE_DEVICES=0,1,2,3)" in masked.text
    assert masked.fix == "unset COREX_VISIBLE_DEVICES to use all, unless a scheduler set it"
    (both,) = check_visible_devices(16, 2, "0,1", "all")
    assert "(CUDA_VISIBLE_DEVICES=0,1, COREX_VISIBLE_DEVICES=all)" in both.text
    assert both.fix.startswith("unset CUDA_VISIBLE_DEVICES to use all")
    assert "compare with the vendor's tool" in check_visible_devices(16, 8, None, "all")[0].fix
    assert check_visible_devices(16, 0, None, "")[0].verdict == WARNING
    assert check_visible_devices(16, 0, None, "all")[0].verdict == FAILURE
    assert "(COREX_VISIBLE_DEVICES=all)" in check_rank_count(16, 8, False, None, "all")[0].text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"exchange": "factored", "link_flops_per_byte": 404.0}, "--link_flops_per_byte has no effect with --exchange="),
        ({"max_rewinds": 7}, "--max_rewinds=7 has no effect without"),
        ({"steps": 10, "epochs": 3.0}, "--epochs=3 has no effect with --steps=10"),
        ({"lr_schedule": "cosine", "lr_step_epochs": (1.0,)}, "--lr_step_epochs has no effect with"),
        ({"lr_min": 1e-4}, "--lr_min has no effect with --lr_schedule=step"),
        ({"lars_eta": 0.01}, "--lars_eta has no effect with --optimizer=momentum"),
        ({"no_decay": ("bias",), "weight_decay": 0.0}, "--no_decay has no effect with --weight_decay=0"),
        ({"reference_curve": "91:0.5"}, "--reference_curve has no effect: it begins after the last of 90 epochs"),
        ({"global_batch": 255, "reproducible": "rounding"}, "255 images of --global_batch=255 are not divisible by 2 ranks"),
        ({"global_batch": 288}, "9 micro-batches of --global_batch=288 are not divisible by 2 ranks"),
        ({"norm_batch": 16}, "--norm_batch has no effect with --model=vgg16"),
        (
            {"model": "vgg16_bn", "global_batch": 160, "device_batch": 160, "reproducible": "rounding"},
            "the 5 groups of --global_batch=160 are not divisible by 2 ranks",
        ),
        ({"xla": True, "reproducible": "rounding"}, "--xla compiles for GPUs"),
        ({"profile_ranks": (1.0,)}, "--profile_ranks has no effect without --profile_steps"),
        ({"profile_steps": "1:2", "profile_ranks": (2.0,)}, "--profile_ranks names rank 2 of 2 ranks"),
        ({"input_threads": 1000}, "--input_threads=1000 exceeds the"),
    ],
)
def test_flags_without_the_meant_effect(flags, text):
    (found,) = check_flags(TrainConfig(**flags), 2, 0)
    assert found.verdict == WARNING
    assert text in found.text
    assert found.fix


def test_flags_usual_and_batch_below_ranks():
    assert check_flags(TrainConfig(), 8, 8)[0].verdict == OK
    for reproducible in ("bits", "rounding"):
        found = check_flags(TrainConfig(global_batch=4, device_batch=1, reproducible=reproducible), 8, 8)
        assert [each.verdict for each in found] == [FAILURE]
    (found,) = check_flags(TrainConfig(device_batch=64), 8, 8)
    assert (found.verdict, "4 micro-batches of --device_batch=64" in found.text) == (FAILURE, True)
    assert found.fix == "start at most 4, or begin a new run with --device_batch=32"


@pytest.mark.parametrize(
    ("flags", "records", "text"),
    [
        ({"lr_schedule": "constant", "steps": 450000}, 1281167, "--lr_schedule=constant keeps 0.01 to the end"),
        ({"epochs": 30.0}, 0, "at or after the end, epoch 30: the learning rate never decays"),
        ({"steps": 100}, 1281167, "at or after the end, epoch 0.02: the learning rate never decays"),
        ({"steps": 100}, 512, ""),
        ({"steps": 100}, 0, ""),
        ({"lr_schedule": "cosine", "steps": 100}, 1281167, ""),
        ({}, 1281167, ""),
    ],
)
def test_schedule_that_never_decays(flags, records, text):
    found = check_schedule(TrainConfig(**flags), records)
    assert [finding.verdict for finding in found] == ([WARNING] if text else [])
    assert all(text in finding.text for finding in found)


def test_environment_of_other_trainers_scripts():
    theirs = {"IX_NUM_CUDA_VISIBLE_DEVICES": "2", "UMD_WAITAFTERLAUNCH": "1", "HOROVOD_GPU_ALLREDUCE": "NCCL"}
    found = [*check_environment({**theirs, "TF_CUDNN_USE_AUTOTUNE": "0", "UMD_ENABLEPROFILE": "0", "HOME": "/"})]
    assert {finding.text.split("=")[0] for finding in found} == {*theirs, "TF_CUDNN_USE_AUTOTUNE"}
    assert all(finding.verdict == WARNING and finding.fix for finding in found)
    assert [*check_environment({"TF_CUDNN_USE_AUTOTUNE": "1"})] == []


def test_environment_gloo_fails_under_mpirun_only(monkeypatch):
    gloo = {"HOROVOD_CPU_OPERATIONS": "gloo"}
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    assert [each.verdict for each in check_environment(gloo)] == [WARNING]
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert [each.verdict for each in check_environment(gloo)] == [FAILURE]
    assert [*check_environment({**gloo, "HOROVOD_CONTROLLER": "gloo"})] == []  # as horovodrun --gloo sets


def test_link_variables():
    """They are compared between hosts."""
    environ = {"UMD_ENABLEMEMPOOL": "1", "NCCL_USE_DIRECT": "1", "NCCL_DEBUG": "INFO", "UMD_WAITAFTERLAUNCH": "0"}
    assert link_variables({**environ, "PATH": "/bin"}) == environ
    assert [*check_environment(environ)] == []
