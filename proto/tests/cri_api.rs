//! Compares proto/cri/v1 with the file api.proto in the Go module from which Kubernetes is built.
//! The comparison covers every message, field, enum value and method, and detects an item that is
//! missing in either definition. `go mod download` downloads the module into Go's module cache. If
//! Go is not installed or the module is not available, the test is reported as ignored, with the
//! reason.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use protox::Compiler;
use protox::file::{File, FileResolver};
use protox::prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind,
    MessageDescriptor, MethodDescriptor,
};

const MODULE: &str = "k8s.io/cri-api@v0.36.3";
const DEFINITION_IN_MODULE: &str = "pkg/apis/runtime/v1/api.proto";
/// The timeout for the download of the Go module. Without a timeout, an unresponsive module proxy
/// would block the test run for ever.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(120);

fn main() {
    let trials = vec![
        Trial::ignorable_test(
            "every_message_enum_and_method_equals_that_of_kubernetes",
            || match fetch_module()? {
                Fetched::Unavailable(reason) => Ok(Completion::ignored_with(reason)),
                Fetched::Directory(directory) => {
                    let theirs = std::fs::read_to_string(directory.join(DEFINITION_IN_MODULE))?;
                    no_difference(&facts(&ours()?), &facts(&compile(&theirs)?))?;
                    Ok(Completion::Completed)
                }
            },
        ),
        Trial::test(
            "runtime_service_has_35_methods_and_image_service_has_6",
            || {
                let pool = ours()?;
                let methods: BTreeMap<_, _> = pool
                    .services()
                    .map(|service| (service.full_name().to_owned(), service.methods().len()))
                    .collect();
                let expected = [
                    ("runtime.v1.ImageService".to_owned(), 6),
                    ("runtime.v1.RuntimeService".to_owned(), 35),
                ];
                if methods != expected.into() {
                    return Err(
                        format!("the services in proto/cri/v1 have unexpected numbers of methods: {methods:?}").into(),
                    );
                }
                Ok(())
            },
        ),
        Trial::test(
            "the_comparison_detects_each_kind_of_change",
            comparison_detects_changes,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// Compiles the definition in proto/cri/v1 from the same files as build.rs.
fn ours() -> Result<DescriptorPool, Failed> {
    let mut compiler = Compiler::new([Path::new(env!("CARGO_MANIFEST_DIR"))])?;
    compiler.open_files(["cri/v1/runtime_service.proto", "cri/v1/image_service.proto"])?;
    Ok(compiler.descriptor_pool())
}

/// Compiles a definition that consists of one file with the text `source`.
fn compile(source: &str) -> Result<DescriptorPool, Failed> {
    struct OneFile(String);
    impl FileResolver for OneFile {
        fn open_file(&self, name: &str) -> Result<File, protox::Error> {
            match name {
                "api.proto" => File::from_source(name, &self.0),
                _ => Err(protox::Error::file_not_found(name)),
            }
        }
    }
    let mut compiler = Compiler::with_file_resolver(OneFile(source.to_owned()));
    compiler.open_file("api.proto")?;
    Ok(compiler.descriptor_pool())
}

/// The contents of a definition, as a map from the full name of each item to the item's
/// description.
type Facts = BTreeMap<String, String>;

fn facts(pool: &DescriptorPool) -> Facts {
    let mut facts = Facts::new();
    // The pool also contains the items of google.protobuf, which are not compared.
    let is_cri = |package: &str| !package.starts_with("google.protobuf");
    for message in pool.all_messages().filter(|m| is_cri(m.package_name())) {
        // This loop skips the entry message of a map, because `describe_type` describes it as part
        // of the map field.
        if message.is_map_entry() {
            continue;
        }
        facts.insert(message.full_name().to_owned(), describe_message(&message));
        for field in message.fields() {
            facts.insert(field.full_name().to_owned(), describe_field(&field));
        }
    }
    for enumeration in pool.all_enums().filter(|e| is_cri(e.package_name())) {
        let name = enumeration.full_name();
        facts.insert(name.to_owned(), describe_enum(&enumeration));
        for value in enumeration.values() {
            // The enum's name is added to the key. In protobuf, the full name of an enum value does
            // not contain the enum's name.
            facts.insert(
                format!("{name}.{}", value.name()),
                format!("{}{}", value.number(), describe_options(&value.options())),
            );
        }
    }
    for service in pool.services() {
        facts.insert(service.full_name().to_owned(), "service".to_owned());
        for method in service.methods() {
            facts.insert(method.full_name().to_owned(), describe_method(&method));
        }
    }
    facts
}

fn describe_message(message: &MessageDescriptor) -> String {
    let mut text = format!("message ({:?})", message.parent_file().syntax());
    for range in message.reserved_ranges() {
        let _ = write!(text, ", reserved {range:?}");
    }
    for name in message.reserved_names() {
        let _ = write!(text, ", reserved {name:?}");
    }
    text + &describe_options(&message.options())
}

fn describe_field(field: &FieldDescriptor) -> String {
    let label = match field.cardinality() {
        _ if field.is_map() => "",
        Cardinality::Repeated => "repeated ",
        Cardinality::Required => "required ",
        // A field with a message type can always be absent. A field with another type can be absent
        // only if it is marked `optional` or is part of a oneof. The description therefore contains
        // `optional` only for a field with another type.
        Cardinality::Optional
            if field.supports_presence() && field.kind().as_message().is_none() =>
        {
            "optional "
        }
        Cardinality::Optional => "",
    };
    let mut text = format!("{label}{} = {}", describe_type(field), field.number());
    if let Some(oneof) = field.containing_oneof() {
        let _ = write!(text, " in oneof {}", oneof.name());
    }
    if field.is_packed() {
        text += ", packed";
    }
    let _ = write!(text, ", JSON {}", field.json_name());
    text + &describe_options(&field.options())
}

fn describe_type(field: &FieldDescriptor) -> String {
    match field.kind() {
        Kind::Message(entry) if field.is_map() => format!(
            "map<{}, {}>",
            describe_type(&entry.map_entry_key_field()),
            describe_type(&entry.map_entry_value_field()),
        ),
        // For a message or an enum, the debug text of `kind` is the full name. For a scalar type,
        // it is the keyword.
        kind => format!("{kind:?}"),
    }
}

fn describe_enum(enumeration: &EnumDescriptor) -> String {
    let mut text = "enum".to_owned();
    for range in enumeration.reserved_ranges() {
        let _ = write!(text, ", reserved {range:?}");
    }
    for name in enumeration.reserved_names() {
        let _ = write!(text, ", reserved {name:?}");
    }
    text + &describe_options(&enumeration.options())
}

fn describe_method(method: &MethodDescriptor) -> String {
    let stream = |is: bool| if is { "stream " } else { "" };
    format!(
        "rpc ({}{}) returns ({}{}){}",
        stream(method.is_client_streaming()),
        method.input().full_name(),
        stream(method.is_server_streaming()),
        method.output().full_name(),
        describe_options(&method.options()),
    )
}

/// Returns all options of an item as text, such as `deprecated` and `debug_redact`.
fn describe_options(options: &DynamicMessage) -> String {
    options
        .fields()
        .fold(String::new(), |text, (field, value)| {
            text + &format!(", {} = {value:?}", field.name())
        })
}

fn differences(ours: &Facts, theirs: &Facts) -> Vec<String> {
    let missing_or_other = theirs
        .iter()
        .filter_map(|(name, there)| match ours.get(name) {
            None => Some(format!(
                "{name}: missing in proto/cri/v1, `{there}` in {MODULE}"
            )),
            Some(here) if here != there => Some(format!(
                "{name}: `{here}` in proto/cri/v1, `{there}` in {MODULE}"
            )),
            Some(_) => None,
        });
    let ours_alone = ours
        .iter()
        .filter(|(name, _)| !theirs.contains_key(*name))
        .map(|(name, here)| format!("{name}: `{here}` in proto/cri/v1, missing in {MODULE}"));
    missing_or_other.chain(ours_alone).collect()
}

fn no_difference(ours: &Facts, theirs: &Facts) -> Result<(), Failed> {
    let found = differences(ours, theirs);
    if found.is_empty() {
        return Ok(());
    }
    Err(format!(
        "proto/cri/v1 and {MODULE} differ in {} places:\n  {}",
        found.len(),
        found.join("\n  ")
    )
    .into())
}

fn comparison_detects_changes() -> Result<(), Failed> {
    const SOURCE: &str = r#"
        syntax = "proto3";
        package runtime.v1;
        message M {
            string text = 1;
            map<string, int32> numbers = 2;
            oneof one { bool yes = 3; bool no = 4; }
            string secret = 5 [debug_redact = true];
            repeated M inner = 6;
        }
        enum E { ZERO = 0; ONE = 1; }
        service S { rpc Call(M) returns (stream M); }
    "#;
    let original = facts(&compile(SOURCE)?);
    no_difference(&original, &original)?;

    for (from, to, place) in [
        ("text = 1", "text = 7", "M.text"),
        ("string text", "bytes text", "M.text"),
        ("string text", "optional string text", "M.text"),
        ("string text", "repeated string text", "M.text"),
        ("text = 1", "text = 1 [deprecated = true]", "M.text"),
        ("string text = 1;", "", "M.text"),
        (
            "string text = 1;",
            "string text = 1; bool more = 7;",
            "M.more",
        ),
        ("string, int32", "string, int64", "M.numbers"),
        ("bool no = 4; }", "} bool no = 4;", "M.no"),
        (" [debug_redact = true]", "", "M.secret"),
        ("repeated M", "M", "M.inner"),
        ("string text = 1;", "string text = 1; reserved 9;", "M"),
        ("ONE = 1", "ONE = 2", "E.ONE"),
        ("ONE = 1;", "", "E.ONE"),
        ("stream M", "M", "S.Call"),
        ("(M) returns", "(stream M) returns", "S.Call"),
    ] {
        let altered = facts(&compile(&SOURCE.replacen(from, to, 1))?);
        for found in [
            differences(&original, &altered),
            differences(&altered, &original),
        ] {
            let prefix = format!("runtime.v1.{place}: ");
            if found.is_empty() || !found.iter().all(|line| line.starts_with(&prefix)) {
                return Err(format!(
                    "the replacement of `{from}` by `{to}` must be reported only as a \
                     difference of {place}, but the comparison reported {found:?}"
                )
                .into());
            }
        }
    }
    Ok(())
}

enum Fetched {
    /// The directory of the unpacked module in Go's module cache.
    Directory(PathBuf),
    /// The reason why the module is not available.
    Unavailable(String),
}

fn fetch_module() -> Result<Fetched, Failed> {
    let spawned = Command::new("go")
        .args(["mod", "download", "-json", MODULE])
        // `go` runs in a directory outside of any Go module. No local go.mod then influences the
        // download.
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut go = match spawned {
        Ok(go) => go,
        Err(error) => {
            return Ok(Fetched::Unavailable(format!(
                "the comparison with {MODULE} was skipped: cannot run go: {error}"
            )));
        }
    };
    let deadline = Instant::now() + DOWNLOAD_TIMEOUT;
    while go.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            go.kill()?;
            go.wait()?;
            return Ok(Fetched::Unavailable(format!(
                "the comparison with {MODULE} was skipped: go mod download did not finish within {DOWNLOAD_TIMEOUT:?}"
            )));
        }
        thread::sleep(Duration::from_millis(50));
    }
    // The loop above does not read the output of `go`. `go` does not block, because its output fits
    // into the pipe's buffer. Even after a failure, `go` prints only a few hundred bytes of JSON.
    let output = go.wait_with_output()?;
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Ok(match result["Dir"].as_str() {
        Some(directory) if output.status.success() => Fetched::Directory(directory.into()),
        _ => Fetched::Unavailable(format!(
            "the comparison with {MODULE} was skipped: go mod download failed: {}",
            result["Error"]
                .as_str()
                .unwrap_or("the command printed no error")
        )),
    })
}
