from hvd_vgg.reporting.findings import as_json, failure, format_findings, format_ranks, merge, ok, warning, worst

HOSTS = ["a", "a", "b", "b"]


def test_findings_of_all_ranks_are_merged():
    """What all ranks found is printed once, the rest with rank and host."""
    same = ok("python", "3.11")
    bad = failure("devices", "does not allocate", "leave it out")
    odd = warning("shm", "small", "more")
    merged = merge([[same], [same, bad], [odd, same], [same, odd]])
    assert format_findings(merged, HOSTS) == [
        "ok       python       3.11",
        "failure  devices      rank 1 (host a): does not allocate",
        "                      fix: leave it out",
        "warning  shm          ranks 2, 3 (host b): small",
        "                      fix: more",
    ]
    painted = format_findings(merged, HOSTS, lambda text, colour: f"<{colour}>{text}<>")
    assert [line[:14] for line in painted if "<" in line] == ["<32>ok      <>", "<31>failure <>", "<33>warning <>"]
    data = as_json(merged, HOSTS, seconds=1.5)
    assert (data["verdict"], data["seconds"]) == ("failure", 1.5)
    assert data["counts"] == {"ok": 1, "warning": 1, "failure": 1}
    assert data["findings"][1] == {**bad._asdict(), "ranks": [1]}
    assert worst([]) == "ok"


def test_findings_about_the_same_are_grouped():
    merged = merge([[ok("a", "1"), ok("b", "1")], [ok("a", "2"), ok("b", "1")]])
    assert [finding.about for finding in merged] == ["a", "a", "b"]


def test_format_ranks_by_host():
    assert format_ranks([0, 2], HOSTS[:3]) == "ranks 0 (host a), 2 (host b)"
    assert format_ranks([0, 1, 2], HOSTS[:3]) == ""
