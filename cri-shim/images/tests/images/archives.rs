//! Archives that builders write, and archives that nobody should.

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
        trial("names_that_lead_upwards_are_refused", upwards),
        trial("absolute_names_land_below_the_root", absolute),
        trial(
            "no_write_goes_through_a_link_out_of_the_root",
            through_links,
        ),
        trial("links_inside_the_layer_are_followed", inside_links),
        trial("hard_links_stay_inside_the_layer", hard_links),
        trial("owner_mode_time_and_attributes_are_kept", attributes),
        trial("devices_and_fifos_are_made", devices),
        trial("later_entries_replace_earlier_ones", replaced),
        trial("long_and_odd_names_are_kept", names),
        trial("whiteouts_hide_what_is_below_in_an_overlay", whiteouts),
        trial(
            "whiteouts_and_their_replacements_come_in_any_order",
            replacements,
        ),
        trial("a_layer_has_bounds", bounds),
        trial("broken_archives_are_refused", broken),
        trial("what_arrives_is_what_was_promised", promised),
    ]
}

/// Those that have GNU tar write the archive.
pub(crate) fn trials_of_gnu_tar() -> Vec<Trial> {
    vec![
        trial("every_dialect_of_tar_is_read", dialects),
        trial("sparse_files_have_their_holes", sparse),
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
    layer::unpack(archive, into, &descriptor(archive, archive), &BOUNDS)
}

/// Unpacks into a new directory inside another, so that what escapes can be seen beside it.
fn unpacked(archive: Archive) -> Result<(Dir, PathBuf), Failure> {
    let dir = Dir::new()?;
    let fs = dir.0.join("fs");
    unpack(&archive.end(), &fs)?;
    Ok((dir, fs))
}

fn refused(archive: Archive) -> Result<String, Failure> {
    let dir = Dir::new()?;
    let result = unpack(&archive.end(), &dir.0.join("fs"));
    let beside: Vec<_> = std::fs::read_dir(&dir.0)?.collect();
    if beside.len() != 1 {
        return Err(format!("something is beside the root: {beside:?}").into());
    }
    match result {
        Ok(_) => Err("it was not refused".into()),
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
    let path = outside.0.to_str().ok_or("path")?.to_owned();
    // To a directory that exists outside, but not inside.
    refused(Archive::new().symlink("out", &path).file("out/victim", "x"))?;
    // The link itself as the file.
    let (_dir, fs) = unpacked(
        Archive::new()
            .symlink("victim", victim.to_str().ok_or("path")?)
            .file("victim", "mine"),
    )?;
    assert!(fs.join("victim").symlink_metadata()?.is_file());
    // Upwards, further than there is: it ends at the layer's root.
    let (_dir, fs) = unpacked(
        Archive::new()
            .symlink("up", "../../../../../..")
            .file("up/here", "x"),
    )?;
    assert!(fs.join("here").is_file());
    // Whiteouts, opaque marks and directories take the same way.
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
    // A directory in the place of a link does not touch what the link leads to.
    let before = std::fs::metadata(&outside.0)?.mode();
    let (_dir, fs) = unpacked(Archive::new().symlink("d", &path).dir("d/", 0o777))?;
    assert!(fs.join("d").symlink_metadata()?.is_dir());
    assert_eq!(std::fs::metadata(&outside.0)?.mode(), before);
    // Loops end.
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
    // Through a link that leads out.
    refused(
        Archive::new()
            .symlink("e", "/etc")
            .hard_link("x", "e/passwd"),
    )?;
    // A hard link to a link is another link, not what it leads to.
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
    // A version 2 capability set with cap_net_bind_service, effective.
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
    // Files that came later did not change the directory's time.
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

/// A tree as GNU tar makes it, in each of the dialects that it knows.
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

/// What a container would see over these layers, lowest first.
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
            // First the whiteout, then the directory: listed, or implied.
            .file(".wh.a", "")
            .dir("a/", 0o755)
            .file("a/new", "2")
            .file(".wh.b", "")
            .file("b/new", "2")
            // First the directory.
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
    // At a layer's root only whoever mounts can honour it.
    let root = Dir::new()?;
    let archive = Archive::new().file("x", "").file(".wh..wh..opq", "").end();
    assert!(unpack(&archive, &root.0.join("fs"))?.opaque_root);
    Ok(())
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
    );
    assert!(matches!(result, Err(LayerError::Bound(_))), "{result:?}");
    // Directories that are only implied count as well.
    let deep = Archive::new().file(&"d/".repeat(40), "").end();
    let result = layer::unpack(
        deep.as_slice(),
        &dir.0.join("c"),
        &descriptor(&deep, &deep),
        &tight,
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
        assert!(result.is_err() || length == 0, "{length}");
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
    // Nothing at all is a layer without files.
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
        match layer::unpack(blob, &dir.0.join("fs"), descriptor, &BOUNDS) {
            Err(LayerError::Digest(what)) => Ok(what),
            other => Err(format!("{other:?}").into()),
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
    // A bit that fell over on the way shows as what it is.
    let mut damaged = blob.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x40;
    try_with(&damaged, &good)?;
    let mut longer = blob;
    longer.extend(Compression::Gzip.apply(b""));
    try_with(&longer, &good)?;
    Ok(())
}
