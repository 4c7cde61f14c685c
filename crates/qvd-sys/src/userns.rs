//! User namespaces as descriptors, for id-mapped mounts.
