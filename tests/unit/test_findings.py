from hvd_vgg.reporting.findings import as_json, failure, format_findings, format_ranks, merge, ok, warning, worst


def test_what_all_ranks_found_is_said_once_and_the_rest_with_rank_and_host():
    same, bad, odd = (
        ok("python", "3.11"),
        failure("devices", "does not allocate", "leave it out"),
        warning("shm", "small", "more"),
    )
    told = merge([[same], [same, bad], [odd, same], [same, odd]])
    assert format_findings(told, ["a", "a", "b", "b"]) == [
        "ok       python       3.11",
        "failure  devices      rank 1 (host a): does not allocate",
        "                      do: leave it out",
        "warning  shm          ranks 2, 3 (host b): small",
        "                      do: more",
    ]
    data = as_json(told, ["a", "a", "b", "b"], seconds=1.5)
    assert (data["verdict"], data["seconds"]) == ("failure", 1.5)
    assert data["counts"] == {"ok": 1, "warning": 1, "failure": 1}
    assert data["findings"][1] == {**bad._asdict(), "ranks": [1]}


def test_findings_about_the_same_stand_together():
    told = merge([[ok("a", "1"), ok("b", "1")], [ok("a", "2"), ok("b", "1")]])
    assert [each.finding.about for each in told] == ["a", "a", "b"]


def test_names_of_ranks_by_host():
    assert format_ranks([0, 2], ["a", "a", "b"]) == "ranks 0 (host a), 2 (host b)"
    assert format_ranks([0, 1, 2], ["a", "a", "b"]) == ""
    assert worst([]) == "ok"
