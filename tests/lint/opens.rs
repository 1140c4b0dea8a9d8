//! Which code opens files without `regular_file`.

use std::path::Path;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Checks the modules that handle paths of images, containers and pods. An open there that does
/// not use `regular_file` must be of a file of /proc, or have a comment on the line before it that
/// begins with `Ours`, `The kernel's`, `O_PATH` or `O_DIRECTORY`.
#[test]
fn what_others_control_is_opened_by_regular_file_alone() -> Result {
    const OPENS: [&str; 14] = [
        "File::open(",
        "File::create(",
        "File::create_new(",
        "File::options(",
        "OpenOptions::new(",
        "fs::open(",
        "fs::read(",
        "fs::read_to_string(",
        "fs::write(",
        "fs::copy(",
        "openat(",
        "openat2(",
        "open_subpath(",
        ".reopen(",
    ];
    const REASONS: [&str; 4] = ["Ours", "The kernel's", "O_PATH", "O_DIRECTORY"];
    let shim = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cri-shim");
    let mut files = vec![
        shim.join("images/src/archive.rs"),
        shim.join("monitor/src/log_file.rs"),
        shim.join("server/src/selinux/relabel.rs"),
    ];
    for dir in ["container", "container/cdi"] {
        for entry in std::fs::read_dir(shim.join("server/src").join(dir))? {
            let path = entry?.path();
            files.extend(
                path.extension()
                    .is_some_and(|end| end == "rs")
                    .then_some(path),
            );
        }
    }
    let mut wrong = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file)?;
        let code = text
            .split("#[cfg(test)]\nmod tests")
            .next()
            .unwrap_or_default();
        let mut explained = false;
        for (number, line) in code.lines().enumerate() {
            let is_procs = line.contains("\"/proc/");
            if !explained && !is_procs && OPENS.iter().any(|open| line.contains(open)) {
                wrong.push(format!(
                    "{}:{}: {}",
                    file.display(),
                    number + 1,
                    line.trim()
                ));
            }
            let comment = line.trim_start().strip_prefix("// ").unwrap_or_default();
            explained = REASONS.iter().any(|reason| comment.starts_with(reason));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
