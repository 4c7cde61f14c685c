-- The tables of SQLite as they are by now. Times are seconds since 1970 in UTC.

CREATE TABLE users (
    name            TEXT    NOT NULL PRIMARY KEY,
    password_hash   TEXT    NOT NULL,
    admin           BOOLEAN NOT NULL DEFAULT FALSE,
    created_unix_s  BIGINT  NOT NULL,
    tenant          TEXT    NOT NULL DEFAULT 'default'
);

-- What the administrator set for a flavour; a flavour without a row has the
-- built-in defaults. The flavours themselves come from the image repository.
CREATE TABLE flavour_defaults (
    name            TEXT    NOT NULL PRIMARY KEY,
    memory_bytes    BIGINT  NOT NULL,
    cpu_milli       BIGINT  NOT NULL,
    pids            BIGINT  NOT NULL,
    root_policy     TEXT    NOT NULL,
    net_port        BOOLEAN NOT NULL,
    net_internet    BOOLEAN NOT NULL,
    net_policy      TEXT,
    io_bytes_per_s  BIGINT
);

-- A number that was given once is never given again, not even the last one.
CREATE TABLE desktops (
    id              BIGINT  NOT NULL PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    user_name       TEXT    NOT NULL REFERENCES users (name),
    name            TEXT    NOT NULL,
    flavour         TEXT    NOT NULL,
    tag             TEXT    NOT NULL,
    virtualizer     TEXT    NOT NULL,
    memory_bytes    BIGINT  NOT NULL,
    cpu_milli       BIGINT  NOT NULL,
    pids            BIGINT  NOT NULL,
    root_policy     TEXT    NOT NULL,
    net_port        BOOLEAN NOT NULL,
    net_internet    BOOLEAN NOT NULL,
    address         TEXT    UNIQUE,
    blocked         BOOLEAN NOT NULL DEFAULT FALSE,
    removing        BOOLEAN NOT NULL DEFAULT FALSE,
    created_unix_s  BIGINT  NOT NULL,
    net_policy      TEXT,
    devices         TEXT    NOT NULL DEFAULT '',
    calls           TEXT,
    io_bytes_per_s  BIGINT,
    UNIQUE (user_name, name)
);

-- Only a hash of the token is kept: who reads this table cannot sign in.
CREATE TABLE sessions (
    id                BIGINT  NOT NULL PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    token_hash        TEXT    NOT NULL UNIQUE,
    user_name         TEXT    NOT NULL REFERENCES users (name) ON DELETE CASCADE,
    kind              TEXT    NOT NULL,
    created_unix_s    BIGINT  NOT NULL,
    last_used_unix_s  BIGINT  NOT NULL,
    expires_unix_s    BIGINT  NOT NULL
);

CREATE INDEX sessions_by_user ON sessions (user_name);
CREATE INDEX sessions_by_expiry ON sessions (expires_unix_s);
