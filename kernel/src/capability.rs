//! Conversions between the names, numbers and masks of capabilities, which the `caps` crate lacks.
//! In a mask, bit n stands for capability n, as in the kernel. See capabilities(7).

use std::sync::LazyLock;

pub use caps::Capability;

/// The capabilities that the `caps` crate supports, indexed by number. The table is needed because
/// `caps::all` returns the capabilities as an unordered set.
static BY_NUMBER: LazyLock<[Option<Capability>; 64]> = LazyLock::new(|| {
    let mut table = [None; 64];
    for capability in caps::all() {
        if let Some(entry) = table.get_mut(usize::from(capability.index())) {
            *entry = Some(capability);
        }
    }
    table
});

/// Parses a capability's name, with or without `CAP_`, in upper or lower case.
pub fn parse(name: &str) -> Option<Capability> {
    let upper = name.to_ascii_uppercase();
    if upper.starts_with("CAP_") {
        upper.parse().ok()
    } else {
        format!("CAP_{upper}").parse().ok()
    }
}

/// Returns the name of the capability with this number, such as `CAP_SYS_ADMIN` for 21. For a
/// number without a name, such as 63, this function returns `capability 63`.
pub fn name(number: usize) -> String {
    let known = BY_NUMBER.get(number).copied().flatten();
    known.map_or_else(
        || format!("capability {number}"),
        |capability| capability.to_string(),
    )
}

/// Returns the names of the capabilities in `mask`, in ascending order of their numbers.
pub fn names(mask: u64) -> impl Iterator<Item = String> {
    (0..64)
        .filter(move |number| mask & (1 << number) != 0)
        .map(name)
}

/// Returns the names of all capabilities that have a name, in ascending order of their numbers.
pub fn all_names() -> impl Iterator<Item = String> {
    BY_NUMBER.iter().flatten().map(Capability::to_string)
}

/// Returns this thread's capability bounding set as a mask. The mask contains only capabilities
/// that the `caps` crate supports. The 41 prctl(2) calls of this function together take 10 µs.
pub fn bounding_set() -> u64 {
    let has = |capability: &&Capability| {
        caps::has_cap(None, caps::CapSet::Bounding, **capability).unwrap_or(false)
    };
    BY_NUMBER
        .iter()
        .flatten()
        .filter(has)
        .map(Capability::bitmask)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_capabilities_are_converted_to_the_kernels_numbers_and_back() {
        for (text, number, canonical) in [
            ("CAP_CHOWN", 0, "CAP_CHOWN"),
            ("cap_net_raw", 13, "CAP_NET_RAW"),
            ("Sys_Admin", 21, "CAP_SYS_ADMIN"),
            ("CHECKPOINT_RESTORE", 40, "CAP_CHECKPOINT_RESTORE"),
        ] {
            let index = parse(text).map(|capability| usize::from(capability.index()));
            assert_eq!(index, Some(number), "{text}");
            assert_eq!(name(number), canonical);
        }
        for text in ["", "CAP_", "CAP_CAP_CHOWN", "NET_FUN", "ſYS_ADMIN", "21"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
        assert_eq!(all_names().count(), 41);
    }

    #[test]
    fn the_names_in_a_mask_are_ordered_by_number() {
        let names: Vec<String> = names(1 << 63 | 1 << 21 | 1).collect();
        assert_eq!(names, ["CAP_CHOWN", "CAP_SYS_ADMIN", "capability 63"]);
    }

    #[test]
    fn the_bounding_set_equals_the_one_in_the_status_file_of_proc() {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
        let mask = u64::from_str_radix(mask.unwrap().trim(), 16).unwrap();
        assert_eq!(bounding_set(), mask & ((1 << 41) - 1));
    }
}
