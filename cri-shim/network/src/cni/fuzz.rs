//! Fuzz targets for CNI configurations and for answers of plugins.

use std::path::Path;

use super::configuration::{Version, parse_list, parse_single};
use super::{plugin, result};

/// Parses a configuration list and the configuration of a single plugin.
pub(crate) fn cni_list(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    for parsed in [
        parse_list(Path::new("a.conflist"), &text),
        parse_single(Path::new("a.conf"), &text),
    ] {
        match parsed {
            Ok(list) => assert!(!list.name.is_empty()),
            Err(sentence) => assert!((10..4096).contains(&sentence.len()), "{sentence}"),
        }
    }
}

/// Parses the answer of a plugin to ADD. The addresses of a converted result are the addresses of
/// the original result.
pub(crate) fn cni_answer(input: &[u8]) {
    let answer = match plugin::parse("ADD", "bridge", input) {
        Ok(answer) => answer,
        Err(error) => {
            let sentence = error.to_string();
            assert!((10..4096).contains(&sentence.len()), "{sentence}");
            return;
        }
    };
    let before = result::addresses(&answer, "eth0");
    if let Err(sentence) = &before {
        assert!((10..4096).contains(&sentence.len()), "{sentence}");
    }
    for version in [Version::V0_3_1, Version::V0_4_0, Version::V1_0_0] {
        let converted = result::in_version(answer.clone(), version);
        assert_eq!(
            result::addresses(&converted, "eth0").ok(),
            before.clone().ok()
        );
    }
}
