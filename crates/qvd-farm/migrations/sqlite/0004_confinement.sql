-- What a desktop has beside its flavour: kinds of devices, a space between two;
-- which system calls, if not those that its image says; and how fast it may read
-- and write.
ALTER TABLE desktops ADD COLUMN devices TEXT NOT NULL DEFAULT '';
ALTER TABLE desktops ADD COLUMN calls TEXT;
ALTER TABLE desktops ADD COLUMN io_bytes_per_s INTEGER;
ALTER TABLE flavour_defaults ADD COLUMN io_bytes_per_s INTEGER;
