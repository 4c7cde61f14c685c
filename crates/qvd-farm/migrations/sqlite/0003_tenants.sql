-- Whose user it is. Rows from before are those of the one tenant there was.
ALTER TABLE users ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
