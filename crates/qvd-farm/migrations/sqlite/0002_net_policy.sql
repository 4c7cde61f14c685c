-- What beside a port and a way out a desktop may reach: the whole policy as
-- JSON. Rows from before have none, and what their two columns say.
ALTER TABLE flavour_defaults ADD COLUMN net_policy TEXT;
ALTER TABLE desktops ADD COLUMN net_policy TEXT;
