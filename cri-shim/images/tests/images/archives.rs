//! Tests with archives that image builders write, and with malformed archives.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Trial;
use rrun_images::layer::{self, Bounds, LayerDescriptor, LayerError, UnpackSummary};

use crate::build::{Archive, Compression, Failure, ITEM, Item, digest};
use crate::node::Dir;
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("paths_with_dot_dot_are_refused", upwards),
        trial("absolute_paths_are_written_below_the_root", absolute),
        trial("no_write_follows_a_link_out_of_the_root", through_links),
        trial("links_inside_the_layer_are_followed", inside_links),
        trial("hard_links_stay_inside_the_layer", hard_links),
        trial(
            "the_owner_the_mode_the_time_and_the_attributes_of_files_are_kept",
            attributes,
        ),
        trial("devices_and_fifos_are_created", devices),
        trial(
            "a_later_entry_replaces_an_earlier_entry_with_the_same_path",
            replaced,
        ),
        trial("long_names_and_names_that_are_not_utf8_are_kept", names),
        trial(
            "whiteouts_hide_files_of_lower_layers_in_an_overlay",
            whiteouts,
        ),
        trial(
            "a_whiteout_can_precede_or_follow_the_file_with_its_name",
            replacements,
        ),
        trial("a_too_large_layer_is_refused", bounds),
        trial("damaged_archives_are_refused", broken),
        trial(
            "data_that_does_not_match_the_descriptor_is_refused",
            promised,
        ),
    ]
}

/// Returns the tests that need GNU tar to write their archives.
pub(crate) fn trials_of_gnu_tar() -> Vec<Trial> {
    vec![
        trial("every_tar_format_is_read", dialects),
        trial("sparse_files_keep_their_holes", sparse),
    ]
}

const BOUNDS: Bounds = Bounds {
    bytes: 1 << 30,
    entries: 10_000,
};

fn descriptor(archive: &[u8], blob: &[u8]) -> LayerDescriptor {
    LayerDescriptor {
        digest: digest(blob),
        size: blob.len() as u64,
        diff_id: digest(archive),
    }
}

fn unpack(archive: &[u8], into: &Path) -> Result<UnpackSummary, LayerError> {
    layer::unpack(
        archive,
        into,
        &descriptor(archive, archive),
        &BOUNDS,
        &|| Ok(()),
    )
}

/// Unpacks `archive` into a subdirectory of a new directory. A file that escapes from the layer is
/// then visible in the outer directory.
fn unpacked(archive: Archive) -> Result<(Dir, PathBuf), Failure> {
    let dir = Dir::new()?;
    let fs = dir.0.join("fs");
    unpack(&archive.end(), &fs)?;
    Ok((dir, fs))
}

fn refused(archive: Archive) -> Result<String, Failure> {
    let dir = Dir::new()?;
    let result = unpack(&archive.end(), &dir.0.join("fs"));
    let outside: Vec<_> = std::fs::read_dir(&dir.0)?.collect();
    if outside.len() != 1 {
        return Err(format!(
            "the layer's parent directory must contain only fs, but it contains {outside:?}"
        )
        .into());
    }
    match result {
        Ok(_) => Err("the layer archive was unpacked, but it must be refused".into()),
        Err(error) => Ok(error.to_string()),
    }
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

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 256];
    let size = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).ok()?;
    value.truncate(size);
    Some(value)
}

async fn attributes() -> Result<(), Failure> {
    // The value of a security.capability attribute of version 2. The effective flag is set, and the
    // permitted set contains cap_net_bind_service.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let (_dir, fs) = unpacked(
        Archive::new()
            .item(&Item {
                path: b"./",
                kind: b'5',
                mode: 0o750,
                uid: 5,
                gid: 6,
                ..ITEM
            })
            .item(&Item {
                path: b"d/",
                kind: b'5',
                mode: 0o2775,
                mtime: 1_234_567,
                ..ITEM
            })
            .pax(&[
                ("SCHILY.xattr.security.capability", &capability),
                ("SCHILY.xattr.user.note", b"a=b\n\0c"),
                ("mtime", b"1000000000.25"),
            ])
            .item(&Item {
                path: b"d/ping",
                mode: 0o4755,
                uid: 70_000,
                gid: 80_000,
                content: b"elf",
                ..ITEM
            })
            .pax(&[
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ])
            .dir("e/", 0o755)
            .item(&Item {
                path: b"link",
                kind: b'2',
                link: b"nowhere",
                uid: 9,
                mtime: 42,
                ..ITEM
            })
            .file("d/last", ""),
    )?;
    let root = std::fs::metadata(&fs)?;
    assert_eq!(
        (root.mode() & 0o7777, root.uid(), root.gid()),
        (0o750, 5, 6)
    );
    let ping = std::fs::metadata(fs.join("d/ping"))?;
    assert_eq!(ping.mode() & 0o7777, 0o4755);
    assert_eq!((ping.uid(), ping.gid()), (70_000, 80_000));
    assert_eq!(
        (ping.mtime(), ping.mtime_nsec()),
        (1_000_000_000, 250_000_000)
    );
    assert_eq!(
        xattr(&fs.join("d/ping"), "security.capability").as_deref(),
        Some(capability.as_slice())
    );
    assert_eq!(
        xattr(&fs.join("d/ping"), "user.note").as_deref(),
        Some(b"a=b\n\0c".as_slice())
    );
    for name in ["redirect", "opaque"] {
        assert_eq!(
            xattr(&fs.join("e"), &format!("trusted.overlay.{name}")),
            None
        );
    }
    assert_eq!(xattr(&fs.join("e"), "user.overlay.opaque"), None);
    let link = fs.join("link").symlink_metadata()?;
    assert_eq!((link.uid(), link.mtime()), (9, 42));
    // The creation of files in the directory must not change the directory's time.
    let directory = std::fs::metadata(fs.join("d"))?;
    assert_eq!(
        (directory.mtime(), directory.mode() & 0o7777),
        (1_234_567, 0o2775)
    );
    Ok(())
}

async fn devices() -> Result<(), Failure> {
    let device = |path: &'static [u8], kind, device| Item {
        path,
        kind,
        device,
        mode: 0o666,
        ..ITEM
    };
    let (_dir, fs) = unpacked(
        Archive::new()
            .item(&device(b"dev/null", b'3', (1, 3)))
            .item(&device(b"dev/loop0", b'4', (7, 0)))
            .item(&device(b"pipe", b'6', (0, 0))),
    )?;
    let null = std::fs::metadata(fs.join("dev/null"))?;
    assert!(null.file_type().is_char_device());
    assert_eq!(
        (null.rdev(), null.mode() & 0o777),
        (rustix::fs::makedev(1, 3), 0o666)
    );
    assert!(
        std::fs::metadata(fs.join("dev/loop0"))?
            .file_type()
            .is_block_device()
    );
    assert!(std::fs::metadata(fs.join("pipe"))?.file_type().is_fifo());
    Ok(())
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

/// Runs a script in an overlay mount of `layers` (lowest first), and returns the script's output.
/// The script sees the layers as a container would.
fn overlay(dir: &Path, layers: &[&Path], script: &str) -> Result<String, Failure> {
    let lowers: Vec<_> = layers
        .iter()
        .rev()
        .map(|l| l.display().to_string())
        .collect();
    let merged = dir.join("merged");
    std::fs::create_dir_all(&merged)?;
    let out = Command::new("unshare")
        .args(["--mount", "sh", "-ec"])
        .arg(format!(
            "mount -t overlay -o ro,lowerdir={} none {m}; cd {m}; {script}",
            lowers.join(":"),
            m = merged.display()
        ))
        .output()?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into());
    }
    Ok(String::from_utf8(out.stdout)?)
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

/// Adds `count` items with different names.
fn repeat(archive: Archive, count: u32, add: impl Fn(Archive, &str) -> Archive) -> Archive {
    (0..count).fold(archive, |archive, number| add(archive, &number.to_string()))
}

async fn bounds() -> Result<(), Failure> {
    let dir = Dir::new()?;
    let bomb = Archive::new()
        .item(&Item {
            path: b"zeros",
            content: &vec![0; 8 << 20],
            ..ITEM
        })
        .end();
    let blob = Compression::Gzip.apply(&bomb);
    let tight = Bounds {
        bytes: 1 << 20,
        entries: 10,
    };
    let result = layer::unpack(
        blob.as_slice(),
        &dir.0.join("a"),
        &descriptor(&bomb, &blob),
        &tight,
        &|| Ok(()),
    );
    assert!(matches!(result, Err(LayerError::Bound(_))), "{result:?}");
    let many = (0..20).fold(Archive::new(), |archive, n| {
        archive.file(&n.to_string(), "")
    });
    let many = many.end();
    let result = layer::unpack(
        many.as_slice(),
        &dir.0.join("b"),
        &descriptor(&many, &many),
        &tight,
        &|| Ok(()),
    );
    assert!(matches!(result, Err(LayerError::Bound(_))), "{result:?}");
    // Each piece of a sparse file needs a whole block on the disk. These 1,000 pieces of one byte
    // need 4 MB.
    let map: String = (0..1000).map(|n| format!("{}\n1\n", n << 13)).collect();
    let mut content = format!("1000\n{map}").into_bytes();
    content.resize(content.len().next_multiple_of(512), 0);
    content.resize(content.len() + 1000, b'x');
    for size in ["", "18446744073709551615"] {
        let mut records = vec![
            ("GNU.sparse.major", &b"1"[..]),
            ("GNU.sparse.realsize", b"8192000"),
        ];
        if !size.is_empty() {
            records = vec![("size", size.as_bytes())];
        }
        let pieces = Archive::new().pax(&records).item(&Item {
            path: b"sparse",
            content: &content,
            ..ITEM
        });
        let pieces = pieces.end();
        let result = layer::unpack(
            pieces.as_slice(),
            &dir.0.join(format!("sparse{size}")),
            &descriptor(&pieces, &pieces),
            &tight,
            &|| Ok(()),
        );
        assert!(
            matches!(&result, Err(LayerError::Bound(why)) if why.contains("image.layer_bytes")),
            "{result:?}"
        );
    }
    // Everything that needs space on the disk counts, not only the contents of files. Each of these
    // archives needs more than the limit of 100 KiB.
    let attribute: [(&str, &[u8]); 1] = [("SCHILY.xattr.user.a", &[b'x'; 1000])];
    let target = "x".repeat(100);
    let first = Archive::new().file("first", "");
    let parts = [
        repeat(Archive::new(), 30, |it, n| it.symlink(n, &target)),
        repeat(Archive::new(), 30, |it, n| it.pax(&attribute).file(n, "")),
        repeat(Archive::new(), 30, |it, _| {
            it.pax(&attribute).dir("d/", 0o755)
        }),
        repeat(Archive::new(), 30, |it, n| it.file(&format!("{n}/a"), "")),
        repeat(first, 1200, |it, n| {
            it.hard_link(&format!("{n}-{}", "x".repeat(90)), "first")
        }),
    ];
    for (number, archive) in parts.into_iter().enumerate() {
        let archive = archive.end();
        for (bytes, refused) in [(100 << 10, true), (1 << 20, false)] {
            let result = layer::unpack(
                archive.as_slice(),
                &dir.0.join(format!("part-{number}-{bytes}")),
                &descriptor(&archive, &archive),
                &Bounds {
                    bytes,
                    entries: 10_000,
                },
                &|| Ok(()),
            );
            match result {
                Err(LayerError::Bound(why)) => {
                    assert!(
                        refused && why.contains("image.layer_bytes"),
                        "{number}: {why}"
                    );
                }
                Ok(unpacked) => assert!(!refused && unpacked.bytes > 100 << 10, "{number}"),
                Err(error) => return Err(error.into()),
            }
        }
    }
    // Directories that the archive uses but does not list count towards the limit of entries, too.
    let deep = Archive::new().file(&"d/".repeat(40), "").end();
    let result = layer::unpack(
        deep.as_slice(),
        &dir.0.join("c"),
        &descriptor(&deep, &deep),
        &tight,
        &|| Ok(()),
    );
    assert!(result.is_ok_and(|unpacked| unpacked.inodes == 41));
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

async fn promised() -> Result<(), Failure> {
    let archive = Archive::new().file("a", "a").end();
    let blob = Compression::Gzip.apply(&archive);
    let good = descriptor(&archive, &blob);
    let try_with = |blob: &[u8], descriptor: &LayerDescriptor| -> Result<String, Failure> {
        let dir = Dir::new()?;
        match layer::unpack(blob, &dir.0.join("fs"), descriptor, &BOUNDS, &|| Ok(())) {
            Err(LayerError::Digest(what)) => Ok(what),
            other => Err(format!(
                "the layer must be refused for its digest; the result: {other:?}"
            )
            .into()),
        }
    };
    let wrong = digest(b"else");
    try_with(
        &blob,
        &LayerDescriptor {
            digest: wrong.clone(),
            ..good.clone()
        },
    )?;
    try_with(
        &blob,
        &LayerDescriptor {
            diff_id: wrong,
            ..good.clone()
        },
    )?;
    try_with(
        &blob,
        &LayerDescriptor {
            size: good.size - 1,
            ..good.clone()
        },
    )?;
    try_with(
        &blob,
        &LayerDescriptor {
            size: good.size + 1,
            ..good.clone()
        },
    )?;
    // A bit that flipped during the transfer is reported as a wrong digest.
    let mut damaged = blob.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x40;
    try_with(&damaged, &good)?;
    let mut longer = blob;
    longer.extend(Compression::Gzip.apply(b""));
    try_with(&longer, &good)?;
    Ok(())
}
