//! Network namespaces, entered only on threads made for it.
