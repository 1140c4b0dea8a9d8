//! Tests of changes in a layer: entries that replace other entries, and whiteouts.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use libtest_mimic::Trial;

use super::{refused, unpack, unpacked};
use crate::build::{Archive, Failure};
use crate::node::{Dir, in_overlay};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_later_entry_replaces_an_earlier_entry_with_the_same_path",
            replaced,
        ),
        trial(
            "whiteouts_hide_files_of_lower_layers_in_an_overlay",
            whiteouts,
        ),
        trial(
            "a_whiteout_can_precede_or_follow_the_file_with_its_name",
            replacements,
        ),
    ]
}

async fn replaced() -> Result<(), Failure> {
    let (_dir, fs) = unpacked(
        Archive::new()
            .file("a", "first, and long")
            .hard_link("kept", "a")
            .file("a", "second")
            .dir("b/", 0o755)
            .file("b/deep/er", "")
            .file("b", "now a file")
            .file("c", "file")
            .dir("c/", 0o711)
            .symlink("d", "a")
            .file("d", "d"),
    )?;
    assert_eq!(std::fs::read_to_string(fs.join("a"))?, "second");
    assert_eq!(std::fs::read_to_string(fs.join("kept"))?, "first, and long");
    assert_eq!(std::fs::read_to_string(fs.join("b"))?, "now a file");
    assert_eq!(
        std::fs::metadata(fs.join("c"))?.permissions().mode() & 0o777,
        0o711
    );
    assert_eq!(std::fs::read_to_string(fs.join("d"))?, "d");
    refused(Archive::new().file("f", "").file("f/g", ""))?;
    Ok(())
}

/// Runs a script in an overlay mount of `layers` (lowest first), and returns the script's output.
fn overlay(dir: &Path, layers: &[&Path], script: &str) -> Result<String, Failure> {
    let lowers: Vec<_> = layers.iter().rev().collect();
    in_overlay(dir, &lowers, script)
}

async fn whiteouts() -> Result<(), Failure> {
    let (_a, lower) = unpacked(
        Archive::new()
            .dir("etc/", 0o755)
            .file("etc/gone", "1")
            .file("etc/stays", "1")
            .file("opaque/below", "1")
            .file("whole/tree/x", "1"),
    )?;
    let (dir, upper) = unpacked(
        Archive::new()
            .dir("etc/", 0o755)
            .file("etc/.wh.gone", "")
            .file("opaque/new", "2")
            .file("opaque/.wh..wh..opq", "")
            .file(".wh.whole", "")
            .file(".wh..wh.plnk/1.2", "aufs"),
    )?;
    let found = overlay(
        &dir.0,
        &[&lower, &upper],
        "find . | LC_ALL=C sort | tr '\\n' ' '",
    )?;
    assert_eq!(found, ". ./etc ./etc/stays ./opaque ./opaque/new ");
    Ok(())
}

async fn replacements() -> Result<(), Failure> {
    let (_a, lower) = unpacked(
        Archive::new()
            .file("a/old", "1")
            .file("b/old", "1")
            .file("c/old", "1")
            .file("d", "1")
            .file("e", "1"),
    )?;
    let (dir, upper) = unpacked(
        Archive::new()
            // The whiteouts `.wh.a` and `.wh.b` precede the directories `a` and `b`. The archive
            // lists the directory `a`, but uses the directory `b` without listing it.
            .file(".wh.a", "")
            .dir("a/", 0o755)
            .file("a/new", "2")
            .file(".wh.b", "")
            .file("b/new", "2")
            // The directory `c` precedes the whiteout `.wh.c`.
            .dir("c/", 0o755)
            .file("c/new", "2")
            .file(".wh.c", "")
            .file(".wh.d", "")
            .file("d", "2")
            .file("e", "2")
            .file(".wh.e", ""),
    )?;
    let script = "find . -type f | LC_ALL=C sort | tr '\\n' ' '; cat d e";
    let found = overlay(&dir.0, &[&lower, &upper], script)?;
    assert_eq!(found, "./a/new ./b/new ./c/new ./d ./e 22");
    // `unpack` reports an opaque whiteout at the layer's root to its caller. The caller must then
    // omit the layers below from the overlay mount.
    let root = Dir::new()?;
    let archive = Archive::new().file("x", "").file(".wh..wh..opq", "").end();
    assert!(unpack(&archive, &root.0.join("fs"))?.opaque_root);
    Ok(())
}
