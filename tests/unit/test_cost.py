import dataclasses

import pytest
from support import ROOT

from hvd_vgg.config import TrainConfig
from hvd_vgg.models.architecture import vgg_layers
from hvd_vgg.parallel import cost

VGG16 = TrainConfig()


def megabytes(ranks, per_rank, **flags):
    config = dataclasses.replace(VGG16, global_batch=ranks * per_rank, **flags)
    return {choice.layer: choice for choice in cost.choose(config, ranks)}


# MB sent by each rank: ranks, images a rank, all by ring, convolutions by ring, fc1 / fc2 / fc3 by factors.
PUBLISHED = [
    (2, 64, 553, 59, (7.5, 2.1, 1.3)),
    (4, 64, 830, 88, (22, 6.3, 3.9)),
    (8, 32, 969, 103, (26, 7.3, 4.6)),
    (8, 64, 969, 103, (52, 15, 9.1)),
    (16, 64, 1038, 110, (112, 31, 20)),
    (64, 64, 1090, 116, (471, 132, 82)),
    (128, 64, 1098, 117, (949, 266, 166)),
]


@pytest.mark.parametrize(("ranks", "per_rank", "everything", "convolutions", "dense"), PUBLISHED)
def test_cost_bytes_are_those_of_the_formulas(ranks, per_rank, everything, convolutions, dense):
    """Of ring allreduce and gathered factors."""
    found = megabytes(ranks, per_rank, exchange="factored")
    assert sum(choice.allreduce_bytes for choice in found.values()) / 1e6 == pytest.approx(everything, abs=0.6)
    summed = [choice.allreduce_bytes for choice in found.values() if choice.factored_bytes is None]
    assert sum(summed) / 1e6 == pytest.approx(convolutions, abs=0.6)
    for layer, wanted in zip(("fc1", "fc2", "predictions"), dense):
        assert found[layer].factored_bytes / 1e6 == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(("layer", "crossover"), [("fc1", 7042), ("fc2", 4096), ("predictions", 1607)])
def test_cost_auto_changes_at_the_crossover(layer, crossover):
    """On any number of ranks."""
    for ranks in (1, 2, 8):
        ways = []
        for global_batch in (crossover - 1, crossover + 1):
            choices = cost.choose(dataclasses.replace(VGG16, global_batch=global_batch), ranks)
            ways.append(next(choice.method for choice in choices if choice.layer == layer))
        assert ways == ["factored", "allreduce"]


def test_cost_float16_halves_every_byte():
    """For every layer."""
    for exchange in ("allreduce", "factored"):
        full, half = (megabytes(8, 32, exchange=exchange, wire_dtype=wire) for wire in ("float32", "float16"))
        assert cost.sent(list(half.values())) == cost.sent(list(full.values())) / 2


def test_cost_bracket_holds_horovods_68_percent():
    """Its published scaling efficiency of VGG16 on 512 devices."""
    link = cost.Cluster(ranks=512, ranks_per_host=4, gbit=25, fps_per_rank=150)
    found = cost.predict(dataclasses.replace(VGG16, global_batch=512 * 64, exchange="allreduce"), link)
    assert found.efficiency_apart < 0.68 < found.efficiency_overlapped
    assert found.efficiency_apart == pytest.approx(0.55, abs=0.005)
    assert found.efficiency_overlapped == pytest.approx(0.86, abs=0.005)


def test_cost_factored_adds_its_multiplications():
    """Every rank forms the product of all rows."""
    config = dataclasses.replace(VGG16, exchange="factored")
    extra = cost._extra_compute(config, cost.choose(config, 8))
    assert extra == pytest.approx(0.2473 / 92.65, rel=0.02)
    assert cost._extra_compute(VGG16, cost.choose(dataclasses.replace(VGG16, exchange="allreduce"), 8)) == 0


def test_cost_on_one_host_nothing_crosses_a_link():
    """Efficiency is limited by computing alone."""
    found = cost.predict(dataclasses.replace(VGG16, exchange="allreduce"), cost.Cluster(8, 8, 0.001, 100))
    assert found.efficiency_apart == 1


def test_cost_table_has_dense_layers_and_the_sum():
    """Convolutions are one row."""
    choices = list(megabytes(8, 32).values())
    text = cost.table(choices)
    assert [line.split()[0] for line in text.splitlines()] == ["layer", "convolutions", "fc1", "fc2", "predictions", "all"]
    assert len(cost.as_log(choices)) == 3
    assert sum(layer.parameters for layer in vgg_layers("vgg16", 1.0, 224, 1000)) == 138_357_544


def test_plan_needs_no_tensorflow_and_draws(launch, tmp_path):
    """A table, a sweep and a picture."""
    (tmp_path / "tensorflow.py").write_text("raise ImportError('TensorFlow was imported')")
    flags = ["--ranks=512", "--ranks_per_host=4", "--gbit=25", "--fps_per_rank=150", "--global_batch=32768"]
    picture = tmp_path / "plan.png"
    ended = launch(0, "plan", *flags, "--sweep_ranks=1,8,64,512", f"--out={picture}", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.code == 0, ended.err
    assert "54.7% .. 86.1%" in ended.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    ended = launch(0, "plan", "--ranks=4", "--global_batch=3", "--out=x.png")
    assert ended.code == 64
    assert "2 illegal flag(s)" in ended.err
