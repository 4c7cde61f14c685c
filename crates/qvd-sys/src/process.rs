//! Processes in namespaces of their own: `clone3`, and a plan that the child executes with raw system calls.
