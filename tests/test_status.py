"""Where a person stands: sequences that teams meet, then the rules in any order and repetition."""

import contextlib
import hashlib
import itertools
import json
import random
import time
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app as kyc

STATUSES = {  # event name -> status, by the rules and not by the code
    "inquiry.created": "created",
    "inquiry.started": "pending",
    "inquiry-session.started": "pending",
    "inquiry.expired": "expired",
    "inquiry.failed": "failed",
    "inquiry.completed": "completed",
    "inquiry.marked-for-review": "needs_review",
    "inquiry.declined": "declined",
    "inquiry.approved": "approved",
}
KYC, OTHER = "itmpl_kyc", "itmpl_other"


class Facts(NamedTuple):
    """What an event says."""

    name: str
    at: float  # in seconds
    inquiry: str | list | None = None
    account: str | list | None = None
    reference: str | None = None
    template: str | None = None
    status: str | None = None  # of the object
    object: str | None = None  # its ID
    id: str | None = None

    @property
    def kind(self):
        """What its object is: the name without its last part."""
        return self.name.rpartition(".")[0]

    def body(self):
        """Return it as Persona sends it."""
        ids = {key: getattr(self, key) for key in ("inquiry", "account", "template")}
        own = ids.pop(self.kind, None)
        status = "account-status" if self.kind == "account" else "status"
        thing = {
            "type": self.kind,
            "id": self.object or own or "obj_1",
            "attributes": {"reference-id": self.reference, status: self.status},
            "relationships": dict(point_at(kind, one) for kind, one in ids.items()),
        }
        moment = datetime(2026, 9, 1, tzinfo=UTC) + timedelta(seconds=self.at)
        attributes = {"name": self.name, "created-at": moment.isoformat()}
        attributes["payload"] = {"data": thing, "included": []}
        digest = hashlib.sha256(json.dumps(attributes).encode()).hexdigest()
        data = {"type": "event", "id": self.id or f"evt_{digest}", "attributes": attributes}
        return json.dumps({"data": data}).encode()


def point_at(kind, ids):
    """Return a relationship to one object or to a list of them, as name and content."""
    name = {"template": "inquiry-template"}.get(kind, kind)
    if isinstance(ids, list):
        plural = {"inquiry": "inquiries", "account": "accounts"}[kind]
        return plural, {"data": [{"type": name, "id": one} for one in ids]}
    return name, {"data": ids and {"type": name, "id": ids}}


FIELDS = {"inq": "inquiry", "act": "account", "itmpl": "template", "evt": "id"}  # by prefix


def event(line):
    """Return the body of an event, written as `name seconds IDs =status`; u1 is a reference ID.

    A name without a dot is one of a report, or else of an inquiry, of inq_1 if it names none.
    """
    name, at, *words = line.split()
    facts = {}
    for word in words:
        field = FIELDS.get(word.partition("_")[0], "object")
        field = {"u": "reference", "=": "status"}.get(word[0], field)
        value = word.removeprefix("=")
        facts[field] = [facts[field], value] if field in facts else value
    if name in ("matched", "dismissed"):
        name = f"report/watchlist.{name}"
    elif "." not in name:
        name, facts = f"inquiry.{name}", {"inquiry": "inq_1", **facts}
    return Facts(name, float(at), **facts).body()


def configure(path, templates=""):
    environ = {"KYC_DATABASE": str(path), "PERSONA_WEBHOOK_SECRET": "wbhsec_test_of_status"}
    return {**environ, "KYC_TEMPLATES": templates} if templates else environ


@contextlib.contextmanager
def opened(path, templates=""):
    """A database of the service, under the rules that are registered now."""
    kyc.prepare_database(kyc.read_config(configure(path, templates)))
    with contextlib.closing(kyc.connect(path)) as db:
        yield db


def deliver(db, *bodies):
    """Store some events in one commit, those of the operator as the commands do."""
    now, deliveries = "2026-09-30T00:00:00.000Z", []
    for body in bodies:
        received = kyc.read_event(body, now)
        source = "operator" if received.name.startswith("kyc.") else "webhook"
        deliveries.append(kyc.Delivery(received, body, now, source=source))
    with kyc.transaction(db):
        kyc.store(db, deliveries)


def rebuild(db):
    """Lose the projections and have the service compute them anew."""
    with kyc.transaction(db):
        for table in ("inquiries", "accounts", "holds", "kyc_status"):
            db.execute(f"DELETE FROM {table}")  # noqa: S608
    list(kyc.rebuild(db))


def read(db, query):
    return [tuple(row) for row in db.execute(query)]


def people(db):
    """Say where everybody stands."""
    query = "SELECT reference_id, status, iif(hold IS NULL, '', ' held') FROM kyc_status ORDER BY 1"
    return ", ".join(f"{person} {status}{held}" for person, status, held in read(db, query))


TEMPLATES = "SELECT reference_id, template_id, status FROM kyc_status_by_template ORDER BY 2"
LINKS = "SELECT reference_id, account_id, template_id, status FROM inquiries"


@pytest.fixture
def outcome(tmp_path):
    """Deliver events in several orders, and rebuild; return what they come to in all of them."""
    numbers = itertools.count()

    def outcome(sequence, query=None, templates=""):
        bodies, found = [event(line) for line in sequence.split(";")], []
        repeated = random.Random(len(bodies)).sample(bodies * 3, len(bodies) * 3)
        for order in (bodies, bodies[::-1], repeated):
            with opened(tmp_path / f"{next(numbers)}.db", templates) as db:
                for body in order:
                    deliver(db, body)
                found.append(read(db, query) if query else people(db))
                rebuild(db)
                found.append(read(db, query) if query else people(db))
        assert found == found[:1] * len(found)
        return found[0]

    return outcome


@pytest.fixture
def own_rules(monkeypatch):
    """The rules of a team: decisions on cases, holds by the status of accounts."""
    monkeypatch.setattr(kyc, "STATUS_RULES", [])
    monkeypatch.setattr(kyc, "HOLD_RULES", [])
    kyc.status_rule("case.resolved", "approved", object_status="Approved")
    kyc.hold_rule("account.status-updated", object_status="Frozen")


# Sequences that teams meet, and where each person then stands.

SEQUENCES = """
account names the person of its inquiry
    account.created 0 act_1 u1; approved 1 act_1 -> u1 approved
account without a reference ID is a person
    account.created 0 act_1; approved 1 act_1 -> act_1 approved
person moves when the account gets its reference ID
    account.created 0 act_1; approved 1 act_1; account.updated-fields 86400 act_1 u1 -> u1 approved
person moves when the inquiry gets its account
    created 0; completed 1 act_1 -> act_1 completed
newest reference ID of an account counts
    account.created 0 act_1 u0; account.updated-fields 1 act_1 u1; approved 2 act_1 -> u1 approved
redacted account keeps its person
    account.created 0 act_1 u1; approved 1 act_1; account.redacted 2 act_1 -> u1 approved
inquiries of one account are of one person
    approved 0 act_1 u1; declined 1 inq_2 act_1 -> u1 declined
abandoned inquiry names the person of the approved one
    created 0 inq_2 act_1 u1; expired 1 inq_2 act_1 u1; approved 2 act_1 -> u1 approved
completed stamped after the approval does not undo it
    approved 0.1 u1; completed 0.14 u1 -> u1 approved
declined inquiry that expires stays declined
    approved 0 u1; declined 1 inq_2 u1; expired 2 inq_2 u1 -> u1 declined
later decision undoes an earlier one
    approved 0; declined 1; marked-for-review 2 -> inq_1 needs_review
completed inquiry does not expire
    completed 0; expired 1 -> inq_1 completed
expired inquiry with a new session is pending
    created 0 u1; started 1 u1; expired 2 u1; inquiry-session.started 3 iqse_2 inq_1 -> u1 pending
resumed inquiry can be completed
    created 0; expired 2 u1; inquiry-session.started 3 iqse_2 inq_1; completed 4 -> u1 completed
expired inquiry that moves on is pending
    created 0 u1; expired 1 u1; transitioned 2 u1 =pending -> u1 pending
open inquiry hides no outcome
    failed 0 u1; started 1 inq_2 u1 -> u1 failed
expired inquiry hides no open one
    created 0 u1; expired 1 inq_2 u1 -> u1 created
rank breaks a tie in time
    declined 0 evt_a; marked-for-review 0 evt_b -> inq_1 declined
event ID breaks a tie in rank
    declined 0 evt_a; approved 0 evt_b -> inq_1 approved
payload status is ignored
    created 0 =approved -> inq_1 created
resolved case decides nothing by itself
    completed 0; case.resolved 1 case_1 inq_1 =Approved -> inq_1 completed
match before any decision holds
    matched 7 inq_1; completed 8 u1 -> u1 completed held
match before the decision was seen by it
    matched 9 inq_1; approved 10 u1 act_1 -> u1 approved
match at the time of the decision was seen by it
    matched 10 inq_1; approved 10 u1 act_1 -> u1 approved
match after the approval holds
    approved 10 u1 act_1; matched 11 inq_1 -> u1 approved held
match that names only the account holds
    approved 10 u1 act_1; matched 11 act_1 -> u1 approved held
match of an account holds its person, whose inquiry does not name it
    account.created 0 act_1 u1; approved 1 u1; matched 2 act_1 -> u1 approved held
dismissed match holds no longer
    approved 10 u1 act_1; matched 11 inq_1; dismissed 12 act_1 -> u1 approved
dismissal of another report clears nothing
    approved 10 u1 act_1; matched 11 act_1 rep_1; dismissed 12 act_1 rep_2 -> u1 approved held
match that comes again without its links still holds
    approved 10 u1 act_1; matched 11 inq_1; matched 12 -> u1 approved held
decision after the match clears it
    approved 10 u1 act_1; matched 11 act_1; approved 12 inq_2 u1 -> u1 approved
new inquiry after the match does not clear it
    approved 10 u1 act_1; matched 11 act_1; completed 12 inq_2 u1 -> u1 approved held
match reaches nobody else
    approved 0 u1 act_1; approved 0 inq_2 act_2; matched 1 act_1 -> act_2 approved, u1 approved held
frozen account holds nobody by itself
    approved 10 u1 act_1; account.status-updated 11 act_1 =Frozen -> u1 approved
"""
SEQUENCES = dict(zip(*[iter(SEQUENCES.strip().splitlines())] * 2, strict=True))
APPROVED = "approved 10 u1 act_1"
FROZEN = "account.status-updated 11 act_1 =Frozen"


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence(outcome, name):
    sequence, _, expected = SEQUENCES[name].partition(" -> ")
    assert outcome(sequence) == expected


@pytest.mark.parametrize("name", STATUSES)
def test_status_of_each_event(outcome, name):
    assert outcome(f"{name} 0 inq_1") == f"inq_1 {STATUSES[name]}"


@pytest.mark.parametrize(
    "name",
    ["redacted", "resumed", "transitioned", "updated-tags", "inquiry-session.expired", "matched"],
)
def test_no_other_event_sets_a_status(outcome, name):
    assert outcome(f"{name} 0 inq_1 act_1 u1 =approved") == ""


@pytest.mark.parametrize("later", ["completed", "failed", "expired", "started", "created"])
@pytest.mark.parametrize("decision", ["approved", "declined", "marked-for-review"])
def test_decision_is_undone_by_nothing_that_is_none(outcome, decision, later):
    assert outcome(f"{decision} 0; {later} 1") == f"inq_1 {STATUSES[f'inquiry.{decision}']}"


@pytest.mark.parametrize("first", ["approved", "declined"])
@pytest.mark.parametrize("second", ["approved", "declined"])
def test_other_template_decides_nothing(outcome, first, second):
    sequence = f"{first} 0 u1 act_1 {KYC}; {second} 9 inq_2 u1 act_1 {OTHER}"
    assert outcome(sequence, templates=KYC) == f"u1 {first}"
    assert outcome(sequence, templates=f"{KYC},{OTHER}") == outcome(sequence) == f"u1 {second}"
    by_template = [("u1", KYC, first), ("u1", OTHER, second)]
    assert outcome(sequence, TEMPLATES, templates=KYC) == by_template


@pytest.mark.parametrize("template", [OTHER, None])
def test_person_without_an_inquiry_that_counts_has_no_row(outcome, template):
    sequence = f"approved 0 u1 {template or ''}"
    assert outcome(sequence, templates=KYC) == ""
    assert outcome(sequence, TEMPLATES, templates=KYC) == [("u1", template, "approved")]


def test_account_that_names_nobody_has_the_reference_id_of_its_inquiry_decided_last(outcome):
    decided = "created 3 u1 act_1; failed 2 inq_2 u2 act_1; failed 1"  # inq_1 moves back to 1
    assert outcome(f"{decided}; declined 0 inq_3 act_1") == "u1 failed, u2 declined"


def test_resolved_case_decides_about_its_only_inquiry_by_the_rule_of_the_team(outcome, own_rules):
    completed = "completed 0 inq_1; completed 0 inq_2; completed 0 inq_3; completed 0 inq_4"
    approved = "case.resolved 1 case_1 inq_1 =Approved"
    others = "case.resolved 1 case_2 inq_2 =Rejected; case.resolved 1 case_3 inq_3 inq_4 =Approved"
    statuses = "inq_1 approved, inq_2 completed, inq_3 completed, inq_4 completed"
    assert outcome(f"{completed}; {approved}; {others}") == statuses


def test_frozen_account_holds_by_the_rule_of_the_team(outcome, own_rules):
    frozen = f"{APPROVED}; {FROZEN}"
    assert outcome(frozen) == outcome(f"{frozen}; approved 12 u1") == "u1 approved held"
    assert outcome(f"{frozen}; account.status-updated 13 act_1 =Default") == "u1 approved"


@pytest.mark.parametrize("subject", ["inq_1", "act_1", "u1"])
def test_operator_hold_stands_until_it_is_released(outcome, subject):
    held = f"{APPROVED}; kyc.held 11 {subject}; approved 12 u1"
    assert outcome(held) == "u1 approved held"
    assert outcome(f"{held}; kyc.released 13 {subject}") == "u1 approved"


def test_changed_rules_and_templates_count_at_the_next_start(tmp_path, own_rules):
    path = tmp_path / "kyc.db"
    with opened(path, KYC) as db:
        for line in (APPROVED, FROZEN, "document.created 11 inq_1"):
            deliver(db, event(line))
        assert people(db) == ""
        kyc.HOLD_RULES.clear()
        assert start_again(db, path) == "u1 approved"
        kyc.hold_rule("account.status-updated")
        kyc.status_rule("document.created", "declined")
        assert start_again(db, path) == "u1 declined held"


def start_again(db, path):
    """Start the service under the rules that are registered now; return where people stand."""
    before, deadline = people(db), time.monotonic() + 5
    kyc.prepare_database(kyc.read_config(configure(path)))
    app = kyc.create_app({**configure(path), "FLASK_RUN_FROM_CLI": "true"})
    app.test_client().get("/healthz")
    while people(db) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    app.extensions["journal"].stop()
    return people(db)


# What is filtered out of an event, or removed.


def test_links_are_those_of_the_newest_event_about_the_inquiry_that_has_them(outcome):
    about = f"created 0 act_1 u0 {KYC}; completed 1 u1; redacted 2"
    other = "verification/selfie.passed 3 inq_1 act_9 u9"
    assert outcome(f"{about}; {other}", LINKS) == [("u1", "act_1", KYC, "completed")]


def test_copy_of_an_event_fills_what_was_missing_and_changes_nothing(tmp_path):
    with opened(tmp_path / "kyc.db") as db:
        deliver(db, event("created 0"), event("transitioned 1 evt_1"))
        assert people(db) == "inq_1 created"
        for copy in (f"act_1 u1 {KYC} =pending", f"act_2 u2 {OTHER} =expired"):
            deliver(db, event(f"transitioned 1 evt_1 {copy}"))
            assert read(db, LINKS) == [("u1", "act_1", KYC, "pending")]
            assert people(db) == "u1 pending"


def test_bodies_that_mention_who_was_redacted_go_and_no_others(outcome):
    sequence = "approved 0 act_1; declined 0 inq_2 act_2; redacted 4; account.redacted 5 act_1"
    mentions = "graph-query.completed 1 inq_1 inq_2; workflow-run.completed 2 act_1 act_2"
    kept = "SELECT name FROM events WHERE body IS NOT NULL"
    assert outcome(f"{sequence}; {mentions}", kept) == [("inquiry.declined",)]


# The views to read.


def test_timeline_holds_every_event_of_a_person_in_order(outcome):
    theirs = "approved 3 act_1; verification/selfie.passed 2 inq_1; matched 4 act_1"
    nobodies = "graph-query.completed 5 act_2; updated-tags 6 inq_2; document.created 7"
    query = "SELECT reference_id, event_name FROM kyc_timeline"
    names = ["account.created", "verification/selfie.passed", "inquiry.approved"]
    assert outcome(f"{theirs}; {nobodies}; account.created 1 act_1 u1", query) == [
        ("act_2", "graph-query.completed"),
        ("inq_2", "inquiry.updated-tags"),
        *[("u1", name) for name in (*names, "report/watchlist.matched")],
    ]


def test_cleared_are_the_approved_whom_nothing_holds(outcome):
    sequence = f"{APPROVED}; approved 10 inq_2 u2; declined 10 inq_3 u3; matched 11 inq_2"
    assert outcome(sequence, "SELECT reference_id, status FROM cleared") == [("u1", "approved")]
    counts = "SELECT status, people, held FROM status_counts ORDER BY status"
    assert outcome(sequence, counts) == [("approved", 2, 1), ("declined", 1, 0)]


# Any order, any repetition, in part or in full: against a model that knows the rules and no SQL.

ORDER = {  # status -> stage, rank, and standing among the inquiries of a person
    "expired": (0, 0, -1),
    "created": (0, 1, 0),
    "pending": (0, 2, 0),
    "failed": (1, 3, 1),
    "completed": (1, 3, 1),
    "needs_review": (2, 4, 2),
    "declined": (2, 5, 2),
    "approved": (2, 5, 2),
}
SPECIAL = {  # event name and status of the object -> status
    ("inquiry.transitioned", "pending"): "pending",
    ("case.resolved", "Approved"): "approved",
}


def sets(one):
    """Return the status that an event sets of its inquiry, or None (rule 1)."""
    return SPECIAL.get((one.name, one.status)) or STATUSES.get(one.name)


def compare(one):
    """Return how an event compares with others that set the same inquiry's status (rule 2)."""
    stage, rank, _ = ORDER[sets(one)]
    return stage, one.at, rank, one.id


def compare_inquiry(row):
    """Return how an inquiry compares with others of a person, by its deciding event (rule 3)."""
    return ORDER[sets(row[-1])][2], *compare(row[-1])[1:]


def raises(one):
    """Return whether an event raises a hold or clears it; None when neither (rule 6)."""
    if one.name == "account.status-updated":
        return one.status == "Frozen"
    endings = {"matched": True, "dismissed": False, "held": True, "released": False}
    return endings.get(one.name.rpartition(".")[2])


def newest(events, key):
    """Return the value of the newest event that carries one, or None."""
    carrying = [(one.at, one.id, getattr(one, key)) for one in events if getattr(one, key)]
    return max(carrying)[-1] if carrying else None


def model_inquiries(events):
    """Return {inquiry ID: [its ID, reference ID, account ID, template, deciding event]} (2, 5)."""
    rows = {}
    for inquiry in {one.inquiry for one in events if one.inquiry and sets(one)}:
        about = [one for one in events if one.object == inquiry and one.kind == "inquiry"]
        links = [newest(about, key) for key in ("reference", "account", "template")]
        setting = [one for one in events if one.inquiry == inquiry and sets(one)]
        rows[inquiry] = [inquiry, *links, max(setting, key=compare)]
    return rows


def model_accounts(events, inquiries):
    """Return {account ID: reference ID} (rule 4)."""
    accounts = {}
    for account in {one.account for one in events} - {None}:
        about = [one for one in events if one.object == account and one.kind == "account"]
        theirs = [row for row in inquiries.values() if row[1] and row[2] == account]
        last = max(theirs, key=lambda row: (row[-1].at, row[-1].id), default=(None, None))
        accounts[account] = newest(about, "reference") or last[1]
    return {account: reference for account, reference in accounts.items() if reference}


def model_holds(events, inquiries, persons, accounts):
    """Return the holds that stand: person, time, whether a decision leaves it (rule 6)."""
    for thing in {(one.object, one.kind) for one in events}:
        about = [e for e in events if (e.object, e.kind) == thing and raises(e) is not None]
        last = max(about, key=lambda one: (one.at, one.id), default=None)
        if last and raises(last):
            inquiry, account = newest(about, "inquiry"), newest(about, "account")
            held = {newest(about, "reference"), accounts.get(account), persons.get(inquiry)}
            held |= {persons[row[0]] for row in inquiries.values() if account and row[2] == account}
            yield from ((person, last.at, last.kind in ("kyc", "account")) for person in held)


def model(events, templates):
    """Return the rows of tables and views by the rules, those of QUERIES."""
    inquiries = model_inquiries(events)
    accounts = model_accounts(events, inquiries)
    persons = {
        inquiry: reference or accounts.get(account) or account or inquiry
        for inquiry, reference, account, *_ in inquiries.values()
    }
    holds = list(model_holds(events, inquiries, persons, accounts))
    by_template, standing, timeline = {}, {}, set()
    for row in sorted(inquiries.values(), key=compare_inquiry):  # the best one comes last
        inquiry, _, _, template, deciding = row
        person, decided = persons[inquiry], ORDER[sets(deciding)][0] == 2
        by_template[person, template] = person, template, inquiry, deciding.id
        if templates in ("", template):
            theirs = [(at, lasting) for one, at, lasting in holds if one == person]
            held = any(lasting or not decided or at > deciding.at for at, lasting in theirs)
            standing[person] = person, sets(deciding), inquiry, deciding.id, held
    for one in events:
        person = persons.get(one.inquiry) or one.reference or accounts.get(one.account)
        if person or one.account or one.inquiry:
            timeline.add((person or one.account or one.inquiry, one.id))
    rows = {(persons[row[0]], *row[:-1], sets(row[-1]), row[-1].id) for row in inquiries.values()}
    found = rows, accounts.items(), standing.values(), by_template.values(), timeline
    return [set(one) for one in found]


QUERIES = [
    "SELECT person, inquiry_id, reference_id, account_id, template_id, status, event_id"
    " FROM inquiries",
    "SELECT account_id, reference_id FROM accounts",
    "SELECT reference_id, status, inquiry_id, event_id, hold IS NOT NULL FROM kyc_status",
    "SELECT reference_id, template_id, inquiry_id, event_id FROM kyc_status_by_template",
    "SELECT reference_id, event_id FROM kyc_timeline",
]


def assert_it_comes_to(db, expected):
    """Tables and views hold these rows, none twice, and each table what its view says."""
    found = [read(db, query) for query in QUERIES]
    assert [set(rows) for rows in found] == expected
    assert [len(rows) for rows in found] == [len(rows) for rows in expected]
    for table in ("inquiries", "accounts", "holds", "kyc_status"):
        view = db.execute(f"SELECT * FROM {table}_by_the_rules LIMIT 0")  # noqa: S608
        names = ", ".join(column[0] for column in view.description)
        rows, rules = (f"SELECT {names} FROM {table}{end}" for end in ("", "_by_the_rules"))  # noqa: S608
        assert set(read(db, rows)) == set(read(db, rules))


KINDS = {  # of objects -> the IDs of some, and what happens to them
    "inquiry": (
        "inq_1 inq_2 inq_3 inq_4",
        "created started expired failed completed marked-for-review declined approved"
        " transitioned redacted",
    ),
    "account": ("act_1 act_2", "created status-updated status-updated"),
    "inquiry-session": ("iqse_1", "started expired"),
    "report/watchlist": ("rep_1 rep_2", "matched matched dismissed ready"),
    "case": ("case_1", "resolved"),
    "kyc": ("inq_1 act_1 u1", "held released"),
}


@st.composite
def any_event(draw):
    """Draw what an event says; one in two is about an inquiry."""

    def one_of(*values):
        return draw(st.sampled_from(values))

    kind = one_of("inquiry", "inquiry", "inquiry", "inquiry", *KINDS)
    thing, ending = (one_of(*words.split()) for words in KINDS[kind])
    facts = {"name": f"{kind}.{ending}", "at": one_of(*range(5)), "object": thing}
    if kind == "kyc":
        return Facts(**facts, **{FIELDS.get(thing[:3], "reference"): thing})
    facts["status"] = one_of(None, "pending", "Frozen", "Approved")
    facts["account"] = one_of(None, "act_1", "act_2")
    if kind != "account":
        facts["inquiry"] = one_of(None, "inq_1", "inq_2", "inq_3", "inq_4")
    if kind in ("inquiry", "account"):
        facts["reference"] = one_of(None, None, "u1", "u2")
        facts[kind] = thing
    if kind == "inquiry":
        facts["template"] = one_of(None, KYC, KYC, OTHER)
    return Facts(**facts)


def take_apart(one, chance):
    """Return two copies that each lack some of what Persona can filter, and no other's."""
    names = ("inquiry", "account", "reference", "template", "status")
    some = [name for name in names if chance.random() < 0.5]
    others = [name for name in names if name not in some]
    return [one._replace(**dict.fromkeys(part)) for part in (some, others)]


def deliver_anyhow(db, events, seed):
    """Deliver in random order and batches, some events again, some in parts."""
    chance = random.Random(seed)
    line = []
    for one in events:
        line += take_apart(one, chance) if chance.random() < 0.5 else [one]
    line += line[::3]
    chance.shuffle(line)
    while line:
        size = chance.randint(1, 8)
        deliver(db, *[one.body() for one in line[:size]])
        line = line[size:]


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(any_event(), min_size=4, max_size=16),
    st.sampled_from(["", KYC]),
    st.integers(0, 2**32),
)
def test_any_order_and_repetition_gives_what_the_rules_say(
    tmp_path_factory, own_rules, events, templates, seed
):
    events = [one._replace(id=f"evt_{n:02}") for n, one in enumerate(events)]
    expected = model(events, templates)
    folder = tmp_path_factory.mktemp("orders")
    for order in range(2):
        with opened(folder / f"{order}.db", templates) as db:
            deliver_anyhow(db, events, seed + order)
            assert_it_comes_to(db, expected)
            rebuild(db)
            assert_it_comes_to(db, expected)
