//! How a command ended, in the words that clients understand.

use serde_json::json;

/// How a command ended, as the client is informed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The exit status as a shell would give it.
    Exit(i32),
    /// Why there is none.
    Failed(String),
}

impl Outcome {
    /// The `Status` object of v4, as JSON.
    pub(super) fn status(&self) -> String {
        match self {
            Outcome::Exit(0) => json!({ "metadata": {}, "status": "Success" }),
            Outcome::Exit(code) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("command terminated with non-zero exit code: {code}"),
                "reason": "NonZeroExitCode",
                "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
            }),
            Outcome::Failed(why) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("Internal error occurred: {why}"),
                "reason": "InternalError",
                "details": { "causes": [{ "message": why }] },
                "code": 500,
            }),
        }
        .to_string()
    }

    /// What older clients get: nothing after a success, else a sentence.
    pub(super) fn sentence(&self) -> String {
        match self {
            Outcome::Exit(0) => String::new(),
            Outcome::Exit(code) => {
                format!("command terminated with non-zero exit code: {code}")
            }
            Outcome::Failed(why) => why.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_told_as_kubernetes_clients_read_it() {
        assert_eq!(
            Outcome::Exit(0).status(),
            r#"{"metadata":{},"status":"Success"}"#
        );
        let failure: serde_json::Value =
            serde_json::from_str(&Outcome::Exit(3).status()).unwrap_or_default();
        assert_eq!(failure["reason"], "NonZeroExitCode");
        assert_eq!(failure["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(failure["details"]["causes"][0]["message"], "3");
        assert_eq!(Outcome::Exit(0).sentence(), "");
        assert!(
            Outcome::Failed("no".into())
                .status()
                .contains("InternalError")
        );
    }
}
