-- The tables of the Persona webhook receiver, as read with: sqlite3 kyc.db
-- Applied when the service starts; running it again changes nothing.
-- All times are UTC, YYYY-MM-DDTHH:MM:SS.mmmZ, so they sort as text.

-- The journal: one row per event, in order of arrival (rowid). Append-only.
CREATE TABLE IF NOT EXISTS events (
    event_id     TEXT NOT NULL PRIMARY KEY,  -- Persona's evt_..., or sha256:<hex> of an unreadable body
    name         TEXT NOT NULL,  -- inquiry.approved, report/watchlist.matched ...
    created_at   TEXT NOT NULL,  -- when Persona created it
    received_at  TEXT NOT NULL,  -- when it was stored
    object_type  TEXT,           -- inquiry, verification/government-id ...
    object_id    TEXT,
    inquiry_id   TEXT,           -- of the object, or the only one in its relationships
    account_id   TEXT,
    reference_id TEXT,           -- your ID of the person; NULL for a transaction, which has its own
    attempt      INTEGER,        -- Persona-Webhook-Attempts-Made of the delivery that was stored
    body_sha256  TEXT NOT NULL,  -- hex, of the bytes as received; outlives the body
    state        TEXT NOT NULL CHECK (state IN ('processed', 'failed', 'unrecognized')),
    error        TEXT,           -- why a handler failed
    redacted_at  TEXT,           -- when the body was removed
    body         ANY             -- the exact body: TEXT when it is UTF-8, else BLOB
) STRICT;

CREATE INDEX IF NOT EXISTS events_by_inquiry
    ON events (inquiry_id) WHERE inquiry_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_by_account
    ON events (account_id) WHERE account_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_by_reference
    ON events (reference_id) WHERE reference_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_by_object
    ON events (object_id) WHERE object_id IS NOT inquiry_id AND object_id IS NOT account_id;
CREATE INDEX IF NOT EXISTS events_failed
    ON events (state) WHERE state = 'failed';

CREATE TRIGGER IF NOT EXISTS events_refuse_delete BEFORE DELETE ON events
BEGIN
    SELECT RAISE(ABORT, 'the journal is append-only: events are never deleted');
END;

CREATE TRIGGER IF NOT EXISTS events_refuse_replace BEFORE INSERT ON events
WHEN EXISTS (SELECT 1 FROM events WHERE event_id = NEW.event_id)
BEGIN
    SELECT RAISE(IGNORE);
END;

CREATE TRIGGER IF NOT EXISTS events_refuse_update BEFORE UPDATE OF
    event_id, name, created_at, received_at, object_type, object_id, inquiry_id,
    account_id, reference_id, attempt, body_sha256 ON events
BEGIN
    SELECT RAISE(ABORT, 'the journal is append-only: only state, error and redaction may change');
END;

CREATE TRIGGER IF NOT EXISTS events_refuse_rewrite BEFORE UPDATE ON events
WHEN NEW.rowid IS NOT OLD.rowid
    OR (NEW.body IS NOT OLD.body AND NEW.body IS NOT NULL)
    OR (OLD.redacted_at IS NOT NULL AND NEW.redacted_at IS NULL)
BEGIN
    SELECT RAISE(ABORT, 'the journal is append-only: a body may only be removed');
END;

-- Whose bodies are not kept: of an inquiry, account or reference ID, or another, and until when.
CREATE TABLE IF NOT EXISTS redactions (
    subject_id      TEXT NOT NULL PRIMARY KEY,
    redacted_before TEXT NOT NULL  -- events created at or before this are stored without a body
) STRICT, WITHOUT ROWID;

-- One row per inquiry of which a status is known. A projection of the journal.
-- (With rowid, as kyc_status: rows this long would make a WITHOUT ROWID tree deep and slow.)
CREATE TABLE IF NOT EXISTS inquiries (
    inquiry_id   TEXT NOT NULL PRIMARY KEY,
    reference_id TEXT,
    account_id   TEXT,
    status       TEXT NOT NULL,
    event_id     TEXT NOT NULL,  -- the event that set the status
    event_name   TEXT NOT NULL,
    event_at     TEXT NOT NULL,  -- when Persona created that event
    -- The best key for a person, and how statuses compare (see the projection in app.py).
    person       TEXT NOT NULL AS (COALESCE(reference_id, account_id, inquiry_id)),
    rank         INTEGER NOT NULL AS (CASE status
                     WHEN 'expired' THEN 0 WHEN 'created' THEN 1 WHEN 'pending' THEN 2
                     WHEN 'failed' THEN 3 WHEN 'completed' THEN 3 WHEN 'needs_review' THEN 4
                     ELSE 5 END),  -- approved, declined
    class        INTEGER NOT NULL AS (CASE
                     WHEN rank >= 4 THEN 3   -- a decision
                     WHEN rank = 3 THEN 2    -- an outcome
                     WHEN rank >= 1 THEN 1   -- open
                     ELSE 0 END)             -- expired
) STRICT;

CREATE INDEX IF NOT EXISTS inquiries_by_person
    ON inquiries (person, class, event_at);

-- One row per person: where they stand. A projection of inquiries.
CREATE TABLE IF NOT EXISTS kyc_status (
    reference_id TEXT NOT NULL PRIMARY KEY,  -- the reference ID; else the account ID; else the inquiry ID
    status       TEXT NOT NULL,
    inquiry_id   TEXT NOT NULL,  -- the inquiry that decides
    account_id   TEXT,
    event_id     TEXT NOT NULL,
    event_name   TEXT NOT NULL,
    event_at     TEXT NOT NULL,
    updated_at   TEXT NOT NULL   -- when this row last changed
) STRICT;

-- Every event of a person, in order:
--   SELECT * FROM kyc_timeline WHERE reference_id = 'user-42';
-- An event belongs to the person of its inquiry; else to its reference ID; else to its account ID,
-- and to everyone whose account that is; else to its inquiry ID.
CREATE VIEW IF NOT EXISTS kyc_timeline AS
    WITH accounts(person, account_id) AS (
        SELECT person, account_id FROM inquiries AS i
        WHERE account_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM inquiries
            WHERE person = i.person AND account_id = i.account_id AND inquiry_id < i.inquiry_id)
        UNION ALL
        SELECT reference_id, account_id FROM events AS e
        WHERE reference_id IS NOT NULL AND object_type = 'account'
          AND NOT EXISTS (SELECT 1 FROM inquiries
            WHERE person = e.reference_id AND account_id = e.account_id)
          AND NOT EXISTS (SELECT 1 FROM events AS x WHERE x.reference_id = e.reference_id
            AND x.account_id = e.account_id AND x.object_type = 'account' AND x.rowid < e.rowid)
    )
    SELECT i.person AS reference_id, e.created_at AS event_at, e.name AS event_name,
           e.event_id, e.inquiry_id, e.account_id, e.received_at, e.state
    FROM inquiries AS i JOIN events AS e ON e.inquiry_id = i.inquiry_id
    UNION ALL
    SELECT e.reference_id, e.created_at, e.name,
           e.event_id, e.inquiry_id, e.account_id, e.received_at, e.state
    FROM events AS e
    WHERE e.reference_id IS NOT NULL
      AND NOT EXISTS (SELECT 1 FROM inquiries WHERE inquiry_id = e.inquiry_id)
    UNION ALL
    SELECT a.person, e.created_at, e.name,
           e.event_id, e.inquiry_id, e.account_id, e.received_at, e.state
    FROM accounts AS a JOIN events AS e ON e.account_id = a.account_id
    WHERE e.reference_id IS NULL AND a.person <> a.account_id
      AND NOT EXISTS (SELECT 1 FROM inquiries WHERE inquiry_id = e.inquiry_id)
    UNION ALL
    SELECT e.account_id, e.created_at, e.name,
           e.event_id, e.inquiry_id, e.account_id, e.received_at, e.state
    FROM events AS e
    WHERE e.account_id IS NOT NULL AND e.reference_id IS NULL
      AND NOT EXISTS (SELECT 1 FROM inquiries WHERE inquiry_id = e.inquiry_id)
    UNION ALL
    SELECT e.inquiry_id, e.created_at, e.name,
           e.event_id, e.inquiry_id, e.account_id, e.received_at, e.state
    FROM events AS e
    WHERE e.inquiry_id IS NOT NULL AND e.account_id IS NULL AND e.reference_id IS NULL
      AND NOT EXISTS (SELECT 1 FROM inquiries WHERE inquiry_id = e.inquiry_id)
    ORDER BY 1, 2, 4;

-- Events whose handler failed: healed by Persona's redelivery or by `flask replay`.
CREATE VIEW IF NOT EXISTS failed_events AS
    SELECT rowid AS position, event_id, name, created_at, received_at, attempt, error,
           inquiry_id, account_id, reference_id
    FROM events WHERE state = 'failed';

-- How many people stand where.
CREATE VIEW IF NOT EXISTS status_counts AS
    SELECT status, count(*) AS people FROM kyc_status GROUP BY status;

PRAGMA user_version = 1;
