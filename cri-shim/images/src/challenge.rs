//! Parses a registry's `WWW-Authenticate` header (RFC 9110, section 11, and the distribution
//! project's token specification).

/// One authentication scheme that a registry offers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// Returns the challenge that the client must answer. The first valid bearer challenge takes
/// precedence over a basic challenge.
pub(crate) fn choose<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for header in headers {
        let (scheme, parameters) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            basic = Some(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer") {
            let parameters = parameters_of(parameters);
            let get = |name: &str| {
                parameters
                    .iter()
                    .find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.clone())
            };
            if let Some(realm) = get("realm") {
                return Some(Challenge::Bearer {
                    realm,
                    service: get("service"),
                    scope: get("scope"),
                });
            }
        }
    }
    basic
}

/// Parses parameters of the form `key="value",key=value`. In a quoted value, a backslash escapes
/// the next character.
fn parameters_of(text: &str) -> Vec<(String, String)> {
    let mut parameters = Vec::new();
    let mut rest = text.chars().peekable();
    loop {
        let mut key = String::new();
        while let Some(c) = rest.next_if(|c| *c != '=') {
            if c != ',' && !c.is_whitespace() {
                key.push(c);
            }
        }
        if rest.next().is_none() {
            return parameters;
        }
        let mut value = String::new();
        if rest.next_if_eq(&'"').is_some() {
            while let Some(c) = rest.next() {
                match c {
                    '"' => break,
                    '\\' => value.extend(rest.next()),
                    _ => value.push(c),
                }
            }
        } else {
            while let Some(c) = rest.next_if(|c| *c != ',') {
                value.push(c);
            }
        }
        parameters.push((key, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_challenge_contains_a_realm_a_service_and_a_scope() {
        let header = r#"Bearer realm="https://auth.example/token?a=b,c",service="r.example",scope="repository:app:pull""#;
        assert_eq!(
            choose(["Basic realm=\"x\"", header].into_iter()),
            Some(Challenge::Bearer {
                realm: "https://auth.example/token?a=b,c".into(),
                service: Some("r.example".into()),
                scope: Some("repository:app:pull".into()),
            })
        );
    }

    #[test]
    fn unknown_and_incomplete_challenges_are_ignored() {
        assert_eq!(
            choose(["Negotiate", "", "Bearer", "Bearer ="].into_iter()),
            None
        );
        assert_eq!(
            choose(["basic realm=\"r\""].into_iter()),
            Some(Challenge::Basic)
        );
    }
}
