"""The rules of the projection, and that neither order nor repetition matters."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app as kyc

NAMES = {  # event name -> (status, rank, class), by the rules and not by the code
    "inquiry.expired": ("expired", 0, 0),
    "inquiry.created": ("created", 1, 1),
    "inquiry.started": ("pending", 2, 1),
    "inquiry.failed": ("failed", 3, 2),
    "inquiry.completed": ("completed", 3, 2),
    "inquiry.marked-for-review": ("needs_review", 4, 3),
    "inquiry.declined": ("declined", 5, 3),
    "inquiry.approved": ("approved", 5, 3),
}
OTHERS = ["inquiry.transitioned", "inquiry.redacted", "inquiry.updated-tags", "inquiry.unheard-of"]


def at(second):
    """Return a time in the tables' form."""
    return f"2026-01-01T00:00:{second:02}.000Z"


def status(db, person="user-1"):
    """Return a person's status, or None."""
    row = db.execute("SELECT status FROM kyc_status WHERE reference_id = ?", (person,)).fetchone()
    return row and row["status"]


@pytest.mark.parametrize("name", NAMES)
def test_status_of_each_event(send, db, name):
    send(name, reference_id="user-1", inquiry_id="inq_1")
    assert status(db) == NAMES[name][0]
    row = db.execute("SELECT rank, class FROM inquiries").fetchone()
    assert tuple(row) == NAMES[name][1:]


@pytest.mark.parametrize("value", ["pending", "resumed"])
def test_rule_that_is_gone_does_not_stop_its_inquiries(send, db, monkeypatch, value):
    with monkeypatch.context() as rule:
        rule.setitem(kyc.STATUSES, "inquiry.resumed", (value, 2))
        rule.setitem(kyc.RANKS, value, 2)
        send("inquiry.resumed", inquiry_id="inq_1", reference_id="user-1")
        assert status(db) == value
    assert send("inquiry.approved", inquiry_id="inq_1", reference_id="user-1").status_code == 200
    assert status(db) == "approved"


@pytest.mark.parametrize("name", [*OTHERS, "verification.passed", "report/watchlist.matched"])
def test_no_other_event_sets_a_status(send, db, name):
    send(name, reference_id="user-1", inquiry_id="inq_1")
    assert db.execute("SELECT count(*) FROM inquiries").fetchone()[0] == 0
    assert db.execute("SELECT count(*) FROM kyc_status").fetchone()[0] == 0


def test_late_event_does_not_overwrite_a_newer_status(send, db):
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1", created_at=at(9))
    send("inquiry.created", reference_id="user-1", inquiry_id="inq_1", created_at=at(1))
    assert status(db) == "approved"


@pytest.mark.parametrize("order", [1, -1])
def test_rank_breaks_a_tie_in_time(send, db, order):
    for name in ["inquiry.completed", "inquiry.approved"][::order]:
        send(name, reference_id="user-1", inquiry_id="inq_1", created_at=at(5))
    assert status(db) == "approved"


@pytest.mark.parametrize("order", [1, -1])
def test_event_id_breaks_a_tie_in_rank(send, db, order):
    for name, event_id in [("inquiry.approved", "evt_a"), ("inquiry.declined", "evt_b")][::order]:
        send(name, event_id=event_id, reference_id="user-1", inquiry_id="inq_1", created_at=at(5))
    assert status(db) == "declined"


def test_expiry_of_a_forgotten_inquiry_hides_no_live_one(send, db):
    send("inquiry.started", reference_id="user-1", inquiry_id="inq_1", created_at=at(1))
    send("inquiry.created", reference_id="user-1", inquiry_id="inq_2", created_at=at(2))
    send("inquiry.expired", reference_id="user-1", inquiry_id="inq_2", created_at=at(9))
    assert status(db) == "pending"


def test_new_attempt_does_not_revoke_a_decision(send, db):
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1", created_at=at(1))
    send("inquiry.completed", reference_id="user-1", inquiry_id="inq_2", created_at=at(9))
    assert status(db) == "approved"
    send("inquiry.declined", reference_id="user-1", inquiry_id="inq_2", created_at=at(10))
    assert status(db) == "declined"


def test_person_falls_back_when_their_best_inquiry_is_reopened(send, db):
    send("inquiry.completed", reference_id="user-1", inquiry_id="inq_1", created_at=at(1))
    send("inquiry.failed", reference_id="user-1", inquiry_id="inq_2", created_at=at(2))
    send("inquiry.started", reference_id="user-1", inquiry_id="inq_2", created_at=at(3))
    assert status(db) == "completed"


def test_person_moves_to_a_better_key_and_the_old_row_goes(send, db):
    send("inquiry.created", inquiry_id="inq_1", created_at=at(1))
    assert status(db, "inq_1") == "created"
    send("inquiry.completed", inquiry_id="inq_1", account_id="act_1", created_at=at(2))
    assert (status(db, "inq_1"), status(db, "act_1")) == (None, "completed")
    send("inquiry.transitioned", inquiry_id="inq_1", reference_id="user-1", created_at=at(3))
    assert (status(db, "act_1"), status(db)) == (None, "completed")


def test_old_key_keeps_its_other_inquiries(send, db):
    send("inquiry.declined", inquiry_id="inq_1", account_id="act_1", created_at=at(1))
    send("inquiry.approved", inquiry_id="inq_2", account_id="act_1", created_at=at(2))
    send("inquiry.updated-tags", inquiry_id="inq_2", reference_id="user-1", created_at=at(3))
    assert (status(db, "act_1"), status(db)) == ("declined", "approved")


def test_later_event_without_links_does_not_erase_them(send, db):
    send("inquiry.completed", inquiry_id="inq_1", reference_id="user-1", created_at=at(1))
    send("inquiry.approved", inquiry_id="inq_1", created_at=at(2))
    assert status(db) == "approved"


def test_links_of_events_before_the_first_status_count(send, db):
    send("inquiry.transitioned", inquiry_id="inq_1", reference_id="user-1", created_at=at(9))
    send("inquiry.created", inquiry_id="inq_1", reference_id="user-2", created_at=at(1))
    assert (status(db), status(db, "user-2")) == ("created", None)


def test_payload_status_is_ignored(send, db):
    body = kyc.build_event("inquiry.created", reference_id="user-1")
    body["data"]["attributes"]["payload"]["data"]["attributes"]["status"] = "approved"
    send(kyc.json.dumps(body).encode())
    assert status(db) == "created"


def test_updated_at_changes_only_with_the_row(send, db):
    query = "SELECT updated_at FROM kyc_status"
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1", created_at=at(9))
    before = db.execute(query).fetchone()[0]
    send("inquiry.created", reference_id="user-1", inquiry_id="inq_1", created_at=at(1))
    assert db.execute(query).fetchone()[0] == before


def test_timeline_holds_every_event_of_a_person_in_order(send, db):
    send("inquiry.approved", reference_id="user-1", inquiry_id="inq_1", created_at=at(3))
    send("verification.passed", inquiry_id="inq_1", created_at=at(2))
    send("account.created", reference_id="user-1", created_at=at(1))
    query = "SELECT event_name FROM kyc_timeline WHERE reference_id = 'user-1'"
    names = [row[0] for row in db.execute(query)]
    assert names == ["account.created", "verification.passed", "inquiry.approved"]
    assert db.execute("SELECT count(*) FROM kyc_timeline").fetchone()[0] == 3


@pytest.mark.parametrize("link", ["account.created", "inquiry.approved"])
def test_timeline_holds_what_names_only_the_account_of_a_person(send, db, link):
    send("graph-query.completed", account_id="act_1", created_at=at(1))
    assert read_timeline(db) == [("act_1", "graph-query.completed")]
    send(link, reference_id="user-1", account_id="act_1", created_at=at(2))
    send("report/business-watchlist.matched", account_id="act_1", created_at=at(3))
    send("graph-query.completed", account_id="act_2", created_at=at(4))
    names = ["graph-query.completed", link, "report/business-watchlist.matched"]
    assert [name for person, name in read_timeline(db) if person == "user-1"] == names
    assert [name for person, name in read_timeline(db) if person == "act_1"] == names[::2]
    assert ("act_2", "graph-query.completed") in read_timeline(db)
    assert len(read_timeline(db)) == 6


def test_timeline_follows_a_corrected_reference_id(send, db):
    ids = {"inquiry_id": "inq_1", "account_id": "act_1"}
    send("inquiry.created", reference_id="user-1", created_at=at(1), **ids)
    send("inquiry.approved", reference_id="user-2", created_at=at(2), **ids)
    send("graph-query.completed", account_id="act_1", created_at=at(3))
    assert {person for person, _ in read_timeline(db)} == {"user-2", "act_1"}


def read_timeline(db, column="event_name"):
    """Return the timeline of everybody, as pairs of person and a column."""
    rows = db.execute("SELECT * FROM kyc_timeline").fetchall()
    return [(row["reference_id"], row[column]) for row in rows]


def test_status_counts(send, db):
    for person in ("user-1", "user-2"):
        send("inquiry.approved", reference_id=person)
    assert [tuple(row) for row in db.execute("SELECT * FROM status_counts")] == [("approved", 2)]


# Any order, any duplication: against a model that knows the rules and nothing else.

FEW = st.sampled_from
EVENTS = st.lists(
    st.builds(
        kyc.Event,
        event_id=st.just(""),
        name=FEW([*NAMES, *NAMES, *OTHERS, "verification.passed"]),
        created_at=st.integers(0, 5).map(at),
        object_type=FEW(["inquiry", "inquiry", "account"]),
        object_id=FEW(["inq_1", "inq_2", "inq_3", "ver_1", None]),
        inquiry_id=FEW(["inq_1", "inq_2", "inq_3", None]),
        account_id=FEW([None, None, "act_1", "act_2"]),
        reference_id=FEW([None, None, "user-1", "user-2"]),
        payload=st.none(),
    ),
    max_size=14,
)


def model_inquiries(events):
    """Return {inquiry: (reference, account, name, event ID, time)} by rules 1, 2 and 5."""
    rows = {}
    for inquiry in {event.inquiry_id for event in events} - {None}:
        own = [event for event in events if event.inquiry_id == inquiry == event.object_id]
        setting = [event for event in own if event.name in NAMES]
        if not setting:
            continue
        newest = sorted(own, key=lambda event: (event.created_at, event.event_id))
        references = [event.reference_id for event in newest if event.reference_id]
        accounts = [event.account_id for event in newest if event.account_id]
        top = max(
            setting, key=lambda event: (event.created_at, NAMES[event.name][1], event.event_id)
        )
        links = (references or [None])[-1], (accounts or [None])[-1]
        rows[inquiry] = (*links, top.name, top.event_id, top.created_at)
    return rows


def model_people(inquiries):
    """Return {person: (status, inquiry, account, event ID)} by rules 3 and 4."""
    people = {}
    for inquiry, (reference, account, name, event_id, created_at) in inquiries.items():
        status, rank, group = NAMES[name]
        standing = (group, created_at, rank, event_id)
        row = (standing, (status, inquiry, account, event_id))
        person = reference or account or inquiry
        people[person] = max(people.get(person, row), row)
    return {person: row for person, (_, row) in people.items()}


def model_timeline(events, inquiries):
    """Return every pair of a person and an event of theirs, as schema.sql tells them."""
    people = {inquiry: row[0] or row[1] or inquiry for inquiry, row in inquiries.items()}
    accounts = {(row[1], people[inquiry]) for inquiry, row in inquiries.items()}
    accounts |= {
        (event.account_id, event.reference_id)
        for event in events
        if event.reference_id and event.object_type == "account"
    }
    pairs = []
    for event in events:
        if event.inquiry_id in people:
            theirs = {people[event.inquiry_id]}
        elif event.reference_id:
            theirs = {event.reference_id}
        else:
            theirs = {
                person for account, person in accounts if account and account == event.account_id
            }
            theirs |= {event.account_id or event.inquiry_id} - {None}
        pairs += [(person, event.event_id) for person in theirs]
    return sorted(pairs)


def deliver(path, events, seed):
    """Store events in random order and batches, some twice; return tables and timeline."""
    chance = random.Random(seed)
    line = events + chance.sample(events, len(events) // 2)
    chance.shuffle(line)
    kyc.prepare_database(path)
    journal = kyc.Journal(path)
    while line:
        size = chance.randint(1, 5)
        batch = [kyc.Delivery(event, b"{}", at(0)) for event in line[:size]]
        journal.commit(batch)
        line = line[size:]
    tables = read_tables(journal.open())
    assert rebuild(journal.open()) == tables
    timeline = sorted(read_timeline(journal.open(), "event_id"))
    journal.close()
    return *tables, timeline


def rebuild(db):
    """Empty both tables, fold the whole journal again, and return them."""
    with kyc.transaction(db):
        db.execute("DELETE FROM inquiries")
        db.execute("DELETE FROM kyc_status")
        kyc.project(db, kyc.read_journal(db, 0))
    return read_tables(db)


def read_tables(db):
    """Return inquiries and kyc_status, without updated_at."""
    columns = "reference_id, account_id, event_name, event_id, event_at"
    inquiries = db.execute(f"SELECT inquiry_id, {columns} FROM inquiries")  # noqa: S608
    people = db.execute(
        "SELECT reference_id, status, inquiry_id, account_id, event_id FROM kyc_status"
    )
    return {row[0]: tuple(row)[1:] for row in inquiries}, {row[0]: tuple(row)[1:] for row in people}


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(events=EVENTS, seed=st.integers(0, 2**32))
def test_any_order_and_duplication_gives_what_the_rules_say(tmp_path_factory, events, seed):
    events = [event._replace(event_id=f"evt_{n}") for n, event in enumerate(events)]
    inquiries = model_inquiries(events)
    folder = tmp_path_factory.mktemp("orders")
    for order in range(2):
        tables = deliver(folder / f"{order}.db", events, seed + order)
        people, timeline = model_people(inquiries), model_timeline(events, inquiries)
        assert tables == (inquiries, people, timeline)
