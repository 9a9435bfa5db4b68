"""flask reconcile, against a stand-in for Persona's API."""

import contextlib
import json

import persona_api
import pytest
from conftest import kyc
from persona_api import content, status

AT = "2026-03-01T10:00:00.000Z"
SINCE = ("--since", "2026-02-01")


@pytest.fixture
def api(monkeypatch):
    yield from persona_api.serve(monkeypatch)


@pytest.fixture
def reconcile(api, runner):
    """Run the command; return its exit code and its JSON."""

    def reconcile(*arguments):
        result = runner("reconcile", *SINCE, "--json", *arguments)
        assert result.exit_code in (0, 1), result.output
        assert not isinstance(result.exception, Exception), result.output
        return result.exit_code, json.loads(result.output)["differences"]

    return reconcile


def at(minute, second="00.123"):
    return f"2026-03-01T10:{minute:02}:{second}Z"


def here(db, inquiry_id):
    """Return where an inquiry stands here, by which event."""
    query = "SELECT status, event_id, person FROM inquiries WHERE inquiry_id = ?"
    return tuple(db.execute(query, (inquiry_id,)).fetchone() or ())


def test_what_is_equal_is_not_told(api, runner, send):
    for number, name in enumerate(["approved", "marked-for-review", "expired"]):
        send(f"inquiry.{name}", inquiry_id=f"inq_{number}", created_at=at(0))
    api.add_inquiry("inq_0", "approved")
    api.add_inquiry("inq_1", "needs review")
    api.add_inquiry("inq_2", "Expired")
    result = runner("reconcile", *SINCE)
    assert result.exit_code == 0
    assert result.output == "3 inquiries compared, since 2026-02-01 00:00 UTC: 0 differ\n"


def test_what_differs_is_told(api, runner, reconcile, send):
    send("inquiry.completed", inquiry_id="inq_1", created_at=at(0), reference_id="user-1")
    send("inquiry.approved", inquiry_id="inq_3", created_at=at(0), reference_id="user-3")
    send("inquiry.approved", inquiry_id="inq_4", created_at="2026-01-01T00:00:00Z")
    api.add_inquiry("inq_1", "declined", at(1))
    api.add_inquiry("inq_2", "approved", at(2))
    code, differences = reconcile()
    assert code == 1
    assert [tuple(one.values()) for one in differences] == [
        ("inq_3", "user-3", "approved", at(0), None, None),
        ("inq_1", "user-1", "completed", at(0), "declined", at(1)),
        ("inq_2", None, None, None, "approved", at(2)),
    ]
    lines = runner("reconcile", *SINCE).output.splitlines()
    assert [line.split() for line in lines] == [
        ["INQUIRY", "PERSON", "HERE", "AT", "PERSONA", "SINCE", "(UTC)"],
        ["inq_3", "user-3", "approved", "unknown"],
        ["inq_1", "user-1", "completed", "declined", "2026-03-01", "10:01"],
        ["inq_2", "unknown", "approved", "2026-03-01", "10:02"],
        ["3", "inquiries", "compared,", "since", "2026-02-01", "00:00", "UTC:", "3", "differ"],
    ]


def test_no_personal_data_is_fetched(api, reconcile):
    api.add_inquiry("inq_1")
    reconcile()
    for _, path, query, _ in api.requests:
        assert path in ("/inquiries/search", "/inquiries")
        assert "name-first" not in query["fields[inquiry]"]
        assert query["fields[inquiry]"]


def test_what_the_search_does_not_know_yet_is_asked_for(api, reconcile, send):
    send("inquiry.approved", inquiry_id="inq_1", created_at=at(5))
    api.add_inquiry("inq_1", "completed")
    late = lambda number: number == 2 and api.add_inquiry("inq_1", "approved")  # noqa: E731
    api.before = late
    assert reconcile() == (0, [])


def test_an_inquiry_updated_before_but_known_since_is_compared(api, reconcile, send):
    send("inquiry.approved", inquiry_id="inq_1", created_at=at(0))
    api.add_inquiry("inq_1", "declined", "2026-01-01T00:00:00.000Z")
    assert [one["at_persona"] for one in reconcile()[1]] == ["declined"]


def test_many_inquiries(api, reconcile, send):
    for number in range(230):
        api.add_inquiry(f"inq_{number}", at=at(number // 40, "00.000"))
    for number in range(10):
        send("inquiry.approved", inquiry_id=f"inq_{number}", created_at=at(0))
    assert len(reconcile()[1]) == 220


@pytest.mark.parametrize("moved", [[99], [199], [99, 199], [199, 225]])
def test_inquiries_updated_while_one_walks_hide_no_others(moved, api, reconcile):
    for number in range(230):
        api.add_inquiry(f"inq_{number}", at=at(number // 10, "00.000"))
    later = iter(range(50, 60))

    def update(number):
        if number > 1 and moved:
            api.add_inquiry(f"inq_{moved.pop(0)}", at=at(next(later), "00.000"))

    api.before = update
    assert len(reconcile()[1]) == 230


@pytest.mark.parametrize(
    ("rule", "name", "status"),
    [
        ("case.resolved", "case.resolved", "needs_review"),
        (None, "inquiry-session.started", "created"),
    ],
)
def test_what_the_rules_mean_to_differ_is_not_told(
    rule, name, status, api, reconcile, send, handlers, app, database
):
    if rule:
        kyc.status_rule(rule, "approved")
        with contextlib.closing(kyc.connect(database)) as db:
            kyc.write_rules(db, ())
    send(name, inquiry_id="inq_1", created_at=at(0))
    api.add_inquiry("inq_1", status)
    assert reconcile() == (0, [])


def test_an_error_is_one_line(api, runner):
    api.faults = [status(403, "Forbidden")]
    result = runner("reconcile")
    assert result.exit_code == 1
    assert result.output == "Error: PERSONA_API_KEY lacks a permission: 403 (Forbidden)\n"


def test_odd_items_do_no_harm(api, reconcile):
    odd = {"data": [None, 7, {}, {"id": "inq_1", "attributes": {"status": "ok"}}], "links": {}}
    api.faults = [content(json.dumps(odd).encode())]
    assert [one["at_persona"] for one in reconcile()[1]] == ["ok"]
    assert reconcile("--mend") == (0, [])


# --mend


EVENTS = {
    "created": "inquiry.created",
    "pending": "inquiry.started",
    "completed": "inquiry.completed",
    "failed": "inquiry.failed",
    "expired": "inquiry.expired",
    "needs_review": "inquiry.marked-for-review",
    "approved": "inquiry.approved",
    "declined": "inquiry.declined",
}


@pytest.mark.parametrize("status", EVENTS)
def test_mend_appends_an_event_that_a_real_one_replaces(status, api, reconcile, db, send):
    api.add_inquiry("inq_1", status, AT, reference_id="user-1", account="act_1", template="itmpl_1")
    code, differences = reconcile("--mend")
    assert (code, [one["event"] for one in differences]) == (0, [EVENTS[status]])
    row = db.execute("SELECT * FROM events").fetchone()
    assert (row["source"], row["created_at"], row["name"]) == ("operator", AT, EVENTS[status])
    ids = [row[n] for n in ("reference_id", "account_id", "template_id")]
    assert ids == ["user-1", "act_1", "itmpl_1"]
    assert here(db, "inq_1") == (status, row["event_id"], "user-1")
    assert reconcile("--mend") == (0, [])
    send(EVENTS[status], event_id="evt_real", inquiry_id="inq_1", created_at=at(0, "00.100"))
    assert here(db, "inq_1") == (status, "evt_real", "user-1")
    assert reconcile() == (0, [])


def test_mending_twice_at_once_appends_one_event(api, reconcile, db):
    api.add_inquiry("inq_1")
    reconcile("--mend", "--dry-run")
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 0
    reconcile("--mend")
    event_id = db.execute("SELECT event_id FROM events").fetchone()[0]
    assert event_id.startswith("evt_mend_")
    db.execute("UPDATE inquiries SET status = 'created'")
    reconcile("--mend")
    assert [row[0] for row in db.execute("SELECT event_id FROM events")] == [event_id]


def test_dry_run_says_what_it_would_append(api, runner, reconcile, db):
    api.add_inquiry("inq_1")
    assert reconcile("--mend", "--dry-run")[0] == 1
    result = runner("reconcile", *SINCE, "--mend", "--dry-run")
    assert "MENDED BY" in result.output
    assert result.output.endswith(": 1 differ, 1 to mend\n")
    assert "inquiry.approved" in result.output
    assert not db.execute("SELECT 1 FROM events").fetchall()


def test_an_inquiry_that_was_resumed_is_mended_by_its_last_update(api, reconcile, db, send):
    send("inquiry.expired", inquiry_id="inq_1", created_at=at(5))
    api.add_inquiry("inq_1", "pending", at(1), updated_at=at(9))
    assert reconcile("--mend")[0] == 0
    assert here(db, "inq_1")[0] == "pending"


@pytest.mark.parametrize(("status", "time"), [("completed", at(9)), ("approved", at(1))])
def test_what_the_rules_forbid_is_not_appended(status, time, api, runner, reconcile, db, send):
    send("inquiry.declined", inquiry_id="inq_1", created_at=at(5))
    api.add_inquiry("inq_1", status, time)
    code, differences = reconcile("--mend")
    assert (code, differences[0]["event"]) == (1, None)
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 1
    assert "nothing mends it" in runner("reconcile", *SINCE, "--mend").output


def test_a_redacted_inquiry_stays_with_its_person(api, reconcile, db, send):
    send("inquiry.completed", inquiry_id="inq_1", created_at=at(0), reference_id="user-1")
    send("inquiry.redacted", inquiry_id="inq_1", created_at=at(30))
    api.add_inquiry("inq_1", "approved", at(1), redacted_at=at(30))
    assert reconcile("--mend")[0] == 0
    assert here(db, "inq_1")[::2] == ("approved", "user-1")
    assert [row[0] for row in db.execute("SELECT body FROM events WHERE source = 'operator'")] == [
        None
    ]


def test_mend_runs_the_handlers(api, reconcile, handlers):
    seen = []
    kyc.on("inquiry.approved")(lambda db, event: seen.append((event.name, event.reference_id)))
    api.add_inquiry("inq_1", reference_id="user-1")
    reconcile("--mend")
    assert seen == [("inquiry.approved", "user-1")]


def test_an_unknown_status_is_told_and_not_mended(api, reconcile, db):
    api.add_inquiry("inq_1", "on hold")
    code, differences = reconcile("--mend")
    assert (code, differences[0]["at_persona"], differences[0]["event"]) == (1, "on_hold", None)
