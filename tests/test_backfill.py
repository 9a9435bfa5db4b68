"""flask backfill, against a stand-in for Persona's API."""

import contextlib
import hashlib
import json
import random
import re

import persona_api
import pytest
from conftest import PAYLOADS, build, kyc
from persona_api import KEY, content, hang_up, silence, status

TIMES = [f"2026-03-01T{hour:02}:{minute:02}:00.123Z" for hour in range(24) for minute in range(60)]
STATUSES = ("created", "started", "completed", "approved", "declined")
TABLES = {
    "inquiries": "SELECT * FROM inquiries ORDER BY inquiry_id",
    "accounts": "SELECT * FROM accounts ORDER BY account_id",
    "kyc_status": """SELECT reference_id, status, hold, inquiry_id, account_id, template_id,
        event_id FROM kyc_status ORDER BY reference_id""",
}


@pytest.fixture
def api(monkeypatch):
    yield from persona_api.serve(monkeypatch)


def event(number, name="inquiry.approved", **ids):
    """Return one event of an environment, numbered in the order of creation."""
    ids = {"inquiry_id": f"inq_{number}", "reference_id": f"user-{number}", **ids}
    return json.loads(build(name, event_id=f"evt_{number}", created_at=TIMES[number], **ids))


def fill(api, number, seed=1):
    """Put events of a few people into the stand-in; some are of no interest here."""
    pick = random.Random(seed)
    for n in range(len(api.events), len(api.events) + number):
        person = pick.randrange(12)
        name = pick.choice([*(f"inquiry.{word}" for word in STATUSES), "verification.passed"])
        ids = {"inquiry_id": f"inq_{person}", "account_id": pick.choice([None, f"act_{person}"])}
        ids["reference_id"] = pick.choice([None, f"user-{person}"])
        if pick.random() < 0.1:
            name, ids["inquiry_id"], ids["account_id"] = "account.created", None, f"act_{person}"
        api.add(event(n, name, **ids))


def read(db, table):
    return [tuple(row) for row in db.execute(TABLES[table])]


def count(db):
    return db.execute("SELECT count(*) FROM events").fetchone()[0]


def test_every_event_is_in_the_journal_once_with_its_body(api, runner, db):
    api.add(*map(event, range(250)))
    result = runner("backfill")
    assert result.exit_code == 0, result.output
    rows = db.execute("SELECT event_id, body, source, state, signed_by FROM events").fetchall()
    assert {row["event_id"]: json.loads(row["body"])["data"] for row in rows} == {
        one["id"]: one for one in api.events
    }
    assert {tuple(row)[2:] for row in rows} == {("api", "processed", None)}
    assert (
        "250 events fetched, back to 2026-03-01 00:00 UTC: all that Persona keeps" in result.output
    )
    assert "250 new: 250 inquiry.approved" in result.output
    assert "250 people changed" in result.output
    assert "user-0: unknown -> approved" in result.output


def test_official_events_are_read_as_when_they_are_delivered(api, runner, db, send):
    if not PAYLOADS.exists():
        pytest.skip("the official payloads are not here")
    documents = {}
    for path in sorted(PAYLOADS.glob("*.json")):
        document = json.loads(path.read_bytes())
        documents.setdefault(document["data"]["id"], document)
    api.add(*documents.values())
    assert runner("backfill", "--name", "*").exit_code == 0
    columns = ("name", *kyc.Event._fields[2:-1])
    rows = {row["event_id"]: row for row in db.execute("SELECT * FROM events")}
    for event_id, document in documents.items():
        expected = kyc.read_event(json.dumps(document).encode(), "")
        assert [rows[event_id][name] for name in columns] == [getattr(expected, n) for n in columns]


def test_statuses_are_those_of_the_same_deliveries(api, runner, db, send, app, tmp_path):
    fill(api, 300)
    assert runner("backfill").exit_code == 0
    fetched = {table: read(db, table) for table in TABLES}
    environ = {"PERSONA_WEBHOOK_SECRET": "x" * 16, "KYC_DATABASE": str(tmp_path / "other.db")}
    config = kyc.read_config(environ)
    kyc.prepare_database(config)
    with contextlib.closing(kyc.connect(config.database)) as other:
        for one in api.events:
            body = json.dumps({"data": one}).encode()
            with kyc.transaction(other):
                kyc.store(other, [kyc.Delivery(kyc.read_event(body, ""), body, "")])
        assert {table: read(other, table) for table in TABLES} == fetched
    assert len(fetched["kyc_status"]) == 12


def test_a_run_that_fetches_nothing_says_so(api, runner, db):
    assert runner("backfill").output.startswith("0 events fetched, back to ")


def test_a_second_run_changes_nothing(api, runner, db):
    fill(api, 150)
    runner("backfill")
    before = {table: read(db, table) for table in TABLES}, count(db)
    result = runner("backfill")
    assert "0 new\n" in result.output
    assert "0 people changed" in result.output
    assert ({table: read(db, table) for table in TABLES}, count(db)) == before


def test_since_ends_the_walk(api, runner, db):
    api.add(*map(event, range(1000)))
    result = runner("backfill", "--since", TIMES[950])
    assert count(db) == 50
    assert len(api.requests) == 1
    assert "UTC: as asked" in result.output


def test_it_says_when_persona_does_not_reach_back_that_far(api, runner):
    api.add(event(7))
    result = runner("backfill", "--since", TIMES[3])
    assert "Persona has no older events; for what was missed before them: flask reconcile" in (
        result.output
    )


def test_new_events_may_arrive_while_one_walks(api, runner, db):
    api.add(*map(event, range(250)))
    late = iter(range(250, 260))
    api.before = lambda number: number > 1 and api.add(event(next(late)))
    assert runner("backfill").exit_code == 0
    assert count(db) == 250
    api.before = lambda number: None
    runner("backfill")
    assert count(db) == len(api.events)


def test_other_events_are_passed_over_unless_asked_for(api, runner, db, handlers):
    handlers["case.created"] = [lambda db, event: None]
    names = ["inquiry.approved", "report/watchlist.matched", "report/watchlist.dismissed"]
    names += ["inquiry.redacted", "document.redacted", "case.created", "account.created"]
    for number, name in enumerate(names):
        api.add(event(number, name))
    api.add(event(10, "verification.passed"), event(11, "verification.passed"))
    api.add(event(12, "account.created", account_id="act_1", inquiry_id=None, reference_id=None))
    result = runner("backfill")
    kept = [row[0] for row in db.execute("SELECT name FROM events ORDER BY created_at")]
    assert kept == names
    assert "3 passed over: 2 verification.passed, 1 account.created" in result.output
    runner("backfill", "--name", "verification.*")
    assert count(db) == len(names) + 2


def test_plain_names_are_asked_of_persona(api, runner, db):
    api.add(*map(event, range(120)), event(121, "verification.passed"), event(122, "case.created"))
    runner("backfill", "--name", "verification.passed", "--name", "case.created")
    assert [one[2]["filter[name]"] for one in api.requests] == ["verification.passed,case.created"]
    assert count(db) == 2


def test_dry_run_keeps_nothing(api, runner, db, send):
    api.add(event(1), event(2, "inquiry.declined"))
    send(json.dumps({"data": api.events[0]}).encode())
    result = runner("backfill", "--dry-run")
    assert count(db) == 1
    assert "1 missing: 1 inquiry.declined" in result.output
    assert "1 already there" in result.output


# One event, whichever copy comes first


def strip(document):
    """Return an event without what a webhook's settings may filter."""
    copy = json.loads(json.dumps(document))
    thing = copy["data"]["attributes"]["payload"]["data"]
    thing["relationships"] = {}
    del thing["attributes"]["reference-id"]
    return copy


def test_a_delivered_event_learns_from_the_fetched_one(api, runner, db, send):
    full = event(1, account_id="act_1", template_id="itmpl_1")
    delivered = json.dumps(strip(full)).encode()
    send(delivered)
    assert [row["reference_id"] for row in db.execute("SELECT * FROM kyc_status")] == ["inq_1"]
    api.add(full)
    result = runner("backfill")
    row = db.execute("SELECT * FROM events").fetchone()
    assert (row["body_sha256"], row["source"]) == (hashlib.sha256(delivered).hexdigest(), "webhook")
    assert (row["account_id"], row["template_id"]) == ("act_1", "itmpl_1")
    assert [tuple(row)[:2] for row in db.execute("SELECT * FROM kyc_status")] == [
        ("user-1", "approved")
    ]
    assert "inq_1: approved -> unknown" in result.output
    assert "user-1: unknown -> approved" in result.output


def test_a_fetched_event_learns_from_the_delivered_one(api, runner, db, send):
    full = event(1, account_id="act_1", template_id="itmpl_1")
    api.add(strip(full))
    runner("backfill")
    fetched = db.execute("SELECT body FROM events").fetchone()[0]
    assert send(json.dumps(full).encode()).json == {"received": True, "duplicate": True}
    row = db.execute("SELECT * FROM events").fetchone()
    assert (row["body"], row["source"], row["reference_id"]) == (fetched, "api", "user-1")
    assert db.execute("SELECT reference_id FROM kyc_status").fetchall()[0][0] == "user-1"


def test_redacted_people_stay_redacted(api, runner, db, send):
    send("inquiry.redacted", inquiry_id="inq_1", created_at=TIMES[9])
    api.add(event(1), event(2, "inquiry.completed", inquiry_id="inq_2"))
    runner("backfill")
    bodies = dict(map(tuple, db.execute("SELECT event_id, body FROM events")))
    assert bodies["evt_1"] is None
    assert bodies["evt_2"]
    query = "SELECT status FROM kyc_status WHERE reference_id = 'user-1'"
    assert db.execute(query).fetchone()[0] == "approved"


# Handlers


@pytest.fixture
def seen(handlers):
    """What a handler for approved inquiries was called with."""
    seen = []

    def handler(db, event):
        seen.append((event.event_id, event.reference_id, bool(event.payload)))

    kyc.on("inquiry.approved")(handler)
    return seen


def test_handlers_run_once_the_oldest_event_first(api, runner, db, seen):
    api.add(*map(event, range(130)))
    result = runner("backfill")
    assert [one[0] for one in seen] == [f"evt_{n}" for n in range(130)]
    assert "handlers ran for 130 events, 0 failed" in result.output
    runner("backfill")
    assert len(seen) == 130


def test_no_handlers_leaves_events_pending(api, runner, db, seen):
    api.add(event(1))
    result = runner("backfill", "--no-handlers")
    assert not seen
    assert db.execute("SELECT state FROM events").fetchone()[0] == "pending"
    assert "1 event left without their handlers" in result.output
    runner("backfill")
    assert seen == [("evt_1", "user-1", True)]


def test_a_handler_gets_what_any_copy_named(api, runner, db, seen, send):
    full = event(1)
    kyc.HANDLERS["inquiry.approved"].insert(0, lambda db, event: 1 / 0)
    send(json.dumps(strip(full)).encode())
    kyc.HANDLERS["inquiry.approved"].pop(0)
    api.add(full)
    runner("backfill")
    assert seen == [("evt_1", "user-1", True)]


def test_a_handler_sees_the_event_of_somebody_redacted(api, runner, db, seen, send):
    send("inquiry.redacted", inquiry_id="inq_1", created_at=TIMES[9])
    api.add(event(1), event(2))
    runner("backfill")
    assert seen == [("evt_1", "user-1", True), ("evt_2", "user-2", True)]


def test_a_failed_handler_is_told(api, runner, db, handlers):
    kyc.on("inquiry.approved")(lambda db, event: 1 / 0)
    api.add(event(1))
    result = runner("backfill")
    assert result.exit_code == 1
    assert "handlers ran for 1 event, 1 failed" in result.output
    assert db.execute("SELECT state FROM events").fetchone()[0] == "failed"


# What may go wrong


PASSING = {
    "429": status(429, "Rate limit exceeded"),
    "500": status(500),
    "503": status(503),
    "not JSON": content(b"<html>"),
    "JSON cut short": content(b'{"data": [{"type": '),
    "no list": content(b'{"data": null}'),
    "deep JSON": content(b"[" * 100_000),
    "closed in the middle": hang_up,
    "no answer": silence(0.3),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_it_waits_and_goes_on_after(fault, api, runner, db, monkeypatch):
    monkeypatch.setattr("commands.persona.ANSWER_SECONDS", 0.2)
    api.add(*map(event, range(250)))
    api.faults = [None, fault, fault, None, fault]
    result = runner("backfill")
    assert result.exit_code == 0, result.output
    assert count(db) == 250
    assert len(api.pauses) == 3


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_it_gives_up_after_some_tries(fault, api, runner, db, monkeypatch):
    monkeypatch.setattr("commands.persona.ANSWER_SECONDS", 0.2)
    api.faults = [fault] * 100
    result = runner("backfill")
    assert result.exit_code == 1
    assert len(api.requests) == 6
    assert re.fullmatch(rf"Error: {api.url}: [^\n]+, 6 times\n", result.output)


def test_it_waits_as_long_as_the_limit_says(api, runner, db):
    api.add(event(1))
    api.faults = [status(429), status(429, RateLimit_Reset="7"), status(429, RateLimit_Reset="x")]
    assert runner("backfill").exit_code == 0
    assert api.pauses == [53, 7, 4]


def test_the_last_tenth_of_the_limit_is_left_to_others(api, runner, db):
    api.add(*map(event, range(250)))
    api.limit = 22  # of which two are left when the 20th was sent
    api.requests = [None] * 18
    assert runner("backfill").exit_code == 0
    assert [round(seconds) for seconds in api.pauses] == [53]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(401), r"Persona does not accept PERSONA_API_KEY: 401 \(It failed\)"),
        (
            status(403, "Forbidden", "no"),
            r"PERSONA_API_KEY lacks a permission: 403 \(Forbidden: no\)",
        ),
        (status(422, KEY), r"http\S+ answers 422 \(\*\*\*\)"),
        (status(302, Location="http://127.0.0.1:1/"), r"http\S+ answers 302 \(It failed\)"),
        (status(400, "\x1b[31m"), r"http\S+ answers 400 \(.\[31m\)"),
    ],
)
def test_what_waiting_does_not_mend_is_one_line(fault, words, api, runner, db):
    api.faults = [fault]
    result = runner("backfill")
    assert result.exit_code == 1
    assert re.fullmatch(f"Error: {words}\n", result.output)
    assert not api.pauses


def test_a_cursor_that_is_gone(api, runner, db):
    api.add(*map(event, range(250)))
    api.before = lambda number: number == 2 and api.events.pop(150)
    result = runner("backfill")
    assert result.exit_code == 1
    assert (
        "Persona no longer knows the event after which the next page begins: 404" in result.output
    )
    assert count(db) == 100
    assert runner("backfill").exit_code == 0
    assert count(db) == 250


def test_a_page_that_repeats(api, runner, db):
    api.add(*map(event, range(350)))
    first = content(json.dumps(api.answer("GET", "/events", {"page[size]": "100"}, b"")).encode())
    api.faults = [None, *[first, first, None] * 3]
    result = runner("backfill")
    assert result.exit_code == 0
    assert "350 events fetched" in result.output
    assert count(db) == 350
    api.faults = [first] * 100
    result = runner("backfill")
    assert "Error: Persona sends the same page again and again" in result.output


def test_odd_items_and_links_do_no_harm(api, runner, db):
    good = event(1)["data"]
    link = "https://elsewhere.example/api/v1/events?page%5Bafter%5D=evt_9&page%5Bsize%5D=3"
    odd = {"data": [good, None, 7, {}, {"type": "event"}], "links": {"next": link}}
    api.add(event(0), event(9))
    api.faults = [content(json.dumps(odd).encode())]
    result = runner("backfill")
    assert result.exit_code == 0, result.output
    assert "4 passed over: 4 unrecognized" in result.output
    assert [row[0] for row in db.execute("SELECT event_id FROM events ORDER BY rowid")] == [
        "evt_1",
        "evt_0",
    ]


@pytest.mark.parametrize("step", ["store", "dispatch"])
def test_interrupted_anywhere_and_run_again_it_ends_the_same(step, api, runner, db, seen):
    fill(api, 450)
    inner = getattr(kyc, step)
    for number in range(1, 6):
        left = [number if step == "store" else 1]

        def interrupt(*arguments, left=left):
            done = inner(*arguments)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return done

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kyc, step, interrupt)
            result = runner("backfill")
        assert (result.exit_code, "Aborted!" in result.output) == (1, True)
        assert "left without their handlers: run this again" in result.output or number == 1
    assert runner("backfill").exit_code == 0
    wanted = [one for one in api.events if is_wanted(one["attributes"])]
    rows = db.execute("SELECT event_id, state FROM events ORDER BY event_id")
    assert [tuple(row) for row in rows] == [
        (n, "processed") for n in sorted(e["id"] for e in wanted)
    ]
    names = {one["id"]: one["attributes"]["name"] for one in wanted}
    assert [one[0] for one in seen] == [n for n in names if names[n] == "inquiry.approved"]


def is_wanted(attributes):
    """Tell whether the default keeps an event of `fill`."""
    owner = attributes["payload"]["data"]["attributes"]["reference-id"]
    return attributes["name"].startswith("inquiry.") or (
        attributes["name"] == "account.created" and owner is not None
    )


# The key


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "PERSONA_API_KEY must hold an API key"),
        ({"PERSONA_API_KEY": ""}, "PERSONA_API_KEY must hold an API key"),
        ({"PERSONA_API_KEY": f"key {KEY}"}, "PERSONA_API_KEY must hold an API key"),
        ({"PERSONA_API_KEY_FILE": "/nowhere"}, "PERSONA_API_KEY_FILE cannot be read: No such file"),
        ({"PERSONA_API_KEY_FILE": "/dev/null"}, "the file of PERSONA_API_KEY_FILE must hold an"),
        (
            {"PERSONA_API_KEY": KEY, "PERSONA_API_KEY_FILE": "/dev/null"},
            "PERSONA_API_KEY and PERSONA_API_KEY_FILE are both set",
        ),
        (
            {"PERSONA_API_KEY": KEY, "PERSONA_API_URL": "http://api.withpersona.com/api/v1"},
            "PERSONA_API_URL must begin with https://",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(variables, words, api, runner, db, monkeypatch):
    monkeypatch.delenv("PERSONA_API_KEY")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = runner("backfill")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {words}")
    assert result.output.count("\n") == 1
    assert KEY not in result.output


def test_the_key_may_be_in_a_file_and_appears_nowhere(
    api, runner, db, monkeypatch, tmp_path, database
):
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.delenv("PERSONA_API_KEY")
    monkeypatch.setenv("PERSONA_API_KEY_FILE", str(tmp_path / "key"))
    api.add(event(1))
    result = runner("backfill")
    assert result.exit_code == 0
    assert KEY not in result.output + repr([one[1:] for one in api.requests])
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.glob("kyc.db*"))


def test_without_network_it_ends_with_one_line(runner, db, monkeypatch, api):
    monkeypatch.setenv("PERSONA_API_URL", "http://127.0.0.1:9/api/v1")
    result = runner("backfill")
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: http\S+: .*refused, 6 times\n", result.output)


def test_without_a_database_nothing_is_fetched(api, flask, tmp_path):
    path = str(tmp_path / "none.db")
    process = flask("backfill", check=False, KYC_DATABASE=path, PERSONA_API_KEY=KEY)
    assert process.returncode == 1
    assert process.stderr == f"Error: KYC_DATABASE {path}: there is no such file\n"
