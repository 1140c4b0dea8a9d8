//! What cgroups count, as the CRI reports it.
