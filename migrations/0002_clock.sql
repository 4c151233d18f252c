-- What the clock decides. An entry is what its row and the time say, and nobody needs to look for
-- it to become so:
--   expired   its time to live is over, and no lease holds it; a tombstone soon
--   leased    a claim holds it until `deadline`
--   delayed   the delay of its push, or of a nack, holds it until `due_at`
--   ready     all others
--   dead      the lease of its last attempt (attempts >= max_attempts) ran out, before its time to
--             live did; the next verb that comes by moves it to KEY/dead
-- `state` is where the row stands in the indexes: 0 nothing holds it; 1 the delay of its push;
-- 2 a claim, with its lease (deadline, lease, token) or, after a nack, with that one's delay
-- (due_at, delay). A row whose time has come stays at 1 or 2 until somebody needs it.
--
-- An end that lies further ahead than twice its length and a minute was set by a clock that has
-- jumped back since, and is over. So each end has a time before which it isn't believed.

ALTER TABLE sqlspace_entries ADD COLUMN until_at INTEGER
               /* states 1 and 2: what holds it ends then */
               AS (ifnull(deadline, due_at)) VIRTUAL;
ALTER TABLE sqlspace_entries ADD COLUMN since_at INTEGER
               /* a clock before that has jumped back: what holds it is over */
               AS (ifnull(deadline - 2 * lease, due_at - 2 * delay) - 60000000) VIRTUAL;
ALTER TABLE sqlspace_entries ADD COLUMN lives_since INTEGER
               /* the same for its time to live */
               AS (2 * pushed_at - expires_at - 60000000) VIRTUAL;

DROP INDEX sqlspace_entries_due;
DROP INDEX sqlspace_entries_leased;
DROP INDEX sqlspace_entries_expiring;
-- What is held, by its end; and by its beginning, for a clock that has jumped back.
CREATE INDEX sqlspace_entries_until ON sqlspace_entries (key, until_at)
  WHERE until_at IS NOT NULL AND state < 3;
CREATE INDEX sqlspace_entries_since ON sqlspace_entries (key, since_at)
  WHERE since_at IS NOT NULL AND state < 3;
-- What expires, over all keys: nobody may ever ask for its key again.
CREATE INDEX sqlspace_entries_expiring ON sqlspace_entries (expires_at)
  WHERE expires_at IS NOT NULL AND state < 3;
CREATE INDEX sqlspace_entries_lives ON sqlspace_entries (lives_since)
  WHERE lives_since IS NOT NULL AND state < 3;
-- The leases of last attempts, over all keys.
CREATE INDEX sqlspace_entries_last ON sqlspace_entries (deadline)
  WHERE deadline IS NOT NULL AND attempts >= max_attempts AND state < 3;
CREATE INDEX sqlspace_entries_last_since ON sqlspace_entries (since_at)
  WHERE deadline IS NOT NULL AND attempts >= max_attempts AND state < 3;

-- The views say what the clock says now. What is dead already and not yet moved stands in them
-- under KEY/dead, with the number that it had.
DROP VIEW sqlspace_outbox;
DROP VIEW sqlspace_keys;
DROP VIEW sqlspace_live;

CREATE VIEW sqlspace_live (seq, key, state, pushed, due, expires, lease_ends, attempts, bytes, payload, headers) AS
  -- The live entries, each in its state, with times (UTC) that a person can read.
  WITH clock (now) AS (SELECT CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER))
  SELECT
    seq,
    key,
    CASE WHEN deadline IS NOT NULL AND until_at > now AND since_at <= now THEN 'leased'
         WHEN due_at IS NOT NULL AND until_at > now AND since_at <= now THEN 'delayed'
         ELSE 'ready' END,
    strftime('%Y-%m-%d %H:%M:%f', pushed_at / 1e6, 'unixepoch'),
    CASE WHEN until_at > now AND since_at <= now
         THEN strftime('%Y-%m-%d %H:%M:%f', due_at / 1e6, 'unixepoch') END,
    strftime('%Y-%m-%d %H:%M:%f', expires_at / 1e6, 'unixepoch'),
    CASE WHEN until_at > now AND since_at <= now
         THEN strftime('%Y-%m-%d %H:%M:%f', deadline / 1e6, 'unixepoch') END,
    attempts,
    length(payload),
    payload,
    headers
  FROM sqlspace_entries, clock
  WHERE state < 3
    AND (deadline IS NOT NULL AND until_at > now AND since_at <= now
         OR (expires_at IS NULL OR expires_at > now AND lives_since <= now)
            AND (deadline IS NULL OR max_attempts IS NULL OR attempts < max_attempts))
  UNION ALL
  SELECT
    seq,
    key || '/dead',
    'ready',
    strftime('%Y-%m-%d %H:%M:%f', pushed_at / 1e6, 'unixepoch'),
    NULL,
    NULL,
    NULL,
    attempts,
    length(payload),
    payload,
    headers
  FROM sqlspace_entries INDEXED BY sqlspace_entries_last, clock
  WHERE deadline IS NOT NULL AND attempts >= max_attempts AND state < 3
    AND (until_at <= now OR since_at > now)
    AND (expires_at IS NULL OR expires_at > deadline OR expires_at > now AND lives_since <= now);

CREATE VIEW sqlspace_outbox (key, payload) AS
  -- INSERT INTO sqlspace_outbox (key, payload) VALUES ('mail', 'hello') is a push.
  SELECT key, payload FROM sqlspace_live;

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
  WITH clock (now) AS (SELECT CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)),
  sums (key, entries, leased, delayed, pushed_at, bytes, now) AS (
    SELECT
      key,
      count(*),
      sum(deadline IS NOT NULL AND until_at > now AND since_at <= now),
      sum(due_at IS NOT NULL AND until_at > now AND since_at <= now),
      min(pushed_at),
      sum(length(payload)),
      max(now)
    FROM sqlspace_entries INDEXED BY sqlspace_entries_live, clock
    WHERE state < 3
      AND (deadline IS NOT NULL AND until_at > now AND since_at <= now
           OR (expires_at IS NULL OR expires_at > now AND lives_since <= now)
              AND (deadline IS NULL OR max_attempts IS NULL OR attempts < max_attempts))
    GROUP BY key
    UNION ALL
    SELECT key || '/dead', 1, 0, 0, pushed_at, length(payload), now
    FROM sqlspace_entries INDEXED BY sqlspace_entries_last, clock
    WHERE deadline IS NOT NULL AND attempts >= max_attempts AND state < 3
      AND (until_at <= now OR since_at > now)
      AND (expires_at IS NULL OR expires_at > deadline OR expires_at > now AND lives_since <= now)
  )
  SELECT
    key,
    sum(entries) - sum(leased) - sum(delayed),
    sum(leased),
    sum(delayed),
    max(0, round((max(now) - min(pushed_at)) / 1e6, 3)),
    sum(bytes)
  FROM sums GROUP BY key;
