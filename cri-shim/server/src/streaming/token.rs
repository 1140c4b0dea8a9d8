//! One-time tokens: what a URL of the streaming server stands for.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rrun_proto::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use tonic::Code;

use crate::id::new_id;
use rrun_calls::error::{Error, Result};

/// How long a token is good for.
const LIFE: Duration = Duration::from_secs(60);

/// The most tokens that wait for their clients.
const MAX_TOKENS: usize = 1000;

/// What a client may do, once.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Permit {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward(PortForwardRequest),
}

impl Permit {
    /// The first part of its URL's path.
    pub(crate) fn method(&self) -> &'static str {
        match self {
            Permit::Exec(_) => "exec",
            Permit::Attach(_) => "attach",
            Permit::PortForward(_) => "portforward",
        }
    }
}

#[derive(Default)]
pub(crate) struct Tokens(Mutex<BTreeMap<String, (Instant, Permit)>>);

impl Tokens {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, (Instant, Permit)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new token.
    pub(crate) fn give(&self, permit: Permit) -> Result<String> {
        let token = new_id()?;
        let now = Instant::now();
        let mut all = self.all();
        all.retain(|_, (until, _)| *until > now);
        if all.len() >= MAX_TOKENS {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!(
                    "{MAX_TOKENS} streams are waiting for their clients; try again in a minute"
                ),
            ));
        }
        all.insert(token.clone(), (now + LIFE, permit));
        Ok(token)
    }

    /// What a token is for, if it is still good.
    pub(crate) fn look(&self, method: &str, token: &str) -> Option<Permit> {
        let all = self.all();
        let (until, permit) = all.get(token)?;
        let good = *until > Instant::now() && permit.method() == method;
        good.then(|| permit.clone())
    }

    /// Uses a token up; false if another client was quicker.
    pub(crate) fn spend(&self, token: &str) -> bool {
        self.all().remove(token).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_once_and_for_its_method() -> Result<()> {
        let tokens = Tokens::default();
        let token = tokens.give(Permit::Attach(AttachRequest::default()))?;
        assert_eq!(tokens.look("exec", &token), None);
        assert!(tokens.look("attach", &token).is_some());
        assert!(tokens.spend(&token));
        assert!(!tokens.spend(&token));
        assert_eq!(tokens.look("attach", &token), None);
        Ok(())
    }

    #[test]
    fn tokens_are_counted() -> Result<()> {
        let tokens = Tokens::default();
        for _ in 0..MAX_TOKENS {
            tokens.give(Permit::Attach(AttachRequest::default()))?;
        }
        let refused = tokens.give(Permit::Attach(AttachRequest::default()));
        assert_eq!(
            refused.err().map(|e| e.code()),
            Some(Code::ResourceExhausted)
        );
        // An old one makes room.
        if let Some((until, _)) = tokens.all().values_mut().next() {
            *until = Instant::now();
        }
        tokens.give(Permit::Attach(AttachRequest::default()))?;
        Ok(())
    }
}
