//! Names of images, as Docker normalises them.

use oci_spec::distribution::Reference;

use super::error::{ImageError, Kind};

/// What a reference points to inside its repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    Tag(String),
    /// `sha256:…`
    Digest(String),
}

/// A reference in full: `busybox` is `docker.io/library/busybox:latest`. A tag beside a digest
/// says nothing and is dropped, as containerd does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    /// Host, with a port if one was given.
    pub registry: String,
    pub repository: String,
    pub target: Target,
}

impl Name {
    pub fn parse(reference: &str) -> Result<Self, ImageError> {
        let refuse = |why: String| {
            let shown: String = reference.chars().take(300).collect();
            ImageError::new(
                Kind::InvalidArgument,
                format!("the image reference {shown:?} can't be read: {why}"),
            )
        };
        let parsed: Reference = reference
            .parse()
            .map_err(|error| refuse(format!("{error}")))?;
        let target = match (parsed.digest(), parsed.tag()) {
            (Some(digest), _) if is_digest(digest) => Target::Digest(digest.to_owned()),
            (Some(_), _) => {
                return Err(refuse(
                    "its digest is not sha256: and 64 lower-case hexadecimal digits".into(),
                ));
            }
            (None, Some(tag)) => Target::Tag(tag.to_owned()),
            (None, None) => Target::Tag("latest".to_owned()),
        };
        Ok(Name {
            registry: parsed.registry().to_owned(),
            repository: parsed.repository().to_owned(),
            target,
        })
    }

    /// The name as it is stored and compared.
    pub fn canonical(&self) -> String {
        match &self.target {
            Target::Tag(tag) => format!("{}/{}:{tag}", self.registry, self.repository),
            Target::Digest(digest) => self.with_digest(digest),
        }
    }

    /// The digest reference of the same repository.
    pub fn with_digest(&self, digest: &str) -> String {
        format!("{}/{}@{digest}", self.registry, self.repository)
    }
}

/// Whether `text` is a sha256 digest, the one algorithm that registries use.
pub fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_those_of_docker_hub() {
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
    fn a_digest_wins_over_a_tag() {
        let hex = "a".repeat(64);
        let name = Name::parse(&format!("r.example/app:1@sha256:{hex}"));
        assert_eq!(
            name.map(|name| name.canonical()).ok(),
            Some(format!("r.example/app@sha256:{hex}"))
        );
    }

    #[test]
    fn nonsense_is_refused_with_a_sentence() {
        for bad in [
            "",
            "Upper/Case",
            "a b",
            "r.example/app@sha256:xyz",
            "a/../b",
            "-",
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
