//! The sessions of all clients of the streaming server. Their number is limited. If the limit is
//! reached, a session for a pod with few sessions replaces a session of the pod with the most
//! sessions. A user who can open sessions only for some pods can therefore not prevent sessions for
//! other pods.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::fair_share::pod_with_most;
use rrun_calls::lock::lock;

pub(super) struct Sessions {
    limit: usize,
    open: Mutex<OpenSessions>,
}

#[derive(Default)]
struct OpenSessions {
    next: u64,
    /// The key of a session is its number. The sessions are ordered by their age.
    sessions: BTreeMap<u64, OpenSession>,
}

struct OpenSession {
    pod: String,
    replaced: watch::Sender<bool>,
}

/// The place of a session among the open sessions. Dropping this value frees the place.
pub(super) struct SessionPlace {
    sessions: Arc<Sessions>,
    number: u64,
    /// True once the session must end, because another session has replaced it.
    pub replaced: watch::Receiver<bool>,
}

impl Sessions {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Sessions {
            limit,
            open: Mutex::default(),
        })
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Adds a session for the pod. Returns `None` if the limit is reached and no other pod has more
    /// sessions.
    pub(super) fn add(self: &Arc<Self>, pod: &str) -> Option<SessionPlace> {
        let mut open = lock(&self.open);
        if open.sessions.len() >= self.limit {
            let pods = open.sessions.values().map(|session| session.pod.as_str());
            let most = pod_with_most(pods.map(|pod| (pod, 1)), pod, 1)?;
            let mut newest_first = open.sessions.iter().rev();
            let (&newest, _) = newest_first.find(|(_, session)| session.pod == most)?;
            if let Some(session) = open.sessions.remove(&newest) {
                let _ = session.replaced.send(true);
            }
        }
        let (sender, replaced) = watch::channel(false);
        let number = open.next;
        open.next += 1;
        let session = OpenSession {
            pod: pod.to_owned(),
            replaced: sender,
        };
        open.sessions.insert(number, session);
        Some(SessionPlace {
            sessions: Arc::clone(self),
            number,
            replaced,
        })
    }
}

impl Drop for SessionPlace {
    fn drop(&mut self) {
        lock(&self.sessions.open).sessions.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_replaces_the_newest_session_of_the_pod_with_the_most_sessions() {
        let sessions = Sessions::new(3);
        let open: Vec<_> = (0..3).filter_map(|_| sessions.add("many")).collect();
        assert_eq!(open.len(), 3);
        assert!(sessions.add("many").is_none());
        let few = sessions.add("few");
        assert!(few.is_some());
        let replaced: Vec<bool> = open.iter().map(|one| *one.replaced.borrow()).collect();
        assert_eq!(replaced, [false, false, true]);
        // Both pods would have the same number of sessions, or the newcomer would have more.
        assert!(sessions.add("few").is_none());
        drop(open);
        assert!(sessions.add("many").is_some());
        assert_eq!(lock(&sessions.open).sessions.len(), 1);
    }
}
