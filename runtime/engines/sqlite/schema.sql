-- Runs, their logs, and LangGraph's checkpointer tables (as its own saver makes them, so that files
-- of either can be read by the other). Times are unix seconds.

CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS runs (
    run_id        TEXT PRIMARY KEY,
    tenant        TEXT NOT NULL DEFAULT 'default',
    thread_id     TEXT NOT NULL,
    graph         TEXT NOT NULL,
    graph_digest  TEXT NOT NULL,
    request       TEXT NOT NULL,      -- the validated body, one JSON
    status        TEXT NOT NULL,
    epoch         INTEGER NOT NULL DEFAULT 0,
    lease_owner   TEXT,
    lease_until   REAL,
    crashes       INTEGER NOT NULL DEFAULT 0,
    deadline      REAL,
    cancel_reason TEXT,
    applied       INTEGER NOT NULL DEFAULT 0,
    last_seq      INTEGER NOT NULL DEFAULT 0,
    terminal      INTEGER,            -- seq of the terminal line
    created_at    REAL NOT NULL,
    updated_at    REAL NOT NULL,
    started_at    REAL,
    ended_at      REAL
);

-- A run holds its thread from its first claim to its terminal line, through drains and crashes.
CREATE UNIQUE INDEX IF NOT EXISTS runs_holder ON runs (tenant, thread_id)
    WHERE terminal IS NULL AND epoch > 0;
CREATE INDEX IF NOT EXISTS runs_open ON runs (created_at, run_id) WHERE terminal IS NULL;
CREATE INDEX IF NOT EXISTS runs_pending ON runs (status, created_at, run_id)
    WHERE status = 'pending';
CREATE INDEX IF NOT EXISTS runs_thread ON runs (tenant, thread_id, created_at);
CREATE INDEX IF NOT EXISTS runs_newest ON runs (created_at, run_id);

-- Interrupted runs that are the last of their thread: few, while those that were answered pile up.
CREATE TABLE IF NOT EXISTS waiting (
    tenant    TEXT NOT NULL,
    thread_id TEXT NOT NULL,
    graph     TEXT NOT NULL,
    since     REAL NOT NULL,
    PRIMARY KEY (tenant, thread_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS waiting_since ON waiting (graph, since);
CREATE TRIGGER IF NOT EXISTS runs_interrupted AFTER UPDATE OF status ON runs
WHEN new.status = 'interrupted' BEGIN
    INSERT OR REPLACE INTO waiting VALUES (new.tenant, new.thread_id, new.graph, new.ended_at);
END;
CREATE TRIGGER IF NOT EXISTS runs_answered AFTER INSERT ON runs BEGIN
    DELETE FROM waiting WHERE tenant = new.tenant AND thread_id = new.thread_id;
END;
-- Once, for files from before this table.
INSERT OR IGNORE INTO waiting
    SELECT tenant, thread_id, graph, ended_at FROM runs AS run
    WHERE NOT EXISTS (SELECT 1 FROM meta WHERE key = 'waiting')
    AND status = 'interrupted'
    AND NOT EXISTS (
        SELECT 1 FROM runs AS later WHERE later.tenant = run.tenant
        AND later.thread_id = run.thread_id AND later.created_at > run.created_at
    );
INSERT OR IGNORE INTO meta VALUES ('waiting', 'filled');

CREATE TABLE IF NOT EXISTS run_events (
    run_id TEXT NOT NULL,
    seq    INTEGER NOT NULL,
    epoch  INTEGER NOT NULL,
    type   TEXT NOT NULL,
    ts     REAL NOT NULL,
    body   BLOB NOT NULL,
    PRIMARY KEY (run_id, seq)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS run_data (
    run_id TEXT NOT NULL,
    seq    INTEGER NOT NULL,
    member TEXT NOT NULL,
    body   BLOB NOT NULL,
    PRIMARY KEY (run_id, seq, member)
);

CREATE TABLE IF NOT EXISTS checkpoints (
    thread_id            TEXT NOT NULL,
    checkpoint_ns        TEXT NOT NULL DEFAULT '',
    checkpoint_id        TEXT NOT NULL,
    parent_checkpoint_id TEXT,
    type                 TEXT,
    checkpoint           BLOB,
    metadata             BLOB,
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id)
);

CREATE TABLE IF NOT EXISTS writes (
    thread_id     TEXT NOT NULL,
    checkpoint_ns TEXT NOT NULL DEFAULT '',
    checkpoint_id TEXT NOT NULL,
    task_id       TEXT NOT NULL,
    task_path     TEXT NOT NULL DEFAULT '',
    idx           INTEGER NOT NULL,
    channel       TEXT NOT NULL,
    type          TEXT,
    value         BLOB,
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id, task_id, idx)
);
