//! Random files config.json. Most of them are configurations that every runtime accepts. One in four
//! can contain mistakes: values that a runtime must refuse, values at the border of what a runtime
//! can accept, and valid values that not all runtimes support.
//!
//! A file contains placeholders, because each runtime gets its own copy: [`ID`] is the id of the
//! container, [`SOURCE`] the directory of the sources of bind mounts, and [`HOLDER`] the process
//! whose namespaces the container can join.

use std::ops::{Deref, DerefMut};

use serde_json::{Value, json};

use crate::support::machine::Dice;

mod kernel;
mod mounts;
mod namespaces;
mod process;
mod resources;

pub(crate) const ID: &str = "@ID@";
pub(crate) const SOURCE: &str = "@SOURCE@";
pub(crate) const HOLDER: &str = "@HOLDER@";

/// A part of config.json: the number of files that contain the part, per 100 files, and the
/// function that adds the part to a file.
type Part = (u64, fn(&mut Choices, &mut Value));

const PARTS: &[&[Part]] = &[
    &[(2, version), (6, root), (8, names), (6, annotations)],
    process::PARTS,
    mounts::PARTS,
    namespaces::PARTS,
    kernel::PARTS,
];

/// The random choices for one file.
pub(crate) struct Choices {
    dice: Dice,
    /// True if the file can contain mistakes.
    pub(crate) mistakes: bool,
}

impl Choices {
    pub(crate) fn new(mut dice: Dice) -> Self {
        let mistakes = dice.one_in(4);
        Choices { dice, mistakes }
    }

    /// Returns true in one of `times` calls on average, but never if the file has no mistakes.
    fn errs(&mut self, times: u64) -> bool {
        self.mistakes && self.dice.one_in(times)
    }

    /// Returns one of the `usual` values, or in some cases one of the `odd` values, if the file can
    /// contain mistakes.
    fn either<T: Copy>(&mut self, usual: &[T], odd: &[T]) -> T {
        let all = if self.errs(4) { odd } else { usual };
        self.dice.pick(all)
    }
}

impl Deref for Choices {
    type Target = Dice;

    fn deref(&self) -> &Dice {
        &self.dice
    }
}

impl DerefMut for Choices {
    fn deref_mut(&mut self) -> &mut Dice {
        &mut self.dice
    }
}

/// Adds random parts to the configuration `config`, which is like the output of `runc spec`. If
/// `limits` is true, the result also contains limits of the cgroup, which need controllers.
pub(crate) fn change(dice: &mut Choices, config: &mut Value, limits: bool) {
    for (percent, part) in PARTS.iter().copied().flatten() {
        if dice.below(100) < *percent {
            part(dice, config);
        }
    }
    if limits {
        resources::limits(dice, config);
    }
    if !dice.mistakes {
        namespaces::fit(config);
    }
}

/// Sets the member `name` of the object at the JSON pointer `parent`.
fn set(config: &mut Value, parent: &str, name: &str, value: Value) {
    if let Some(Value::Object(object)) = config.pointer_mut(parent) {
        object.insert(name.to_owned(), value);
    }
}

/// Appends an element to the list `name` of the object at the JSON pointer `parent`.
fn push(config: &mut Value, parent: &str, name: &str, value: Value) {
    if let Some(Value::Object(object)) = config.pointer_mut(parent) {
        let list = object.entry(name).or_insert_with(|| json!([]));
        if let Value::Array(list) = list {
            list.push(value);
        }
    }
}

fn version(dice: &mut Choices, config: &mut Value) {
    let usual = ["1.0.0", "1.0.2-dev", "1.1.0+dev", "1.2.1"];
    let version = dice.either(&usual, &["1.3.0", "2.0.0", "1.2", ""]);
    set(config, "", "ociVersion", json!(version));
}

fn root(dice: &mut Choices, config: &mut Value) {
    let usual = ["rootfs", "./rootfs/", "rootfs/../rootfs"];
    let path = dice.either(&usual, &["no-rootfs"]);
    set(config, "/root", "path", json!(path));
    set(config, "/root", "readonly", json!(dice.one_in(2)));
}

fn names(dice: &mut Choices, config: &mut Value) {
    let longest = "n".repeat(64);
    let too_long = "n".repeat(65);
    let usual = ["", "a", "a.example", "ü", " ", &longest, "(none)"];
    let kind = dice.pick(&["hostname", "domainname"]);
    let name = dice.either(&usual, &[&too_long]);
    set(config, "", kind, json!(name));
}

fn annotations(dice: &mut Choices, config: &mut Value) {
    let key = dice.pick(&["com.example.key", "a", "org.opencontainers.image.author"]);
    let value = dice.pick(&["", "value", "[1]", "{}", "a=b", "\n"]);
    set(config, "", "annotations", json!({ *key: value }));
    set(
        config,
        "",
        "com.example.unknown",
        json!({ *key: [null, 1.5] }),
    );
}
