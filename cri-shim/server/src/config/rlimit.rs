//! Process limits (setrlimit(2)) in the notation of the configuration file.

use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, PosixRlimitType};
use serde::{Deserialize, Serialize};

/// A process limit such as `nofile=1024:65536` (soft and hard limit), `core=0` (both limits), or
/// `memlock=unlimited`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Rlimit(
    /// An entry of the runtime specification's `process.rlimits`.
    pub PosixRlimit,
);

impl TryFrom<String> for Rlimit {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} must have the form NAME=SOFT:HARD, as in nofile=1024:65536");
        let (name, values) = text.split_once('=').ok_or_else(wrong)?;
        let upper = name.trim().to_ascii_uppercase();
        let bare = upper.strip_prefix("RLIMIT_").unwrap_or(&upper);
        let typ: PosixRlimitType = format!("RLIMIT_{bare}")
            .parse()
            .map_err(|_| format!("unknown process limit {name:?}"))?;
        let number = |value: &str| match value.trim() {
            "unlimited" | "infinity" | "-1" => Ok(u64::MAX),
            value => value.parse().map_err(|_| wrong()),
        };
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(format!(
                "{text:?}: the soft limit is higher than the hard limit"
            ));
        }
        PosixRlimitBuilder::default()
            .typ(typ)
            .soft(soft)
            .hard(hard)
            .build()
            .map(Rlimit)
            .map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_has_a_name_and_one_or_two_values() -> Result<(), String> {
        let limit = Rlimit::try_from("nofile=1024:65536".to_owned())?;
        let json = serde_json::to_value(limit.0).map_err(|error| error.to_string())?;
        assert_eq!(
            json,
            serde_json::json!({ "type": "RLIMIT_NOFILE", "soft": 1024, "hard": 65536 })
        );
        let limit = Rlimit::try_from("RLIMIT_CORE=unlimited".to_owned())?;
        assert_eq!((limit.0.soft(), limit.0.hard()), (u64::MAX, u64::MAX));
        for wrong in ["nofile", "nofile=", "nofile=2:1", "files=1", "core=a:b"] {
            assert!(Rlimit::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
        Ok(())
    }
}
