//! A command's outcome, in the forms that clients parse.

use serde_json::json;

/// A command's outcome, as the server reports it to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The exit status as a shell reports it: 128 + N if the process was killed by signal N.
    Exit(i32),
    /// The reason why the command has no exit status.
    Failed(String),
}

impl Outcome {
    /// Returns the `Status` object of version 4 of the remotecommand protocol, as JSON.
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

    /// Returns the outcome as text, for clients with an older version of the remotecommand
    /// protocol. The text is empty after a success, and a sentence after a failure.
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
    fn an_outcome_has_the_form_that_kubernetes_clients_parse() {
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
