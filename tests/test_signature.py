"""Verification: only what Persona signed, over the raw bytes, around now."""

import ast
import hashlib
import hmac
import inspect
import time

import pytest
from conftest import SECRET, build, sign

import app as kyc

NOW = 1_720_713_905
OTHER = "wbhsec_other_0123456789abcdef"


def verify(body, headers, now=NOW, **environ):
    """Verify against the configuration in `environ`; return which secret matched."""
    config = kyc.read_config({"PERSONA_WEBHOOK_SECRET": SECRET, **environ})
    return kyc.verify(body, headers, config, now)


def fingerprint(secret):
    """Return what the journal calls a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()[:8]


def refusal(headers, body=b"abc123", **environ):
    """Return why a request is refused."""
    with pytest.raises(kyc.SignatureError) as error:
        verify(body, headers, **environ)
    return error.value


def pair(body=b"abc123", secret=SECRET, timestamp=NOW):
    """Return one `t=...,v1=...` pair."""
    return sign(body, secret, timestamp=timestamp)["Persona-Signature"]


def sign_by(scheme, timestamp=NOW, body=b"abc123"):
    """Return the headers that authenticate `body` in one of the three schemes."""
    message = body if scheme == "body" else b"%d." % timestamp + body
    digest = hmac.new(SECRET.encode(), message, "sha256").hexdigest()
    return {
        "persona": {"Persona-Signature": f"t={timestamp},v1={digest}"},
        "split": {"X-Persona-Timestamp": str(timestamp), "X-Persona-Signature": digest},
        "body": {"Persona-Signature": digest},
    }[scheme]


def test_known_vector():
    signature = "0fd4586aa5cb67c098a920ed55906fb2669a2bb21c6ed2de58e4f5cfb79814c7"
    headers = {"Persona-Signature": f"t={NOW},v1={signature}"}
    verify(b"abc123", headers, PERSONA_WEBHOOK_SECRET="wbhsec_researchhub")
    assert pair(secret="wbhsec_researchhub") == headers["Persona-Signature"]


def test_body_must_be_the_signed_bytes():
    headers = sign(b'{"a": 40.172463903}', timestamp=NOW)
    assert "no signature matches" in str(refusal(headers, b'{"a":40.172463903}'))


def test_missing_header_is_refused_whatever_the_body():
    assert str(refusal({})) == "the Persona-Signature header is missing"


def test_the_secret_itself_is_no_signature():
    assert "malformed" in str(refusal({"Persona-Signature": SECRET}))


def test_hmac_of_the_body_alone_is_refused():
    digest = sign_by("body")["Persona-Signature"]
    assert "no signature" in str(refusal({"Persona-Signature": f"t={NOW},v1={digest}"}))


@pytest.mark.parametrize("separator", [" ", "  ", "\t", ",", ", "])
@pytest.mark.parametrize("right", [0, 1])
def test_either_signature_of_a_rotation_is_enough(right, separator):
    pairs = [pair(secret=OTHER), pair(secret=OTHER)]
    pairs[right] = pair()
    verify(b"abc123", {"Persona-Signature": separator.join(pairs)})


def test_each_signature_is_checked_against_its_own_time():
    other, right = pair(timestamp=NOW - 9), pair(timestamp=NOW)
    swapped = f"{right.split(',')[0]},{other.split(',')[1]}"
    assert "no signature" in str(refusal({"Persona-Signature": swapped}))
    verify(b"abc123", {"Persona-Signature": f"{swapped} {other}"})


@pytest.mark.parametrize("secrets", ["{},{}", "{} {}", " {},\n{} ,"])
def test_any_configured_secret_matches_and_is_told(secrets):
    secrets = secrets.format(SECRET, OTHER)
    for secret in (SECRET, OTHER):
        headers = {"Persona-Signature": pair(secret=secret)}
        assert verify(b"abc123", headers, PERSONA_WEBHOOK_SECRET=secrets) == fingerprint(secret)


@pytest.mark.parametrize(("age", "words"), [(301, "301 seconds old"), (-301, "in the future")])
def test_stale_signature_is_refused_and_says_by_how_much(age, words):
    error = refusal({"Persona-Signature": pair(timestamp=NOW - age)})
    assert words in str(error)
    assert error.stale


@pytest.mark.parametrize("age", [300, -300, 0])
def test_tolerance_holds_both_ways(age):
    verify(b"abc123", {"Persona-Signature": pair(timestamp=NOW - age)})


def test_wrong_signature_is_not_called_stale():
    assert not refusal({"Persona-Signature": pair(secret="wrong", timestamp=1)}).stale


def test_tolerance_zero_switches_the_check_off():
    header = {"Persona-Signature": pair(timestamp=1)}
    verify(b"abc123", header, PERSONA_SIGNATURE_TOLERANCE="0")


@pytest.mark.parametrize(
    "header",
    [
        *("", " ", "t", "t=", "t=,v1=", "=", ",", "v1=abc", "t=1", "t=1,v1=", "garbage"),
        *(f"t=-{NOW},v1={'0' * 64}", f"t=abc,v1={'0' * 64}", f"t={'9' * 400},v1={'0' * 64}"),
        *(f"t=1e9,v1={'0' * 64}", "t=\u0661\u0662,v1=" + "0" * 64, f"t={NOW},v1={'z' * 64}"),
        *(f"t={NOW},v1={'0' * 63}", f"t={NOW},v1=" + "\u0660" * 64, f"t={NOW},v0={'0' * 64}"),
        *("\xff\xfe", "t=\xe9,v1=\xe9", "x" * 8192, "t=1,v1=2 " * 900, f"v1={'0' * 64},t={NOW}"),
    ],
)
@pytest.mark.parametrize("scheme", kyc.SCHEMES)
def test_odd_headers_are_refused(header, scheme):
    headers = {"Persona-Signature": header, "X-Persona-Signature": header}
    headers["X-Persona-Timestamp"] = header
    error = refusal(headers, PERSONA_SIGNATURE_SCHEME=scheme)
    assert "missing" in str(error) or "malformed" in str(error)


def test_number_of_signatures_is_bounded():
    header = " ".join([pair(secret="wrong")] * kyc.MAX_SIGNATURES + [pair()])
    assert "malformed" in str(refusal({"Persona-Signature": header}))


@pytest.mark.parametrize("scheme", kyc.SCHEMES)
def test_each_scheme_accepts_its_own_signature_only(scheme):
    for other in kyc.SCHEMES:
        headers = sign_by(other)
        if other == scheme:
            verify(b"abc123", headers, PERSONA_SIGNATURE_SCHEME=scheme)
        else:
            refusal(headers, PERSONA_SIGNATURE_SCHEME=scheme)


def test_split_scheme_checks_the_time():
    headers = sign_by("split", timestamp=NOW - 400)
    assert refusal(headers, PERSONA_SIGNATURE_SCHEME="split").stale


def test_refusal_over_http_is_json_with_a_reason(client):
    answer = client.post("/webhooks/persona", data=b"{}")
    assert answer.status_code == 401
    assert answer.json == {
        "error": "Invalid signature",
        "reason": "the Persona-Signature header is missing",
    }


def test_nothing_unsigned_is_stored(client, db):
    client.post("/webhooks/persona", data=build(), headers=sign(b"another body"))
    client.post("/webhooks/persona", data=build(), headers=sign(build(), "wrong"))
    assert db.execute("SELECT count(*) FROM events").fetchone()[0] == 0


def test_journal_keeps_which_secret_signed(create, db):
    client = create(PERSONA_WEBHOOK_SECRET=f"{SECRET} {OTHER}").test_client()
    for secret in (SECRET, OTHER):
        body = build()
        assert client.post("/webhook", data=body, headers=sign(body, secret)).status_code == 200
    kept = [row["signed_by"] for row in db.execute("SELECT signed_by FROM events ORDER BY rowid")]
    assert kept == [fingerprint(SECRET), fingerprint(OTHER)]


def test_repeated_header_is_read_as_one(client):
    body = build()
    headers = [("Persona-Signature", sign(body, "wrong")["Persona-Signature"])]
    headers.append(("Persona-Signature", sign(body)["Persona-Signature"]))
    assert client.post("/webhooks/persona", data=body, headers=headers).status_code == 200


def test_stale_answer_says_by_how_many_seconds(client):
    body = build()
    headers = sign(body, timestamp=int(time.time()) - 1000)
    answer = client.post("/webhooks/persona", data=body, headers=headers)
    assert answer.status_code == 401
    assert "stale: 100" in answer.json["reason"]


def test_digests_are_compared_in_constant_time():
    tree = ast.parse(inspect.getsource(kyc.verify))
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [text for text in compared if "digest" in text or "secret" in text]
    assert "hmac.compare_digest(" in inspect.getsource(kyc.verify)
