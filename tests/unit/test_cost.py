import dataclasses
import json
import re

import pytest
from support import ROOT
from test_report import checked

from hvd_vgg.commands.plan import plan
from hvd_vgg.config import BenchmarkConfig, PlanConfig, TrainConfig
from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.flags import validate
from hvd_vgg.models.architecture import vgg_layers
from hvd_vgg.pages.benchmark_page import benchmark_page
from hvd_vgg.pages.curves import flag_text
from hvd_vgg.pages.plan_page import plan_page
from hvd_vgg.parallel import cost
from hvd_vgg.parallel.plan import make_plan, powers_of_two

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


# The least global batch, to rounding, at which a layer's products are summed: by FLOPs per byte, wire dtype and layer.
CROSSOVERS = [
    (flops_per_byte, wire_dtype, layer, crossover)
    for flops_per_byte, wire_dtype, crossovers in [
        (1e12, "float32", (7042, 4096, 1607)),
        (1e12, "float16", (7042, 4096, 1607)),
        (1e4, "float32", (5988, 3716, 1545)),
        (1000, "float32", (2551, 2024, 1147)),
        (1000, "float16", (1558, 1344, 891)),
        (404, "float32", (1314, 1159, 806)),
    ]
    for layer, crossover in zip(("fc1", "fc2", "predictions"), crossovers)
]


@pytest.mark.parametrize(("flops_per_byte", "wire_dtype", "layer", "crossover"), CROSSOVERS)
def test_cost_auto_changes_at_the_crossover(flops_per_byte, wire_dtype, layer, crossover):
    """On any number of ranks."""
    config = dataclasses.replace(VGG16, link_flops_per_byte=flops_per_byte, wire_dtype=wire_dtype)
    for ranks in (1, 2, 8):
        ways = []
        for global_batch in (crossover - 1, crossover + 1):
            choices = cost.choose(dataclasses.replace(config, global_batch=global_batch), ranks)
            ways.append(next(choice.method for choice in choices if choice.layer == layer))
        assert ways == ["factored", "allreduce"]


def test_cost_defaults_gather_all_dense_layers():
    assert VGG16.link_flops_per_byte == 1000
    assert cost.factored_layers(VGG16, 8) == ["fc1", "fc2", "predictions"]


def test_cost_choices_made_before_are_kept():
    """Whatever the flags say, with the bytes of both methods."""
    for exchange in ("auto", "allreduce", "factored"):
        config = dataclasses.replace(VGG16, exchange=exchange)
        made = cost.choose(config, 8, ["fc2"])
        assert [choice.layer for choice in made if choice.method == "factored"] == ["fc2"]
        assert [choice[2:] for choice in made] == [choice[2:] for choice in cost.choose(config, 8)]
        assert not any(choice.method == "factored" for choice in cost.choose(config, 8, []))


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


def seconds(cluster, global_batch, flops_per_byte=1000.0, **flags):
    """Returns what is predicted without overlap."""
    flags = dict(flags, global_batch=global_batch, link_flops_per_byte=flops_per_byte)
    return cost.predict(dataclasses.replace(VGG16, **flags), cluster).seconds_apart


@pytest.mark.parametrize(("flops_per_byte", "wire_dtype", "layer", "crossover"), CROSSOVERS[6:])
@pytest.mark.parametrize("ranks", [2, 64, 1000])
def test_cost_methods_take_equally_long_at_crossover(flops_per_byte, wire_dtype, layer, crossover, ranks):
    """What `auto` chooses by is what `predict` predicts."""
    cluster = cost.Cluster(ranks, 1, 100, 1)
    cluster = cluster._replace(fps_per_rank=flops_per_byte / cost.link_flops_per_byte(VGG16, cluster))
    assert cost.link_flops_per_byte(VGG16, cluster) == pytest.approx(flops_per_byte)
    # Nothing but this layer's method differs between the two.
    summed, gathered = (seconds(cluster, crossover, flops_per_byte * by, wire_dtype=wire_dtype) for by in (0.9, 1.1))
    assert summed == pytest.approx(gathered, rel=5e-4)
    assert summed != gathered


def test_cost_auto_is_never_slower_without_overlap():
    """Than one method for all layers, where it knows the cluster's FLOPs per byte."""
    for ranks, per_host, gbit, fps in [(2, 1, 0.3, 1), (8, 1, 10, 54.5), (128, 16, 100, 54.5), (512, 8, 400, 504)]:
        cluster = cost.Cluster(ranks, per_host, gbit, fps)
        own = cost.link_flops_per_byte(VGG16, cluster)
        for global_batch in range(ranks, 9000, 97):
            for wire_dtype in ("float32", "float16"):
                took = {
                    way: seconds(cluster, global_batch, own, exchange=way, wire_dtype=wire_dtype)
                    for way in ("auto", "allreduce", "factored")
                }
                assert took["auto"] <= min(took.values()) * (1 + 1e-12)


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


def test_plan_page_has_what_is_printed(launch, tmp_path):
    """Every number, with the sweep of 1, 2, 4, ... ranks where none is asked for; a band for each method; no outside."""
    flags = ["--ranks=6", "--ranks_per_host=2", "--global_batch=600", "--save_seconds=6", "--failure_hours=24"]
    ended = launch(0, "plan", *flags, "--out=plan.html", code=0)
    page = checked((tmp_path / "plan.html").read_text())
    assert [line.split()[0] for line in ended.out.split("ranks   ")[1].splitlines()[1:5]] == ["1", "2", "4", "6"]
    for number in re.findall(r"\d+\.\d%? \.\. \d+\.\d%?|\d+\.\d{3} \.\. \d+\.\d{3}", ended.out):
        assert number in page.text
    assert "Save with --save_every_minutes=17" in page.text and "--ranks_per_host 2 1" in page.text
    assert "6 ranks on 3 hosts, 2 on each" in page.text and "the processor time of sending, stragglers." in page.text
    assert page.tags.count("figure") == 1 and "fc1" in page.text and ended.out.endswith("drawn: plan.html\n")
    one = checked(plan_page(make_plan(PlanConfig(ranks=1), powers_of_two(1)), 0.0)).text
    assert "Plan: vgg16 on 1 rank" in one and "images per rank and 1 rank per host." in one
    assert powers_of_two(8) == (1, 2, 4, 8) and powers_of_two(9) == (1, 2, 4, 8, 9)
    assert checked(plan_page(make_plan(PlanConfig(ranks=8), ()), 0.0)).tags.count("figure") == 0


def test_plan_refuses_what_it_cannot_draw(launch, tmp_path, capsys):
    """Before it prints anything: another ending, a picture without a sweep, no matplotlib, a place that is none."""
    (message,) = validate(PlanConfig(out="plan.txt", sweep_ranks=(2,)))
    assert message == "--out=plan.txt: expected a name that ends in .png, .svg, .pdf or .html"
    assert validate(PlanConfig(out="plan.svg")) == ["--out of a picture needs --sweep_ranks"]
    assert len(validate(PlanConfig(out="plan.HTML"))) == 1
    (message,) = validate(BenchmarkConfig(out="b.txt"))
    assert message == "--out=b.txt: expected a name that ends in .json or .html"
    hide = {"PYTHONPATH": f"{ROOT / 'tests' / 'programs' / 'hide_packages'}:{ROOT}", "HIDDEN_PACKAGES": "matplotlib"}
    ended = launch(0, "plan", "--out=plan.html", code=78, **hide)
    assert (ended.out, ended.err.count("matplotlib, which draws the figures, is not installed")) == ("", 1)
    with pytest.raises(Failure, match=r"plan\.html cannot be written") as raised:
        plan(PlanConfig(out=str(tmp_path / "none" / "plan.html")))
    assert raised.value.code == NOT_WRITTEN and capsys.readouterr().out == ""


@pytest.fixture
def record():
    """What a benchmark on one and two ranks has measured, as its JSON has it."""
    found = json.loads((ROOT / "docs" / "acceptance-sample" / "benchmark.float32.json").read_text())
    return {"images_per_rank": 16, "updates": 200, **found}


def test_benchmark_page_has_what_its_json_has(record):
    page = checked(benchmark_page(record))
    assert page.tags.count("figure") == 2
    for row in record["rows"]:
        assert f"{row['fps']:.1f}" in page.text and f"{row['efficiency']:.1%}" in page.text
        for each in row.get("by_rank", []):
            assert all(f"{each[name]:.1f}" in page.text for name in ("fps", "fps_alone")) and each["host"] in page.text
            assert f"{each['compute']:.1%}" in page.text
    for value in (*record["software"].values(), record["date"], record["machine"]["hosts"][0]["cpu"]):
        assert value in page.text
    for name, value in record["flags"].items():
        assert f"--{name} {flag_text(value)}" in page.text
    shares = [{**row, "share_of_peak": 0.123} for row in record["rows"] if row["ranks"] == 1 and "by_rank" in row]
    alone = checked(benchmark_page({**record, "rows": shares}))
    assert alone.tags.count("figure") == 1 and "12.3%" in alone.text and "of peak" in alone.text


def test_benchmark_page_takes_names_for_text(record):
    hostile = "<b onclick='x'>&amp;\x1b[2J"
    record["machine"]["hosts"][0].update(host=hostile, cpu=hostile)
    record["rows"][0]["by_rank"][0]["host"] = hostile
    record["flags"]["data_dir"] = hostile
    page = checked(benchmark_page(record))
    assert "b" not in page.tags and page.text.count("<b onclick='x'>&amp;\\x1b[2J") >= 4


def test_plan_advises_how_often_to_save(launch):
    """sqrt(2 x 6 s x 86400 s) = 1018 s; both figures are needed, and a save that is shorter than the time to a failure."""
    ended = launch(0, "plan", "--save_seconds=6", "--failure_hours=24", code=0)
    assert ended.out.rstrip().splitlines()[-1] == (
        "Save with --save_every_minutes=17: sqrt(2 x 6 s a save x 24 h between failures), to first order (Young 1974); "
        "saves and lost updates take 1.2% then."
    )
    for flags, message in (
        (["--save_seconds=6"], "--save_seconds and --failure_hours need each other"),
        (["--save_seconds=7200", "--failure_hours=1"], "--save_seconds=7200: expected less than --failure_hours"),
    ):
        assert message in launch(0, "plan", *flags, code=64).err
    assert "--save_every_minutes" not in launch(0, "plan", code=0).out


def test_plan_knows_what_its_cluster_computes(launch):
    """Where links are fast, ranks many and processors slow: with the flag that it says, training does what it predicts."""
    flags = ["--ranks=128", "--ranks_per_host=16", "--gbit=100", "--fps_per_rank=54.5", "--global_batch=2048"]
    ended = launch(0, "plan", *flags, code=0)
    assert ended.out.count("77.0% .. 100.0%") == 2  # allreduce of everything, and ours
    assert "Train with --link_flops_per_byte=404, which is this cluster's: with 1000 auto chooses otherwise." in ended.out
    told = launch(0, "plan", *flags, "--link_flops_per_byte=404", code=0)
    assert ended.out.startswith(told.out)
    default = launch(0, "plan", *flags, "--link_flops_per_byte=1000", code=0)
    assert "fc1                    815.7        237.2  factored" in default.out
    assert "--link_flops_per_byte=404, which is" in default.out
