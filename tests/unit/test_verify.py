"""`verify-run` on directories as runs leave them, written here by the package's own writers in the order of the loop."""

import dataclasses
import itertools
import json
import math
import os

import numpy as np
import pytest

from hvd_vgg import provenance
from hvd_vgg.commands.history import FAIL, PASS, UNKNOWN, read_history
from hvd_vgg.commands.verify import check
from hvd_vgg.config import TrainConfig, fingerprint
from hvd_vgg.data.coverage import Coverage, to_hex
from hvd_vgg.data.sampler import positions
from hvd_vgg.flags import to_flag_file
from hvd_vgg.provenance import describe_process
from hvd_vgg.reporting import receipt
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.reporting.throughput import Throughput, per_host, per_rank
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint
from hvd_vgg.training.schedule import evaluation_steps, learning_rate

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
    console="lines",
)


class Killed(Exception):
    """The run ends here."""


class Simulated:
    """Runs as the loop does, without a network: `kill_at` counts everything that is written to the directory."""

    def __init__(self, run_dir, config=CONFIG, kill_at=None, skipped=(), bad=(), poisoned=(), stops_at=None, launched=False):
        self.run_dir, self.config, self.kill_at = run_dir, config, kill_at
        self.skipped, self.bad, self.poisoned, self.launched = set(skipped), set(bad), set(poisoned), launched
        self.stops_at, self.writes, self.evaluated = stops_at, 0, 0

    def wrote(self):
        self.writes += 1
        if self.writes == self.kill_at:
            raise Killed

    def event(self, name, **data):
        self.log.event(name, **data)
        self.wrote()

    def save(self, done, hits, best):
        for proved in self.coverage.settle(done, lambda data: [data]):
            self.covered(proved)
        rows = {"w": np.full((3, 4), done, np.float32)}
        run = {**fingerprint(self.config), "train_data_sha256": "t" * 64}
        meta = {"step": done, "best_top1": hits, "evaluated": self.evaluated, "coverage": self.coverage.state(), "run": run}
        path = checkpoint.save(RunDir(self.run_dir), rows, meta, 3, best)
        self.wrote()
        self.event("checkpoint", step=done, **receipt.checkpoint_row(path))

    def covered(self, proved):
        seen, skipped = proved.records.seen, proved.records.skipped
        self.event(
            "coverage",
            epoch=proved.epoch,
            step=proved.step,
            records=RECORDS,
            known=True,
            seen=int(seen[0]),
            seen_digest=to_hex(seen),
            skipped=int(skipped[0]),
            skipped_digest=to_hex(skipped),
            replaced=sorted(proved.records.replaced.tolist()),
        )

    def run(self):
        config, run_dir = self.config, self.run_dir
        run_dir.mkdir(exist_ok=True)
        self.log = RunLog(run_dir, False, None)
        self.wrote()
        found, _ = checkpoint.newest(RunDir(run_dir))
        first = found.meta["step"] if found else 0
        best = found.meta["best_top1"] if found else -1
        if found:
            self.event("resume", checkpoint=found.path.name)
        (run_dir / "flags.txt").write_text(to_flag_file(config))
        self.wrote()
        self.log.log("PARAMETER", {**dataclasses.asdict(config), "steps": STEPS})
        self.wrote()
        data = {"train": {"records": RECORDS, "sha256": "t" * 64}, "validation": {"records": VALIDATION, "sha256": "v" * 64}}
        row = receipt.checkpoint_row(found.path) if found else None
        started = {**describe_process(), "launched": self.launched}
        self.event(
            "start",
            step=first,
            skipped_steps=sorted(self.skipped),
            ranks=2,
            hosts=["a", "a"],
            checkpoint=row,
            data=data,
            **started,
        )
        receipt.write(run_dir)
        self.wrote()
        self.throughput = Throughput()
        self.evaluated = found.meta["evaluated"] if found else 0
        while True:
            self.coverage = Coverage(RECORDS, 32, first, found.meta["coverage"] if found else [])
            result = None
            if self.evaluated < first and first in evaluation_steps(config, RECORDS):
                result = self.evaluate(first)
                self.save(first, max(best, result["eval.top1_hits"]), result["eval.top1_hits"] > best)
                best = max(best, result["eval.top1_hits"])
            result, met = self.train(first, best, result)
            if met is None:
                break
            if met == "stopped":
                return
            found, _ = checkpoint.newest(RunDir(run_dir))
            first, best = (found.meta["step"], found.meta["best_top1"]) if found else (0, -1)
            self.skipped.add(met[0])
            told = {"from": met[0], "to": first, "skipped_steps": sorted(self.skipped), **met[1]}
            self.event("rewind", **told)
        if result is None:
            result = self.evaluate(STEPS)
            self.result(STEPS, result)
        self.log.log((), {**result, **{name: each for name, each in self.measured().items() if not name.startswith("by_")}})
        self.wrote()
        receipt.write(run_dir)
        self.wrote()

    def train(self, first, best, result):
        """Returns the last evaluation; and None, "stopped", or a step that was not finite with the seconds of its window."""
        config, window = self.config, 0
        for step in range(first, STEPS):
            at = positions(step * 32, step * 32 + 32, RECORDS, config.seed)
            if step in self.skipped:
                self.coverage.skip(step * 32, at.ids)
            else:
                bad = [(row, int(at.ids[row])) for row in range(32) if at.ids[row] in self.bad]
                at.ids[[row for row, _ in bad]] = 5
                self.coverage.add(step * 32, at.ids, bad)
            self.throughput.total_seconds.append((3.0 if not self.throughput.total_seconds else 0.1) + 0.001 * (step % 3))
            self.throughput.input_seconds.append(0.01 * (step % 2))
            self.throughput.exchange_seconds.append(0.02)
            window, done = window + 1, step + 1
            due = done in evaluation_steps(config, RECORDS)
            if done % 2 and not due:
                continue
            met = (set(range(done - window, done)) & self.poisoned) - self.skipped
            if met:
                unlogged = {"update_seconds": self.throughput.total_seconds, "input_seconds": self.throughput.input_seconds}
                return None, (min(met), {name: each[-window:] for name, each in unlogged.items()})
            if self.coverage.ended(done):
                for proved in self.coverage.settle(done, lambda data: [data]):
                    self.covered(proved)
            self.line(done, window)
            window = 0
            if done == self.stops_at:  # asked for while it was scored
                self.save(done, best, False)
                self.event("stopped", step=done)
                receipt.write(self.run_dir)
                return None, "stopped"
            if due:
                result = self.evaluate(done)
            improved = due and 10 + done * 3 % 7 > best
            best = max(best, 10 + done * 3 % 7) if due else best
            if done % 2 == 0 or improved:
                self.save(done, best, improved)
            if due:
                self.result(done, result)
        return result, None

    def line(self, done, window):
        seconds = self.throughput.total_seconds[-window:]
        images = 32 * max(1, len(set(range(done - window, done)) - self.skipped))
        row = {"train.loss": 1.0, "train.acc@1": 3 / images, "train.acc@5": 5 / images, "train.update_seconds": seconds}
        row["train.input_seconds"] = self.throughput.input_seconds[-window:]
        row["train.fps"] = 32 * window / sum(seconds)
        row["train.lr"] = learning_rate(done - 1, self.config, RECORDS)
        self.log.log((done * 32 // RECORDS, done), row)
        self.wrote()

    def evaluate(self, done):
        hits, self.evaluated = 10 + done * 3 % 7, done
        row = {"eval.loss": 2.0, "eval.acc@1": hits / VALIDATION, "eval.acc@5": 30 / VALIDATION}
        row.update({"eval.top1_hits": hits, "eval.top5_hits": 30, "eval.records": VALIDATION})
        self.log.log((done * 32 // RECORDS, done), row)
        self.wrote()
        return row

    def measured(self):
        summary = self.throughput.summary(32)
        if summary["fps"]:
            from hvd_vgg.models.architecture import training_flops, vgg_layers

            flops = training_flops(vgg_layers("vgg11", 0.125, 32, 10), 32)
            summary.update(
                fps_wall=32 * len(self.throughput.total_seconds) / (sum(self.throughput.total_seconds) + 1),
                tflops_per_rank=flops * summary["fps"] / 2 / 1e12,
            )
            last = self.throughput.last(summary["fps_updates"])
            rows = per_rank([last, last], ["a", "b"], [16 * summary["fps_updates"]] * 2)
            summary.update(by_rank=rows, by_host=per_host(rows))
        return summary

    def result(self, done, evaluated):
        names = {"acc@1": "eval.acc@1", "acc@5": "eval.acc@5", "top1_hits": "eval.top1_hits", "top5_hits": "eval.top5_hits"}
        content = {name: evaluated[there] for name, there in names.items()}
        content.update(records_evaluated=VALIDATION, steps=done, epochs=done * 32 / RECORDS, ranks=2, global_batch=32)
        measured = self.measured()
        content.update(precision="float32", **measured)
        path = self.run_dir / "result.json"
        if self.throughput.total_seconds or not path.exists() or json.loads(path.read_text())["steps"] != done:
            self.event("throughput", step=done, **measured)
            (self.run_dir / "result.json").write_text(json.dumps(content))
            self.wrote()
        receipt.write(self.run_dir)
        self.wrote()


def verdicts(run_dir, verdict=FAIL):
    return [f"{claim.subject}: {claim.text}" for claim in check(run_dir) if claim.verdict == verdict]


def test_a_run_that_nothing_happened_to_is_accepted(tmp_path):
    run = Simulated(tmp_path / "run")
    run.run()
    assert verdicts(run.run_dir) == []
    assert len(verdicts(run.run_dir, UNKNOWN)) == 0
    Simulated(run.run_dir).run()  # once more, with nothing left to train
    assert verdicts(run.run_dir) == []


@pytest.mark.parametrize("poisoned", [(), (0, 7)])
def test_a_run_killed_at_any_moment_is_accepted_and_so_is_it_when_it_went_on(tmp_path, poisoned):
    whole = Simulated(tmp_path / "whole", poisoned=poisoned)
    whole.run()
    assert verdicts(whole.run_dir) == []
    assert whole.writes > 40
    for moment in range(5, whole.writes):
        run_dir = tmp_path / str(moment)
        with pytest.raises(Killed):
            Simulated(run_dir, kill_at=moment, poisoned=poisoned).run()
        assert verdicts(run_dir) == [], moment
        skipped = read_history(receipt.read_log(run_dir / "dllogger.json")).attempts
        skipped = skipped[-1].segment.skipped if skipped else ()
        Simulated(run_dir, poisoned=poisoned, skipped=skipped).run()
        assert verdicts(run_dir) == [], moment


def test_a_run_killed_again_and_again_is_accepted(tmp_path):
    run_dir, kills = tmp_path / "run", 0
    for kill_at in itertools.cycle((3, 14, 9, 12)):
        try:
            Simulated(run_dir, kill_at=kill_at).run()
            break
        except Killed:
            kills += 1
            assert verdicts(run_dir) == []
    assert kills > 5
    assert verdicts(run_dir) == []
    assert len([line for line in receipt.read_log(run_dir / "dllogger.json") if line.kind == "start"]) > 4


def test_a_run_stopped_before_its_evaluation_and_then_killed_at_any_moment_is_accepted(tmp_path):
    for moment in itertools.count(3):
        run_dir = tmp_path / str(moment)
        Simulated(run_dir, stops_at=5).run()
        assert verdicts(run_dir) == []
        try:
            Simulated(run_dir, kill_at=moment).run()
            break
        except Killed:
            assert verdicts(run_dir) == [], moment
        Simulated(run_dir).run()
        assert verdicts(run_dir) == [], moment
    assert moment > 30


def test_a_torn_line_is_a_kills_where_the_log_ends_and_nowhere_else(tmp_path):
    run = Simulated(tmp_path / "run", kill_at=25)
    with pytest.raises(Killed):
        run.run()
    path = run.run_dir / "dllogger.json"
    with open(path, "a") as file:
        file.write('DLLL {"timestamp": "17')
    assert verdicts(run.run_dir) == []
    Simulated(run.run_dir).run()
    assert verdicts(run.run_dir) == []
    lines = path.read_bytes().splitlines(keepends=True)
    torn = next(number for number, line in enumerate(lines) if line.endswith(b"17\n") or line == b'DLLL {"timestamp": "17\n')
    lines[torn - 1] = b'DLLL {"timest\n'
    path.write_bytes(b"".join(lines))
    assert any(f"line {torn} cannot be read" in claim for claim in verdicts(run.run_dir))


def test_replaced_and_skipped_records_are_held_against_the_order(tmp_path):
    run = Simulated(tmp_path / "run", skipped=[4], bad=[2, 17])
    run.run()
    assert verdicts(run.run_dir) == []
    (told,) = [claim for claim in verdicts(run.run_dir, PASS) if claim.startswith("epochs: ")]
    assert "epoch 0: 2 replaced [2, 17]" in told and "epoch 1: 22 skipped" in told and "epoch 2: 10 skipped" in told
    path = run.run_dir / "dllogger.json"
    text = path.read_text()
    path.write_text(text.replace('"replaced": [2, 17]', '"replaced": [2]'))
    assert any("whose digest is not that of all 75" in claim for claim in verdicts(run.run_dir))
    path.write_text(text.replace('"skipped_steps": [4]', '"skipped_steps": []'))
    assert any("which are not those of the steps skipped" in claim for claim in verdicts(run.run_dir))


def test_a_best_that_is_not_the_best_is_noticed(tmp_path):
    run = Simulated(tmp_path / "run")
    run.run()
    assert checkpoint.best(RunDir(run.run_dir)).name != f"step-{STEPS:08d}.safetensors"
    (run.run_dir / "checkpoints" / "best").write_text(f"step-{STEPS:08d}.safetensors\n")
    assert any(claim.startswith(f"best: step {STEPS} has ") for claim in verdicts(run.run_dir))


def test_a_checkpoint_that_is_gone_is_noticed(tmp_path):
    run = Simulated(tmp_path / "run")
    run.run()
    paths = RunDir(run.run_dir).list_checkpoints()
    assert len(paths) > 2
    for gone in (paths[:1], paths[1:2], paths[-1:], paths):
        kept = {path: path.read_bytes() for path in gone}
        for path in gone:
            path.unlink()
        assert any(f"{gone[0].name} is gone" in claim or "there is none" in claim for claim in verdicts(run.run_dir)), gone
        for path, data in kept.items():
            path.write_bytes(data)
    assert verdicts(run.run_dir) == []
    (run.run_dir / "checkpoints" / "best").unlink()
    assert verdicts(run.run_dir) == ["best: names no checkpoint, though one was saved with its evaluation"]


def test_what_is_taken_out_of_the_receipt_is_noticed(tmp_path):
    run_dir = tmp_path / "run"
    write_rows(run_dir, supervised(run_dir))
    receipt.write(run_dir)
    whole = receipt.read(run_dir)
    for change in ({"checkpoints": []}, {"restarts": []}, {"files": {**whole["files"], "restarts.jsonl": None}}):
        (run_dir / "receipt.json").write_text(json.dumps({**whole, **change}))
        assert any(claim.startswith("receipt.json, ") for claim in verdicts(run_dir)), change


# ---- what the supervisor says


def supervised(run_dir):
    """Three attempts: killed, killed before it could log, through; returns restarts.jsonl's lines."""
    rows = []

    def note(event, attempt, **data):
        rows.append(
            {"time": rows[-1]["time"] + 0.001 if rows else 0.0, "at": "then", "event": event, "attempt": attempt, **data}
        )

    with pytest.raises(Killed):
        Simulated(run_dir, kill_at=20, launched=True).run()
    Simulated(run_dir, launched=True).run()
    times = [line.timestamp for line in receipt.read_log(run_dir / "dllogger.json") if line.kind == "start"]
    for attempt, (when, code) in enumerate([(times[0], 137), ((times[0] + times[1]) / 2, 139), (times[1], 0)]):
        rows.append({"time": when - 1e-4, "at": "then", "event": "start", "attempt": attempt, "ranks": 2})
        rows.append({"time": when + 1e-4, "at": "then", "event": "end", "attempt": attempt, "ranks": 2, "code": code})
    return rows


def write_rows(run_dir, rows):
    (run_dir / "restarts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_starts_and_attempts_must_match(tmp_path):
    run_dir = tmp_path / "run"
    rows = supervised(run_dir)
    write_rows(run_dir, rows)
    receipt.write(run_dir)
    assert verdicts(run_dir) == []
    assert any(claim.startswith("restarts.jsonl: 3 attempts, 2 starts") for claim in verdicts(run_dir, PASS))
    for gone in range(len(rows) - 1):
        write_rows(run_dir, rows[:gone] + rows[gone + 1 :])
        assert any(claim.startswith("restarts.jsonl: ") for claim in verdicts(run_dir)), gone
    for gone in range(3):
        write_rows(run_dir, rows[: 2 * gone] + rows[2 * gone + 2 :])
        assert any(claim.startswith("restarts.jsonl: ") for claim in verdicts(run_dir)), gone
    write_rows(run_dir, [*rows, {**rows[0], "time": 9e9}, {**rows[-1], "attempt": 0, "time": 9.1e9}])
    assert any("but the log has no start of it" in claim for claim in verdicts(run_dir))
    write_rows(run_dir, [{**row, "ranks": 3} for row in rows])
    assert any("its attempt another number" in claim for claim in verdicts(run_dir))
    write_rows(run_dir, rows)
    receipt.write(run_dir)
    write_rows(run_dir, [{**rows[0], "at": "another time"}, *rows[1:]])
    assert any(claim.startswith("receipt.json, restarts: ") for claim in verdicts(run_dir))


# ---- damaged files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", b"{}"),
        ("result.json", b"[]"),
        ("result.json", b"\xff"),
        ("receipt.json", b""),
        ("receipt.json", b'{"starts": [1], "files": {}}'),
        ("flags.txt", b"--lr=x\n"),
        ("dllogger.json", b""),
        ("restarts.jsonl", b'{"event": "start"}\n'),
        ("checkpoints/step-00000012.safetensors", b""),
        ("checkpoints/step-00000012.safetensors", b"\xff" * 100),
        ("checkpoints/step-00000012.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
    ],
)
def test_whatever_is_in_a_file_is_a_verdict_and_no_traceback(tmp_path, name, content):
    run = Simulated(tmp_path / "run")
    run.run()
    (run.run_dir / name).write_bytes(content)
    assert verdicts(run.run_dir)


def test_any_part_of_a_line_missing_or_of_another_kind_is_a_verdict_and_no_traceback(tmp_path):
    run = Simulated(tmp_path / "run", poisoned=[7])
    run.run()
    path = run.run_dir / "dllogger.json"
    lines, seen = path.read_text().splitlines(), set()
    for number, line in enumerate(lines):
        row = json.loads(line[5:])
        kind = (row["type"], str(row.get("step"))[:3], row.get("data", {}).get("event"), tuple(row.get("data", {})))
        if kind in seen:
            continue
        seen.add(kind)
        for where, names in ((row, list(row)), (row.get("data", {}), list(row.get("data", {})))):
            for name in names:
                kept = where[name]
                for value in (None, "x", [], {"a": 1}, -1):
                    where[name] = value
                    path.write_text("\n".join([*lines[:number], "DLLL " + json.dumps(row), *lines[number + 1 :]]) + "\n")
                    assert verdicts(run.run_dir), (number, name, value)
                del where[name]
                path.write_text("\n".join([*lines[:number], "DLLL " + json.dumps(row), *lines[number + 1 :]]) + "\n")
                assert verdicts(run.run_dir), (number, name)
                where[name] = kept


def test_any_byte_of_the_log_changed_is_noticed(tmp_path):
    run = Simulated(tmp_path / "run")
    run.run()
    path = run.run_dir / "dllogger.json"
    good, random = path.read_bytes(), np.random.default_rng(1)
    for at in random.integers(0, len(good), 150).tolist():
        data = bytearray(good)
        data[at] = (data[at] + int(random.integers(1, 255))) % 256
        path.write_bytes(bytes(data))
        assert verdicts(run.run_dir), at


# ---- receipt


def test_code_fingerprint_commit_of_a_clone(tmp_path):
    """Of a branch, loose or packed, and detached; none without a repository."""
    git, commit = tmp_path / ".git", "a" * 40
    git.mkdir()
    assert provenance._git_commit(git) is None
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs\n{'b' * 40} refs/heads/main2\n{commit} refs/heads/main\n")
    assert provenance._git_commit(git) == commit
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "refs" / "heads" / "main").write_text("c" * 40 + "\n")
    assert provenance._git_commit(git) == "c" * 40
    (git / "HEAD").write_text(commit + "\n")
    assert provenance._git_commit(git) == commit


def test_only_the_environment_that_is_listed_is_told(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert describe_process()["environment"].items() <= os.environ.items()
    assert "SECRET_TOKEN" not in describe_process()["environment"]
    assert describe_process()["environment"]["OMP_NUM_THREADS"] == "3"


def test_a_receipt_is_written_whole_and_for_few_to_read(tmp_path):
    run = Simulated(tmp_path / "run")
    run.run()
    assert not list(run.run_dir.glob("*.tmp"))
    assert (run.run_dir / "receipt.json").stat().st_mode & 0o777 & ~0o640 == 0
    assert math.isclose(receipt.read(run.run_dir)["configuration"]["lr"], CONFIG.lr)
