"""Reading events: every shape, every inflection, and anything else without harm."""

import json

import pytest
from conftest import PAYLOADS

import app as kyc

RECEIVED = "2026-01-02T03:04:05.678Z"


def read(document):
    """Read an event from a document or from raw bytes."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return kyc.read_event(body, RECEIVED)


def wrap(thing, name="inquiry.approved", **attributes):
    """Return an official event around `thing`."""
    attributes = {"name": name, "payload": {"data": thing}, **attributes}
    return {"data": {"type": "event", "id": "evt_1", "attributes": attributes}}


def links(event):
    """Return whom an event names."""
    return event.inquiry_id, event.account_id, event.reference_id


@pytest.mark.parametrize(
    ("created", "reference", "template"),
    [
        ("created-at", "reference-id", "inquiry-template"),
        ("createdAt", "referenceId", "inquiryTemplate"),
        ("created_at", "reference_id", "inquiry_template"),
    ],
    ids=["kebab", "camel", "snake"],
)
def test_every_inflection_is_read(created, reference, template):
    thing = {
        "type": "inquiry",
        "id": "inq_1",
        "attributes": {reference: "user-1", "status": "approved"},
        "relationships": {
            "account": {"data": {"type": "account", "id": "act_1"}},
            template: {"data": {"type": "inquiry-template", "id": "itmpl_1"}},
        },
    }
    event = read(wrap(thing, **{created: "2026-01-01T00:00:00.000Z"}))
    assert event[:10] == (
        *("evt_1", "inquiry.approved", "2026-01-01T00:00:00.000Z", "inquiry", "inq_1", "approved"),
        *("inq_1", "act_1", "user-1", "itmpl_1"),
    )


@pytest.mark.parametrize("key", ["account-status", "accountStatus", "account_status", "status"])
def test_status_of_an_account_is_read(key):
    event = read(wrap({"type": "account", "id": "act_1", "attributes": {key: "Frozen"}}))
    assert (event.object_status, event.account_id) == ("Frozen", "act_1")


def test_shape_with_the_event_id_in_data():
    thing = {"type": "inquiry", "id": "inq_1", "attributes": {"referenceId": "user-1"}}
    document = {
        "type": "inquiry.approved",
        "data": {"id": "evt_1", "attributes": {"payload": {"data": thing}}},
    }
    event = read(document)
    assert (event.event_id, event.name, event.created_at) == ("evt_1", "inquiry.approved", RECEIVED)
    assert (event.inquiry_id, event.reference_id) == ("inq_1", "user-1")


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        (1_700_000_000, "2023-11-14T22:13:20.000Z"),
        ("2023-11-14T23:13:20+01:00", "2023-11-14T22:13:20.000Z"),
        ("yesterday", RECEIVED),
    ],
)
def test_shape_with_everything_on_top(created, expected):
    thing = {"type": "inquiry", "id": "inq_1"}
    event = read({"id": "evt_1", "type": "inquiry.failed", "data": thing, "created": created})
    assert (event.event_id, event.name, event.created_at) == ("evt_1", "inquiry.failed", expected)
    assert event.inquiry_id == "inq_1"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024-03-15T18:35:00.100Z", "2024-03-15T18:35:00.100Z"),
        ("2024-03-15T18:35:00Z", "2024-03-15T18:35:00.000Z"),
        ("2024-03-15T18:35:00.123456+02:00", "2024-03-15T16:35:00.123Z"),
        ("2024-03-15T18:35:00", "2024-03-15T18:35:00.000Z"),
        *((odd, RECEIVED) for odd in ("", "x", None, True, [], {}, float("nan"), float("inf"))),
        *((odd, RECEIVED) for odd in (10**30, -(10**30), "0000-01-01T00:00:00Z", "9" * 5000)),
        ("0001-01-01T00:00:00+14:00", RECEIVED),
        ("9999-12-31T23:59:59-14:00", RECEIVED),
    ],
)
def test_created_at_is_normalised_or_the_receipt_stands_in(value, expected):
    assert read(wrap({}, **{"created-at": value})).created_at == expected


def test_id_that_is_too_long_counts_as_none():
    long = "\N{SNOWMAN}" * 334  # 1,002 bytes
    thing = {"type": "inquiry", "id": "inq_1", "attributes": {"reference-id": long}}
    event = read({"id": "evt_1", "type": "inquiry.failed", "data": thing})
    assert (event.event_id, event.inquiry_id, event.reference_id) == ("evt_1", "inq_1", None)
    assert read({"id": long, "type": "inquiry.failed", "data": thing}).name == "unrecognized"


def test_age_of_the_object_is_not_the_time_of_the_event():
    thing = {"type": "inquiry", "id": "inq_1", "attributes": {"created-at": "2020-01-01T00:00:00Z"}}
    event = read({"id": "evt_1", "type": "inquiry.approved", "data": thing, "created": 1700000000})
    assert event.created_at == "2023-11-14T22:13:20.000Z"


def test_object_id_never_stands_in_for_an_event_id():
    thing = {"type": "inquiry", "id": "inq_1", "attributes": {}}
    assert read({"type": "inquiry.approved", "data": thing}).name == "unrecognized"


def test_links_through_relationships():
    thing = {
        "type": "verification/selfie",
        "id": "ver_1",
        "relationships": {
            "inquiry": {"data": {"type": "inquiry", "id": "inq_1"}},
            "account": {"data": None},
        },
    }
    event = read(wrap(thing, "verification.passed"))
    assert (event.object_type, event.object_id) == ("verification/selfie", "ver_1")
    assert links(event) == ("inq_1", None, None)


@pytest.mark.parametrize(
    ("inquiries", "found"), [([], None), (["inq_1"], "inq_1"), (["inq_1", "inq_2"], None)]
)
def test_only_one_of_a_kind_is_linked(inquiries, found):
    listed = {"inquiries": {"data": [{"type": "inquiry", "id": name} for name in inquiries]}}
    thing = {"type": "case", "id": "case_1", "relationships": listed}
    assert read(wrap(thing, "case.created")).inquiry_id == found


def test_transaction_names_the_account_it_is_related_to_and_nobody_by_reference():
    related = [{"type": "account", "id": "act_1"}, {"type": "transaction", "id": "txn_2"}]
    thing = {
        "type": "transaction",
        "id": "txn_1",
        "attributes": {"reference-id": "user-42"},
        "relationships": {"related-objects": {"data": related}},
    }
    event = read(wrap(thing, "transaction.created"))
    assert links(event) == (None, "act_1", None)


def test_object_without_a_type_is_of_the_kind_of_its_event():
    thing = {"id": "inq_1", "attributes": {"reference-id": "user-42"}}
    event = read({"id": "evt_1", "type": "inquiry.approved", "data": thing})
    assert event.object_type == "inquiry"
    assert links(event) == ("inq_1", None, "user-42")


@pytest.mark.parametrize("thing", [None, [], {}, "x", 7, {"type": 1, "id": [], "attributes": 2}])
def test_missing_or_odd_object_leaves_columns_empty(thing):
    event = read(wrap(thing))
    assert event[:2] == ("evt_1", "inquiry.approved")
    assert (event.object_type, event.object_id, *links(event)) == (None,) * 5


@pytest.mark.parametrize("value", [None, "", 7, ["x"], {"a": 1}, "a\0b", "\ud800", True])
def test_odd_reference_id_counts_as_absent(value):
    thing = {"type": "inquiry", "id": "inq_1", "attributes": {"reference-id": value}}
    assert read(wrap(thing)).reference_id is None


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"abc", b"null", b"7", b"[]", b"{}", b'"x"', b"\xff\xfe\x00", b"\x00" * 9),
        *(b'{"data": null}', b'{"data": []}', b'{"data": {"type": "event"}}', b"{" * 100_000),
        *(b"[" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"\xed\xa0\x80", b"NaN"),
        json.dumps(wrap({}, name=None)).encode(),
        json.dumps(wrap({}, name="\ud800")).encode(),
        b'{"data": {"type": "event", "id": "evt_\\u0000", "attributes": {"name": "a.b"}}}',
        b'{"data": {"type": "event", "id": ["evt_1"], "attributes": {"name": "a.b"}}}',
    ],
)
def test_body_without_an_event_is_unrecognized(body):
    event = kyc.read_event(body, RECEIVED)
    assert event.name == "unrecognized"
    assert event.event_id.startswith("sha256:")
    assert event.created_at == RECEIVED


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_of_json_are_read(encoding):
    assert read(json.dumps(wrap({})).encode(encoding)).event_id == "evt_1"


@pytest.mark.parametrize("odd", [b"NaN", b"-Infinity", b"9" * 5000, b'"\\ud800"', b'"\x01\\u0000"'])
def test_odd_values_elsewhere_do_not_hide_an_event(odd):
    body = json.dumps(wrap({"type": "inquiry", "id": "inq_1", "x": "ODD"})).encode()
    assert kyc.read_event(body.replace(b'"ODD"', odd), RECEIVED).inquiry_id == "inq_1"


def test_last_of_duplicate_keys_wins():
    body = b'{"data": 1, "data": {"type": "event", "id": "evt_1", "attributes": {"name": "a.b"}}}'
    assert kyc.read_event(body, RECEIVED).name == "a.b"


@pytest.mark.skipif(not PAYLOADS.is_dir(), reason="the official payloads are not at hand")
def test_every_official_payload_is_read():
    for path in PAYLOADS.glob("*.json"):
        document = json.loads(path.read_text())["data"]
        event = kyc.read_event(path.read_bytes(), RECEIVED)
        thing = document["attributes"]["payload"]["data"]
        assert (event.event_id, event.name) == (document["id"], document["attributes"]["name"])
        assert (event.object_type, event.object_id) == (thing["type"], thing["id"])
        assert event.created_at == document["attributes"]["created-at"]
