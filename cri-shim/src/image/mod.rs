//! Images: references, registries, pulls, records.
