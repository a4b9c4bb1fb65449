"""`verify-run` on what runs leave: the real loop, with a trainer that computes nothing and writes all that a run writes."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import types
from unittest import mock

import numpy as np
import pytest

from hvd_vgg.commands.history import FAIL, PASS, UNKNOWN
from hvd_vgg.commands.verify import check, verify_run
from hvd_vgg.config import TrainConfig, VerifyConfig, fingerprint
from hvd_vgg.data.coverage import Coverage, Update
from hvd_vgg.data.sampler import positions
from hvd_vgg.errors import Failure
from hvd_vgg.flags import to_flag_file
from hvd_vgg.models.architecture import training_flops, vgg_layers
from hvd_vgg.provenance import describe_process
from hvd_vgg.reporting import receipt
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.goodput import Goodput
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.reporting.throughput import Throughput, per_host, per_rank
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint, loop
from hvd_vgg.training.evaluate import Evaluation, report_evaluation
from hvd_vgg.training.metrics import NonFiniteStep
from hvd_vgg.training.reporter import Reporter
from hvd_vgg.training.schedule import learning_rate, make_cadence

RECORDS, VALIDATION, STEPS = 75, 37, 12
CONFIG = TrainConfig(
    num_classes=10,
    image_size=32,
    model="vgg11",
    width=0.125,
    global_batch=32,
    steps=STEPS,
    lr_schedule="cosine",
    warmup_epochs=1.0,
    save_every_steps=2,
    log_every_steps=2,
    drift_every_steps=0,
    console="lines",
)
LAYERS = vgg_layers(CONFIG.model, CONFIG.width, CONFIG.image_size, CONFIG.num_classes)


@pytest.fixture(autouse=True, scope="module")
def _no_fsync():
    """What a power cut leaves is not the subject; it would take most of the time."""
    with mock.patch.object(receipt.os, "fsync", lambda handle: None):
        yield


class Killed(Exception):
    """The process ends here."""


class Trainer:
    """Does for the loop what training.trainer.Trainer does, on paper; kill_at: the number of the write that is its last."""

    total_steps, target_reached, check_replicas = STEPS, staticmethod(lambda: False), staticmethod(lambda: None)
    save_overdue = staticmethod(lambda: False)
    loss = staticmethod(lambda step: 1 / (step + 3))

    def __init__(self, path, kill_at=None, bad=(), poisoned=(), skipped=(), stop_at=None, job=None, launched=False):
        self.run, self.kill_at, self.bad, self.poisoned, self.stop_at = RunDir(path), kill_at, bad, poisoned, stop_at
        self.skipped_file, self.writes, self.throughput = self.run.path / "skipped", 0, Throughput()
        path.mkdir(exist_ok=True)
        log = self.write(RunLog, path, False, None)
        log.log = lambda *line, write=log.log: self.write(write, *line)
        self.reporter = Reporter(log, Console("lines", False))
        self.skipped = {*skipped, *(json.loads(self.skipped_file.read_text()) if self.skipped_file.exists() else ())}
        found = self.restore()
        self.write(self.run.flags.write_text, to_flag_file(CONFIG))
        self.reporter.row("PARAMETER", dataclasses.asdict(CONFIG))
        digests = {"train": {"records": RECORDS, "sha256": "t"}, "validation": {"records": VALIDATION, "sha256": "v"}}
        start = {"step": self.progress.step, "skipped_steps": sorted(self.skipped), "ranks": 2, "hosts": ["a", "a"]}
        start["checkpoint"] = receipt.checkpoint_row(found.path) if found else None
        process = {**describe_process(), "job": job, "launched": launched}
        self.reporter.event("start", **process, **start, data=digests)
        self.write(receipt.write, self.run)

    def write(self, function, *arguments):
        found = function(*arguments)
        self.writes += 1
        if self.writes == self.kill_at:
            raise Killed
        return found

    def restore(self):
        found, _ = checkpoint.newest(self.run)
        meta = found.meta if found else {"step": 0, "best_top1": -1, "evaluated": 0, "coverage": []}
        self.progress = types.SimpleNamespace(**meta)
        self.cadence = make_cadence(CONFIG, RECORDS, meta["step"])
        self.coverage = Coverage(RECORDS, CONFIG.global_batch, meta["step"], meta["coverage"])
        self.window, self.saved, self.result = 0, None, None
        return found

    def epoch(self):
        return self.progress.step * 32 / RECORDS

    def evaluation_missed(self):
        return self.progress.evaluated < self.progress.step in self.cadence.evaluation_steps

    def any_stop_requested(self):
        return self.progress.step == self.stop_at

    def batches(self):
        for step in range(self.progress.step, STEPS):
            yield step, positions(step * 32, step * 32 + 32, RECORDS, CONFIG.seed).ids

    def update(self, step, ids):
        bad = [(row, int(ids[row])) for row in range(32) if ids[row] in self.bad]
        ids[[row for row, _ in bad]] = 5
        self.coverage.add([Update(step * 32, ids, bad, step in self.skipped)])
        self.progress.step, self.window = step + 1, self.window + 1

    def end_update(self):
        first = not self.throughput.total_seconds
        self.throughput.total_seconds.append((3.0 if first else 0.1) + 0.001 * (self.progress.step % 3))
        self.throughput.input_seconds.append(0.01 * (self.progress.step % 2))
        self.throughput.exchange_seconds.append(0.02)

    def log_metrics(self):
        self.end_update()
        self.unlogged = [times[-self.window :] for times in (self.throughput.total_seconds, self.throughput.input_seconds)]
        steps = set(range(self.progress.step - self.window, self.progress.step))
        for step in sorted(steps & set(self.poisoned) - self.skipped):
            raise NonFiniteStep(step, float("nan"), 1.0)
        if self.coverage.ended(self.progress.step):
            self.settle()
        seconds, waits = self.unlogged
        images = 32 * max(1, len(steps - self.skipped))
        losses = [None if step in self.skipped else self.loss(step) for step in sorted(steps)]
        loss = float(np.mean([each for each in losses if each is not None] or np.nan))
        row = {"train.loss": loss, "train.losses": losses, "train.acc@1": 3 / images, "train.acc@5": 5 / images}
        row.update({"train.fps": 32 * self.window / sum(seconds), "train.update_seconds": seconds})
        row.update({"train.input_seconds": waits, "train.lr": learning_rate(self.progress.step - 1, CONFIG, RECORDS)})
        self.reporter.row((int(self.epoch()), self.progress.step), row)
        self.window = 0

    def settle(self):
        for covered in self.coverage.settle(self.progress.step, lambda data: [data]):
            self.reporter.coverage(covered, RECORDS)

    def evaluate(self):
        hits, self.progress.evaluated = 10 + self.progress.step * 3 % 7, self.progress.step
        improved = [checkpoint.BEST] * (hits > self.progress.best_top1)
        self.progress.best_top1 = max(hits, self.progress.best_top1)
        digest = checkpoint.state_sha256(checkpoint.tensors_sha256(self.tensors().items()), vars(self.progress))
        self.result = Evaluation(hits, 30, VALIDATION, 70.0, 0, digest)
        report_evaluation(self.result, self.progress.step, self.epoch(), self.reporter)
        return improved

    def tensors(self):
        return {f"{LAYERS[1].name}/{part}": np.full((3, 4), self.progress.step, np.float32) for part in ("bias", "kernel")}

    def save(self, best=()):
        self.settle()
        run = {**fingerprint(CONFIG), "train_data_sha256": "t"}
        meta = {**vars(self.progress), "coverage": self.coverage.state(), "run": run}
        path = self.write(checkpoint.save, self.run, self.tensors(), meta, 3, best)
        self.reporter.event("checkpoint", step=self.progress.step, **receipt.checkpoint_row(path))
        self.saved = self.progress.step

    def measure(self):
        found, seconds = self.throughput.summary(32), sum(self.throughput.total_seconds)
        if found["fps"]:
            found["fps_wall"] = 32 * len(self.throughput.total_seconds) / (seconds + 1)
            found["tflops_per_rank"] = training_flops(LAYERS, CONFIG.image_size) * found["fps"] / 2 / 1e12
            rows = per_rank([self.throughput.last(found["fps_updates"])] * 2, ["a", "b"], [16 * found["fps_updates"]] * 2)
            found.update(by_rank=rows, by_host=per_host(rows))
        return found

    def write_result(self):
        measured, step, metrics = self.measure(), self.progress.step, self.result.metrics()
        content = {name: metrics[f"eval.{name}"] for name in ("acc@1", "acc@5", "top1_hits", "top5_hits")}
        content.update(records_evaluated=VALIDATION, steps=step, epochs=self.epoch(), ranks=2, global_batch=32)
        content["state_sha256"] = self.result.state_sha256
        content.update(Goodput(receipt.read_log(self.run.log)).report())
        if measured["fps"] or not self.run.result.exists() or json.loads(self.run.result.read_text())["steps"] != step:
            self.reporter.event("throughput", step=step, **measured)
            self.write(self.run.result.write_text, json.dumps({**content, "precision": "float32", **measured}))
        self.write(receipt.write, self.run)
        return {name: value for name, value in measured.items() if not name.startswith("by_")}

    def stop(self):
        if self.saved != self.progress.step:
            self.save()
        self.reporter.event("stopped", step=self.progress.step)
        self.write(receipt.write, self.run)
        raise Failure(80, "stopped")

    def rewind_or_stop(self, error):
        unlogged = dict(zip(("update_seconds", "input_seconds"), self.unlogged))
        self.skipped.add(error.step)
        self.write(self.skipped_file.write_text, json.dumps(sorted(self.skipped)))
        self.restore()
        steps = {"from": error.step, "to": self.progress.step, "skipped_steps": sorted(self.skipped)}
        self.reporter.event("rewind", **steps, **unlogged)

    def finish(self):
        if self.result is None:
            self.evaluate()
        self.reporter.row((), {**self.result.metrics(), **self.write_result()})
        self.write(receipt.write, self.run)


def train(path, **how):
    """Runs to the end, or raises Killed, or the Failure of a stop; returns the number of writes."""
    trainer = Trainer(path, **how)
    with mock.patch.multiple(
        loop, Trainer=lambda trainer, on_log: contextlib.nullcontext(trainer), rewind_or_stop=Trainer.rewind_or_stop
    ):
        loop.train(trainer)
    return trainer.writes


def verdicts(path, verdict=FAIL):
    return [f"{each.subject}: {each.text}" for each in check(path) if each.verdict == verdict]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files of a run that nothing happened to, by path."""
    path = tmp_path_factory.mktemp("finished") / "run"
    train(path)
    return {each.relative_to(path): each.read_bytes() for each in path.rglob("*") if each.is_file()}


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run."""
    for name, content in finished.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return RunDir(tmp_path)


# ---- what is accepted


def test_verify_accepts_a_finished_run(run):
    """Also when it is started once more, with nothing left to train."""
    assert verdicts(run.path) == verdicts(run.path, UNKNOWN) == []
    train(run.path)
    assert verdicts(run.path) == []


def test_verify_accepts_a_run_killed_at_any_moment(tmp_path):
    """Two rewinds included: as the kill left it, and after the run that continued from there."""
    moments = train(tmp_path / "whole", poisoned=(0, 7))
    assert verdicts(tmp_path / "whole") == []
    assert moments > 40
    for moment in range(2, moments):
        path = tmp_path / str(moment)
        with pytest.raises(Killed):
            train(path, kill_at=moment, poisoned=(0, 7))
        assert verdicts(path) == [], moment
        train(path, poisoned=(0, 7))
        assert verdicts(path) == [], moment


def test_verify_accepts_a_run_killed_again_and_again(tmp_path):
    path, kills = tmp_path / "run", 0
    for kill_at in itertools.cycle((3, 14, 9, 12)):
        try:
            train(path, kill_at=kill_at)
            break
        except Killed:
            kills += 1
            assert verdicts(path) == []
    assert kills > 5
    assert verdicts(path) == []
    assert len([line for line in receipt.read_log(path / "dllogger.json") if line.kind == "start"]) > 4


def test_verify_accepts_kills_around_a_missed_evaluation(tmp_path):
    """Stopped before the checkpoint was evaluated, and then killed at any moment: it is saved twice, with one content."""
    with pytest.raises(Failure), mock.patch.object(Trainer, "evaluate", Trainer.stop):
        train(tmp_path / "stopped", stop_at=5)
    assert verdicts(tmp_path / "stopped") == []
    for moment in itertools.count(2):
        path = shutil.copytree(tmp_path / "stopped", tmp_path / str(moment))
        try:
            train(path, kill_at=moment)
            break
        except Killed:
            assert verdicts(path) == [], moment
        train(path)
        assert verdicts(path) == [], moment
    assert moment > 30


def test_verify_accepts_a_torn_line_only_where_a_kill_can(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, kill_at=25)
    log = RunDir(tmp_path).log
    with open(log, "a") as file:
        file.write('DLLL {"timestamp": "17')
    assert verdicts(tmp_path) == []
    train(tmp_path)
    assert verdicts(tmp_path) == []
    lines = log.read_bytes().splitlines(keepends=True)
    torn = lines.index(b'DLLL {"timestamp": "17\n')
    lines[torn - 1] = b'DLLL {"timest\n'
    log.write_bytes(b"".join(lines))
    assert any(f"line {torn}: cannot be read" in text for text in verdicts(tmp_path))


def test_verify_compares_records_with_the_sample_stream(tmp_path):
    """Replaced and skipped ones are shown, and must be those that the rest of the log implies."""
    train(tmp_path, skipped=[4], bad=[2, 17])
    assert verdicts(tmp_path) == []
    shown = [text for text in verdicts(tmp_path, PASS) if text.startswith("epoch ")]
    assert shown[:3] == [
        "epoch 0: 0 skipped, replaced [2, 17]",
        "epoch 1: 22 skipped, replaced [17]",
        "epoch 2: 10 skipped, replaced [17]",
    ]
    log = RunDir(tmp_path).log
    text = log.read_text()
    log.write_text(text.replace('"replaced": [2, 17]', '"replaced": [2]'))
    assert any(": seen is [" in fault for fault in verdicts(tmp_path))
    log.write_text(text.replace('"skipped_steps": [4]', '"skipped_steps": []'))
    assert any(": skipped is [" in fault for fault in verdicts(tmp_path))


# ---- what is found


def best_is_the_newest(run):
    assert checkpoint.best(run) != run.checkpoint(STEPS)
    (run.checkpoints / "best").write_text(f"{run.checkpoint(STEPS).name}\n")


def change_receipt(**change):
    def tamper(run):
        whole = receipt.read(run)
        files = {**whole["files"], **change.pop("files", {})}
        run.receipt.write_text(json.dumps({**whole, "files": files, **change}))

    return tamper


def write(name, content):
    return lambda run: (run.path / name).write_bytes(content)


CHECKPOINT = f"checkpoints/step-{STEPS:08d}.safetensors"
TAMPERINGS = {
    "best is not the best": (best_is_the_newest, "best: names step-00000012.safetensors, but the checkpoint of step "),
    "best is gone": (lambda run: (run.checkpoints / "best").unlink(), "best: names nothing, but the checkpoint of step "),
    "a checkpoint of the receipt": (change_receipt(checkpoints=[]), " was saved before, but is not in it"),
    "an evaluation of the receipt": (change_receipt(evaluations=[]), "receipt.json: evaluations is "),
    "the receipt's digest of the result": (
        change_receipt(files={"result.json": None}),
        "receipt.json: digest of result.json is bytes ",
    ),
    "an empty result": (write("result.json", b"{}"), "result.json: "),
    "a list for a result": (write("result.json", b"[]"), "result.json: "),
    "a result that is no text": (write("result.json", b"\xff"), "result.json: "),
    "an empty receipt": (write("receipt.json", b""), "receipt.json: "),
    "a receipt of other content": (write("receipt.json", b'{"starts": [1], "files": {}}'), "receipt.json: "),
    "flags that are none": (write("flags.txt", b"--lr=x\n"), "flags.txt: "),
    "an empty log": (write("dllogger.json", b""), "receipt.json: digest of dllogger.json is None, expected bytes "),
    "flags of the receipt": (
        lambda run: change_receipt(configuration={**receipt.read(run)["configuration"], "lr": 9, "odd": 1})(run),
        "receipt.json: configuration differs: lr is 0.01, expected 9; odd is absent, expected 1",
    ),
    "a row of restarts cut": (write("restarts.jsonl", b'{"event": "start"}\n'), "restarts.jsonl: "),
    "an empty checkpoint": (write(CHECKPOINT, b""), "step-00000012.safetensors: "),
    "a checkpoint of other bytes": (write(CHECKPOINT, b"\xff" * 100), "step-00000012.safetensors: "),
    "a checkpoint of another header": (write(CHECKPOINT, b"\x02\0\0\0\0\0\0\0{}"), "step-00000012.safetensors: "),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_verify_finds_a_change_of_files(run, name):
    """Whatever is in a file is a verdict, and no traceback."""
    tamper, expected = TAMPERINGS[name]
    tamper(run)
    assert any(expected in fault for fault in verdicts(run.path)), verdicts(run.path)


def seal(run):
    """Makes the receipt fit what is there now, as whoever can rewrite the directory may."""
    run.receipt.unlink()
    receipt.write(run)


def change_line(run, kind, of_step=None, **changes):
    """Changes the data of the last line of a kind, or of a step; `at`: its [epoch, step]."""
    lines = [line for line in receipt.read_log(run.log) if line.kind == kind and of_step in (None, line.step)]
    number = lines[-1].number - 1
    lines = run.log.read_text().splitlines()
    row = json.loads(lines[number][5:])
    row["step"] = changes.pop("at", row.get("step"))
    row["data"].update(changes)
    lines[number] = f"DLLL {json.dumps(row)}"
    run.log.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("kind", "changes", "fault"),
    [
        ("train", {"at": [4, STEPS]}, "epoch is 4, expected 5"),
        ("train", {"train.update_seconds": [0.1]}, "number of updates since the last line is 1, expected 2"),
        ("train", {"train.input_seconds": [9.0, 0.0]}, "train.input_seconds is [9.0, 0.0]"),
        ("train", {"train.input_seconds": [0.0]}, "train.input_seconds is [0.0]"),
        ("train", {"train.fps": 1.0}, "train.fps is 1.0"),
        ("train", {"train.lr": 1.0}, "train.lr is 1.0"),
        ("train", {"train.loss": 1.0}, "train.loss is 1.0"),
        ("train", {"train.losses": [0.1, 0.2]}, "expected 0.15"),
        ("train", {"train.losses": [None, 1 / 14]}, "steps without a loss is [10], expected []"),
        ("train", {"train.losses": [1 / 14]}, "number of losses since the last line is 1, expected 2"),
        ("evaluation", {"eval.state_sha256": "0"}, "state_sha256 is '"),
        ("train", {"train.acc@5": 0.0}, "train.acc@1, acc@5 of 64 images is [0.046875, 0.0]"),
        ("evaluation", {"at": [5, 11]}, "step is 11, expected 12"),
        ("evaluation", {"eval.top5_hits": 1}, "eval.top1_hits, top5_hits, eval.records is [11, 1, 37]"),
        ("evaluation", {"eval.records": 36}, "eval.top1_hits, top5_hits, eval.records is [11, 30, 36]"),
        ("evaluation", {"eval.acc@5": 1.0}, "eval.acc@1, acc@5 is "),
        ("coverage", {"epoch": 3}, "epoch is 3, expected 4"),
        ("coverage", {"step": 11}, "step is 11, expected 12"),
        ("coverage", {"records": 74}, "records is 74, expected 75"),
        ("coverage", {"skipped": 1}, "skipped is [1, "),
        ("coverage", {"known": False}, ""),
        ("throughput", {"step": 11}, "step is 11, expected 12"),
        ("throughput", {"by_rank": []}, "number of ranks in by_rank is 0, expected 2"),
        ("throughput", {"by_host": []}, "by_host is [], expected "),
        ("throughput", {"fps": 1.0}, "result.json: fps is "),
        ("end", {"eval.loss": 0.0}, "eval.loss is 0.0"),
        ("end", {"fps": 1.0}, "fps is 1.0"),
        ("end", {"fps_wall": 1e9}, "fps_wall is 1000000000.0"),
        ("end", {"tflops_per_rank": 1.0}, "tflops_per_rank is 1.0"),
        ("end", {"warm_up_updates": 0}, "warm_up_updates is 0, expected 1"),
        ("checkpoint", {"sha256": "0"}, "step-00000012.safetensors: is not what was saved"),
        ("start", {"ranks": 3}, "result.json: ranks is 2, expected 3"),
        ("start", {"step": 2}, "start 1: from step 2 on 2 ranks: not what had been saved"),
        ("PARAMETER", {"lr": 1.0}, "flags.txt: lr is 0.01, expected 1.0"),
    ],
)
def test_verify_finds_a_change_under_a_new_receipt(run, kind, changes, fault):
    """What is computed again from other lines needs no receipt. An epoch that is not known is unknown, and no failure."""
    change_line(run, kind, **changes)
    assert any(text.startswith("receipt.json: digest of dllogger.json differs: ") for text in verdicts(run.path))
    seal(run)
    assert any(fault in text for text in verdicts(run.path)) if fault else len(verdicts(run.path, UNKNOWN)) == 1


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"run": {"lr": 9.0}}, "lr is 9.0, expected 0.01"),
        ({"run": {"train_data_sha256": "u"}}, "train_data_sha256 is 'u', expected 't'"),
        ({"coverage": [5, 0, 0, 0, 0, 0]}, "digest of the epoch in progress is [5, 0, 0]"),
    ],
)
def test_verify_finds_a_checkpoint_of_another_run(run, changes, fault):
    """Though log and receipt have its digests."""
    found = checkpoint.load(run.checkpoint(10))
    meta = {**found.meta, **changes, "run": {**found.meta["run"], **changes.get("run", {})}}
    checkpoint.write(found.path, found.tensors, meta)
    change_line(run, "checkpoint", of_step=10, **receipt.checkpoint_row(found.path))
    seal(run)
    assert [text for text in verdicts(run.path) if fault in text] == verdicts(run.path) != []


def test_verify_finds_checkpoints_that_are_gone(run):
    paths = run.list_checkpoints()
    assert len(paths) > 2
    for gone in (paths[:1], paths[1:2], paths[-1:], paths):
        kept = {path: path.read_bytes() for path in gone}
        for path in gone:
            path.unlink()
        assert {f"receipt.json: {path.name} is gone" for path in gone} <= set(verdicts(run.path))
        for path, content in kept.items():
            path.write_bytes(content)
    assert verdicts(run.path) == []


@pytest.mark.parametrize("ahead", [None, 0, -3600, 3600])
def test_verify_compares_starts_with_restarts(tmp_path, ahead):
    """Three attempts: killed, killed before it could log, and through; then without each of their rows.

    ahead: by how many seconds the clock of the launcher's host is; None: an earlier version, which gave starts no names.
    """
    run, names = RunDir(tmp_path), [None if ahead is None else f"run.host.1.2.{attempt}" for attempt in range(3)]
    with pytest.raises(Killed):
        train(tmp_path, kill_at=20, launched=True, job=names[0])
    train(tmp_path, launched=True, job=names[2])
    first, second = [line.timestamp for line in receipt.read_log(run.log) if line.kind == "start"]
    rows = []
    for attempt, (when, code) in enumerate([(first, 137), ((first + second) / 2, 139), (second, 0)]):
        row = {"at": "then", "attempt": attempt, "ranks": 2, **({} if ahead is None else {"job": names[attempt]})}
        rows.append({"time": when + (ahead or 0) - 1e-4, "event": "start", **row})
        rows.append({"time": when + (ahead or 0) + 1e-4, "event": "end", **row, "code": code})

    def faults(rows, subject="restarts.jsonl"):
        run.restarts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [fault for fault in verdicts(tmp_path) if fault.startswith(f"{subject}: ")]

    faults(rows)
    receipt.write(run)
    assert verdicts(tmp_path) == []
    for gone in range(len(rows) - 1):
        assert faults(rows[:gone] + rows[gone + 1 :]), gone
    for gone in range(3):
        assert faults(rows[: 2 * gone] + rows[2 * gone + 2 :]), gone
    unknown = [{**rows[0], "time": 9e9}, {**rows[-1], "attempt": 0, "time": 9.1e9}]
    for row in unknown[: 2 * (ahead is not None)]:
        row["job"] = "run.host.1.3.0"
    assert any("but the log has no start of it" in fault for fault in faults([*rows, *unknown]))
    assert any("no attempt on 2 ranks" in fault for fault in faults([{**row, "ranks": 3} for row in rows]))
    receipt_of = {"rows": receipt.read(run)["restarts"], "file": receipt.read(run)["files"]["restarts.jsonl"]}
    assert receipt_of["rows"] == rows
    assert faults([{**rows[0], "at": "another time"}, *rows[1:]], "receipt.json")
    faults(rows)
    for change in ({"restarts": []}, {"files": {"restarts.jsonl": None}}):
        change_receipt(**change)(run)
        assert any(
            fault.startswith(("receipt.json: restarts ", "receipt.json: digest of restarts.jsonl "))
            for fault in verdicts(tmp_path)
        ), change
        receipt.write(run)


def test_verify_accepts_a_run_of_an_earlier_version(run):
    """Which noted no goodput, and not since when its process had been running; now one without the other is a fault."""
    result = json.loads(run.result.read_text())
    del result["goodput"], result["goodput_seconds"]
    run.result.write_text(json.dumps(result))
    seal(run)
    assert any(text.startswith("result.json: goodput is None, expected ") for text in verdicts(run.path))
    for name in ("process_seconds", "boot", "job"):
        run.log.write_text(re.sub(rf', "{name}": ([^{{}},]+|{{[^}}]*}})', "", run.log.read_text()))
    assert "process_seconds" not in run.log.read_text()
    seal(run)
    assert verdicts(run.path) == []


def test_verify_computes_goodput_from_the_log(run):
    """The share of its updates in the time from 2.5 s before the start to the last evaluation, summed up without Goodput."""
    lines, now, trained, share = [json.loads(line[5:]) for line in run.log.read_text().splitlines()], 1e9, 0.0, 0.0
    for row in lines:
        data = row.get("data", {})
        if data.get("event") == "start":
            data["process_seconds"], began = 2.5, now - 2.5
        trained += sum(data.get("train.update_seconds", []))
        row.update(timestamp=str(now + trained), elapsedtime=str(now + trained - 1e9))
        if "eval.loss" in data and row["step"]:
            share = trained / (now + trained - began)
        now += 1.0
    run.log.write_text("".join(f"DLLL {json.dumps(row)}\n" for row in lines))
    result = json.loads(run.result.read_text())
    for wrong in (0.0, 1e-6):
        run.result.write_text(json.dumps({**result, "goodput": share + wrong}))
        assert any(text.startswith("result.json: goodput is ") for text in verdicts(run.path)) == bool(wrong)


def test_verify_survives_any_change_of_a_line(tmp_path):
    """Parts of each kind of line missing, or of another type: a verdict, and no traceback."""
    train(tmp_path, poisoned=[7])
    log = RunDir(tmp_path).log
    lines, seen, pairs = log.read_text().splitlines(), set(), itertools.cycle([(None, "x"), ([], -1), ({"a": 1}, 1e9)])
    for number, line in enumerate(lines):
        row = json.loads(line[5:])
        data = row.get("data", {})
        kind = (row["type"], str(row.get("step"))[:3], data.get("event"), tuple(data))
        if kind in seen:
            continue
        seen.add(kind)
        names = list(data) if row.get("step") != "PARAMETER" else list(data)[::7]
        changes = [("data", {**data, name: value}) for name, values in zip(names, pairs) for value in values]
        changes += [("data", {other: data[other] for other in data if other != name}) for name in names]
        for change in [*changes, *((name, value) for name, values in zip(row, pairs) for value in values)]:
            changed = {**row, **dict([change])}
            log.write_text("\n".join([*lines[:number], f"DLLL {json.dumps(changed)}", *lines[number + 1 :]]) + "\n")
            assert changed == row or verdicts(tmp_path), (number, change)
    assert len(seen) > 12


def test_verify_finds_any_byte_of_the_log_changed(run):
    good, random = run.log.read_bytes(), np.random.default_rng(1)
    for at in random.integers(0, len(good), 150).tolist():
        data = bytearray(good)
        data[at] = (data[at] + int(random.integers(1, 255))) % 256
        run.log.write_bytes(bytes(data))
        assert verdicts(run.path), at


def test_verify_finds_a_state_sha256_of_another_state(run):
    """In a checkpoint's header, under a checksum that fits."""
    with mock.patch.object(checkpoint, "state_sha256", lambda digest, progress: "0" * 64):
        found = checkpoint.load(run.checkpoint(10))
        checkpoint.write(found.path, found.tensors, found.meta)
    change_line(run, "checkpoint", of_step=10, **receipt.checkpoint_row(found.path))
    seal(run)
    assert [text for text in verdicts(run.path) if "state_sha256 is '0000" in text] == verdicts(run.path) != []


# ---- two runs


def compare(path, other, capsys):
    """Returns the line about the comparison of two runs that are whole; with exit code 65 if they differ."""
    code = 0
    try:
        verify_run(VerifyConfig(run_dir=str(path), same_as=str(other)))
    except Failure as failure:
        code = failure.code
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "same as" in line]
    verdict, text = line.split(f"  same as {other}: ")
    assert (code == 65) == (verdict.strip() == FAIL)
    return f"{verdict.strip()} {text}"


def test_same_as_accepts_a_run_killed_at_any_moment(tmp_path, capsys):
    """Two rewinds included: as far as the kill left it, and to its end after it continued."""
    moments = train(tmp_path / "whole", poisoned=(0, 7))
    equal = (
        "losses of 12 steps, state SHA-256 at 5 evaluations (the last at step 12) and weights and momentum of 3 checkpoints"
    )
    for moment in range(4, moments, 3):
        path = tmp_path / str(moment)
        with pytest.raises(Killed):
            train(path, kill_at=moment, poisoned=(0, 7))
        assert compare(path, tmp_path / "whole", capsys).split()[0] in (PASS, UNKNOWN), moment
        train(path, poisoned=(0, 7))
        assert compare(path, tmp_path / "whole", capsys) == f"pass {equal} are equal", moment


def test_same_as_says_how_far(run, tmp_path_factory, capsys):
    path = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Failure):
        train(path, stop_at=5)
    text = compare(path, run.path, capsys)
    assert text.startswith("pass so far: losses of 5 steps, state SHA-256 at 2 evaluations (the last at step 5) and ")
    assert text.endswith("; the run ends at step 5, the other at step 12")
    assert compare(run.path, path, capsys).endswith("; the run ends at step 12, the other at step 5")


def loss_that_differs(step):
    return 1 / (step + 3) + (step == 6) * 1e-16


def tensors_that_differ(trainer):
    """In the bias and the momentum of a kernel, from step 8 on; the kernel, which comes first, is equal."""
    later = trainer.progress.step >= 8
    found = {f"{LAYERS[1].name}/{part}": np.full((3, 4), trainer.progress.step, np.float32) for part in ("bias", "kernel")}
    found[f"{LAYERS[1].name}/bias"][1, 1] += later
    return found


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"loss": staticmethod(loss_that_differs)}, ["losses part at step 6 (0.1111111111111112 and 0.1111111111111111)"]),
        ({"tensors": tensors_that_differ}, ["state SHA-256 differs at step 8 (", "BIAS (checkpoint of step 8)"]),
    ],
)
def test_same_as_finds_where_runs_part(run, tmp_path_factory, capsys, change, parts):
    path = tmp_path_factory.mktemp("other") / "run"
    with mock.patch.multiple(Trainer, **change):
        train(path)
    text = compare(path, run.path, capsys)
    assert text.startswith("fail ")
    for part in parts:
        assert part.replace("BIAS", f"weights first differ in {LAYERS[1].name}/bias") in text, text


def test_same_as_finds_other_flags_and_data(run, tmp_path_factory, capsys):
    """Though nothing that was trained differs."""
    path = tmp_path_factory.mktemp("other") / "run"
    with mock.patch.dict(globals(), CONFIG=dataclasses.replace(CONFIG, dropout=0.25)):
        train(path)
    assert compare(path, run.path, capsys) == "fail --dropout is 0.25 and 0.5"


def test_same_as_needs_another_run(run, tmp_path):
    with pytest.raises(Failure, match="--same_as=.* has no dllogger.json: expected the directory of a run") as raised:
        verify_run(VerifyConfig(run_dir=str(run.path), same_as=str(tmp_path / "none")))
    assert raised.value.code == 78


# ---- receipt


@pytest.mark.parametrize("depth", [1, 4, 2000])
def test_verify_prints_no_control_sequence_of_a_receipt(run, depth):
    """Of long names and deep objects the beginning."""
    found = json.loads(run.receipt.read_text())
    inner: object = {"x\x1b[2K\rpass": 1, **{f"{number}" * 10_000: "y" * 200 for number in range(9)}}
    text = json.dumps(inner)
    for _ in range(depth):
        text = f'{{"k": {text}}}'
    run.receipt.write_text(json.dumps({**found, "configuration": "HERE"}).replace('"HERE"', text))
    (fault,) = verdicts(run.path)
    assert fault.startswith("receipt.json: ") and fault.isprintable() and len(fault) < 1100


def test_receipt_keeps_what_it_said_of_earlier_starts(run):
    """A log changed between two starts is not sealed by the second."""
    first = receipt.read(run)["starts"]
    run.log.write_text(run.log.read_text().replace("nats", "bits"))
    train(run.path)
    assert receipt.read(run)["starts"][:1] == first
    assert any(fault.startswith("receipt.json: starts: entry 1 differs: ") for fault in verdicts(run.path))


def test_receipt_is_written_whole_and_for_few_to_read(run):
    assert not list(run.path.glob("*.tmp"))
    receipt.write(run)
    assert run.receipt.stat().st_mode & 0o777 == 0o640
    assert receipt.read(run)["configuration"]["lr"] == CONFIG.lr
