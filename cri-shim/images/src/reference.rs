//! Parses image references, and normalises them as Docker does.

use crate::error::{ImageError, Kind};

/// The part of a reference after the repository: a tag or a digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Target {
    Tag(String),
    /// `sha256:…`
    Digest(String),
}

/// A complete reference: `busybox` becomes `docker.io/library/busybox:latest`. If a reference has
/// both a tag and a digest, the tag is dropped as in containerd. Only the digest identifies the
/// image.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    /// The host, with its port if the reference contains one.
    pub(crate) registry: String,
    pub(crate) repository: String,
    pub(crate) target: Target,
}

/// The maximum lengths in bytes of a repository's name and of a tag, from the distribution
/// project's reference.go.
const REPOSITORY_BYTES: usize = 255;
const TAG_BYTES: usize = 128;

/// The maximum length in bytes of a registry: a host name of the DNS (RFC 1035, section 2.3.4), a
/// colon and a port.
const REGISTRY_BYTES: usize = 253 + 6;

/// The name of Docker Hub, and its former name.
const HUB: &str = "docker.io";
const OLD_HUB: &str = "index.docker.io";

impl Name {
    /// Parses a reference. Unlike other implementations, this parser uses no regular expression. A
    /// compiled regular expression would take two thirds of this server's memory.
    pub fn parse(reference: &str) -> Result<Self, ImageError> {
        let refuse = |why: &str| {
            let shown: String = reference.chars().take(300).collect();
            ImageError::new(
                Kind::InvalidArgument,
                format!("the image reference {shown:?} can't be read: {why}"),
            )
        };
        let (rest, digest) = match reference.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (reference, None),
        };
        // A tag begins with a colon after the last slash. A colon before the last slash begins a
        // port.
        let after_slash = rest.rfind('/').map_or(0, |slash| slash + 1);
        let colon = rest.rfind(':').filter(|colon| *colon >= after_slash);
        let (name, tag) = match colon.and_then(|colon| rest.split_at_checked(colon)) {
            Some((name, tag)) => (name, Some(tag.trim_start_matches(':'))),
            None => (rest, None),
        };
        let (registry, path) = match name.split_once('/') {
            Some((first, path)) if is_registry(first) => (first, path),
            _ => (HUB, name),
        };
        let registry = if registry == OLD_HUB { HUB } else { registry };
        let repository = if registry == HUB && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if !is_host(registry) {
            return Err(refuse("the registry is not a host name"));
        }
        if repository.len() > REPOSITORY_BYTES || !path.split('/').all(is_component) {
            return Err(refuse(
                "the name may contain only lower-case letters and digits, with . or _ or __ or any number of - between them",
            ));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(refuse(
                "the tag may contain only letters, digits, _, . and -",
            ));
        }
        let target = match (digest, tag) {
            (Some(digest), _) if is_digest(digest) => Target::Digest(digest.to_owned()),
            (Some(_), _) => {
                return Err(refuse(
                    "the digest is not sha256: followed by 64 lower-case hexadecimal digits",
                ));
            }
            (None, tag) => Target::Tag(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Name {
            registry: registry.to_owned(),
            repository,
            target,
        })
    }

    /// Returns the complete reference as text. References are stored and compared in this form.
    pub fn canonical(&self) -> String {
        match &self.target {
            Target::Tag(tag) => format!("{}/{}:{tag}", self.registry, self.repository),
            Target::Digest(digest) => self.with_digest(digest),
        }
    }

    /// Returns a reference to the digest `digest` in the same repository.
    pub(crate) fn with_digest(&self, digest: &str) -> String {
        format!("{}/{}@{digest}", self.registry, self.repository)
    }
}

/// Returns whether `first`, the text before the first slash of a reference, is a registry. A text
/// that is not a registry is the beginning of a repository name on Docker Hub.
fn is_registry(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.contains(|c: char| c.is_ascii_uppercase())
}

/// Returns whether `text` is a host: dotted labels or an IPv6 address in brackets, with an optional
/// port.
fn is_host(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let is_label = |label: &str| {
        let bytes = label.as_bytes();
        let ends = [bytes.first(), bytes.last()];
        ends.iter()
            .all(|end| end.is_some_and(u8::is_ascii_alphanumeric))
            && bytes
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || *b == b'-')
    };
    let address = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host = match address {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(is_label),
    };
    text.len() <= REGISTRY_BYTES && host && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

/// Returns whether `text` consists of lower-case letters and digits with `.`, `_`, `__` or any
/// number of `-` between them.
fn is_component(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separators = text.split(is_plain).filter(|between| !between.is_empty());
    text.starts_with(is_plain)
        && text.ends_with(is_plain)
        && separators.into_iter().all(|between| {
            matches!(between, "." | "_" | "__") || between.bytes().all(|b| b == b'-')
        })
}

fn is_tag(text: &str) -> bool {
    let is_word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
    text.len() <= TAG_BYTES
        && text.as_bytes().first().is_some_and(is_word)
        && text.bytes().all(|b| is_word(&b) || b == b'.' || b == b'-')
}

/// Returns whether `text` is a sha256 digest. Registries use no other digest algorithm.
pub(crate) fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_refer_to_docker_hub() {
        let canonical = |text| Name::parse(text).map(|name| name.canonical()).ok();
        assert_eq!(
            canonical("busybox").as_deref(),
            Some("docker.io/library/busybox:latest")
        );
        assert_eq!(canonical("me/app:1").as_deref(), Some("docker.io/me/app:1"));
        assert_eq!(
            canonical("localhost:5000/app").as_deref(),
            Some("localhost:5000/app:latest")
        );
        assert_eq!(
            canonical("index.docker.io/library/busybox").as_deref(),
            Some("docker.io/library/busybox:latest")
        );
    }

    #[test]
    fn a_registry_is_recognised_by_a_dot_a_colon_or_a_capital_letter() {
        let parts = |text| {
            let name = Name::parse(text);
            name.map(|name| (name.registry, name.repository)).ok()
        };
        let is = |registry: &str, repository: &str| Some((registry.into(), repository.into()));
        assert_eq!(parts("a.b/c"), is("a.b", "c"));
        assert_eq!(parts("A/c"), is("A", "c"));
        assert_eq!(parts("a/b/c"), is("docker.io", "a/b/c"));
        assert_eq!(parts("localhost/c:2"), is("localhost", "c"));
        assert_eq!(parts("[::1]:5000/c"), is("[::1]:5000", "c"));
        assert_eq!(parts("a--b__c.d_e"), is("docker.io", "library/a--b__c.d_e"));
    }

    #[test]
    fn a_digest_takes_precedence_over_a_tag() {
        let hex = "a".repeat(64);
        let name = Name::parse(&format!("r.example/app:1@sha256:{hex}"));
        assert_eq!(
            name.map(|name| name.canonical()).ok(),
            Some(format!("r.example/app@sha256:{hex}"))
        );
    }

    #[test]
    fn a_malformed_reference_is_refused_with_an_explanation() {
        for bad in [
            "",
            "Upper/Case",
            "a b",
            "r.example/app@sha256:xyz",
            "a/../b",
            "-",
            "a..b",
            "a___b",
            "a_-b",
            "a/",
            "/a",
            "a:",
            "a:-x",
            "a:b:c",
            "a.b:port/c",
            "-a.b/c",
            &format!("{}/c", "a.".repeat(150) + "b"),
        ] {
            let error = Name::parse(bad);
            assert!(
                error.is_err_and(|e| e.kind() == Kind::InvalidArgument
                    && e.to_string().contains("image reference")),
                "{bad}"
            );
        }
    }
}
