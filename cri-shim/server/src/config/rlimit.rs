//! Limits of processes, setrlimit(2), as a configuration writes them.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The kernel's limits without `RLIMIT_`, asm-generic/resource.h.
const NAMES: [&str; 16] = [
    "AS",
    "CORE",
    "CPU",
    "DATA",
    "FSIZE",
    "LOCKS",
    "MEMLOCK",
    "MSGQUEUE",
    "NICE",
    "NOFILE",
    "NPROC",
    "RSS",
    "RTPRIO",
    "RTTIME",
    "SIGPENDING",
    "STACK",
];

/// `nofile=1024:65536`, soft and hard, `core=0` for both, `memlock=unlimited`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Rlimit {
    name: String,
    soft: u64,
    hard: u64,
}

impl Rlimit {
    /// An entry of the runtime specification's `process.rlimits`.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "type": format!("RLIMIT_{}", self.name), "soft": self.soft, "hard": self.hard })
    }
}

impl TryFrom<String> for Rlimit {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not NAME=SOFT:HARD, as in nofile=1024:65536");
        let (name, values) = text.split_once('=').ok_or_else(wrong)?;
        let upper = name.trim().to_ascii_uppercase();
        let bare = upper.strip_prefix("RLIMIT_").unwrap_or(&upper);
        if !NAMES.contains(&bare) {
            return Err(format!("there is no process limit {name:?}"));
        }
        let number = |value: &str| match value.trim() {
            "unlimited" | "infinity" | "-1" => Ok(u64::MAX),
            value => value.parse().map_err(|_| wrong()),
        };
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(format!("{text:?}: the soft limit is above the hard one"));
        }
        Ok(Rlimit {
            name: bare.to_owned(),
            soft,
            hard,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_name_and_one_or_two_values() -> Result<(), String> {
        let limit = Rlimit::try_from("nofile=1024:65536".to_owned())?;
        assert_eq!(
            limit.to_json(),
            json!({ "type": "RLIMIT_NOFILE", "soft": 1024, "hard": 65536 })
        );
        let limit = Rlimit::try_from("RLIMIT_CORE=unlimited".to_owned())?;
        assert_eq!((limit.soft, limit.hard), (u64::MAX, u64::MAX));
        for wrong in ["nofile", "nofile=", "nofile=2:1", "files=1", "core=a:b"] {
            assert!(Rlimit::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
        Ok(())
    }
}
