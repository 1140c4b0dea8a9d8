//! Tests of the paths and links of an archive, which must not lead out of the layer.

use std::os::unix::fs::MetadataExt as _;

use libtest_mimic::Trial;

use super::{refused, unpacked};
use crate::build::{Archive, Failure};
use crate::node::Dir;
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("paths_with_dot_dot_are_refused", upwards),
        trial("absolute_paths_are_written_below_the_root", absolute),
        trial("no_write_follows_a_link_out_of_the_root", through_links),
        trial("links_inside_the_layer_are_followed", inside_links),
        trial("hard_links_stay_inside_the_layer", hard_links),
    ]
}

async fn upwards() -> Result<(), Failure> {
    for name in ["../x", "a/../../x", "..", "a/..", "/../x", "../fs/x"] {
        let error = refused(Archive::new().file(name, "x"))?;
        assert!(error.contains("upwards"), "{error}");
    }
    refused(Archive::new().file(".wh...", ""))?;
    refused(Archive::new().file("a/.wh..", ""))?;
    refused(Archive::new().file(".wh.", ""))?;
    let long = Archive::new().gnu_long(b'L', b"../../../../tmp/x");
    refused(long.file("short", ""))?;
    refused(
        Archive::new()
            .pax(&[("path", b"/../../x")])
            .file("short", ""),
    )?;
    refused(Archive::new().pax(&[("path", b"a\0b")]).file("short", ""))?;
    Ok(())
}

async fn absolute() -> Result<(), Failure> {
    let (_dir, fs) = unpacked(Archive::new().file("/etc//./passwd", "x"))?;
    assert_eq!(std::fs::read_to_string(fs.join("etc/passwd"))?, "x");
    Ok(())
}

async fn through_links() -> Result<(), Failure> {
    let outside = Dir::new()?;
    let victim = outside.0.join("victim");
    std::fs::write(&victim, "untouched")?;
    let path = outside
        .0
        .to_str()
        .ok_or("the path is not UTF-8")?
        .to_owned();
    // The link points to a directory that exists outside the layer, but not inside the layer.
    refused(Archive::new().symlink("out", &path).file("out/victim", "x"))?;
    // A file in the archive replaces a symbolic link with the same path, and does not change the
    // link's target.
    let (_dir, fs) = unpacked(
        Archive::new()
            .symlink("victim", victim.to_str().ok_or("the path is not UTF-8")?)
            .file("victim", "mine"),
    )?;
    assert!(fs.join("victim").symlink_metadata()?.is_file());
    // A link that leads up beyond the root ends at the layer's root.
    let (_dir, fs) = unpacked(
        Archive::new()
            .symlink("up", "../../../../../..")
            .file("up/here", "x"),
    )?;
    assert!(fs.join("here").is_file());
    // A whiteout, an opaque whiteout or a directory is refused if its path contains a link out of
    // the layer.
    refused(
        Archive::new()
            .symlink("out", &path)
            .file("out/.wh.victim", ""),
    )?;
    refused(
        Archive::new()
            .symlink("out", &path)
            .file("out/.wh..wh..opq", ""),
    )?;
    refused(Archive::new().symlink("out", &path).dir("out/dir/", 0o777))?;
    // A directory that replaces a link does not change the link's target.
    let before = std::fs::metadata(&outside.0)?.mode();
    let (_dir, fs) = unpacked(Archive::new().symlink("d", &path).dir("d/", 0o777))?;
    assert!(fs.join("d").symlink_metadata()?.is_dir());
    assert_eq!(std::fs::metadata(&outside.0)?.mode(), before);
    // A link that replaces the layer's root is refused (CVE-2021-29136).
    for root in [".", "./", "/"] {
        refused(Archive::new().symlink(root, &path).file("victim", "x"))?;
    }
    // A file is refused if its path contains a loop of symbolic links.
    refused(
        Archive::new()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/x", ""),
    )?;
    assert_eq!(std::fs::read_to_string(&victim)?, "untouched");
    Ok(())
}

async fn inside_links() -> Result<(), Failure> {
    let (_dir, fs) = unpacked(
        Archive::new()
            .dir("usr/lib/", 0o755)
            .symlink("lib", "usr/lib")
            .symlink("lib64", "/usr/lib")
            .file("lib/one", "1")
            .file("lib64/two", "2"),
    )?;
    assert!(fs.join("usr/lib/one").is_file() && fs.join("usr/lib/two").is_file());
    Ok(())
}

async fn hard_links() -> Result<(), Failure> {
    let (_dir, fs) = unpacked(
        Archive::new()
            .file("bin/a", "a")
            .hard_link("bin/b", "bin/a")
            .hard_link("c", "/bin/b"),
    )?;
    let inode = |name: &str| std::fs::metadata(fs.join(name)).map(|stat| stat.ino());
    assert_eq!(inode("bin/a")?, inode("c")?);
    assert_eq!(std::fs::metadata(fs.join("c"))?.nlink(), 3);
    for target in ["../../etc/passwd", "/etc/passwd", "missing", "x", ""] {
        refused(Archive::new().hard_link("x", target))?;
    }
    refused(Archive::new().dir("d/", 0o755).hard_link("x", "d"))?;
    // The path of the hard link's target contains a symbolic link to a directory outside the layer.
    refused(
        Archive::new()
            .symlink("e", "/etc")
            .hard_link("x", "e/passwd"),
    )?;
    // A hard link to a symbolic link refers to the symbolic link itself, not to the symbolic link's
    // target.
    let (_dir, fs) = unpacked(
        Archive::new()
            .symlink("l", "/etc/shadow")
            .hard_link("x", "l"),
    )?;
    assert!(fs.join("x").symlink_metadata()?.is_symlink());
    Ok(())
}
