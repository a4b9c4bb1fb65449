"""What the stages of `hvd-vgg acceptance` amount to: a verdict on each subject, and a page of text.

Everything is read from the directory of results, so that its reader can check it.
"""

import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

from hvd_vgg.errors import DONE
from hvd_vgg.reporting.findings import FAILURE, OK, Finding, failure, format_findings, ok, warning, worst
from hvd_vgg.reporting.receipt import read_log
from hvd_vgg.text import format_duration, plural

# What differs from run to run, at most: below this share of a published figure a host is slower than it.
_SLOWER, _MUCH_SLOWER = 0.97, 0.9
# Reading and decoding alone should be this much faster than training, or its jitter shows.
_INPUT_MARGIN = 1.2
_KINDS = {"device": "on the device", "host": "from the host", "real": "read and decoded", "alone": "decoded, not trained"}


class Published(NamedTuple):
    """A throughput that others have published, of training from records on one host."""

    device: str  # a part of the device's name
    ranks: int
    model: str
    image_size: int
    precision: str
    fps: float
    source: str


PUBLISHED = (Published("BI-V100", 8, "vgg16", 224, "float32", 435.9, "DeepSparkHub, VGG16 for TensorFlow, SDK 3.1.0"),)


class Bundle:
    """Paths of the results; creating one touches no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.page, self.results, self.doctor = path / "acceptance.txt", path / "acceptance.json", path / "doctor.json"
        self.flags = path / "flags.txt"  # that all stages share

    def log(self, stage: str) -> Path:
        """Returns the path of what a stage printed."""
        return self.path / "logs" / f"{stage}.txt"

    def benchmark(self, precision: str) -> Path:
        """Returns the path of the measurements in a precision."""
        return self.path / f"benchmark.{precision}.json"

    def run(self, ranks: int) -> Path:
        """Returns the directory of what is kept of the run on this number of ranks."""
        return self.path / "runs" / f"ranks-{ranks}"


def assess(bundle: Bundle, facts: Mapping[str, Any], planned: int) -> List[Finding]:
    """Returns a finding for each subject; facts: of the machine and the stages; planned: the number of stages."""
    measured = _measurements(bundle, facts)
    found = [*_assess_stages(facts["stages"], planned), *_assess_doctor(_read(bundle.doctor))]
    for precision, content in measured.items():
        found += _assess_throughput(precision, content["rows"], facts["machine"]["ranks"])
    if facts["flags"]["precision"] in measured:
        content = measured[facts["flags"]["precision"]]
        found.append(_assess_published(content, facts))
        found += _assess_input(content["rows"], facts["machine"]["ranks"])
    return [*found, *_assess_equality(bundle, facts), *_assess_checkpoint(bundle, facts["machine"]["ranks"])]


def _assess_stages(stages: Sequence[Mapping[str, Any]], planned: int) -> Iterator[Finding]:
    for stage in stages:
        if stage["code"] != DONE:
            text = f"{stage['stage']} ended with exit code {stage['code']}"
            yield failure("stages", text, f"logs/{stage['stage']}.txt says why; docs/troubleshooting.md lists exit codes")
    if len(stages) < planned:
        yield failure("stages", f"{len(stages)} of {planned} were run", "mend what failed and run acceptance again")
    elif all(stage["code"] == DONE for stage in stages):
        yield ok("stages", f"all {planned} were run and ended well")


def _assess_doctor(report: Mapping[str, Any]) -> Iterator[Finding]:
    rows = report.get("findings", [])
    for row in rows:
        if row["verdict"] != OK:
            yield Finding(row["about"], row["verdict"], row["text"], row["fix"])
    yield from (ok("collectives", row["text"]) for row in rows if row["about"] == "collectives" and row["verdict"] == OK)


def _assess_throughput(precision: str, rows: Sequence[Mapping[str, Any]], ranks: int) -> Iterator[Finding]:
    of_all = {row["input"]: row for row in rows if row["ranks"] == ranks}
    for kind in ("real", "host"):
        if kind in of_all:
            row = of_all[kind]
            text = f"{precision}, {plural(ranks, 'rank')}, {_KINDS[kind]}: {row['fps']:.1f} images/s (standard deviation "
            text += f"{row['fps_standard_deviation']:.1f}, {plural(row['fps_updates'], 'update')}), "
            text += f"{row['efficiency']:.0%} of a single rank's, for each; limit: {row['bottleneck']}"
            yield ok("throughput", text)
            return


def _assess_published(content: Mapping[str, Any], facts: Mapping[str, Any]) -> Finding:
    """Compares with what is published of this device, network and number of ranks."""
    flags, device = facts["flags"], content["machine"]["hosts"][0]["gpu"]
    fps = {row["input"]: row["fps"] for row in content["rows"] if row["ranks"] == facts["machine"]["ranks"]}
    mine = (facts["machine"]["ranks"], flags["model"], flags["image_size"], flags["precision"])
    one_host = facts["machine"]["hosts"] == 1 and flags["width"] == 1
    known = [each for each in PUBLISHED if one_host and each.device in device and each[1:5] == mine]
    if not known:
        what = f"{flags['model']} at {flags['image_size']} pixels in {flags['precision']} on {plural(mine[0], 'rank')} of"
        return ok("published", f"no figure is known for {what} {device or 'CPUs'}")
    (each,), kind = known, "real" if "real" in fps else "host"
    share = fps[kind] / each.fps
    text = f"{fps[kind]:.1f} images/s ({_KINDS[kind]}) is {share:.2f} of the published {each.fps:g} ({each.source})"
    fix = "see the limit of throughput, and doctor's findings on devices and links; then docs/performance.md"
    if share >= _SLOWER:
        return ok("published", text)
    return warning("published", text, fix) if share >= _MUCH_SLOWER else failure("published", text, fix)


def _assess_input(rows: Sequence[Mapping[str, Any]], ranks: int) -> Iterator[Finding]:
    fps = {row["input"]: row["fps"] for row in rows if row["ranks"] == ranks}
    if "alone" not in fps:
        return
    share = fps["alone"] / fps["device"]
    text = f"read and decoded alone: {fps['alone']:.1f} images/s, {share:.2f} of what the devices train without input"
    if share >= _INPUT_MARGIN:
        yield ok("input", text)
    else:
        yield warning("input", text, "more cores, faster storage, --shuffle_block_records: docs/performance.md")


def _assess_equality(bundle: Bundle, facts: Mapping[str, Any]) -> Iterator[Finding]:
    results = {int(path.parent.name.split("-")[1]): _read(path) for path in bundle.path.glob("runs/ranks-*/result.json")}
    steps = facts["flags"]["equal_steps"]
    states = {ranks: result["state_sha256"] for ranks, result in sorted(results.items()) if result["steps"] == steps}
    if len(set(states.values())) > 1:
        text = ", ".join(f"{plural(ranks, 'rank')} {state:.16}" for ranks, state in states.items())
        fix = "logs/equal-*.txt name the first difference; docs/reproducibility.md says what may cause it. Do not train here"
        yield failure("equality", f"states after {steps} steps differ: {text}", fix)
    elif states:
        where = " and ".join(plural(ranks, "rank") for ranks in states)
        text = f"state {next(iter(states.values())):.16} after {steps} steps on {where}, equal in every bit"
        yield ok("equality", text + ", and continued from a checkpoint")


def _assess_checkpoint(bundle: Bundle, ranks: int) -> Iterator[Finding]:
    try:
        size = int((bundle.run(ranks) / "checkpoint_bytes.txt").read_text())
    except (OSError, ValueError):
        return
    lines = [line for line in read_log(bundle.run(ranks) / "dllogger.json") if line.kind == "checkpoint"]
    if size and lines:
        seconds = sorted(line.data["seconds"] for line in lines)[len(lines) // 2]
        text = f"{size / 1e6:.1f} MB written in {seconds:.2g} s, {size / 1e6 / seconds:.0f} MB/s, beside training"
        yield ok("checkpoint", text)


def format_page(bundle: Bundle, facts: Mapping[str, Any], findings: Sequence[Finding]) -> str:
    """Returns the page for people: where, what was found, and the throughput of all ranks, half and one."""
    machine, code, flags = facts["machine"], facts["code"], facts["flags"]
    verdict = "NOT ACCEPTED" if worst(findings) == FAILURE else "ACCEPTED"
    measured = _measurements(bundle, facts)
    lines = [
        f"hvd-vgg acceptance, {facts['date']}, {format_duration(facts['seconds'])}: {verdict}",
        "",
        f"code       hvd_vgg {code['version']}, commit {code['commit'] or 'unknown'}, sha256 {code['sha256']:.16}",
        f"machine    {plural(machine['ranks'], 'rank')} on {plural(machine['hosts'], 'host')}; "
        f"{_devices(measured, machine)}; {machine['processor']} ({machine['instructions']})",
        *(f"software   {_format_software(content['software'])}" for content in list(measured.values())[:1]),
        f"network    {flags['model']} at width {flags['width']:g}, {flags['image_size']} pixels; {flags['global_batch']} "
        f"images per update on all ranks, in micro-batches of {flags['device_batch']}",
        f"data       {flags['data_dir'] or 'drawn pictures'}",
        "",
        *format_findings({finding: [0] for finding in findings}, [""]),
        "",
        *_format_rows(measured),
        "",
        "stages",
        *(f"  {stage['code']:3d}  {stage['seconds']:8.1f} s  {stage['stage']}" for stage in facts["stages"]),
    ]
    return "\n".join(lines) + "\n"


def _format_rows(measured: Mapping[str, Any]) -> List[str]:
    """Returns a table of images/s; `share` is of as many ranks alone."""
    head = f"{'images/s':10s} {'images':22s} {'ranks':>5s} {'all':>9s} {'deviation':>9s} {'a rank':>9s} {'share':>6s}  limit"
    lines = [head] if measured else []
    for precision, content in measured.items():
        for row in content["rows"]:
            deviation = f"{row['fps_standard_deviation']:.1f}" if "fps_standard_deviation" in row else ""
            lines.append(
                f"{precision:10s} {_KINDS[row['input']]:22s} {row['ranks']:5d} {row['fps']:9.1f} {deviation:>9s} "
                f"{row['fps'] / row['ranks']:9.1f} {row['efficiency']:6.0%}  {row.get('bottleneck', 'input')}"
            )
    return lines


def _devices(measured: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    names = [host["gpu"] for content in measured.values() for host in content["machine"]["hosts"] if host["gpu"]]
    return ", ".join(filter(None, [*dict.fromkeys(names), machine["vendor"], machine["driver"]]))


def _format_software(software: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in software.items() if isinstance(value, str))


def _measurements(bundle: Bundle, facts: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the measurements by precision, that of --precision first."""
    found = {path.name.split(".")[1]: _read(path) for path in bundle.path.glob("benchmark.*.json")}
    return dict(sorted(found.items(), key=lambda item: (item[0] != facts["flags"]["precision"], item[0])))


def _read(path: Path) -> Dict[str, Any]:
    """Returns a JSON object; {} where a stage that failed has left none, or half of one."""
    try:
        found: Optional[Dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    return found or {}
