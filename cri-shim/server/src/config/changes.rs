//! The comparison of two configurations.

use std::collections::BTreeSet;

use serde_json::Value;

use super::table::Config;

/// Returns the keys whose values differ between `old` and `new`. The names of a key's tables
/// precede the key, as in `network.range`. If only one of the two configurations has a section
/// `[runtime.NAME]`, the returned key is `runtime.NAME`.
pub(crate) fn changed_keys(old: &Config, new: &Config) -> Vec<String> {
    // The conversion to JSON fails only for a path that is not UTF-8. The paths in configuration
    // files are UTF-8. But if the server finds a program by its name, the program's directory may
    // have a path that is not UTF-8.
    let value = |config| serde_json::to_value(config).unwrap_or_default();
    let mut changed = Vec::new();
    compare(
        String::new(),
        Some(&value(old)),
        Some(&value(new)),
        &mut changed,
    );
    changed
}

fn compare(key: String, old: Option<&Value>, new: Option<&Value>, changed: &mut Vec<String>) {
    if let (Some(Value::Object(old)), Some(Value::Object(new))) = (old, new) {
        let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        for name in names {
            let inner = match key.as_str() {
                "" => name.clone(),
                table => format!("{table}.{name}"),
            };
            compare(inner, old.get(name), new.get(name), changed);
        }
    } else if old != new {
        changed.push(key);
    }
}

#[cfg(test)]
mod tests {
    use super::super::runtime_handler::RuntimeHandler;
    use super::*;

    #[test]
    fn changed_values_are_listed_by_their_keys() {
        let old = Config::default();
        assert_eq!(changed_keys(&old, &old), Vec::<String>::new());
        let mut new = old.clone();
        new.state = "/s".into();
        new.metrics_listen = Some(([127, 0, 0, 1], 1).into());
        new.rlimits.extend("core=0".to_owned().try_into());
        new.network.masquerade = false;
        new.image.least_rate = 1;
        let handler = RuntimeHandler::built_in();
        new.runtimes.insert("crun".to_owned(), handler.clone());
        let expected = [
            "image.least_rate",
            "metrics_listen",
            "network.masquerade",
            "rlimits",
            "runtime.crun",
            "state",
        ];
        assert_eq!(changed_keys(&old, &new), expected);
        assert_eq!(changed_keys(&new, &old), expected);
        let mut newer = new.clone();
        let native = false;
        let handler = RuntimeHandler { native, ..handler };
        newer.runtimes.insert("crun".to_owned(), handler);
        assert_eq!(changed_keys(&new, &newer), ["runtime.crun.native"]);
    }
}
