"""Reading over HTTP: who may, what each answer says, its bounds, and what never leaves."""

import base64
import concurrent.futures
import contextlib
import json
import re
import sqlite3
import threading
import time
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest
from conftest import ROOT, SECRET, Load, build, sign, wait_until
from prometheus_client.parser import text_string_to_metric_families

import app as kyc
import dashboard
from dashboard import queries

TOKEN, SECOND = "token_0123456789abcdefgh", "another-token/0123456789+=="
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PATHS = [
    *("/people", "/people/user-1", "/people?status=pending", "/events", "/dashboard.css"),
    *("/api/people", "/api/people/user-1", "/api/people/user-1/events", "/api/events", "/metrics"),
]
HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><b>",
    "a/b",
    "a/",
    "//",
    "x/events",
    "50%25?#",
    "a b+c&d=e",
    "line\nend\n",
    "\u202euser",
    "مستخدم",
    "\U0001f600",
    "x" * 1000,
    "a/../b",
    "..",
    "{{ 7 * 7 }}",
]


def encode(cursor):
    return base64.urlsafe_b64encode(cursor).decode()


@pytest.fixture
def environ(environ):
    return {**environ, "KYC_API_TOKEN": f"{SECOND}, {TOKEN}"}


@pytest.fixture
def get(client):
    """Ask with the token."""
    return lambda path, **headers: client.get(path, headers={**BEARER, **headers})


def basic(password):
    return {"Authorization": "Basic " + base64.b64encode(f"any:{password}".encode()).decode()}


# Who may


def test_nothing_is_there_without_a_token_in_the_environment(create):
    client = create(KYC_API_TOKEN=" ").test_client()
    for path in PATHS:
        answer = client.get(path, headers=BEARER)
        assert (answer.status_code, answer.json) == (404, {"error": "Not Found"})


@pytest.mark.parametrize("text", ["short", f"{TOKEN},short", f"{TOKEN} {'x' * 23}", "ü" * 30])
def test_short_token_stops_the_start_and_is_not_quoted(create, text):
    with pytest.raises(kyc.ConfigError, match=r"KYC_API_TOKEN: entry [12] of [12]") as refused:
        create(KYC_API_TOKEN=text)
    assert not any(word in str(refused.value) for word in re.split(r"[, ]", text) if word != TOKEN)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_needs_a_token(client, send, path):
    send("inquiry.created", reference_id="user-1")
    answer = client.get(path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="kyc", charset="UTF-8"'
    assert answer.json == {"error": "Unauthorized", "reason": "the API token is missing"}
    assert client.get(path, headers=BEARER).status_code == 200
    assert client.head(path, headers=BEARER).status_code == 200


@pytest.mark.parametrize("headers", [basic(TOKEN), basic(SECOND), BEARER])
def test_each_token_opens_as_bearer_and_as_password(client, headers):
    assert client.get("/api/people", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        *("", "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Token {TOKEN}"),
        *(f"Bearer {SECOND}, {TOKEN}", TOKEN, "Basic ???", "Basic " + "A" * 99, "Bearer \xff\xfe"),
        *(basic("wrong")["Authorization"], "Basic " + base64.b64encode(TOKEN.encode()).decode()),
    ],
)
def test_anything_else_is_refused_and_logged_without_it(client, log, value):
    answer = client.get("/api/people", headers={"Authorization": value})
    assert answer.status_code == 401
    assert "outcome=rejected" in log.text
    assert TOKEN[:-1] not in log.text


@pytest.mark.parametrize("method", ["post", "put", "patch", "delete", "options"])
def test_nothing_is_changed_over_http(client, method):
    for path in ("/api/people", "/api/people/x", "/people", "/events", "/metrics"):
        assert getattr(client, method)(path, headers=BEARER).status_code == 405


def test_unknown_paths_stay_json(get):
    for path in ("/api", "/api/", "/api/nothing", "/peoples", "/dashboard/../app.py", "/style.css"):
        answer = get(path)
        assert (answer.status_code, answer.json) == (404, {"error": "Not Found"})


def test_answers_are_not_kept_framed_or_sniffed(get, send):
    send("inquiry.created", reference_id="user-1")
    for path in PATHS:
        headers = get(path).headers
        kept = {"/dashboard.css": "private, max-age=86400"}
        usual = "private, no-cache" if path.startswith("/api/") else "no-store"
        assert headers["Cache-Control"] == kept.get(path, usual)
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'self'")
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_no_body_and_no_message_of_an_error_leaves(get, send, handlers):
    @kyc.on("inquiry.approved")
    def fail(db, event):
        raise ValueError("passport X1234567")

    body = build(reference_id="user-1", inquiry_id="inq_1", account_id="act_1")
    body = body.replace(b'"note": null', b'"note": "passport X1234567"')
    assert send(body).status_code == 500
    for path in [*PATHS, "/events?state=failed", "/people?id=user-1", "/api/events?name=inquiry.*"]:
        assert b"X1234567" not in get(path).data
    assert get("/api/events").json["events"][0]["error"] == "ValueError"


def test_error_says_where_in_the_teams_file():
    errors = {
        "KeyError: 'a' (handlers.py:12 open_account)": "KeyError (handlers.py:12 open_account)",
        "KeyError (handlers.py:1 <lambda>)": "KeyError (handlers.py:1 <lambda>)",
        "KeyError": "KeyError",
        "ValueError: X (handlers.py:1 a) b": "ValueError",
        "ValueError: two\nlines (handlers.py:1 a)": "ValueError (handlers.py:1 a)",
    }
    assert {one: queries.cut_error({"error": one})["error"] for one in errors} == errors


def test_database_that_cannot_be_read_is_503(get, database):
    database.rename(database.with_suffix(".away"))
    for path in PATHS[:4] + PATHS[5:]:
        answer = get(path)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
        assert answer.json["reason"] == "there is no such file"


def test_work_is_bounded(get, send, monkeypatch):
    send("inquiry.created", reference_id="user-1")
    monkeypatch.setattr(queries, "SECONDS", -1)
    monkeypatch.setattr(
        queries,
        "STANDING",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i), :id FROM n",
    )
    answer = get("/api/people/user-1")
    assert (answer.status_code, answer.json["reason"]) == (503, "it took too long")


def test_half_of_the_threads_stay_free_of_readers(get):
    with contextlib.ExitStack() as others:
        for _ in range(16):
            dashboard.SHARE.acquire()
            others.callback(dashboard.SHARE.release)
        answer = get("/api/people")
        assert (answer.status_code, answer.json["reason"]) == (503, "too many are reading")
    for _ in range(20):
        assert get("/api/people").status_code == 200


def test_no_question_scans_a_table(get, send, database, monkeypatch):
    asked, connect = set(), queries.connect

    def trace():
        db = connect()
        db.set_trace_callback(asked.add)
        return db

    monkeypatch.setattr(queries, "connect", trace)
    for name in ("inquiry.approved", "report/watchlist.matched"):
        send(name, reference_id="user-1", inquiry_id="inq_1", account_id="act_1")
    more = ["/api/people?held=1", "/api/people?status=pending&template=x", "/people/inq_1"]
    more += ["/people/act_0", "/people?after=" + cursor(), "/events?state=failed&name=a*"]
    for path in PATHS + more:
        get(path)
    with contextlib.closing(sqlite3.connect(database)) as db:
        asked = [one for one in asked if "SELECT" in one]
        plans = {one: [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {one}")] for one in asked}
    tables = "events|journal|inquiries|kyc_status|accounts|mentions|[eikahnd]"
    scans = [
        (step, one)
        for one, steps in plans.items()
        for step in steps
        if re.fullmatch(rf"SCAN ({tables})", step)
    ]
    assert len(asked) > 20
    assert scans == []


def cursor():
    """Return a cursor of a page of people."""
    return queries.write_cursor({"a": "2026-11-21T08:00:00.000Z", "b": "x"}, "a", "b")


# A person


def test_person_is_found_by_each_of_their_ids(get, send):
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1", account_id="act_1")
    answers = [get(f"/api/people/{one}").json for one in ("user-1", "inq_1", "act_1")]
    assert answers[0] == answers[1] == answers[2]
    standing = answers[0]
    assert (standing["reference_id"], standing["status"], standing["hold"]) == (
        "user-1",
        "approved",
        None,
    )
    (inquiry,) = standing["inquiries"]
    assert (inquiry["inquiry_id"], inquiry["counts"], inquiry["decides"]) == ("inq_1", True, True)


def test_row_is_that_of_the_table(get, send, db):
    send("inquiry.declined", reference_id="user-1")
    row = dict(db.execute("SELECT * FROM kyc_status").fetchone())
    assert row.items() <= get("/api/people/user-1").json.items()
    assert get("/api/people").json["people"] == [row]


@pytest.mark.parametrize("path", ["", "/events"])
def test_id_that_no_event_names_is_404(get, send, path):
    send("inquiry.approved", reference_id="user-1")
    for subject in ("user-2", "user-", "%00", "%FF", "user-1%0A", "USER-1", "%25", "*"):
        assert get(f"/api/people/{subject}{path}").status_code == 404


@pytest.mark.parametrize("subject", HOSTILE)
def test_hostile_id_is_one_id(get, send, subject):
    send("inquiry.approved", reference_id=subject, inquiry_id="inq_1")
    assert get("/api/people/inq_1").json["reference_id"] == subject
    path = "/api/people/" + quote(subject, safe="")
    if not subject.endswith("/events"):  # that is the timeline of "x"
        assert get(path).json["reference_id"] == subject
    assert [event["inquiry_id"] for event in get(f"{path}/events").json["events"]] == ["inq_1"]


def test_hold_is_shown_with_what_raised_it(get, send):
    send("inquiry.approved", inquiry_id="inq_1", reference_id="user-1", created_at=ago(hours=2))
    send("report/watchlist.matched", inquiry_id="inq_1", object_id="rep_1", created_at=ago(hours=1))
    assert get("/api/people/user-1").json["hold"] == "report/watchlist.matched: rep_1"
    page = get("/people/user-1").text
    assert "Held: do not act on the approval" in page
    assert "match of a report (watchlist): rep_1" in page
    assert "It came after the decision, so whoever decided has not seen it." in page
    assert '<span class="status held">holds</span>' in page


def test_hold_by_hand_says_who_ends_it(get, send, runner):
    send("inquiry.approved", reference_id="user-1")
    runner("hold", "user-1", "--reason", "chargeback <b>", "--by", "ops")
    page = get("/people/user-1").text
    assert "by hand: chargeback &lt;b&gt;, by ops" in page
    assert "Only flask release ends it." in page


@pytest.mark.parametrize(
    ("object_status", "end"),
    [
        ("Frozen", "a newer event of this name says otherwise."),
        (None, "its rule is taken out of handlers.py."),
    ],
)
def test_own_rule_of_a_hold_lasts(handlers, create, object_status, end):
    kyc.hold_rule("account.updated", object_status)
    app = create()
    deliver(app, build("inquiry.approved", reference_id="user-1", account_id="act_1"))
    deliver(app, build("account.updated", account_id="act_1", object_status="Frozen"))
    page = app.test_client().get("/people/user-1", headers=BEARER).text
    assert "account.updated: Frozen" in page
    assert f"It stands until {end}" in page


def test_templates_that_do_not_count_are_told_apart(create):
    app = create(KYC_TEMPLATES="itmpl_1")
    for template in ("itmpl_1", "itmpl_2", "itmpl_2"):
        deliver(app, build("inquiry.approved", reference_id="user-1", template_id=template))
    client = app.test_client()
    standing = client.get("/api/people/user-1", headers=BEARER).json
    assert [one["counts"] for one in standing["inquiries"]] == [True, False, False]
    assert {one["template_id"] for one in standing["templates"]} == {"itmpl_1", "itmpl_2"}
    page = client.get("/people/user-1", headers=BEARER).text
    assert page.count("no: its template is not in KYC_TEMPLATES") == 2


def test_person_without_a_status_is_known(get, send):
    send("account.created", account_id="act_1", reference_id="user-1")
    send("verification/selfie.passed", inquiry_id="inq_2", account_id=None)
    for subject in ("user-1", "act_1", "inq_2"):
        standing = get(f"/api/people/{subject}").json
        assert (standing["status"], standing["inquiries"]) == (None, [])
        assert "No status: no event has set one yet" in get(f"/people/{subject}").text
        assert len(get(f"/api/people/{subject}/events").json["events"]) == 1


def test_reference_id_of_the_past_leads_to_the_person(get, send):
    ids = {"inquiry_id": "inq_1", "account_id": "act_1"}
    send("inquiry.created", reference_id="old", created_at=ago(hours=2), **ids)
    send("inquiry.approved", reference_id="new", created_at=ago(hours=1), **ids)
    assert get("/api/people/old").json["reference_id"] == "new"


def test_account_of_a_case_is_not_the_person_of_its_inquiry(get, send):
    send("inquiry.approved", inquiry_id="inq_1", reference_id="user-1", account_id="act_1")
    send("case.created", inquiry_id="inq_1", account_id="act_2")
    assert get("/api/people/act_2").json["reference_id"] == "act_2"


def test_etag_saves_the_second_answer(get, send):
    send("inquiry.created", reference_id="user-1", inquiry_id="inq_1")
    first = get("/api/people/user-1")
    again = get("/api/people/user-1", **{"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1")
    later = get("/api/people/user-1", **{"If-None-Match": first.headers["ETag"]})
    assert (later.status_code, later.json["status"]) == (200, "approved")


def test_many_inquiries_are_cut_behind_the_one_that_decides(get, send):
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_best")
    for number in range(105):
        send("inquiry.created", reference_id="user-1", inquiry_id=f"inq_{number}")
    standing = get("/api/people/user-1").json
    assert (len(standing["inquiries"]), standing["more_inquiries"]) == (100, True)
    assert standing["inquiries"][0]["inquiry_id"] == "inq_best"


# Pages of people, and of events


def test_people_come_in_pages_in_the_order_they_changed(get, send):
    for number in range(7):
        send("inquiry.created", reference_id=f"user-{number}")
    assert walk(get, "/api/people?limit=3") == [f"user-{number}" for number in range(7)]


def test_pages_neither_skip_nor_repeat_people_of_one_instant(get, database, send):
    for number in range(9):
        send("inquiry.created", reference_id=f"user-{number}")
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE kyc_status SET updated_at = '2026-11-21T08:00:00.000Z'")
    assert walk(get, "/api/people?limit=2") == [f"user-{number}" for number in range(9)]
    shown = re.findall(r'href="/people/(user-\d)"', walk_pages(get, "/people?status=created", 9))
    assert shown == [f"user-{number}" for number in reversed(range(9))]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["a", "b", "c", "d"]),
        ("status=approved", ["a", "b"]),
        ("status=declined", ["c"]),
        ("held=true", ["b", "c"]),
        ("held=1&status=approved", ["b"]),
        ("held=0", ["a", "d"]),
        ("held=false&status=approved", ["a"]),
        ("template=itmpl_2", ["d"]),
        ("status=failed", []),
        ("updated_since=2999-01-01", []),
        ("updated_since=2020-01-01T00:00:00Z&held=", ["a", "b", "c", "d"]),
    ],
)
@pytest.mark.parametrize("scanned", [1, 3, 10_000])
def test_people_are_filtered(get, send, monkeypatch, query, expected, scanned):
    monkeypatch.setattr(queries, "SCANNED", scanned)  # a page may then be short, but not the last
    for person, name in zip("abcd", ["approved", "approved", "declined", "created"], strict=True):
        template = "itmpl_2" if person == "d" else "itmpl_1"
        send(
            f"inquiry.{name}", reference_id=person, inquiry_id=f"inq_{person}", template_id=template
        )
    for person in "bc":
        send("report/watchlist.matched", inquiry_id=f"inq_{person}")
    assert sorted(walk(get, f"/api/people?{query}&limit=2")) == expected


@pytest.mark.parametrize(
    "query",
    [
        *("status=nope", "held=maybe", "updated_since=soon", "after=nope", "after=e30", "limit=0"),
        *("limit=x", "limit=-1", *("after=" + encode(one) for one in (b"[1,2,3]", b"[" * 2000))),
        "after=" + encode(rb'["\ud800", "x"]'),
    ],
)
def test_senseless_filter_is_400_with_a_reason(get, query):
    answer = get(f"/api/people?{query}")
    assert (answer.status_code, answer.json["error"]) == (400, "Bad Request")
    assert answer.json["reason"]


def test_people_who_change_come_again_after_the_last(get, send):
    send("inquiry.created", reference_id="a", inquiry_id="inq_a")
    send("inquiry.created", reference_id="b")
    last = get("/api/people").json["people"][-1]["updated_at"]
    send("inquiry.approved", reference_id="a", inquiry_id="inq_a")
    people = get(f"/api/people?updated_since={last}").json["people"]
    assert [one["reference_id"] for one in people] == ["b", "a"]


def test_timeline_comes_in_pages(get, send):
    names = ["inquiry.created", "inquiry.started", "verification/selfie.passed", "inquiry.approved"]
    for hours, name in enumerate(reversed(names)):
        ids = {"inquiry_id": "inq_1", "created_at": ago(hours=hours + 1)}
        send(name, reference_id="user-1" if "inquiry" in name else None, **ids)
    found, path = [], "/api/people/user-1/events?limit=3"
    while path:
        page = get(path).json
        found += [event["event_name"] for event in page["events"]]
        path = page["next"] and f"/api/people/user-1/events?limit=3&after={page['next']}"
    assert found == names


def test_events_are_as_the_command_lists_them(get, send, runner):
    send("inquiry.created", reference_id="user-1")
    send(b"nothing")
    lines = runner("events", "--json", "--after", "0").output.splitlines()
    assert get("/api/events").json == {"events": [json.loads(line) for line in lines], "next": 2}


def test_events_are_followed_by_position(get, send):
    for number in range(5):
        send(f"inquiry.{'created' if number % 2 else 'approved'}", event_id=f"evt_{number}")
    first = get("/api/events?limit=3").json
    rest = get(f"/api/events?after={first['next']}").json
    found = [event["event_id"] for event in first["events"] + rest["events"]]
    assert (found, rest["next"]) == ([f"evt_{number}" for number in range(5)], 5)
    named = get("/api/events?name=*.created").json["events"]
    assert [event["event_id"] for event in named] == ["evt_1", "evt_3"]
    assert get("/api/events?after=9").json == {"events": [], "next": 9}


def test_name_without_events_is_searched_in_steps(get, send, monkeypatch):
    monkeypatch.setattr(queries, "SCANNED", 2)
    for _ in range(5):
        send("inquiry.created")
    steps = [get(f"/api/events?name=nope&after={after}").json for after in (0, 2, 4)]
    assert [step["next"] for step in steps] == [2, 4, 5]
    assert "?name=nope&amp;before=4" in get("/events?name=nope").text


@pytest.mark.parametrize("name", ["*a*b*", "[a]*", "a" * 101, "a?c", "a'b"])
def test_costly_pattern_is_refused(get, name):
    assert get(f"/api/events?name={quote(name)}").status_code == 400
    assert get(f"/events?name={quote(name)}").status_code == 400


def walk(get, path):
    """Return the people of all pages."""
    people, cursor = [], ""
    while cursor is not None:
        page = get(f"{path}&after={cursor}").json
        people += [one["reference_id"] for one in page["people"]]
        cursor = page["next"]
    return people


def walk_pages(get, path, number):
    """Return the HTML of a page and those that its links to older ones lead to."""
    text = ""
    for _ in range(number):
        page = get(path).text
        text += page[page.index("<table") :] if "<table" in page else ""
        older = re.search(r'<a rel="next" href="([^"]*)"', page)
        if not older:
            return text
        path = older[1].replace("&amp;", "&")
    raise AssertionError("the pages do not end")


def ago(**age):
    """Return a time of the past."""
    return kyc.format_time(datetime.now(UTC) - timedelta(**age))


def deliver(app, body):
    """Post a signed body to an app."""
    answer = app.test_client().post("/webhooks/persona", data=body, headers=sign(body))
    assert answer.status_code == 200


# Pages for people


def test_first_page_shows_who_needs_attention(get, send, handlers):
    @kyc.on("inquiry.declined")
    def fail(db, event):
        raise KeyError("name")

    send("inquiry.marked-for-review", reference_id="in-review")
    send("inquiry.completed", reference_id="just-completed")
    send("inquiry.completed", reference_id="stuck", created_at=ago(hours=2))
    send("inquiry.approved", reference_id="held", inquiry_id="inq_1", created_at=ago(hours=2))
    send("report/watchlist.matched", inquiry_id="inq_1")
    send("inquiry.declined", reference_id="unlucky")
    page = get("/people").text
    attention = page[page.index("Needs attention") : page.index("Latest changes")]
    people = re.findall(r'href="/people/([\w-]+)"', attention)
    assert people == ["held", "in-review", "stuck"]
    assert "1 event whose handlers failed" in page
    assert "KeyError" in get("/events?state=failed").text


def test_search_redirects_to_the_person(get, send):
    send("inquiry.approved", reference_id="user 1/2", inquiry_id="inq_1", account_id="act_1")
    for subject in (
        "user 1/2",
        " inq_1 ",
        "act_1",
        "https://app.withpersona.com/dashboard/inquiries/inq_1",
    ):
        answer = get(f"/people?id={quote(subject)}")
        assert (answer.status_code, answer.location) == (303, "/people/user%201%2F2")


def test_search_in_vain_says_so(get):
    answer = get("/people?id=%3Cb%3E")
    assert answer.status_code == 404
    assert "No event names <bdi>&lt;b&gt;</bdi>" in answer.text
    assert get("/people/%3Cb%3E").text == answer.text


@pytest.mark.parametrize("subject", HOSTILE)
def test_hostile_id_is_text_on_every_page(get, send, subject):
    send("inquiry.marked-for-review", reference_id=subject, inquiry_id="inq_1", event_id=subject)
    pages = [get(path).text for path in ("/people", "/people?held=false", "/events")]
    (link,) = set(re.findall(r'href="(/people/[^"]*)"', "".join(pages)))
    pages += [get(link).text, get(f"/people?id={quote(subject)}").text]
    text = "".join(pages)
    assert "<script" not in text
    assert "<b>" not in text.replace("<b>decides</b>", "").replace('"><b>', "")
    assert "\u202e" not in text
    assert "In review: somebody must decide at Persona" in pages[3]


@pytest.mark.parametrize(
    ("inquiry", "linked"),
    [
        ("inq_abcXYZ1", True),
        ("inq_1\n", False),
        ("inq_1/../x", False),
        ("inq_é", False),
        ("x", False),
    ],
)
def test_only_inquiries_of_persona_are_linked(get, send, inquiry, linked):
    send("inquiry.approved", reference_id="user-1", inquiry_id=inquiry)
    address = f"https://app.withpersona.com/dashboard/inquiries/{inquiry}"
    assert (f'href="{address}"' in get("/people/user-1").text) == linked
    assert ("withpersona" in get("/people/user-1").text) == linked


def test_page_of_a_person_has_pages_of_their_events(get, send):
    for number in range(120):
        ids = {
            "inquiry_id": "inq_1",
            "event_id": f"evt_{number:03}",
            "object_id": f"ver_{number:03}",
        }
        send("verification/selfie.passed", created_at=ago(minutes=number + 1), **ids)
    page = get("/people/inq_1").text
    shown, pages = re.findall(r"ver_\d+", page), 1
    while older := re.search(r'<a rel="next" href="(\?after=[^"]*)"', page):
        page, pages = get("/people/inq_1" + older[1]).text, pages + 1
        shown += re.findall(r"ver_\d+", page)
    assert (pages, shown) == (3, [f"ver_{number:03}" for number in range(120)])


def test_times_are_utc_with_their_age(get, send):
    send("inquiry.approved", reference_id="user-1", created_at="2026-01-02T03:04:05Z")
    page = get("/people/user-1").text
    assert '<time datetime="2026-01-02T03:04:05.000Z">2 Jan 2026, 03:04 UTC</time>' in page
    assert "days ago" in page


@pytest.mark.parametrize("path", ["/people?status=nope", "/events?state=x", "/people?held=2"])
def test_senseless_filter_of_a_page_is_400(get, path):
    assert get(path).status_code == 400


# Metrics


def read_metrics(text):
    """Return samples as name and labels -> value, read by Prometheus's own parser."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_the_tables_hold(get, send, runner, handlers):
    @kyc.on("inquiry.declined")
    def fail(db, event):
        raise KeyError("name")

    send("inquiry.approved", reference_id="a", inquiry_id="inq_1", created_at=ago(hours=1))
    send("report/watchlist.matched", inquiry_id="inq_1")
    send("inquiry.declined", reference_id="b")
    send(b"nothing")
    runner("hold", "b", "--reason", "x")
    answer = get("/metrics")
    assert answer.content_type == "text/plain; version=0.0.4; charset=utf-8"
    found = read_metrics(answer.text)
    events = {key[1:]: value for key, value in found.items() if key[0] == "kyc_events" and value}
    assert events == {
        ("processed", "webhook"): 2,
        ("failed", "webhook"): 1,
        ("unrecognized", "webhook"): 1,
        ("processed", "operator"): 1,
    }
    assert found["kyc_stored_total",] == 5
    assert found["kyc_held_people",] == 2
    assert found["kyc_people", "approved"] == found["kyc_people", "declined"] == 1
    assert 0 <= found["kyc_last_delivery_age_seconds",] < 60
    assert found["kyc_database_bytes",] > 0
    assert found["kyc_free_bytes",] > 0


def test_metrics_of_an_empty_journal_are_there(get):
    found = read_metrics(get("/metrics").text)
    assert found["kyc_stored_total",] == found["kyc_deliveries_total", "stored"] == 0
    assert found["kyc_events", "failed", "webhook"] == found["kyc_people", "approved"] == 0


def test_metrics_say_where_forwarding_stands(get, send, runner, monkeypatch):
    assert ("kyc_forward_waiting",) not in read_metrics(get("/metrics").text)
    monkeypatch.setenv("KYC_FORWARD_SECRET", SECRET)
    send("inquiry.created", reference_id="user-1", inquiry_id="inq_1")
    runner("forward", "http://127.0.0.1:9/", "--once")  # nobody listens there
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1")
    found = read_metrics(get("/metrics").text)
    assert found["kyc_forward_waiting",] == 2
    assert 0 <= found["kyc_forward_waiting_seconds",] < 60


def test_alerts_name_metrics_that_exist(get):
    rules = (ROOT / "docs" / "alerts.yml").read_text()
    named = set(re.findall(r"\bkyc_\w+", rules))
    assert named <= set(re.findall(r"# TYPE (\w+) ", get("/metrics").text))
    assert len(re.findall(r"- alert: \w+", rules)) >= 6


def scrape(server):
    """Return the metrics of one of the workers."""
    status, body = server.request("GET", "/metrics", headers=BEARER)
    assert status == 200
    return read_metrics(body.decode())


@pytest.mark.parametrize("option", [(), ("--preload",)])
def test_metrics_are_the_same_from_every_worker_and_survive_a_restart(serve, option):
    server = serve("--workers", "2", *option)
    with Load(server.port, clients=4) as load:
        wait_until(lambda: len(load.accepted) >= 100)
    for path in ("/nothing", "/webhook", "/webhooks/persona"):
        server.request("POST", path, b"{}")
    server.send(b"{}", secret="wbhsec_some_other_secret")
    server.send(b"{}")
    server.send(next(iter(load.accepted.values())))
    stored = len(load.accepted)
    wait_until(lambda: scrape(server)["kyc_deliveries_total", "duplicate"] == 1)
    time.sleep(1.5)
    answers = [scrape(server) for _ in range(20)]
    moving = {
        "kyc_last_delivery_age_seconds",
        "kyc_free_bytes",
        "kyc_database_bytes",
        "kyc_wal_bytes",
    }
    steady = [{key: n for key, n in one.items() if key[0] not in moving} for one in answers]
    assert all(one == steady[0] for one in steady)
    assert steady[0]["kyc_deliveries_total", "stored"] == stored
    assert steady[0]["kyc_deliveries_total", "unrecognized"] == 1
    assert steady[0]["kyc_rejected_total", "no signature matches the body"] == 1
    assert steady[0]["kyc_rejected_total", "the Persona-Signature header is missing"] == 2
    assert steady[0]["kyc_rejected_total", "Not Found"] == 1
    assert 0 < steady[0]["kyc_commits_total",] <= stored + 2
    server.stop()
    assert scrape(serve()).items() >= steady[0].items()


def test_a_path_never_becomes_a_label(serve):
    server = serve()
    for number in range(60):
        server.request("POST", f"/a{number}%20outcome=stored%0Aoutcome=unavailable%20x", b"{}")
    wait_until(lambda: scrape(server).get(("kyc_rejected_total", "Not Found")) == 60)
    found = scrape(server)
    assert found["kyc_unavailable_total",] == found["kyc_deliveries_total", "stored"] == 0
    assert not any("outcome" in label for key in found for label in key[1:])


def test_damaged_or_forbidden_counts_do_not_hurt(serve, database):
    counts = database.with_name(database.name + ".counts")
    counts.mkdir()
    server = serve()
    for _ in range(2):
        assert server.send(build())[0] == 200
        wait_until(lambda: scrape(server)["kyc_deliveries_total", "stored"] >= 1)
    counts.rmdir()
    counts.write_bytes(b"not a database" * 1000)
    server.send(build())
    wait_until(lambda: scrape(server)["kyc_deliveries_total", "stored"] == 3)
    server.send(build())
    wait_until(lambda: scrape(server)["kyc_deliveries_total", "stored"] == 4)
    assert counts.read_bytes().startswith(b"SQLite format 3")


# The real server


def test_long_poll_answers_when_an_event_comes(serve):
    server = serve()
    server.send(build(event_id="evt_1"))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        poll = pool.submit(server.request, "GET", "/api/events?after=1&wait=10", headers=BEARER)
        time.sleep(0.6)
        assert not poll.done()
        server.send(build(event_id="evt_2"))
        began = time.monotonic()
        events = json.loads(poll.result()[1])["events"]
    assert [event["event_id"] for event in events] == ["evt_2"]
    assert time.monotonic() - began < 2


def test_long_poll_ends_in_time_and_keeps_its_place(serve):
    server = serve()
    server.send(build("inquiry.created"))
    began = time.monotonic()
    status, body = server.request("GET", "/api/events?after=1&wait=1&name=x", headers=BEARER)
    assert (status, json.loads(body)) == (200, {"events": [], "next": 1})
    assert 0.9 < time.monotonic() - began < 3


def test_long_polls_hold_a_share_of_the_threads_and_no_transaction(serve, database):
    server = serve()
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        ask = (server.request, "GET", "/api/events?after=0&wait=10", None, BEARER, 20)
        polls = [pool.submit(*ask) for _ in range(14)]
        wait_until(lambda: sum(poll.done() for poll in polls) == 6)
        time.sleep(0.5)
        assert sum(not poll.done() for poll in polls) == 8
        server.request("GET", "/healthz")
        with contextlib.closing(sqlite3.connect(database)) as db:  # the service may do it, too
            wait_until(lambda: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, 5)
        began = time.monotonic()
        answers = list(pool.map(server.send, [build() for _ in range(20)]))
        assert time.monotonic() - began < 2
        assert {status for status, _ in answers} == {200}
        held = [json.loads(poll.result()[1]) for poll in polls]
    assert sum(bool(answer["events"]) for answer in held) == 8


def test_readers_and_deliveries_go_on_together(serve):
    server = serve("--workers", "2")
    stop, statuses = threading.Event(), set()

    def read(path):
        while not stop.is_set():
            statuses.add(server.request("GET", path, headers=BEARER)[0])

    paths = ("/people", "/metrics", "/api/people?limit=500", "/events", "/api/events?limit=500")
    threads = [threading.Thread(target=read, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    with Load(server.port, clients=4) as load:
        wait_until(lambda: len(load.accepted) >= 200)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(load.answers) == {200}
    assert statuses <= {200, 503}
    assert len(walk_server(server)) == len(load.accepted)


def walk_server(server):
    """Return the people of all pages of a server."""
    people, cursor = [], ""
    while cursor is not None:
        answer = server.request("GET", f"/api/people?limit=500&after={cursor}", headers=BEARER)
        page = json.loads(answer[1])
        people, cursor = people + page["people"], page["next"]
    return people


def test_token_in_a_real_start(serve, refusal, tmp_path):
    own = {"PERSONA_WEBHOOK_SECRET": SECRET, "KYC_DATABASE": str(tmp_path / "none.db")}
    words = refusal({**own, "KYC_API_TOKEN": "too-short-token"})
    assert "app.py: KYC_API_TOKEN: entry 1 of 1" in words
    assert "too-short" not in words
    assert not (tmp_path / "none.db").exists()  # a start that is refused changes nothing
    assert serve().request("GET", "/people", headers=basic(TOKEN))[0] == 200
