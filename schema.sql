-- The tables of the Persona webhook receiver, as read with: sqlite3 kyc.db
-- Applied when the database is created or migrated; running it again changes nothing.
-- All times are UTC, YYYY-MM-DDTHH:MM:SS.mmmZ, so they sort as text.
--
--   1  the journal      events, mentions, redactions: append-only, all else follows from it
--   2  the rules        statuses, status_rules, hold_rules, kyc_templates: data, joined by the views
--   3  the projections  inquiries, accounts, holds, kyc_status: what the journal comes to by the
--                       rules; each has a view ..._by_the_rules that computes it anew
--   4  views to read    cleared, kyc_status_by_template, kyc_timeline, journal, failed_events,
--                       status_counts


-- 1. The journal ---------------------------------------------------------------------------

-- One row per event, in order of arrival. Its rowid is its position: from 1 on, without gaps.
CREATE TABLE IF NOT EXISTS events (
    event_id      TEXT NOT NULL PRIMARY KEY,  -- Persona's evt_..., or sha256:<hex> of an unreadable body
    name          TEXT NOT NULL,  -- inquiry.approved, report/watchlist.matched ...
    created_at    TEXT NOT NULL,  -- when Persona created it
    received_at   TEXT NOT NULL,  -- when it was stored
    object_type   TEXT,           -- inquiry, verification/government-id ...
    object_id     TEXT,
    object_status TEXT,           -- the object's own status, as sent
    inquiry_id    TEXT,           -- of the object, or the only one in its relationships
    account_id    TEXT,           -- likewise
    reference_id  TEXT,           -- your ID of the person; NULL for a transaction, which has its own
    template_id   TEXT,           -- of an inquiry: its inquiry template, itmpl_...
    source        TEXT NOT NULL CHECK (source IN ('webhook', 'api', 'operator')),
    signed_by     TEXT,           -- fingerprint of the secret that matched; NULL unless a webhook
    attempt       INTEGER,        -- Persona-Webhook-Attempts-Made of the delivery that was stored
    body_sha256   TEXT NOT NULL,  -- hex, of the bytes as received; outlives the body
    state         TEXT NOT NULL CHECK (state IN ('pending', 'processed', 'failed', 'unrecognized')),
    error         TEXT,           -- why a handler failed, and where
    redacted_at   TEXT,           -- when the body was removed
    body          ANY             -- the exact body: TEXT when it is UTF-8, else BLOB
) STRICT;

CREATE INDEX IF NOT EXISTS events_by_inquiry
    ON events (inquiry_id, created_at, event_id) WHERE inquiry_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_by_account
    ON events (account_id) WHERE account_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_by_reference
    ON events (reference_id) WHERE reference_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_by_object
    ON events (object_id) WHERE object_id IS NOT inquiry_id;
CREATE INDEX IF NOT EXISTS events_naming_account
    ON events (account_id, created_at, event_id)
    WHERE object_type = 'account' AND reference_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_naming_owner
    ON events (reference_id, account_id)
    WHERE object_type = 'account' AND reference_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_unprocessed
    ON events (state) WHERE state <> 'processed';
CREATE INDEX IF NOT EXISTS events_not_delivered
    ON events (source) WHERE source <> 'webhook';

CREATE TRIGGER IF NOT EXISTS events_refuse_delete BEFORE DELETE ON events
BEGIN
    SELECT RAISE(ABORT, 'the journal is append-only: events are never deleted');
END;

-- Another copy of an event is not stored, but fills in what the first copy lacked.
CREATE TRIGGER IF NOT EXISTS events_refuse_replace BEFORE INSERT ON events
WHEN EXISTS (SELECT 1 FROM events WHERE event_id = NEW.event_id)
BEGIN
    UPDATE events SET
        object_status = COALESCE(object_status, NEW.object_status),
        inquiry_id = COALESCE(inquiry_id, NEW.inquiry_id),
        account_id = COALESCE(account_id, NEW.account_id),
        reference_id = COALESCE(reference_id, NEW.reference_id),
        template_id = COALESCE(template_id, NEW.template_id)
    WHERE event_id = NEW.event_id AND (
        (object_status IS NULL AND NEW.object_status IS NOT NULL)
        OR (inquiry_id IS NULL AND NEW.inquiry_id IS NOT NULL)
        OR (account_id IS NULL AND NEW.account_id IS NOT NULL)
        OR (reference_id IS NULL AND NEW.reference_id IS NOT NULL)
        OR (template_id IS NULL AND NEW.template_id IS NOT NULL));
    SELECT RAISE(IGNORE);
END;

CREATE TRIGGER IF NOT EXISTS events_refuse_update BEFORE UPDATE OF
    event_id, name, created_at, received_at, object_type, object_id,
    source, signed_by, attempt, body_sha256 ON events
BEGIN
    SELECT RAISE(ABORT, 'the journal is append-only: only state, error, redaction and missing IDs may change');
END;

CREATE TRIGGER IF NOT EXISTS events_refuse_rewrite BEFORE UPDATE ON events
WHEN NEW.rowid IS NOT OLD.rowid
    OR (NEW.body IS NOT OLD.body AND NEW.body IS NOT NULL)
    OR (OLD.redacted_at IS NOT NULL AND NEW.redacted_at IS NULL)
    OR NEW.object_status IS NOT COALESCE(OLD.object_status, NEW.object_status)
    OR NEW.inquiry_id IS NOT COALESCE(OLD.inquiry_id, NEW.inquiry_id)
    OR NEW.account_id IS NOT COALESCE(OLD.account_id, NEW.account_id)
    OR NEW.reference_id IS NOT COALESCE(OLD.reference_id, NEW.reference_id)
    OR NEW.template_id IS NOT COALESCE(OLD.template_id, NEW.template_id)
BEGIN
    SELECT RAISE(ABORT, 'the journal is append-only: a body may only be removed, an ID only added');
END;

-- Further inquiries and accounts that the body of an event names, beyond its columns.
CREATE TABLE IF NOT EXISTS mentions (
    id       TEXT NOT NULL,
    position INTEGER NOT NULL,  -- the event's rowid
    PRIMARY KEY (id, position)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER IF NOT EXISTS mentions_refuse_delete BEFORE DELETE ON mentions
BEGIN
    SELECT RAISE(ABORT, 'mentions are kept: redactions must find them');
END;

CREATE TRIGGER IF NOT EXISTS mentions_refuse_update BEFORE UPDATE ON mentions
BEGIN
    SELECT RAISE(ABORT, 'mentions are kept: redactions must find them');
END;

-- Whose bodies are not kept, until when, and by whose order.
CREATE TABLE IF NOT EXISTS redactions (
    subject_id      TEXT,           -- an inquiry, account, reference, event or other object ID;
                                    -- NULL for a prune, of whatever was old then
    redacted_before TEXT NOT NULL,  -- events created at or before this lose their body, and so do
                                    -- those of the subject that arrive later
    ordered_at      TEXT NOT NULL,
    ordered_by      TEXT NOT NULL,  -- the event of Persona's redaction, or who ran the command
    command         TEXT NOT NULL CHECK (command IN ('event', 'redact', 'prune')),
    reason          TEXT
) STRICT;

CREATE INDEX IF NOT EXISTS redactions_by_subject
    ON redactions (subject_id) WHERE subject_id IS NOT NULL;

CREATE TRIGGER IF NOT EXISTS redactions_refuse_delete BEFORE DELETE ON redactions
BEGIN
    SELECT RAISE(ABORT, 'redactions are kept: events that arrive late must find them');
END;

CREATE TRIGGER IF NOT EXISTS redactions_refuse_update BEFORE UPDATE ON redactions
BEGIN
    SELECT RAISE(ABORT, 'redactions are kept: events that arrive late must find them');
END;

-- Persona's own redactions order one here (page "Model lifecycle").
CREATE TRIGGER IF NOT EXISTS events_order_redaction AFTER INSERT ON events
WHEN NEW.name LIKE '%.redacted' AND NEW.object_id IS NOT NULL
BEGIN
    INSERT INTO redactions (subject_id, redacted_before, ordered_at, ordered_by, command)
    VALUES (NEW.object_id, NEW.created_at, NEW.received_at, NEW.event_id, 'event');
END;

CREATE TRIGGER IF NOT EXISTS redactions_obey AFTER INSERT ON redactions
WHEN NEW.subject_id IS NOT NULL
BEGIN
    INSERT INTO remove_bodies VALUES (NEW.subject_id, NEW.redacted_before, NEW.ordered_at);
END;

-- An event that arrives, or a link that becomes known, after the redaction.
CREATE TRIGGER IF NOT EXISTS events_obey_redactions AFTER INSERT ON events
WHEN EXISTS (SELECT 1 FROM redactions WHERE subject_id IS NOT NULL)
BEGIN
    INSERT INTO obey_redactions VALUES
        (NEW.inquiry_id, NEW.account_id, NEW.reference_id, NEW.object_id, NEW.received_at);
END;

CREATE TRIGGER IF NOT EXISTS events_obey_redactions_when_linked
AFTER UPDATE OF inquiry_id, account_id, reference_id ON events
WHEN EXISTS (SELECT 1 FROM redactions WHERE subject_id IS NOT NULL)
BEGIN
    INSERT INTO obey_redactions VALUES
        (NEW.inquiry_id, NEW.account_id, NEW.reference_id, NEW.object_id, NEW.received_at);
END;

CREATE TRIGGER IF NOT EXISTS mentions_obey_redactions AFTER INSERT ON mentions
WHEN EXISTS (SELECT 1 FROM redactions WHERE subject_id IS NOT NULL)
BEGIN
    INSERT INTO obey_redactions
    SELECT NEW.id, NEW.id, NULL, NULL, received_at FROM events WHERE rowid = NEW.position;
END;

-- A view used as a procedure (an INSERT runs its trigger): obey every redaction that may reach
-- what an event names.
CREATE VIEW IF NOT EXISTS obey_redactions AS
    SELECT '' AS inquiry_id, '' AS account_id, '' AS reference_id, '' AS object_id, '' AS at
    WHERE false;

CREATE TRIGGER IF NOT EXISTS obey_redactions_do INSTEAD OF INSERT ON obey_redactions
BEGIN
    INSERT INTO remove_bodies
    SELECT subject_id, max(redacted_before), NEW.at FROM redactions
    WHERE subject_id IN (
        WITH own_accounts(id) AS (
                SELECT NEW.account_id
                UNION SELECT account_id FROM events WHERE inquiry_id = NEW.inquiry_id),
            own_inquiries(id) AS (
                SELECT NEW.inquiry_id
                UNION SELECT inquiry_id FROM events
                    WHERE account_id IN (SELECT id FROM own_accounts))
        SELECT NEW.inquiry_id UNION SELECT NEW.reference_id UNION SELECT NEW.object_id
        UNION SELECT id FROM own_accounts
        UNION SELECT reference_id FROM events WHERE account_id IN (SELECT id FROM own_accounts)
        UNION SELECT reference_id FROM events WHERE inquiry_id IN (SELECT id FROM own_inquiries))
    GROUP BY subject_id;
END;

-- A view used as a procedure: remove the bodies of a subject's events. An account
-- includes the inquiries that events link to it; a reference ID its inquiries, and its and their
-- accounts with all of theirs; each of them what mentions it, whenever that was created. A case or
-- a transaction may concern several people, so it does not tell whose inquiry or account it names.
CREATE VIEW IF NOT EXISTS remove_bodies AS
    SELECT '' AS subject_id, '' AS redacted_before, '' AS at WHERE false;

CREATE TRIGGER IF NOT EXISTS remove_bodies_do INSTEAD OF INSERT ON remove_bodies
BEGIN
    UPDATE events SET body = NULL, redacted_at = NEW.at,
        error = substr(error, 1, instr(error || ':', ':') - 1)  -- the kind, not the message
    WHERE body IS NOT NULL AND rowid IN (
        WITH own(id) AS (
                SELECT NEW.subject_id
                UNION SELECT account_id FROM events
                    WHERE reference_id = NEW.subject_id AND account_id IS NOT NULL
                UNION SELECT account_id FROM events WHERE account_id IS NOT NULL
                    AND COALESCE(object_type, '') NOT IN ('case', 'transaction')
                    AND inquiry_id IN (
                        SELECT inquiry_id FROM events WHERE reference_id = NEW.subject_id)),
            ids(id) AS (
                SELECT id FROM own
                UNION SELECT inquiry_id FROM events
                    WHERE account_id IN (SELECT id FROM own) AND inquiry_id IS NOT NULL
                    AND COALESCE(object_type, '') NOT IN ('case', 'transaction')
                UNION SELECT inquiry_id FROM events
                    WHERE reference_id = NEW.subject_id AND inquiry_id IS NOT NULL),
            own_events(position, created_at) AS (
                SELECT rowid, created_at FROM events WHERE inquiry_id IN (SELECT id FROM ids)
                UNION SELECT rowid, created_at FROM events WHERE account_id IN (SELECT id FROM ids)
                UNION SELECT rowid, created_at FROM events WHERE reference_id = NEW.subject_id
                UNION SELECT rowid, created_at FROM events WHERE object_id = NEW.subject_id
                    AND object_id IS NOT inquiry_id
                UNION SELECT rowid, created_at FROM events WHERE event_id = NEW.subject_id)
        SELECT position FROM own_events WHERE created_at <= NEW.redacted_before
        UNION SELECT position FROM mentions WHERE id IN (SELECT id FROM ids));
END;


-- 2. The rules -----------------------------------------------------------------------------

-- How statuses compare. Of the events of an inquiry the one with the greatest (stage, time, rank)
-- decides; of the inquiries of a person the one with the greatest (standing, time, rank).
CREATE TABLE IF NOT EXISTS statuses (
    status   TEXT NOT NULL PRIMARY KEY,
    stage    INTEGER NOT NULL,  -- 1 open, 2 outcome, 3 decision
    rank     INTEGER NOT NULL,  -- which one decides when two happened at the same time
    standing INTEGER NOT NULL   -- equals the stage, except expired: 0
) STRICT, WITHOUT ROWID;

INSERT INTO statuses (status, stage, rank, standing) VALUES
    ('expired', 1, 0, 0), ('created', 1, 1, 1), ('pending', 1, 2, 1),
    ('failed', 2, 3, 2), ('completed', 2, 3, 2),
    ('needs_review', 3, 4, 3), ('declined', 3, 5, 3), ('approved', 3, 5, 3)
ON CONFLICT DO NOTHING;

-- Which event sets which status of its inquiry (page "Model lifecycle"); handlers.py may add some.
CREATE TABLE IF NOT EXISTS status_rules (
    name          TEXT NOT NULL,                      -- of the event
    object_status TEXT NOT NULL,                      -- of its object; '' for any
    status        TEXT NOT NULL REFERENCES statuses,
    own           INTEGER NOT NULL DEFAULT 0,         -- 1: added by handlers.py
    PRIMARY KEY (name, object_status, status)
) STRICT, WITHOUT ROWID;

-- No event says that an expired inquiry was resumed: a new session does, or a step in the flow.
INSERT INTO status_rules (name, object_status, status) VALUES
    ('inquiry.created', '', 'created'), ('inquiry.started', '', 'pending'),
    ('inquiry-session.started', '', 'pending'), ('inquiry.transitioned', 'pending', 'pending'),
    ('inquiry.expired', '', 'expired'), ('inquiry.failed', '', 'failed'),
    ('inquiry.completed', '', 'completed'), ('inquiry.marked-for-review', '', 'needs_review'),
    ('inquiry.approved', '', 'approved'), ('inquiry.declined', '', 'declined')
ON CONFLICT DO NOTHING;

-- Which event raises a hold on the person of its object, and which clears it again.
CREATE TABLE IF NOT EXISTS hold_rules (
    name          TEXT NOT NULL,               -- a LIKE pattern, of the event that raises
    object_status TEXT NOT NULL,               -- of its object; '' for any
    cleared_by    TEXT NOT NULL,               -- a LIKE pattern; the newest event decides
    lasting       INTEGER NOT NULL,            -- 0: a later decision on the inquiry clears it, too
    own           INTEGER NOT NULL DEFAULT 0,  -- 1: added by handlers.py
    PRIMARY KEY (name, object_status)
) STRICT, WITHOUT ROWID;

INSERT INTO hold_rules (name, object_status, cleared_by, lasting) VALUES
    ('report/%.matched', '', 'report/%.dismissed', 0), ('kyc.held', '', 'kyc.released', 1)
ON CONFLICT DO NOTHING;

-- The inquiry templates that count for kyc_status: KYC_TEMPLATES. When there are none, all count.
CREATE TABLE IF NOT EXISTS kyc_templates (
    template_id TEXT NOT NULL PRIMARY KEY
) STRICT, WITHOUT ROWID;

-- The rules of handlers.py and KYC_TEMPLATES, as one text: the service compares it at its start.
CREATE TABLE IF NOT EXISTS rules_in_force (
    rules     TEXT NOT NULL,
    projected INTEGER NOT NULL,  -- 1 once a rebuild by these rules has finished
    since     TEXT NOT NULL      -- tells one time that they came into force from another
) STRICT;


-- 3. The projections -----------------------------------------------------------------------

-- One row per inquiry of which a status is known.
CREATE TABLE IF NOT EXISTS inquiries (
    inquiry_id   TEXT NOT NULL PRIMARY KEY,
    person       TEXT NOT NULL,     -- the key of kyc_status, see inquiries_by_the_rules
    reference_id TEXT,              -- the inquiry's own
    account_id   TEXT,
    template_id  TEXT,
    status       TEXT NOT NULL,
    event_id     TEXT NOT NULL,     -- the event that set the status
    event_name   TEXT NOT NULL,
    event_at     TEXT NOT NULL,     -- when Persona created that event
    standing     INTEGER NOT NULL,  -- of the status, as is the rank
    rank         INTEGER NOT NULL
) STRICT;

CREATE INDEX IF NOT EXISTS inquiries_by_person
    ON inquiries (person, standing, event_at, rank, event_id);
CREATE INDEX IF NOT EXISTS inquiries_without_reference
    ON inquiries (account_id) WHERE reference_id IS NULL;

-- Whose account it is, as far as that is known.
CREATE TABLE IF NOT EXISTS accounts (
    account_id   TEXT NOT NULL PRIMARY KEY,
    reference_id TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- The newest event about each object that raised or cleared a hold.
CREATE TABLE IF NOT EXISTS holds (
    object_id    TEXT NOT NULL,
    rule         TEXT NOT NULL,     -- hold_rules: name, and object_status if it has one
    raised       INTEGER NOT NULL,  -- 1: it raises the hold; 0: it clears it
    lasting      INTEGER NOT NULL,
    hold         TEXT NOT NULL,     -- why, in words
    event_id     TEXT NOT NULL,
    event_at     TEXT NOT NULL,
    inquiry_id   TEXT,              -- the person is that of this inquiry, of this account,
    account_id   TEXT,              -- or has this reference ID
    reference_id TEXT,
    PRIMARY KEY (object_id, rule)
) STRICT, WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS holds_by_inquiry ON holds (inquiry_id) WHERE raised = 1;
CREATE INDEX IF NOT EXISTS holds_by_account ON holds (account_id) WHERE raised = 1;
CREATE INDEX IF NOT EXISTS holds_by_reference ON holds (reference_id) WHERE raised = 1;

-- One row per person: where they stand.
CREATE TABLE IF NOT EXISTS kyc_status (
    reference_id TEXT NOT NULL PRIMARY KEY,  -- the reference ID; else the account ID; else the inquiry ID
    status       TEXT NOT NULL,
    hold         TEXT,           -- why they must not be acted on all the same; NULL: nothing
    inquiry_id   TEXT NOT NULL,  -- the inquiry that decides
    account_id   TEXT,
    template_id  TEXT,
    event_id     TEXT NOT NULL,
    event_name   TEXT NOT NULL,
    event_at     TEXT NOT NULL,
    updated_at   TEXT NOT NULL   -- when this row last changed
) STRICT;

-- For who asks what has changed since, who is held, and who is not approved.
CREATE INDEX IF NOT EXISTS kyc_status_by_update ON kyc_status (updated_at, reference_id);
CREATE INDEX IF NOT EXISTS kyc_status_held
    ON kyc_status (updated_at, reference_id) WHERE hold IS NOT NULL;
CREATE INDEX IF NOT EXISTS kyc_status_not_approved
    ON kyc_status (status, updated_at, reference_id) WHERE status <> 'approved';

-- An inquiry's status is that of its deciding event. Its reference ID, account and template are
-- each those of the newest event about the inquiry itself that carries one. Its person is its own
-- reference ID; else that of its account; else the account; else the inquiry.
CREATE VIEW IF NOT EXISTS inquiries_by_the_rules AS
    SELECT i.inquiry_id,
        COALESCE(i.reference_id,
            (SELECT a.reference_id FROM accounts AS a WHERE a.account_id = i.account_id),
            i.account_id, i.inquiry_id) AS person,
        i.reference_id, i.account_id, i.template_id, s.status, d.event_id,
        d.name AS event_name, d.created_at AS event_at, s.standing, s.rank
    FROM (SELECT k.inquiry_id,
            (SELECT e.reference_id FROM events AS e
             WHERE e.inquiry_id = k.inquiry_id AND e.object_type = 'inquiry'
                AND e.reference_id IS NOT NULL
             ORDER BY e.created_at DESC, e.event_id DESC LIMIT 1) AS reference_id,
            (SELECT e.account_id FROM events AS e
             WHERE e.inquiry_id = k.inquiry_id AND e.object_type = 'inquiry'
                AND e.account_id IS NOT NULL
             ORDER BY e.created_at DESC, e.event_id DESC LIMIT 1) AS account_id,
            (SELECT e.template_id FROM events AS e
             WHERE e.inquiry_id = k.inquiry_id AND e.object_type = 'inquiry'
                AND e.template_id IS NOT NULL
             ORDER BY e.created_at DESC, e.event_id DESC LIMIT 1) AS template_id,
            (SELECT e.rowid FROM events AS e
                JOIN status_rules AS r ON r.name = e.name
                    AND (r.object_status = '' OR r.object_status = e.object_status)
                JOIN statuses AS t ON t.status = r.status
             WHERE e.inquiry_id = k.inquiry_id
             ORDER BY t.stage DESC, e.created_at DESC, t.rank DESC, e.event_id DESC
             LIMIT 1) AS deciding
        FROM (SELECT DISTINCT inquiry_id FROM events WHERE inquiry_id IS NOT NULL) AS k) AS i
    JOIN events AS d ON d.rowid = i.deciding
    JOIN statuses AS s ON s.status = (
        SELECT t.status FROM status_rules AS r JOIN statuses AS t ON t.status = r.status
        WHERE r.name = d.name AND (r.object_status = '' OR r.object_status = d.object_status)
        ORDER BY t.stage DESC, t.rank DESC, t.status LIMIT 1);

-- An account's reference ID is that of the newest event about the account that carries one; else
-- that of its inquiry with one of its own that was decided last.
CREATE VIEW IF NOT EXISTS accounts_by_the_rules AS
    SELECT a.account_id, a.reference_id
    FROM (SELECT k.account_id, COALESCE(
            (SELECT e.reference_id FROM events AS e
             WHERE e.account_id = k.account_id AND e.object_type = 'account'
                AND e.reference_id IS NOT NULL
             ORDER BY e.created_at DESC, e.event_id DESC LIMIT 1),
            (SELECT i.reference_id FROM events AS e
                JOIN inquiries AS i ON i.inquiry_id = e.inquiry_id
                    AND i.account_id = e.account_id AND i.reference_id IS NOT NULL
             WHERE e.account_id = k.account_id AND e.object_type = 'inquiry'
             ORDER BY i.event_at DESC, i.event_id DESC LIMIT 1)) AS reference_id
        FROM (SELECT DISTINCT account_id FROM events WHERE account_id IS NOT NULL) AS k) AS a
    WHERE a.reference_id IS NOT NULL;

-- Every event about an object, by the index that finds it.
CREATE VIEW IF NOT EXISTS object_events AS
    SELECT object_id, event_id, name, created_at, object_type, object_status,
        inquiry_id, account_id, reference_id
    FROM events WHERE object_id IS NOT inquiry_id
    UNION ALL
    SELECT inquiry_id, event_id, name, created_at, object_type, object_status,
        inquiry_id, account_id, reference_id
    FROM events WHERE object_id = inquiry_id;

-- Every event that raises or clears a hold, and by which rule. One without an object status does
-- neither when the rule requires one.
CREATE VIEW IF NOT EXISTS hold_events AS
    SELECT e.object_id,
        r.name || CASE r.object_status WHEN '' THEN '' ELSE ' ' END || r.object_status AS rule,
        CASE WHEN e.name LIKE r.name AND r.object_status IN ('', e.object_status)
            THEN 1 ELSE 0 END AS raised,
        r.lasting,
        e.name || ': ' || CASE WHEN e.object_type LIKE 'report/%' OR e.object_status IS NULL
            THEN e.object_id ELSE e.object_status END AS hold,
        e.event_id, e.created_at AS event_at, e.inquiry_id, e.account_id, e.reference_id
    FROM object_events AS e JOIN hold_rules AS r ON e.name LIKE r.name OR e.name LIKE r.cleared_by
    WHERE e.object_id IS NOT NULL AND (r.object_status = '' OR e.object_status IS NOT NULL);

-- The newest of them decides; each ID is taken from the newest that has it.
CREATE VIEW IF NOT EXISTS holds_by_the_rules AS
    SELECT object_id, rule, raised, lasting, hold, event_id, event_at,
        inquiry_id, account_id, reference_id
    FROM (SELECT h.object_id, h.rule, h.raised, h.lasting, h.hold, h.event_id, h.event_at,
            row_number() OVER (PARTITION BY h.object_id, h.rule
                ORDER BY h.event_at DESC, h.event_id DESC) AS age,
            first_value(h.inquiry_id) OVER (PARTITION BY h.object_id, h.rule
                ORDER BY h.inquiry_id IS NULL, h.event_at DESC, h.event_id DESC) AS inquiry_id,
            first_value(h.account_id) OVER (PARTITION BY h.object_id, h.rule
                ORDER BY h.account_id IS NULL, h.event_at DESC, h.event_id DESC) AS account_id,
            first_value(h.reference_id) OVER (PARTITION BY h.object_id, h.rule
                ORDER BY h.reference_id IS NULL, h.event_at DESC, h.event_id DESC) AS reference_id
        FROM hold_events AS h) AS newest
    WHERE age = 1;

-- A person's status is that of their best inquiry among those that count: a decision before an
-- outcome, before an open one, before an expired one; among equals the newest. A hold is shown
-- unless the decision is as new as what raised it: then it was decided with that in sight.
-- (Without any hold, any_hold is empty and the four look-ups are skipped.)
CREATE VIEW IF NOT EXISTS kyc_status_by_the_rules AS
    SELECT p.person AS reference_id, i.status,
        (SELECT h.hold FROM (SELECT 1 FROM holds WHERE raised = 1 LIMIT 1) AS any_hold
            CROSS JOIN (
                SELECT h.hold, h.event_at, h.event_id, h.lasting FROM inquiries AS n
                    JOIN holds AS h ON h.inquiry_id = n.inquiry_id AND h.raised = 1
                    WHERE n.person = p.person
                UNION ALL SELECT h.hold, h.event_at, h.event_id, h.lasting FROM inquiries AS n
                    JOIN holds AS h ON h.account_id = n.account_id AND h.raised = 1
                    WHERE n.person = p.person
                UNION ALL SELECT h.hold, h.event_at, h.event_id, h.lasting FROM events AS e
                    JOIN accounts AS a ON a.account_id = e.account_id
                        AND a.reference_id = e.reference_id
                    JOIN holds AS h ON h.account_id = a.account_id AND h.raised = 1
                    WHERE e.reference_id = p.person AND e.object_type = 'account'
                UNION ALL SELECT h.hold, h.event_at, h.event_id, h.lasting FROM holds AS h
                    WHERE h.reference_id = p.person AND h.raised = 1) AS h
         WHERE h.lasting = 1 OR i.standing < 3 OR h.event_at > i.event_at
         ORDER BY h.event_at DESC, h.event_id DESC LIMIT 1) AS hold,
        i.inquiry_id, i.account_id, i.template_id, i.event_id, i.event_name, i.event_at
    FROM (SELECT DISTINCT person FROM inquiries) AS p
    JOIN inquiries AS i ON i.inquiry_id = (
        SELECT n.inquiry_id FROM inquiries AS n
        WHERE n.person = p.person AND (NOT EXISTS (SELECT 1 FROM kyc_templates)
            OR n.template_id IN (SELECT t.template_id FROM kyc_templates AS t))
        ORDER BY n.standing DESC, n.event_at DESC, n.rank DESC, n.event_id DESC LIMIT 1);


-- 4. Views to read -------------------------------------------------------------------------

-- Whom to act on: approved, and nothing stands against it.
CREATE VIEW IF NOT EXISTS cleared AS
    SELECT * FROM kyc_status WHERE status = 'approved' AND hold IS NULL;

-- Where each person stands in each inquiry template, whether it counts for kyc_status or not.
CREATE VIEW IF NOT EXISTS kyc_status_by_template AS
    SELECT p.person AS reference_id, p.template_id, i.status, i.inquiry_id, i.account_id,
        i.event_id, i.event_name, i.event_at
    FROM (SELECT DISTINCT person, template_id FROM inquiries) AS p
    JOIN inquiries AS i ON i.inquiry_id = (
        SELECT n.inquiry_id FROM inquiries AS n
        WHERE n.person = p.person AND n.template_id IS p.template_id
        ORDER BY n.standing DESC, n.event_at DESC, n.rank DESC, n.event_id DESC LIMIT 1);

-- Every event of a person, in order:
--   SELECT * FROM kyc_timeline WHERE reference_id = 'user-42';
-- An event belongs to the person of its inquiry; else to its reference ID; else to the person of
-- its account; else to its account ID; else to its inquiry ID.
CREATE VIEW IF NOT EXISTS kyc_timeline AS
    SELECT i.person AS reference_id, e.created_at AS event_at, e.name AS event_name, e.event_id,
        e.inquiry_id, e.account_id, e.received_at, e.state, e.rowid AS position
    FROM inquiries AS i JOIN events AS e ON e.inquiry_id = i.inquiry_id
    UNION ALL
    SELECT e.reference_id, e.created_at, e.name, e.event_id,
        e.inquiry_id, e.account_id, e.received_at, e.state, e.rowid
    FROM events AS e
    WHERE e.reference_id IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM inquiries AS i WHERE i.inquiry_id = e.inquiry_id)
    UNION ALL
    SELECT o.reference_id, e.created_at, e.name, e.event_id,
        e.inquiry_id, e.account_id, e.received_at, e.state, e.rowid
    FROM (SELECT DISTINCT reference_id, account_id FROM events
            WHERE object_type = 'account' AND reference_id IS NOT NULL) AS o
        JOIN accounts AS a ON a.account_id = o.account_id AND a.reference_id = o.reference_id
        JOIN events AS e ON e.account_id = o.account_id
    WHERE e.reference_id IS NULL
        AND NOT EXISTS (SELECT 1 FROM inquiries AS i WHERE i.inquiry_id = e.inquiry_id)
    UNION ALL
    SELECT o.person, e.created_at, e.name, e.event_id,
        e.inquiry_id, e.account_id, e.received_at, e.state, e.rowid
    FROM (SELECT DISTINCT person, account_id FROM inquiries WHERE account_id IS NOT NULL) AS o
        JOIN accounts AS a ON a.account_id = o.account_id AND a.reference_id = o.person
        JOIN events AS e ON e.account_id = o.account_id
    WHERE e.reference_id IS NULL
        AND NOT EXISTS (SELECT 1 FROM inquiries AS i WHERE i.inquiry_id = e.inquiry_id)
        AND NOT EXISTS (SELECT 1 FROM events AS n WHERE n.account_id = o.account_id
            AND n.object_type = 'account' AND n.reference_id = o.person)
    UNION ALL
    SELECT e.account_id, e.created_at, e.name, e.event_id,
        e.inquiry_id, e.account_id, e.received_at, e.state, e.rowid
    FROM events AS e
    WHERE e.account_id IS NOT NULL AND e.reference_id IS NULL
        AND NOT EXISTS (SELECT 1 FROM inquiries AS i WHERE i.inquiry_id = e.inquiry_id)
        AND NOT EXISTS (SELECT 1 FROM accounts AS a WHERE a.account_id = e.account_id)
    UNION ALL
    SELECT e.inquiry_id, e.created_at, e.name, e.event_id,
        e.inquiry_id, e.account_id, e.received_at, e.state, e.rowid
    FROM events AS e
    WHERE e.inquiry_id IS NOT NULL AND e.account_id IS NULL AND e.reference_id IS NULL
        AND NOT EXISTS (SELECT 1 FROM inquiries AS i WHERE i.inquiry_id = e.inquiry_id)
    ORDER BY 1, 2, 4;

-- Every event with its person, without the body.
CREATE VIEW IF NOT EXISTS journal AS
    SELECT rowid AS position, received_at, created_at, name, state, event_id, source, object_type,
        object_id, object_status, inquiry_id, account_id, reference_id, template_id,
        COALESCE((SELECT i.person FROM inquiries AS i WHERE i.inquiry_id = events.inquiry_id),
            reference_id,
            (SELECT a.reference_id FROM accounts AS a WHERE a.account_id = events.account_id),
            account_id, inquiry_id) AS person,
        signed_by, attempt, error, body_sha256, redacted_at
    FROM events;

-- Events whose handlers failed or have not run: healed by Persona's redelivery or `flask replay`.
CREATE VIEW IF NOT EXISTS failed_events AS
    SELECT rowid AS position, event_id, name, created_at, received_at, attempt, state, error,
        inquiry_id, account_id, reference_id
    FROM events WHERE state <> 'processed' AND state <> 'unrecognized';

-- How many people stand where.
CREATE VIEW IF NOT EXISTS status_counts AS
    SELECT status, count(*) AS people, count(hold) AS held FROM kyc_status GROUP BY status;

PRAGMA user_version = 2;
