//! Checks that paths from images, containers and pods are opened only with `regular_file`.

use std::path::Path;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Checks the modules that handle paths of images, containers and pods. Except for files of /proc,
/// these modules must open each file with `regular_file`. If a call opens a file in another way,
/// the line before the call must be a comment. The comment must begin with `Ours`, `The kernel's`,
/// `O_PATH`, `O_DIRECTORY`, `O_TMPFILE` or `O_EXCL`.
#[test]
fn untrusted_paths_are_opened_only_with_regular_file() -> Result {
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
    const REASONS: [&str; 6] = [
        "Ours",
        "The kernel's",
        "O_PATH",
        "O_DIRECTORY",
        "O_TMPFILE",
        "O_EXCL",
    ];
    let shim = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cri-shim");
    let mut files = vec![
        shim.join("images/src/archive.rs"),
        shim.join("monitor/src/log_file.rs"),
        shim.join("server/src/selinux/relabel.rs"),
        shim.join("server/src/stats/writable/walk.rs"),
    ];
    for dir in ["container", "container/cdi", "container/volumes"] {
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
    assert!(
        wrong.is_empty(),
        "these lines open a file without regular_file, and no comment gives the reason:\n{}",
        wrong.join("\n")
    );
    Ok(())
}
