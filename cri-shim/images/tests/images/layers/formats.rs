//! Tests of the formats of tar archives, and with malformed archives.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use libtest_mimic::Trial;

use super::{refused, unpack, unpacked};
use crate::build::{Archive, Failure, ITEM, Item};
use crate::node::Dir;
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("long_names_and_names_that_are_not_utf8_are_kept", names),
        trial("damaged_archives_are_refused", broken),
    ]
}

/// Returns the tests that need GNU tar to write their archives.
pub(crate) fn trials_of_gnu_tar() -> Vec<Trial> {
    vec![
        trial("every_tar_format_is_read", dialects),
        trial("sparse_files_keep_their_holes", sparse),
    ]
}

async fn names() -> Result<(), Failure> {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let longer = format!("{}/{}", "e".repeat(250), "g".repeat(250));
    let odd = b"caf\xe9 \xff\n*".as_slice();
    let (_dir, fs) = unpacked(
        Archive::new()
            .gnu_long(b'L', long.as_bytes())
            .file("short", "gnu")
            .pax(&[("path", longer.as_bytes())])
            .file("short", "pax")
            .item(&Item {
                path: odd,
                content: b"odd",
                ..ITEM
            })
            .gnu_long(b'K', long.as_bytes())
            .symlink("link", "short")
            .pax(&[("path", b""), ("uid", b"4000000000")])
            .file("plain", ""),
    )?;
    assert_eq!(std::fs::read_to_string(fs.join(&long))?, "gnu");
    assert_eq!(std::fs::read_to_string(fs.join(&longer))?, "pax");
    assert_eq!(
        std::fs::read_to_string(fs.join(OsStr::from_bytes(odd)))?,
        "odd"
    );
    assert_eq!(
        std::fs::read_link(fs.join("link"))?.to_str(),
        Some(long.as_str())
    );
    assert_eq!(std::fs::metadata(fs.join("plain"))?.uid(), 4_000_000_000);
    refused(Archive::new().pax(&[("uid", b"4294967295")]).file("x", ""))?;
    refused(Archive::new().pax(&[("uid", b"-1")]).file("x", ""))?;
    refused(Archive::new().pax(&[("path", &[b'n'; 300])]).file("x", ""))?;
    refused(
        Archive::new()
            .pax(&[("path", &b"n/".repeat(3000))])
            .file("x", ""),
    )?;
    Ok(())
}

/// Unpacks archives that GNU tar wrote from the same tree, one archive in each of its formats.
async fn dialects() -> Result<(), Failure> {
    let dir = Dir::new()?;
    let tree = dir.0.join("tree");
    std::fs::create_dir_all(tree.join("sub/dir"))?;
    std::fs::write(tree.join("sub/file"), "content")?;
    std::os::unix::fs::symlink("file", tree.join("sub/link"))?;
    std::fs::hard_link(tree.join("sub/file"), tree.join("sub/dir/hard"))?;
    for format in ["v7", "oldgnu", "gnu", "ustar", "posix"] {
        let out = Command::new("tar")
            .arg(format!("--format={format}"))
            .arg("-C")
            .arg(&tree)
            .args(["-c", "."])
            .output()?;
        let fs = dir.0.join(format);
        unpack(&out.stdout, &fs)?;
        assert_eq!(
            std::fs::read_to_string(fs.join("sub/dir/hard"))?,
            "content",
            "{format}"
        );
        assert_eq!(
            std::fs::read_link(fs.join("sub/link"))?,
            Path::new("file"),
            "{format}"
        );
    }
    Ok(())
}

async fn sparse() -> Result<(), Failure> {
    let dir = Dir::new()?;
    let original = dir.0.join("holes");
    let file = std::fs::File::create(&original)?;
    for piece in 0..40_u64 {
        rustix::io::pwrite(&file, b"island", piece * (1 << 20) + 777)?;
    }
    file.set_len(64 << 20)?;
    rustix::fs::fsync(&file)?;
    let formats: [&[&str]; 4] = [
        &["--format=gnu"],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
    ];
    for (number, format) in formats.iter().enumerate() {
        let out = Command::new("tar")
            .args(*format)
            .args(["--sparse", "-C"])
            .arg(&dir.0)
            .args(["-c", "holes"])
            .output()?;
        let fs = dir.0.join(number.to_string());
        unpack(&out.stdout, &fs)?;
        let copy = fs.join("holes");
        let same = Command::new("cmp").arg(&original).arg(&copy).status()?;
        assert!(same.success(), "{format:?}");
        assert!(
            std::fs::metadata(&copy)?.blocks() * 512 < 4 << 20,
            "{format:?}"
        );
    }
    Ok(())
}

async fn broken() -> Result<(), Failure> {
    let whole = Archive::new()
        .item(&Item {
            path: b"f",
            content: &[7; 5000],
            ..ITEM
        })
        .end();
    for length in [100, 512, 1000, 3000] {
        let dir = Dir::new()?;
        let result = unpack(&whole[..length], &dir.0.join("fs"));
        assert!(
            result.is_err() || length == 0,
            "an archive that was cut after {length} bytes was unpacked"
        );
    }
    for garbage in [vec![b'x'; 4096], vec![0xff; 700]] {
        let dir = Dir::new()?;
        assert!(unpack(&garbage, &dir.0.join("fs")).is_err());
    }
    refused(Archive::new().item(&Item {
        path: b"what",
        kind: b'Z',
        ..ITEM
    }))?;
    refused(
        Archive::new()
            .pax(&[("size", b"99999999999999999999")])
            .file("x", ""),
    )?;
    refused(
        Archive::new()
            .pax(&[("size", b"9999999999999")])
            .file("x", ""),
    )?;
    refused(Archive::new().symlink("x", ""))?;
    let overlapping: [(&str, &[u8]); 2] =
        [("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"0,4,2,4")];
    refused(Archive::new().pax(&overlapping).file("x", "12345678"))?;
    let outside: [(&str, &[u8]); 2] = [("GNU.sparse.size", b"4"), ("GNU.sparse.map", b"2,8")];
    refused(Archive::new().pax(&outside).file("x", "12345678"))?;
    // An empty archive is a layer without files.
    let dir = Dir::new()?;
    unpack(b"", &dir.0.join("fs"))?;
    Ok(())
}
