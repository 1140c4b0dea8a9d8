//! What differs between two configurations.

use std::collections::BTreeSet;

use serde_json::Value;

use super::table::Config;

/// The keys whose values differ, each with the tables that it is in: `network.range`. A
/// `[runtime.NAME]` that only one of them has is `runtime.NAME`.
pub(crate) fn changed_keys(old: &Config, new: &Config) -> Vec<String> {
    // Only a path that is not UTF-8 has no JSON. Files can't have one, only the directory of a
    // program that was looked up.
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
    fn what_has_changed_is_named_by_its_key() {
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
