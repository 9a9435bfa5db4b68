BEGIN TRANSACTION;
CREATE TABLE accounts (
    account_id   TEXT NOT NULL PRIMARY KEY,
    reference_id TEXT NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO "accounts" VALUES('act_1','user-1');
INSERT INTO "accounts" VALUES('act_2','user-2');
INSERT INTO "accounts" VALUES('act_6','user-6');
CREATE TABLE events (
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
INSERT INTO "events" VALUES('evt_01','inquiry.created','2026-05-01T08:00:00.000Z','2026-05-01T08:00:00.000Z','inquiry','inq_1','created','inq_1',NULL,'user-1','itmpl_TrialTemplateOfThisReceiver','api',NULL,1,'51edc5eac8d0c10efb538f6553ced1b3e83867d927a3e593833ff8881861b5fa','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_01", "attributes": {"name": "inquiry.created", "payload": {"data": {"type": "inquiry", "id": "inq_1", "attributes": {"status": "created", "reference-id": "user-1", "created-at": "2026-05-01T08:00:00.000Z", "updated-at": "2026-05-01T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": null, "failed-at": null, "expired-at": null, "marked-for-review-at": null, "decisioned-at": null, "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-01T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_02','inquiry.started','2026-05-02T08:00:00.000Z','2026-05-02T08:00:00.000Z','inquiry','inq_1','pending','inq_1',NULL,'user-1','itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'9d4ed30280ab10567b318bd4fb8bec785c294484138b96b240d48a5ecec13525','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_02", "attributes": {"name": "inquiry.started", "payload": {"data": {"type": "inquiry", "id": "inq_1", "attributes": {"status": "pending", "reference-id": "user-1", "created-at": "2026-05-02T08:00:00.000Z", "updated-at": "2026-05-02T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": "2026-05-02T08:00:00.000Z", "completed-at": null, "failed-at": null, "expired-at": null, "marked-for-review-at": null, "decisioned-at": null, "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-02T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_03','verification/selfie.passed','2026-05-03T08:00:00.000Z','2026-05-03T08:00:00.000Z','verification/selfie','ver_1','passed','inq_1',NULL,NULL,NULL,'webhook','2eb6f8a2',1,'fbc43f976d19c234c207515e98f5788071206b105d54913311a6cc17e7324bce','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_03", "attributes": {"name": "verification/selfie.passed", "payload": {"data": {"type": "verification/selfie", "id": "ver_1", "attributes": {"status": "passed", "reference-id": null, "created-at": "2026-05-03T08:00:00.000Z", "updated-at": "2026-05-03T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "country-code": "US", "checks": [{"name": "id_check_0", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_1", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_2", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_3", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_4", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_5", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_6", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_7", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_8", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}], "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}, "passed-at": "2026-05-03T08:00:00.000Z"}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": {"type": "inquiry", "id": "inq_1"}}}}, "included": []}, "created-at": "2026-05-03T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_04','inquiry.completed','2026-05-04T08:00:00.000Z','2026-05-04T08:00:00.000Z','inquiry','inq_1','completed','inq_1',NULL,'user-1','itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'4d2ba1f93dd439ea69a3cccf598f8f052df254fd6cbb48158ce46cbb9eb6adbf','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_04", "attributes": {"name": "inquiry.completed", "payload": {"data": {"type": "inquiry", "id": "inq_1", "attributes": {"status": "completed", "reference-id": "user-1", "created-at": "2026-05-04T08:00:00.000Z", "updated-at": "2026-05-04T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": "2026-05-04T08:00:00.000Z", "failed-at": null, "expired-at": null, "marked-for-review-at": null, "decisioned-at": null, "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-04T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_05','inquiry.approved','2026-05-05T08:00:00.000Z','2026-05-05T08:00:00.000Z','inquiry','inq_1','approved','inq_1','act_1','user-1','itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'f4687aacc205a83af38702aa6602de6f6d6391a497b21105e5b6633563b86c9e','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_05", "attributes": {"name": "inquiry.approved", "payload": {"data": {"type": "inquiry", "id": "inq_1", "attributes": {"status": "approved", "reference-id": "user-1", "created-at": "2026-05-05T08:00:00.000Z", "updated-at": "2026-05-05T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": null, "failed-at": null, "expired-at": null, "marked-for-review-at": null, "decisioned-at": "2026-05-05T08:00:00.000Z", "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": {"type": "account", "id": "act_1"}}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-05T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_06','report/watchlist.matched','2026-05-06T08:00:00.000Z','2026-05-06T08:00:00.000Z','report/watchlist','rep_1','ready','inq_1',NULL,NULL,NULL,'webhook','2eb6f8a2',1,'fc831cc23f73f90f21f79049afe4fc5959eb5bbd6b8915d90bc80d418b1bdbca','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_06", "attributes": {"name": "report/watchlist.matched", "payload": {"data": {"type": "report/watchlist", "id": "rep_1", "attributes": {"status": "ready", "reference-id": null, "created-at": "2026-05-06T08:00:00.000Z", "updated-at": "2026-05-06T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "country-code": "US", "checks": [{"name": "id_check_0", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_1", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_2", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_3", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_4", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_5", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_6", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_7", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_8", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}], "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}, "matched-at": "2026-05-06T08:00:00.000Z"}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": {"type": "inquiry", "id": "inq_1"}}}}, "included": []}, "created-at": "2026-05-06T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_07','inquiry.declined','2026-05-07T08:00:00.000Z','2026-05-07T08:00:00.000Z','inquiry','inq_2','declined','inq_2','act_2',NULL,'itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'fd495c77b00c0b37d21e9e776e513a67dab97c8096a2d577e1e948a81c5937c4','failed','KeyError: ''x'' (handlers.py:5 open_account)',NULL,'{"data": {"type": "event", "id": "evt_07", "attributes": {"name": "inquiry.declined", "payload": {"data": {"type": "inquiry", "id": "inq_2", "attributes": {"status": "declined", "reference-id": null, "created-at": "2026-05-07T08:00:00.000Z", "updated-at": "2026-05-07T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": null, "failed-at": null, "expired-at": null, "marked-for-review-at": null, "decisioned-at": "2026-05-07T08:00:00.000Z", "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": {"type": "account", "id": "act_2"}}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-07T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_08','account.created','2026-05-08T08:00:00.000Z','2026-05-08T08:00:00.000Z','account','act_2','Default',NULL,'act_2','user-2',NULL,'webhook','2eb6f8a2',1,'5dd6868e7b30b24d6c1946d7af04893836c9105a73a955fc6464e6790d599e84','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_08", "attributes": {"name": "account.created", "payload": {"data": {"type": "account", "id": "act_2", "attributes": {"account-status": "Default", "reference-id": "user-2", "created-at": "2026-05-08T08:00:00.000Z", "updated-at": "2026-05-08T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "account-type-name": "User", "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": {"type": "account", "id": "act_2"}}, "transaction": {"data": null}, "inquiry": {"data": null}}}, "included": []}, "created-at": "2026-05-08T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_09','inquiry.marked-for-review','2026-05-09T08:00:00.000Z','2026-05-09T08:00:00.000Z','inquiry','inq_3','needs_review','inq_3','act_3',NULL,'itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'40dbee76ce7cc30b821d4a5f760df5c4907bdc3cac8ddc5ea7b9332a19dbcbaa','pending',NULL,NULL,'{"data": {"type": "event", "id": "evt_09", "attributes": {"name": "inquiry.marked-for-review", "payload": {"data": {"type": "inquiry", "id": "inq_3", "attributes": {"status": "needs_review", "reference-id": null, "created-at": "2026-05-09T08:00:00.000Z", "updated-at": "2026-05-09T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": null, "failed-at": null, "expired-at": null, "marked-for-review-at": "2026-05-09T08:00:00.000Z", "decisioned-at": null, "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": {"type": "account", "id": "act_3"}}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-09T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_10','inquiry.expired','2026-05-10T08:00:00.000Z','2026-05-10T08:00:00.000Z','inquiry','inq_4','expired','inq_4',NULL,'user-4','itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'9d0d61e1913b85615766605c02b241b4221b502ebc3356eba69ce6bfb07e1e09','processed',NULL,'2026-05-31T08:00:00.000Z',NULL);
INSERT INTO "events" VALUES('evt_11','inquiry-session.started','2026-05-11T08:00:00.000Z','2026-05-11T08:00:00.000Z','inquiry-session','iqse_4','pending','inq_4',NULL,NULL,NULL,'webhook','2eb6f8a2',1,'16bd0d47b17a7d570b1bd3f79b7041ad10989ab43fd945f271e1068a08fd4a36','processed',NULL,'2026-05-31T08:00:00.000Z',NULL);
INSERT INTO "events" VALUES('evt_12','inquiry.failed','2026-05-12T08:00:00.000Z','2026-05-12T08:00:00.000Z','inquiry','inq_5','failed','inq_5',NULL,'user-5','itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'5cdb9f629873f5b523017a987b48c2129ef7af4b7256011e965ee211b95a38a9','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_12", "attributes": {"name": "inquiry.failed", "payload": {"data": {"type": "inquiry", "id": "inq_5", "attributes": {"status": "failed", "reference-id": "user-5", "created-at": "2026-05-12T08:00:00.000Z", "updated-at": "2026-05-12T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": null, "failed-at": "2026-05-12T08:00:00.000Z", "expired-at": null, "marked-for-review-at": null, "decisioned-at": null, "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-12T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_13','inquiry.transitioned','2026-05-13T08:00:00.000Z','2026-05-13T08:00:00.000Z','inquiry','inq_6','pending','inq_6',NULL,'user-5','itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'1cd2de042901efb4903580711f73ac514da51be0c394c42d164aa441a5da6083','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_13", "attributes": {"name": "inquiry.transitioned", "payload": {"data": {"type": "inquiry", "id": "inq_6", "attributes": {"status": "pending", "reference-id": "user-5", "created-at": "2026-05-13T08:00:00.000Z", "updated-at": "2026-05-13T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": null, "failed-at": null, "expired-at": null, "marked-for-review-at": null, "decisioned-at": null, "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}, "transitioned-at": "2026-05-13T08:00:00.000Z"}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-13T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_14','inquiry.approved','2026-05-14T08:00:00.000Z','2026-05-14T08:00:00.000Z','inquiry','inq_7','approved','inq_7','act_6','user-6','itmpl_2','webhook','2eb6f8a2',1,'04844ac49cdf332276f64cac6099261f8f56c563d313714342464de9f191e958','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_14", "attributes": {"name": "inquiry.approved", "payload": {"data": {"type": "inquiry", "id": "inq_7", "attributes": {"status": "approved", "reference-id": "user-6", "created-at": "2026-05-14T08:00:00.000Z", "updated-at": "2026-05-14T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": null, "failed-at": null, "expired-at": null, "marked-for-review-at": null, "decisioned-at": "2026-05-14T08:00:00.000Z", "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": {"type": "account", "id": "act_6"}}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_2"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-14T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_15','report/adverse-media.matched','2026-05-15T08:00:00.000Z','2026-05-15T08:00:00.000Z','report/adverse-media','rep_6','ready',NULL,'act_6',NULL,NULL,'webhook','2eb6f8a2',1,'341519b8bf83534bda989c5caae6a176699475b05682dda2563402cec6767857','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_15", "attributes": {"name": "report/adverse-media.matched", "payload": {"data": {"type": "report/adverse-media", "id": "rep_6", "attributes": {"status": "ready", "reference-id": null, "created-at": "2026-05-15T08:00:00.000Z", "updated-at": "2026-05-15T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "country-code": "US", "checks": [{"name": "id_check_0", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_1", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_2", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_3", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_4", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_5", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_6", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_7", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_8", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}], "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}, "matched-at": "2026-05-15T08:00:00.000Z"}, "relationships": {"account": {"data": {"type": "account", "id": "act_6"}}, "transaction": {"data": null}, "inquiry": {"data": null}}}, "included": []}, "created-at": "2026-05-15T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_16','report/adverse-media.dismissed','2026-05-16T08:00:00.000Z','2026-05-16T08:00:00.000Z','report/adverse-media','rep_6','ready',NULL,'act_6',NULL,NULL,'webhook','2eb6f8a2',1,'0e3b0c35869088b38e46cd52523bd07deff9ffdc08ffc4a120ed8488565c8114','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_16", "attributes": {"name": "report/adverse-media.dismissed", "payload": {"data": {"type": "report/adverse-media", "id": "rep_6", "attributes": {"status": "ready", "reference-id": null, "created-at": "2026-05-16T08:00:00.000Z", "updated-at": "2026-05-16T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "country-code": "US", "checks": [{"name": "id_check_0", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_1", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_2", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_3", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_4", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_5", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_6", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_7", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_8", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}], "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}, "dismissed-at": "2026-05-16T08:00:00.000Z"}, "relationships": {"account": {"data": {"type": "account", "id": "act_6"}}, "transaction": {"data": null}, "inquiry": {"data": null}}}, "included": []}, "created-at": "2026-05-16T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_17','inquiry.approved','2026-05-17T08:00:00.000Z','2026-05-17T08:00:00.000Z','inquiry','inq_8','approved','inq_8',NULL,'user-7','itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'fd609768ae279b3c5453a2d9380bebd719a595060fb222df5360638a91669ddf','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_17", "attributes": {"name": "inquiry.approved", "payload": {"data": {"type": "inquiry", "id": "inq_8", "attributes": {"status": "approved", "reference-id": "user-7", "created-at": "2026-05-17T08:00:00.000Z", "updated-at": "2026-05-17T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": null, "failed-at": null, "expired-at": null, "marked-for-review-at": null, "decisioned-at": "2026-05-17T08:00:00.000Z", "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-17T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_18','kyc.held','2026-05-18T08:00:00.000Z','2026-05-18T08:00:00.000Z','kyc','user-7','chargeback, by ops',NULL,NULL,'user-7',NULL,'operator',NULL,1,'3440a568714bcc34699d3a6cc58be7c814159e556848ad264ddf4c433734ec97','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_18", "attributes": {"name": "kyc.held", "payload": {"data": {"type": "kyc", "id": "user-7", "attributes": {"status": "chargeback, by ops", "reference-id": "user-7", "created-at": "2026-05-18T08:00:00.000Z", "updated-at": "2026-05-18T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "country-code": "US", "checks": [{"name": "id_check_0", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_1", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_2", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_3", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_4", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_5", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_6", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_7", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_8", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}], "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}, "held-at": "2026-05-18T08:00:00.000Z"}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}}}, "included": []}, "created-at": "2026-05-18T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_19','kyc.held','2026-05-19T08:00:00.000Z','2026-05-19T08:00:00.000Z','kyc','user-6','call back, by ops',NULL,NULL,'user-6',NULL,'operator',NULL,1,'c617b5dd606e3d4aabfb4ee4b15d7c52bc6eaab9fefcbc484ccbbf3d51fd70d4','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_19", "attributes": {"name": "kyc.held", "payload": {"data": {"type": "kyc", "id": "user-6", "attributes": {"status": "call back, by ops", "reference-id": "user-6", "created-at": "2026-05-19T08:00:00.000Z", "updated-at": "2026-05-19T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "country-code": "US", "checks": [{"name": "id_check_0", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_1", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_2", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_3", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_4", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_5", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_6", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_7", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_8", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}], "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}, "held-at": "2026-05-19T08:00:00.000Z"}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}}}, "included": []}, "created-at": "2026-05-19T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_20','kyc.released','2026-05-20T08:00:00.000Z','2026-05-20T08:00:00.000Z','kyc','user-6','done, by ops',NULL,NULL,'user-6',NULL,'operator',NULL,1,'4bb21f6640efcb576c50c76f605ad166f7fbb34ac8df1e36f56412c47a601871','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_20", "attributes": {"name": "kyc.released", "payload": {"data": {"type": "kyc", "id": "user-6", "attributes": {"status": "done, by ops", "reference-id": "user-6", "created-at": "2026-05-20T08:00:00.000Z", "updated-at": "2026-05-20T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "country-code": "US", "checks": [{"name": "id_check_0", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_1", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_2", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_3", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_4", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_5", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_6", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_7", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_8", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}], "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}, "released-at": "2026-05-20T08:00:00.000Z"}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}}}, "included": []}, "created-at": "2026-05-20T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_21','inquiry.created','2026-05-21T08:00:00.000Z','2026-05-21T08:00:00.000Z','inquiry','inq_9','created','inq_9',NULL,'user-8','itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'8cf7a0fb156880d70035fac61a959864f5fcbe4e0a4ef28116b6e710e3d42033','processed',NULL,'2026-05-22T08:00:00.000Z',NULL);
INSERT INTO "events" VALUES('evt_22','inquiry.redacted','2026-05-22T08:00:00.000Z','2026-05-22T08:00:00.000Z','inquiry','inq_9','approved','inq_9',NULL,'user-8','itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'077d002dad26c06ff0ee26f099cc7e3677cd3b8ae097f022b844ca6679b1b998','processed',NULL,'2026-05-22T08:00:00.000Z',NULL);
INSERT INTO "events" VALUES('evt_23','case.created','2026-05-23T08:00:00.000Z','2026-05-23T08:00:00.000Z','case','case_1','created','inq_9',NULL,NULL,NULL,'webhook','2eb6f8a2',1,'8b47ff268a3f34b9897577a05d08ecdad4236ac9060c905e7026504d694e3fb5','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_23", "attributes": {"name": "case.created", "payload": {"data": {"type": "case", "id": "case_1", "attributes": {"status": "created", "reference-id": null, "created-at": "2026-05-23T08:00:00.000Z", "updated-at": "2026-05-23T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "country-code": "US", "checks": [{"name": "id_check_0", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_1", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_2", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_3", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_4", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_5", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_6", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_7", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_8", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}], "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": {"type": "inquiry", "id": "inq_9"}}}}, "included": []}, "created-at": "2026-05-23T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_24','workflow-run.created','2026-05-24T08:00:00.000Z','2026-05-24T08:00:00.000Z','workflow-run','wfr_1','created',NULL,NULL,NULL,NULL,'webhook','2eb6f8a2',1,'5d663b85e7135bd461462953f17022e48288398b34e2e0ff7cbd8c3899b6d2d4','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_24", "attributes": {"name": "workflow-run.created", "payload": {"data": {"type": "workflow-run", "id": "wfr_1", "attributes": {"status": "created", "reference-id": null, "created-at": "2026-05-24T08:00:00.000Z", "updated-at": "2026-05-24T08:00:00.000Z", "redacted-at": null, "tags": [], "note": "started by inq_3", "country-code": "US", "checks": [{"name": "id_check_0", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_1", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_2", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_3", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_4", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_5", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_6", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_7", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_8", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}], "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}}}, "included": []}, "created-at": "2026-05-24T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_25','transaction.created','2026-05-25T08:00:00.000Z','2026-05-25T08:00:00.000Z','transaction','txn_1','created',NULL,NULL,NULL,NULL,'webhook','2eb6f8a2',1,'398d2a33f98d112cbf214648173355efa6f7005d6ff66185182cb05e6c1796cb','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_25", "attributes": {"name": "transaction.created", "payload": {"data": {"type": "transaction", "id": "txn_1", "attributes": {"status": "created", "reference-id": "user-9", "created-at": "2026-05-25T08:00:00.000Z", "updated-at": "2026-05-25T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "country-code": "US", "checks": [{"name": "id_check_0", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_1", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_2", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_3", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_4", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_5", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_6", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_7", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}, {"name": "id_check_8", "status": "passed", "reasons": [], "requirement": "required", "metadata": {}}], "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}}}, "included": []}, "created-at": "2026-05-25T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_26','account.status-updated','2026-05-26T08:00:00.000Z','2026-05-26T08:00:00.000Z','account','act_1','Frozen',NULL,'act_1',NULL,NULL,'webhook','2eb6f8a2',1,'fcd2eca257a3afb6eefc94ef0c37d164360309fa09b91480e75f1ea986b25ba9','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_26", "attributes": {"name": "account.status-updated", "payload": {"data": {"type": "account", "id": "act_1", "attributes": {"account-status": "Frozen", "reference-id": null, "created-at": "2026-05-26T08:00:00.000Z", "updated-at": "2026-05-26T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "account-type-name": "User", "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}, "status-updated-at": "2026-05-26T08:00:00.000Z"}, "relationships": {"account": {"data": {"type": "account", "id": "act_1"}}, "transaction": {"data": null}, "inquiry": {"data": null}}}, "included": []}, "created-at": "2026-05-26T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_27','inquiry.approved','2026-05-27T08:00:00.000Z','2026-05-27T08:00:00.000Z','inquiry','inq_10','approved','inq_10',NULL,NULL,'itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'e8511fad5a61a3b876cf49b6752f8f9d46ec6435fd02b6dea30d62bc32823b67','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_27", "attributes": {"name": "inquiry.approved", "payload": {"data": {"type": "inquiry", "id": "inq_10", "attributes": {"status": "approved", "reference-id": null, "created-at": "2026-05-27T08:00:00.000Z", "updated-at": "2026-05-27T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": null, "failed-at": null, "expired-at": null, "marked-for-review-at": null, "decisioned-at": "2026-05-27T08:00:00.000Z", "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-27T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('evt_28','inquiry.completed','2026-05-28T08:00:00.000Z','2026-05-28T08:00:00.000Z','inquiry','inq_11','completed','inq_11',NULL,'user-9','itmpl_TrialTemplateOfThisReceiver','webhook','2eb6f8a2',1,'477f8fcdda4875e5725bfd76b6cb4dd136cd91908280933e410e905a71e32a3a','processed',NULL,NULL,'{"data": {"type": "event", "id": "evt_28", "attributes": {"name": "inquiry.completed", "payload": {"data": {"type": "inquiry", "id": "inq_11", "attributes": {"status": "completed", "reference-id": "user-9", "created-at": "2026-05-28T08:00:00.000Z", "updated-at": "2026-05-28T08:00:00.000Z", "redacted-at": null, "tags": [], "note": null, "creator": "API", "reviewer-comment": null, "started-at": null, "completed-at": "2026-05-28T08:00:00.000Z", "failed-at": null, "expired-at": null, "marked-for-review-at": null, "decisioned-at": null, "previous-step-name": "selfie", "next-step-name": "success", "behaviors": {"behavior-threat-level": "low", "completion-time": 40.172463903}, "name-first": "Jane", "name-middle": null, "name-last": "Doe", "birthdate": "1994-12-30", "address-street-1": "123 Main St", "address-city": "San Francisco", "address-subdivision": "California", "address-postal-code": "94111", "email-address": "jane@example.com", "phone-number": "+14155550123", "fields": {"name-first": {"type": "string", "value": "Jane"}, "name-middle": {"type": "string", "value": null}, "name-last": {"type": "string", "value": "Doe"}, "birthdate": {"type": "string", "value": "1994-12-30"}, "address-street-1": {"type": "string", "value": "123 Main St"}, "address-city": {"type": "string", "value": "San Francisco"}, "address-subdivision": {"type": "string", "value": "California"}, "address-postal-code": {"type": "string", "value": "94111"}, "email-address": {"type": "string", "value": "jane@example.com"}, "phone-number": {"type": "string", "value": "+14155550123"}}}, "relationships": {"account": {"data": null}, "transaction": {"data": null}, "inquiry": {"data": null}, "inquiry-template": {"data": {"type": "inquiry-template", "id": "itmpl_TrialTemplateOfThisReceiver"}}, "reviewer": {"data": null}}}, "included": []}, "created-at": "2026-05-28T08:00:00.000Z"}}}');
INSERT INTO "events" VALUES('sha256:1c6e625b0f716cbbe212963d51326d2cb5d23ecd554e9c9f047219b629d328d8','unrecognized','2026-05-30T08:00:00.000Z','2026-05-30T08:00:00.000Z',NULL,NULL,NULL,NULL,NULL,NULL,NULL,'webhook','2eb6f8a2',NULL,'1c6e625b0f716cbbe212963d51326d2cb5d23ecd554e9c9f047219b629d328d8','unrecognized',NULL,NULL,'{"data": "of nobody"}');
INSERT INTO "events" VALUES('sha256:b3d510ef04275ca8e698e5b3cbb0ece3949ef9252f0cdc839e9ee347409a2209','unrecognized','2026-05-30T08:00:00.000Z','2026-05-30T08:00:00.000Z',NULL,NULL,NULL,NULL,NULL,NULL,NULL,'webhook','2eb6f8a2',NULL,'b3d510ef04275ca8e698e5b3cbb0ece3949ef9252f0cdc839e9ee347409a2209','unrecognized',NULL,NULL,X'FFFE');
CREATE TABLE hold_rules (
    name          TEXT NOT NULL,               -- a LIKE pattern, of the event that raises
    object_status TEXT NOT NULL,               -- of its object; '' for any
    cleared_by    TEXT NOT NULL,               -- a LIKE pattern; the newest event decides
    lasting       INTEGER NOT NULL,            -- 0: a later decision on the inquiry clears it, too
    own           INTEGER NOT NULL DEFAULT 0,  -- 1: added by handlers.py
    PRIMARY KEY (name, object_status)
) STRICT, WITHOUT ROWID;
INSERT INTO "hold_rules" VALUES('kyc.held','','kyc.released',1,0);
INSERT INTO "hold_rules" VALUES('report/%.matched','','report/%.dismissed',0,0);
CREATE TABLE holds (
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
INSERT INTO "holds" VALUES('rep_1','report/%.matched',1,0,'report/watchlist.matched: rep_1','evt_06','2026-05-06T08:00:00.000Z','inq_1',NULL,NULL);
INSERT INTO "holds" VALUES('rep_6','report/%.matched',0,0,'report/adverse-media.dismissed: rep_6','evt_16','2026-05-16T08:00:00.000Z',NULL,'act_6',NULL);
INSERT INTO "holds" VALUES('user-6','kyc.held',0,1,'kyc.released: done, by ops','evt_20','2026-05-20T08:00:00.000Z',NULL,NULL,'user-6');
INSERT INTO "holds" VALUES('user-7','kyc.held',1,1,'kyc.held: chargeback, by ops','evt_18','2026-05-18T08:00:00.000Z',NULL,NULL,'user-7');
CREATE TABLE inquiries (
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
INSERT INTO "inquiries" VALUES('inq_1','user-1','user-1','act_1','itmpl_TrialTemplateOfThisReceiver','approved','evt_05','inquiry.approved','2026-05-05T08:00:00.000Z',3,5);
INSERT INTO "inquiries" VALUES('inq_2','user-2',NULL,'act_2','itmpl_TrialTemplateOfThisReceiver','declined','evt_07','inquiry.declined','2026-05-07T08:00:00.000Z',3,5);
INSERT INTO "inquiries" VALUES('inq_3','act_3',NULL,'act_3','itmpl_TrialTemplateOfThisReceiver','needs_review','evt_09','inquiry.marked-for-review','2026-05-09T08:00:00.000Z',3,4);
INSERT INTO "inquiries" VALUES('inq_4','user-4','user-4',NULL,'itmpl_TrialTemplateOfThisReceiver','pending','evt_11','inquiry-session.started','2026-05-11T08:00:00.000Z',1,2);
INSERT INTO "inquiries" VALUES('inq_5','user-5','user-5',NULL,'itmpl_TrialTemplateOfThisReceiver','failed','evt_12','inquiry.failed','2026-05-12T08:00:00.000Z',2,3);
INSERT INTO "inquiries" VALUES('inq_6','user-5','user-5',NULL,'itmpl_TrialTemplateOfThisReceiver','pending','evt_13','inquiry.transitioned','2026-05-13T08:00:00.000Z',1,2);
INSERT INTO "inquiries" VALUES('inq_7','user-6','user-6','act_6','itmpl_2','approved','evt_14','inquiry.approved','2026-05-14T08:00:00.000Z',3,5);
INSERT INTO "inquiries" VALUES('inq_8','user-7','user-7',NULL,'itmpl_TrialTemplateOfThisReceiver','approved','evt_17','inquiry.approved','2026-05-17T08:00:00.000Z',3,5);
INSERT INTO "inquiries" VALUES('inq_9','user-8','user-8',NULL,'itmpl_TrialTemplateOfThisReceiver','created','evt_21','inquiry.created','2026-05-21T08:00:00.000Z',1,1);
INSERT INTO "inquiries" VALUES('inq_10','inq_10',NULL,NULL,'itmpl_TrialTemplateOfThisReceiver','approved','evt_27','inquiry.approved','2026-05-27T08:00:00.000Z',3,5);
INSERT INTO "inquiries" VALUES('inq_11','user-9','user-9',NULL,'itmpl_TrialTemplateOfThisReceiver','completed','evt_28','inquiry.completed','2026-05-28T08:00:00.000Z',2,3);
CREATE TABLE kyc_status (
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
INSERT INTO "kyc_status" VALUES('user-1','approved','report/watchlist.matched: rep_1','inq_1','act_1','itmpl_TrialTemplateOfThisReceiver','evt_05','inquiry.approved','2026-05-05T08:00:00.000Z','2026-05-05T08:00:00.000Z');
INSERT INTO "kyc_status" VALUES('user-2','declined',NULL,'inq_2','act_2','itmpl_TrialTemplateOfThisReceiver','evt_07','inquiry.declined','2026-05-07T08:00:00.000Z','2026-05-07T08:00:00.000Z');
INSERT INTO "kyc_status" VALUES('act_3','needs_review',NULL,'inq_3','act_3','itmpl_TrialTemplateOfThisReceiver','evt_09','inquiry.marked-for-review','2026-05-09T08:00:00.000Z','2026-05-09T08:00:00.000Z');
INSERT INTO "kyc_status" VALUES('user-4','pending',NULL,'inq_4',NULL,'itmpl_TrialTemplateOfThisReceiver','evt_11','inquiry-session.started','2026-05-11T08:00:00.000Z','2026-05-11T08:00:00.000Z');
INSERT INTO "kyc_status" VALUES('user-5','failed',NULL,'inq_5',NULL,'itmpl_TrialTemplateOfThisReceiver','evt_12','inquiry.failed','2026-05-12T08:00:00.000Z','2026-05-12T08:00:00.000Z');
INSERT INTO "kyc_status" VALUES('user-6','approved',NULL,'inq_7','act_6','itmpl_2','evt_14','inquiry.approved','2026-05-14T08:00:00.000Z','2026-05-14T08:00:00.000Z');
INSERT INTO "kyc_status" VALUES('user-7','approved','kyc.held: chargeback, by ops','inq_8',NULL,'itmpl_TrialTemplateOfThisReceiver','evt_17','inquiry.approved','2026-05-17T08:00:00.000Z','2026-05-17T08:00:00.000Z');
INSERT INTO "kyc_status" VALUES('user-8','created',NULL,'inq_9',NULL,'itmpl_TrialTemplateOfThisReceiver','evt_21','inquiry.created','2026-05-21T08:00:00.000Z','2026-05-21T08:00:00.000Z');
INSERT INTO "kyc_status" VALUES('inq_10','approved',NULL,'inq_10',NULL,'itmpl_TrialTemplateOfThisReceiver','evt_27','inquiry.approved','2026-05-27T08:00:00.000Z','2026-05-27T08:00:00.000Z');
INSERT INTO "kyc_status" VALUES('user-9','completed',NULL,'inq_11',NULL,'itmpl_TrialTemplateOfThisReceiver','evt_28','inquiry.completed','2026-05-28T08:00:00.000Z','2026-05-28T08:00:00.000Z');
CREATE TABLE kyc_templates (
    template_id TEXT NOT NULL PRIMARY KEY
) STRICT, WITHOUT ROWID;
CREATE TABLE mentions (
    id       TEXT NOT NULL,
    position INTEGER NOT NULL,  -- the event's rowid
    PRIMARY KEY (id, position)
) STRICT, WITHOUT ROWID;
INSERT INTO "mentions" VALUES('inq_3',24);
CREATE TABLE redactions (
    subject_id      TEXT,           -- an inquiry, account, reference, event or other object ID;
                                    -- NULL for a prune, of whatever was old then
    redacted_before TEXT NOT NULL,  -- events created at or before this lose their body, and so do
                                    -- those of the subject that arrive later
    ordered_at      TEXT NOT NULL,
    ordered_by      TEXT NOT NULL,  -- the event of Persona's redaction, or who ran the command
    command         TEXT NOT NULL CHECK (command IN ('event', 'redact', 'prune')),
    reason          TEXT
) STRICT;
INSERT INTO "redactions" VALUES('inq_9','2026-05-22T08:00:00.000Z','2026-05-22T08:00:00.000Z','evt_22','event',NULL);
INSERT INTO "redactions" VALUES('user-4','2026-05-30T08:00:00.000Z','2026-05-31T08:00:00.000Z','ops','redact','request 17');
CREATE TABLE rules_in_force (
    rules     TEXT NOT NULL,
    projected INTEGER NOT NULL,  -- 1 once a rebuild by these rules has finished
    since     TEXT NOT NULL      -- tells one time that they came into force from another
) STRICT;
INSERT INTO "rules_in_force" VALUES('[2, [], [], []]',1,'1');
CREATE TABLE status_rules (
    name          TEXT NOT NULL,                      -- of the event
    object_status TEXT NOT NULL,                      -- of its object; '' for any
    status        TEXT NOT NULL REFERENCES statuses,
    own           INTEGER NOT NULL DEFAULT 0,         -- 1: added by handlers.py
    PRIMARY KEY (name, object_status, status)
) STRICT, WITHOUT ROWID;
INSERT INTO "status_rules" VALUES('inquiry-session.started','','pending',0);
INSERT INTO "status_rules" VALUES('inquiry.approved','','approved',0);
INSERT INTO "status_rules" VALUES('inquiry.completed','','completed',0);
INSERT INTO "status_rules" VALUES('inquiry.created','','created',0);
INSERT INTO "status_rules" VALUES('inquiry.declined','','declined',0);
INSERT INTO "status_rules" VALUES('inquiry.expired','','expired',0);
INSERT INTO "status_rules" VALUES('inquiry.failed','','failed',0);
INSERT INTO "status_rules" VALUES('inquiry.marked-for-review','','needs_review',0);
INSERT INTO "status_rules" VALUES('inquiry.started','','pending',0);
INSERT INTO "status_rules" VALUES('inquiry.transitioned','pending','pending',0);
CREATE TABLE statuses (
    status   TEXT NOT NULL PRIMARY KEY,
    stage    INTEGER NOT NULL,  -- 1 open, 2 outcome, 3 decision
    rank     INTEGER NOT NULL,  -- which one decides when two happened at the same time
    standing INTEGER NOT NULL   -- equals the stage, except expired: 0
) STRICT, WITHOUT ROWID;
INSERT INTO "statuses" VALUES('approved',3,5,3);
INSERT INTO "statuses" VALUES('completed',2,3,2);
INSERT INTO "statuses" VALUES('created',1,1,1);
INSERT INTO "statuses" VALUES('declined',3,5,3);
INSERT INTO "statuses" VALUES('expired',1,0,0);
INSERT INTO "statuses" VALUES('failed',2,3,2);
INSERT INTO "statuses" VALUES('needs_review',3,4,3);
INSERT INTO "statuses" VALUES('pending',1,2,1);
CREATE INDEX events_by_inquiry
    ON events (inquiry_id, created_at, event_id) WHERE inquiry_id IS NOT NULL;
CREATE INDEX events_by_account
    ON events (account_id) WHERE account_id IS NOT NULL;
CREATE INDEX events_by_reference
    ON events (reference_id) WHERE reference_id IS NOT NULL;
CREATE INDEX events_by_object
    ON events (object_id) WHERE object_id IS NOT inquiry_id;
CREATE INDEX events_naming_account
    ON events (account_id, created_at, event_id)
    WHERE object_type = 'account' AND reference_id IS NOT NULL;
CREATE INDEX events_naming_owner
    ON events (reference_id, account_id)
    WHERE object_type = 'account' AND reference_id IS NOT NULL;
CREATE INDEX events_unprocessed
    ON events (state) WHERE state <> 'processed';
CREATE INDEX events_not_delivered
    ON events (source) WHERE source <> 'webhook';
CREATE TRIGGER events_refuse_delete BEFORE DELETE ON events
BEGIN
    SELECT RAISE(ABORT, 'the journal is append-only: events are never deleted');
END;
CREATE TRIGGER events_refuse_replace BEFORE INSERT ON events
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
CREATE TRIGGER events_refuse_update BEFORE UPDATE OF
    event_id, name, created_at, received_at, object_type, object_id,
    source, signed_by, attempt, body_sha256 ON events
BEGIN
    SELECT RAISE(ABORT, 'the journal is append-only: only state, error, redaction and missing IDs may change');
END;
CREATE TRIGGER events_refuse_rewrite BEFORE UPDATE ON events
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
CREATE TRIGGER mentions_refuse_delete BEFORE DELETE ON mentions
BEGIN
    SELECT RAISE(ABORT, 'mentions are kept: redactions must find them');
END;
CREATE TRIGGER mentions_refuse_update BEFORE UPDATE ON mentions
BEGIN
    SELECT RAISE(ABORT, 'mentions are kept: redactions must find them');
END;
CREATE INDEX redactions_by_subject
    ON redactions (subject_id) WHERE subject_id IS NOT NULL;
CREATE TRIGGER redactions_refuse_delete BEFORE DELETE ON redactions
BEGIN
    SELECT RAISE(ABORT, 'redactions are kept: events that arrive late must find them');
END;
CREATE TRIGGER redactions_refuse_update BEFORE UPDATE ON redactions
BEGIN
    SELECT RAISE(ABORT, 'redactions are kept: events that arrive late must find them');
END;
CREATE TRIGGER events_order_redaction AFTER INSERT ON events
WHEN NEW.name LIKE '%.redacted' AND NEW.object_id IS NOT NULL
BEGIN
    INSERT INTO redactions (subject_id, redacted_before, ordered_at, ordered_by, command)
    VALUES (NEW.object_id, NEW.created_at, NEW.received_at, NEW.event_id, 'event');
END;
CREATE TRIGGER redactions_obey AFTER INSERT ON redactions
WHEN NEW.subject_id IS NOT NULL
BEGIN
    INSERT INTO remove_bodies VALUES (NEW.subject_id, NEW.redacted_before, NEW.ordered_at);
END;
CREATE TRIGGER events_obey_redactions AFTER INSERT ON events
WHEN EXISTS (SELECT 1 FROM redactions WHERE subject_id IS NOT NULL)
BEGIN
    INSERT INTO obey_redactions VALUES
        (NEW.inquiry_id, NEW.account_id, NEW.reference_id, NEW.object_id, NEW.received_at);
END;
CREATE TRIGGER events_obey_redactions_when_linked
AFTER UPDATE OF inquiry_id, account_id, reference_id ON events
WHEN EXISTS (SELECT 1 FROM redactions WHERE subject_id IS NOT NULL)
BEGIN
    INSERT INTO obey_redactions VALUES
        (NEW.inquiry_id, NEW.account_id, NEW.reference_id, NEW.object_id, NEW.received_at);
END;
CREATE TRIGGER mentions_obey_redactions AFTER INSERT ON mentions
WHEN EXISTS (SELECT 1 FROM redactions WHERE subject_id IS NOT NULL)
BEGIN
    INSERT INTO obey_redactions
    SELECT NEW.id, NEW.id, NULL, NULL, received_at FROM events WHERE rowid = NEW.position;
END;
CREATE VIEW obey_redactions AS
    SELECT '' AS inquiry_id, '' AS account_id, '' AS reference_id, '' AS object_id, '' AS at
    WHERE false;
CREATE TRIGGER obey_redactions_do INSTEAD OF INSERT ON obey_redactions
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
CREATE VIEW remove_bodies AS
    SELECT '' AS subject_id, '' AS redacted_before, '' AS at WHERE false;
CREATE TRIGGER remove_bodies_do INSTEAD OF INSERT ON remove_bodies
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
CREATE INDEX inquiries_by_person
    ON inquiries (person, standing, event_at, rank, event_id);
CREATE INDEX inquiries_without_reference
    ON inquiries (account_id) WHERE reference_id IS NULL;
CREATE INDEX holds_by_inquiry ON holds (inquiry_id) WHERE raised = 1;
CREATE INDEX holds_by_account ON holds (account_id) WHERE raised = 1;
CREATE INDEX holds_by_reference ON holds (reference_id) WHERE raised = 1;
CREATE INDEX kyc_status_by_update ON kyc_status (updated_at, reference_id);
CREATE INDEX kyc_status_held
    ON kyc_status (updated_at, reference_id) WHERE hold IS NOT NULL;
CREATE INDEX kyc_status_not_approved
    ON kyc_status (status, updated_at, reference_id) WHERE status <> 'approved';
CREATE VIEW inquiries_by_the_rules AS
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
CREATE VIEW accounts_by_the_rules AS
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
CREATE VIEW object_events AS
    SELECT object_id, event_id, name, created_at, object_type, object_status,
        inquiry_id, account_id, reference_id
    FROM events WHERE object_id IS NOT inquiry_id
    UNION ALL
    SELECT inquiry_id, event_id, name, created_at, object_type, object_status,
        inquiry_id, account_id, reference_id
    FROM events WHERE object_id = inquiry_id;
CREATE VIEW hold_events AS
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
CREATE VIEW holds_by_the_rules AS
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
CREATE VIEW kyc_status_by_the_rules AS
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
CREATE VIEW cleared AS
    SELECT * FROM kyc_status WHERE status = 'approved' AND hold IS NULL;
CREATE VIEW kyc_status_by_template AS
    SELECT p.person AS reference_id, p.template_id, i.status, i.inquiry_id, i.account_id,
        i.event_id, i.event_name, i.event_at
    FROM (SELECT DISTINCT person, template_id FROM inquiries) AS p
    JOIN inquiries AS i ON i.inquiry_id = (
        SELECT n.inquiry_id FROM inquiries AS n
        WHERE n.person = p.person AND n.template_id IS p.template_id
        ORDER BY n.standing DESC, n.event_at DESC, n.rank DESC, n.event_id DESC LIMIT 1);
CREATE VIEW kyc_timeline AS
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
CREATE VIEW journal AS
    SELECT rowid AS position, received_at, created_at, name, state, event_id, source, object_type,
        object_id, object_status, inquiry_id, account_id, reference_id, template_id,
        COALESCE((SELECT i.person FROM inquiries AS i WHERE i.inquiry_id = events.inquiry_id),
            reference_id,
            (SELECT a.reference_id FROM accounts AS a WHERE a.account_id = events.account_id),
            account_id, inquiry_id) AS person,
        signed_by, attempt, error, body_sha256, redacted_at
    FROM events;
CREATE VIEW failed_events AS
    SELECT rowid AS position, event_id, name, created_at, received_at, attempt, state, error,
        inquiry_id, account_id, reference_id
    FROM events WHERE state <> 'processed' AND state <> 'unrecognized';
CREATE VIEW status_counts AS
    SELECT status, count(*) AS people, count(hold) AS held FROM kyc_status GROUP BY status;
COMMIT;
PRAGMA user_version = 2;
