//! Tests that the printed defaults and the manual page document every key and no other key.

use std::collections::BTreeSet;

use serde_json::Value;

use super::DEFAULT_TEXT;
use super::check::look_up_programs;
use super::table::Config;

const MANUAL: &str = include_str!("../../../../contrib/man/rrun-cri.toml.5");

/// Words that the manual page prints in italics, but that are not keys of the server's
/// configuration. They are keys of SELinux's contexts files. The check of the documented keys
/// ignores these words.
const NOT_KEYS: [&str; 2] = ["process", "file"];

/// The full names of keys, such as `network.range`. The table `[runtime.rrun]` represents the
/// tables of all handlers.
type Keys = BTreeSet<String>;

fn full(table: &str, key: &str) -> String {
    match table {
        "" => key.to_owned(),
        table => format!("{table}.{key}"),
    }
}

fn is_name(word: &str) -> bool {
    let mut bytes = word.bytes();
    !word.is_empty() && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

fn keys_of_value(table: &str, value: &Value, keys: &mut Keys) {
    match value {
        Value::Object(inner) => {
            for (name, value) in inner {
                keys_of_value(&full(table, name), value, keys);
            }
        }
        _ => drop(keys.insert(table.to_owned())),
    }
}

fn keys_of_the_configuration() -> Keys {
    let mut config = Config::default();
    look_up_programs(&mut config);
    let mut keys = Keys::new();
    let value = serde_json::to_value(&config).unwrap_or_default();
    keys_of_value("", &value, &mut keys);
    keys
}

/// Collects the keys of lines such as `# key = value`. A key belongs to the table in the nearest
/// line `# [table]` above the key.
fn keys_of_the_printed_default() -> Keys {
    let mut keys = Keys::new();
    let mut table = "";
    for line in DEFAULT_TEXT.lines() {
        let line = line.trim_start_matches('#').trim();
        let header = line
            .strip_prefix('[')
            .and_then(|line| line.strip_suffix(']'));
        if let Some(header) = header {
            table = header;
        } else if let Some((key, _)) = line.split_once('=')
            && is_name(key.trim())
        {
            keys.insert(full(table, key.trim()));
        }
    }
    keys
}

/// Returns the words in italics in the manual page's section KEYS. If a word's paragraph describes
/// a table, the table's name precedes the word, as in `network.range`.
fn keys_of_the_manual() -> Keys {
    let mut keys = Keys::new();
    let mut table = String::new();
    let sections = MANUAL.split("\n.SH ");
    let lines = sections.filter_map(|section| section.strip_prefix("KEYS\n"));
    for line in lines.flat_map(str::lines) {
        if line == ".TP" {
            table.clear();
        } else if let Some(header) = line.strip_prefix(".B [") {
            let header = header.trim_end_matches(']');
            table = header.replace("\\fINAME\\fB", "rrun");
        }
        let macros = [".I ", ".IR "];
        let words: Vec<&str> = match macros.iter().find_map(|name| line.strip_prefix(name)) {
            Some(words) => words.split(' ').collect(),
            None => {
                let after = line.split("\\fI").skip(1);
                after.filter_map(|text| text.split('\\').next()).collect()
            }
        };
        let named = words.into_iter().filter(|word| is_name(word));
        let named = named.filter(|word| !NOT_KEYS.contains(word));
        keys.extend(named.map(|word| full(&table, word)));
    }
    keys
}

#[test]
fn every_key_is_documented_and_every_documented_key_exists() {
    let keys = keys_of_the_configuration();
    assert!(keys.contains("network.range") && keys.contains("runtime.rrun.path"));
    for (place, documented) in [
        ("config_default.toml", keys_of_the_printed_default()),
        ("the manual", keys_of_the_manual()),
    ] {
        let missing: Vec<_> = keys.difference(&documented).collect();
        assert!(
            missing.is_empty(),
            "{place} does not document the keys {missing:?}"
        );
        let unknown: Vec<_> = documented.difference(&keys).collect();
        assert!(
            unknown.is_empty(),
            "{place} documents keys that do not exist: {unknown:?}"
        );
    }
}
