//! The limits of device numbers, from linux/kdev_t.h. The kernel truncates larger numbers, so
//! mknod(2) would create another device.

/// The largest major number, which has 12 bits.
pub const LARGEST_MAJOR: u32 = (1 << 12) - 1;
/// The largest minor number, which has 20 bits.
pub const LARGEST_MINOR: u32 = (1 << 20) - 1;

/// Returns whether a device can have the number `major`:`minor`.
pub fn is_valid(major: u32, minor: u32) -> bool {
    major <= LARGEST_MAJOR && minor <= LARGEST_MINOR
}
