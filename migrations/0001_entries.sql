-- The first schema. Times are Unix time in whole microseconds.
-- It reads and writes in SQLite 3.40 and later, so that the plain sqlite3 shell is enough.

CREATE TABLE sqlspace_schema (
  -- The migrations applied to this file, one row each.
  version    INTEGER PRIMARY KEY,  -- the number of the migration's file
  name       TEXT NOT NULL,        -- its name
  applied_at INTEGER NOT NULL,
  file_id    TEXT,                 -- first row only: the random id of this file, 32 hex digits
  boots      INTEGER               -- first row only: grows before a Store's first write; that
                                   -- commit decides what a crash before it left undecided
) STRICT;

CREATE TABLE sqlspace_entries (
  -- Entries, and the tombstones of those taken.
  seq          INTEGER PRIMARY KEY -- grows over the whole file and is never used twice; that needs
                                   -- the row with the highest seq to stay, so it is never deleted
               CHECK (seq BETWEEN 1 AND 4611686018427387903),
  key          TEXT NOT NULL,      -- '' in a row that stays only for its seq
  payload      BLOB,               -- NULL once taken, so that its pages are used again
  headers      TEXT,               -- a JSON object of strings; NULL if there are none
  state        INTEGER NOT NULL DEFAULT 0,
                                   -- live: 0 ready, 1 delayed, 2 leased
                                   -- tombstones: 3 taken, 4 acked, 5 expired, 6 dead; 7 bare
  pushed_at    INTEGER NOT NULL,
  due_at       INTEGER,            -- state 1: ready from then on
  delay        INTEGER,            -- state 1: the length of that delay, in microseconds
  expires_at   INTEGER,            -- gone from then on, unless leased
  deadline     INTEGER,            -- state 2: the lease ends then
  lease        INTEGER,            -- state 2: the length of the lease, in microseconds
  token        BLOB,               -- state 2: proves whose lease it is
  attempts     INTEGER NOT NULL DEFAULT 0,
  max_attempts INTEGER,
  dedupe       TEXT,               -- of two entries of a key with the same one, only the first is
  taken_at     INTEGER,            -- tombstones: when
  taken_no     INTEGER,            -- tombstones: which taking of this file, in order; 0 if bare
  UNIQUE (key, seq)
) STRICT;

-- The live entries of a key, by state: the head of each queue is one step away.
CREATE INDEX sqlspace_entries_live ON sqlspace_entries (key, state, seq) WHERE state < 3;
-- What ends by itself, and when.
CREATE INDEX sqlspace_entries_due ON sqlspace_entries (key, due_at) WHERE state = 1;
CREATE INDEX sqlspace_entries_leased ON sqlspace_entries (key, deadline) WHERE state = 2;
CREATE INDEX sqlspace_entries_expiring ON sqlspace_entries (key, expires_at)
  WHERE expires_at IS NOT NULL AND state < 3;
-- The history, in the order of taking.
CREATE INDEX sqlspace_entries_taken ON sqlspace_entries (taken_no) WHERE taken_no IS NOT NULL;
CREATE UNIQUE INDEX sqlspace_entries_dedupe ON sqlspace_entries (key, dedupe)
  WHERE dedupe IS NOT NULL;

CREATE VIEW sqlspace_outbox (key, payload) AS
  -- INSERT INTO sqlspace_outbox (key, payload) VALUES ('mail', 'hello') is a push.
  SELECT key, payload FROM sqlspace_entries WHERE state < 3;

CREATE TRIGGER sqlspace_outbox_push INSTEAD OF INSERT ON sqlspace_outbox
BEGIN
  SELECT RAISE(ABORT, 'sqlspace: key must be TEXT')
    WHERE typeof(NEW.key) <> 'text';
  SELECT RAISE(ABORT, 'sqlspace: key must be 1 to 1024 bytes')
    WHERE length(CAST(NEW.key AS BLOB)) NOT BETWEEN 1 AND 1024;
  SELECT RAISE(ABORT, 'sqlspace: key must not hold a NUL character')
    WHERE instr(CAST(NEW.key AS BLOB), x'00');
  -- Character by character: what is no UTF-8 comes back as another character. So do U+FFFE and
  -- U+FFFF, which SQLite can't spell, and which are UTF-8 all the same.
  SELECT RAISE(ABORT, 'sqlspace: key must be valid UTF-8')
    WHERE CAST(NEW.key AS BLOB) <> (
      WITH RECURSIVE spelled (at, text) AS (
        SELECT 1, ''
        UNION ALL
        SELECT
          at + 1,
          text || CASE WHEN CAST(substr(NEW.key, at, 1) AS BLOB) IN (x'efbfbe', x'efbfbf')
                       THEN substr(NEW.key, at, 1)
                       ELSE char(unicode(substr(NEW.key, at, 1))) END
          FROM spelled WHERE at <= length(NEW.key)
      )
      SELECT CAST(text AS BLOB) FROM spelled ORDER BY at DESC LIMIT 1
    );
  SELECT RAISE(ABORT, 'sqlspace: payload must not be NULL')
    WHERE NEW.payload IS NULL;
  INSERT INTO sqlspace_entries (key, payload, pushed_at)
  VALUES (
    NEW.key,
    CAST(NEW.payload AS BLOB),
    CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)
  );
END;

CREATE VIEW sqlspace_keys (key, ready, leased, delayed, oldest_seconds, bytes) AS
  -- What waits under each key, the age of its oldest entry, and the size of its payloads.
  WITH clock (now) AS (SELECT CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER))
  SELECT
    key,
    sum(CASE WHEN state = 0 OR state = 1 AND due_at <= now OR state = 2 AND deadline <= now
             THEN 1 ELSE 0 END),
    sum(state = 2 AND deadline > now),
    sum(state = 1 AND due_at > now),
    max(0, round((max(now) - min(pushed_at)) / 1e6, 3)),
    sum(length(payload))
  FROM sqlspace_entries INDEXED BY sqlspace_entries_live, clock
  WHERE state < 3
    AND (expires_at IS NULL OR expires_at > now OR state = 2 AND deadline > now)
  GROUP BY key;

CREATE VIEW sqlspace_live (seq, key, state, pushed, due, expires, lease_ends, attempts, bytes, payload, headers) AS
  -- The live entries, with times (UTC) that a person can read.
  WITH clock (now) AS (SELECT CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER))
  SELECT
    seq,
    key,
    CASE WHEN state = 2 AND deadline > now THEN 'leased'
         WHEN state = 1 AND due_at > now THEN 'delayed'
         ELSE 'ready' END,
    strftime('%Y-%m-%d %H:%M:%f', pushed_at / 1e6, 'unixepoch'),
    strftime('%Y-%m-%d %H:%M:%f', due_at / 1e6, 'unixepoch'),
    strftime('%Y-%m-%d %H:%M:%f', expires_at / 1e6, 'unixepoch'),
    strftime('%Y-%m-%d %H:%M:%f', deadline / 1e6, 'unixepoch'),
    attempts,
    length(payload),
    payload,
    headers
  FROM sqlspace_entries, clock
  WHERE state < 3
    AND (expires_at IS NULL OR expires_at > now OR state = 2 AND deadline > now);

CREATE VIEW sqlspace_tombstones (seq, key, outcome, pushed, taken) AS
  -- What was taken, in the order of taking.
  SELECT
    seq,
    key,
    CASE state WHEN 3 THEN 'taken' WHEN 4 THEN 'acked' WHEN 5 THEN 'expired' ELSE 'dead' END,
    strftime('%Y-%m-%d %H:%M:%f', pushed_at / 1e6, 'unixepoch'),
    strftime('%Y-%m-%d %H:%M:%f', taken_at / 1e6, 'unixepoch')
  FROM sqlspace_entries
  WHERE taken_no > 0
  ORDER BY taken_no;
