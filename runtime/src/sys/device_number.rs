//! The check of device numbers in config.json.

use rrun_kernel::device_number::{LARGEST_MAJOR, LARGEST_MINOR, is_valid};

use crate::error::{Result, refuse};

/// Checks the number of a device. `field` returns the path of the object in config.json that
/// contains the number.
pub(crate) fn device_number(
    field: impl Fn() -> String,
    major: i64,
    minor: i64,
) -> Result<(u32, u32)> {
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) if is_valid(major, minor) => Ok((major, minor)),
        _ => refuse!(
            "{}: {major}:{minor} is not a device number, because the largest device number is {LARGEST_MAJOR}:{LARGEST_MINOR}",
            field()
        ),
    }
}
