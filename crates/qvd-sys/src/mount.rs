//! Detached mounts: the parts of the new mount API that rustix lacks.
