//! Runs the commands of the user documents, and compares their output with the output that the
//! documents show.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, Node, on_a_node};
use crate::{ensure, test};

pub(crate) const TESTS: &[Test] = &[
    test!(the_readme_shows_the_real_output_of_its_commands, CLIENTS),
    test!(
        docs_first_steps_md_shows_the_real_output_of_its_commands,
        CLIENTS,
        Need::Controller("cpu"),
        Need::Controller("memory")
    ),
    test!(every_document_command_without_output_is_run_by_another_test),
];

const CLIENTS: Need = Need::All(&[
    A_NODE,
    Need::RrunCri,
    Need::Program("skopeo"),
    Need::Program("umoci"),
    Need::Program("curl"),
]);

/// The commands in the documents' code blocks without output. Each entry contains a command and the
/// test or script that runs this command.
const RUN_ELSEWHERE: &[(&str, &str)] = &[
    ("make demo", "tests/run, in its part `demo`"),
    (
        "make dist",
        "`make bench` builds these binaries before it measures them",
    ),
    ("sudo make install", "cri::systemd runs contrib/install"),
    (
        "sudo systemctl enable --now rrun-cri",
        "cri::systemd starts the unit",
    ),
    ("/src/tests/images/registry.sh start", "on_a_node"),
    (
        "/src/tests/images/registry.sh mirrors /etc/rrun/certs.d",
        "on_a_node",
    ),
    ("rrun-cri 2>>/var/log/rrun-cri.log &", "on_a_node"),
];

/// The paths that the documents use for the server's socket and for the pods' logs. The test
/// replaces these paths with paths in the test's directory.
const SOCKET: &str = "/run/rrun/rrun-cri.sock";
const LOGS: &str = "/var/log/pods";
/// The default directory of rrun's option `--root`.
const RUNTIME_ROOT: &str = "/run/rrun";
/// The image that the documents pull from docker.io. The node's mirror of docker.io serves this
/// image.
const IMAGE: &str = "docker://127.0.0.1:5000/library/busybox:latest";
/// The directory in which skopeo records the registries of each blob.
const SKOPEO_RECORDS: &str = "/var/lib/containers";

/// The marker that precedes the output of each command. One shell script runs all commands of a
/// document, and prints this marker before each command.
const MARK: &str = "@@@ command ";

/// The first lines of the shell script that runs the document's commands. If a command of the
/// document has killed the CRI server, the shell function `server` starts the server again. The
/// function then waits until the server answers.
const PRELUDE: &str = r#"
exec 2>&1
server() {
    if ! pidof rrun-cri >/dev/null; then
        setsid rrun-cri --config "$CONFIG" >>"$SERVER_LOG" 2>&1 </dev/null &
        disown
    fi
    for ((tries = 0; tries < 600; tries++)); do
        crictl version >/dev/null 2>&1 && return
        sleep 0.2
    done
    echo "the server does not answer"
}
"#;

/// A command of a document with the output that the document shows.
#[derive(Debug)]
struct Step {
    command: String,
    output: Vec<String>,
    /// True for the first command of a block.
    begins_block: bool,
}

fn the_readme_shows_the_real_output_of_its_commands() -> Result {
    run_document("README.md")
}

fn docs_first_steps_md_shows_the_real_output_of_its_commands() -> Result {
    run_document("docs/first-steps.md")
}

fn every_document_command_without_output_is_run_by_another_test() -> Result {
    for document in ["README.md", "docs/first-steps.md"] {
        for line in blocks(&read(document)?, "sh").concat() {
            ensure!(
                RUN_ELSEWHERE.iter().any(|(command, _)| *command == line),
                "the constant RUN_ELSEWHERE does not list this command of the document {document}: {line}"
            );
        }
    }
    Ok(())
}

fn run_document(document: &str) -> Result {
    let steps = steps(&read(document)?);
    ensure!(
        !steps.is_empty(),
        "the document {document} has no command with output"
    );
    on_a_node(|node| {
        let had_root = Path::new(RUNTIME_ROOT).exists();
        let had_records = Path::new(SKOPEO_RECORDS).exists();
        let result = run_on(node, &steps).map_err(|failed| {
            let message = failed.message().unwrap_or_default();
            format!("test of the document {document}: {message}")
        });
        // The script that runs the document's commands may have replaced the test's server with
        // another server. The test therefore kills every server and starts its own server again.
        command("pkill", ["-x", "rrun-cri"]).end()?;
        node.kill_server()?;
        wait_for("the other server to exit", || {
            let running = command("pidof", ["rrun-cri"]).end()?;
            Ok((running.code != 0).then_some(()))
        })?;
        node.start_server()?;
        if !had_root && Path::new(RUNTIME_ROOT).exists() {
            fs::remove_dir_all(RUNTIME_ROOT)?;
        }
        if !had_records && Path::new(SKOPEO_RECORDS).exists() {
            fs::remove_dir_all(SKOPEO_RECORDS)?;
        } else {
            let _ = fs::remove_dir_all(Path::new(SKOPEO_RECORDS).join("cache"));
        }
        Ok(result?)
    })
}

fn run_on(node: &mut Node, steps: &[Step]) -> Result {
    let work = node.join("work");
    let tools = node.join("tools");
    fs::create_dir(&work)?;
    provide_busybox(node, &tools)?;
    let crictl = node.join("crictl.yaml");
    fs::write(&crictl, "timeout: 120\n")?;

    let mut script = format!(
        "export PATH={}:$PATH CRI_CONFIG_FILE={} CONFIG={} SERVER_LOG={}\n{PRELUDE}",
        tools.display(),
        crictl.display(),
        node.join("config.toml").display(),
        node.join("server.log").display()
    );
    let socket = node.socket().display().to_string();
    let logs = node.join("logs").display().to_string();
    for (number, step) in steps.iter().enumerate() {
        if step.begins_block && number > 0 {
            script += "server\n";
        }
        let command = step.command.replace(SOCKET, &socket).replace(LOGS, &logs);
        // The marker begins on a new line, because some output does not end with a newline.
        let _ = write!(script, "printf '\\n%s\\n' '{MARK}{number}'\n{command}\n");
    }
    let file = node.join("session");
    fs::write(&file, script)?;
    let session = command("bash", [&file])
        .dir(&work)
        .within(Duration::from_secs(600))
        .end()?;

    let printed = outputs(&session.stdout, &work);
    let mut wrong = String::new();
    for (number, step) in steps.iter().enumerate() {
        let shown: Vec<String> = step.output.iter().map(|line| plain(line)).collect();
        let lines = printed.get(&number).cloned().unwrap_or_default();
        let found: Vec<String> = lines.iter().map(|line| plain(line)).collect();
        if shown != found {
            let _ = write!(
                wrong,
                "\n$ {}\noutput in the document:\n{}\noutput of the command:\n{}\n",
                step.command,
                step.output.join("\n"),
                lines.join("\n")
            );
        }
    }
    ensure!(
        wrong.is_empty(),
        "the document shows other output than these commands print:{wrong}"
    );
    Ok(())
}

/// Copies the busybox program from the image `IMAGE` into the directory `tools`. A command of
/// README.md expects the program on the machine.
fn provide_busybox(node: &Node, tools: &Path) -> Result {
    let image = format!("oci:{}:box", node.join("layout").display());
    command("skopeo", ["--insecure-policy", "copy", "--quiet"])
        .args(["--src-tls-verify=false", IMAGE, &image])
        .ok()?;
    let rootfs: PathBuf = node.join("unpacked");
    command("umoci", ["raw", "unpack", "--image"])
        .arg(image.trim_start_matches("oci:"))
        .arg(&rootfs)
        .ok()?;
    fs::create_dir(tools)?;
    fs::copy(rootfs.join("bin/busybox"), tools.join("busybox"))?;
    Ok(())
}

fn read(document: &str) -> Result<String> {
    Ok(fs::read_to_string(Path::new("/src").join(document))?)
}

/// Returns the lines of each code block in the language `language`.
fn blocks(text: &str, language: &str) -> Vec<Vec<String>> {
    let mut blocks = Vec::new();
    let mut block: Option<Vec<String>> = None;
    for line in text.lines() {
        match (&mut block, line.strip_prefix("```")) {
            (None, Some(name)) if name == language => block = Some(Vec::new()),
            (Some(_), Some(_)) => blocks.extend(block.take()),
            (Some(lines), None) => lines.push(line.to_owned()),
            (None, _) => {}
        }
    }
    blocks
}

/// Returns the commands in all `console` blocks. The first line of a command begins with `$ `, and
/// its other lines begin with `> `.
fn steps(text: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    for block in blocks(text, "console") {
        let mut begins_block = true;
        for line in block {
            if let Some(first) = line.strip_prefix("$ ") {
                steps.push(Step {
                    command: first.to_owned(),
                    output: Vec::new(),
                    begins_block,
                });
                begins_block = false;
            } else if let Some(step) = steps.last_mut() {
                match line.strip_prefix("> ") {
                    Some(more) => {
                        step.command.push('\n');
                        step.command.push_str(more);
                    }
                    None => step.output.push(line),
                }
            }
        }
    }
    steps
}

/// Returns a map from each command's number to the lines that the command printed.
fn outputs(text: &str, work: &Path) -> BTreeMap<usize, Vec<String>> {
    let work = work.display().to_string();
    let mut all: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    let mut number = None;
    for line in text.lines() {
        if let Some(next) = line.strip_prefix(MARK) {
            number = next.parse().ok();
        } else if let Some(number) = number
            && !line.is_empty()
        {
            let line = line.replace(&work, "/root");
            all.entry(number).or_default().push(line);
        }
    }
    all
}

/// Replaces everything in the line that differs from run to run: ids, numbers, sizes, times and the
/// width of columns.
fn plain(line: &str) -> String {
    // crictl clears the screen before it prints statistics. The escape sequences are not part of
    // the documents.
    let mut line = line.replace("\u{1b}[2J\u{1b}[H", "");
    // Without a terminal, crictl prints errors and warnings in this format. The documents show the
    // format for terminals.
    for (level, mark) in [("fatal", "FATA"), ("warning", "WARN")] {
        if line.starts_with("time=")
            && let Some((_, message)) = line.split_once(&format!(" level={level} msg=\""))
        {
            line = format!("{mark}[0000] {}", message.trim_end_matches('"'));
        }
    }
    let mut words: Vec<String> = Vec::new();
    for word in line.split_whitespace() {
        if word == "ago" {
            // The words before "ago" are an age such as "10 seconds", "About a minute" or "Less
            // than a second".
            const AGE: &[&str] = &[
                "#", "About", "Less", "a", "minute", "minutes", "second", "seconds", "than",
            ];
            let age = |word: &String| AGE.contains(&word.as_str());
            while words.last().is_some_and(age) {
                words.pop();
            }
        }
        words.push(plain_word(word));
    }
    words.join(" ")
}

fn plain_word(word: &str) -> String {
    let is_size = word.starts_with(|c: char| c.is_ascii_digit()) && word.ends_with('B');
    if is_size {
        return "SIZE".to_owned();
    }
    let mut plain = String::new();
    let mut rest = word;
    while let Some(first) = rest.chars().next() {
        let hex = rest.len()
            - rest
                .trim_start_matches(|c: char| c.is_ascii_hexdigit())
                .len();
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (sign, length) = if hex >= 12 {
            ("ID", hex)
        } else if digits > 0 {
            ("#", digits)
        } else {
            plain.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        plain.push_str(sign);
        rest = &rest[length..];
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_all_lines_of_its_command_and_of_the_output() {
        let text =
            "text\n```console\n$ cat <<END\n> a\n> END\na\n$ true\n```\n```sh\nmake demo\n```\n";
        let steps = steps(text);
        let shown: Vec<_> = steps
            .iter()
            .map(|step| {
                (
                    step.command.as_str(),
                    step.output.join("|"),
                    step.begins_block,
                )
            })
            .collect();
        assert_eq!(
            shown,
            [
                ("cat <<END\na\nEND", "a".to_owned(), true),
                ("true", String::new(), false)
            ]
        );
        assert_eq!(blocks(text, "sh"), [["make demo"]]);
    }

    #[test]
    fn only_text_that_differs_from_run_to_run_is_replaced() {
        for (one, other) in [
            (
                "afa05ecd6552c   10 seconds ago  Ready",
                "0fa05ecd65521 Less than a second ago Ready",
            ),
            ("mem 569.3kB 6", "mem 1.2MB 17"),
            (
                "time=\"2026-11-22T01:57:24Z\" level=error",
                "time=\"2027-01-02T11:07:00Z\" level=error",
            ),
        ] {
            assert_eq!(plain(one), plain(other));
        }
        for (one, other) in [
            ("Ready", "NotReady"),
            ("hello 1", "hallo 1"),
            ("2.4MB", "2.4"),
        ] {
            assert_ne!(plain(one), plain(other));
        }
    }
}
