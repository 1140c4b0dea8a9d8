//! Volumes that an image declares. The container gets a separate directory for each volume, outside
//! the overlay of its root filesystem. The directory starts as a copy of the image's directory at
//! the same path.

mod copy;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rrun_proto::v1::Mount;
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;

use self::copy::Copier;
pub(crate) use self::copy::Limits;
use super::in_root::InRoot;
use super::mounts::cleaned;
use crate::sandbox::files::private_dir;
use rrun_calls::error::{Code, During, Error, Result};
use rrun_kernel::errno::describe;

/// The maximum number of volumes that an image can declare.
const MAX_VOLUMES: usize = 1000;

/// The maximum number of components of the paths of all volumes that an image declares. The runtime
/// creates a directory for each component that does not exist. Without this limit, a small image
/// could request a million directories.
const MAX_COMPONENTS: usize = 10_000;

/// The volumes that a container's image declares, and the inputs for their creation.
pub(crate) struct Volumes<'a> {
    pub declared: &'a [String],
    /// The requested mounts. A volume is skipped if the request has a mount at the same path.
    pub requested: &'a [Mount],
    pub rootfs: &'a Path,
    /// The directory in which the volumes are created.
    pub dir: &'a Path,
    /// The owner of a volume whose path does not exist in the image.
    pub owner: (u32, u32),
    pub limits: Limits,
}

impl Volumes<'_> {
    /// Creates the volumes and returns a mount for each volume. Calls `go_on` before each step; an
    /// error from `go_on` ends the work. This call blocks.
    pub(crate) fn make(&self, go_on: impl Fn() -> Result<()>) -> Result<Vec<Mount>> {
        let places = self.places()?;
        let names = self.dir.join("names");
        let all = places.iter().map(|(_, place)| place.clone()).collect();
        let mut copier = Copier::new(self.limits, &names, all, go_on);
        // The complete copies, by their directories in the image.
        let mut copied: HashMap<PathBuf, PathBuf> = HashMap::new();
        let mut made: Vec<Mount> = Vec::new();
        for (volume, place) in &places {
            let what = || format!("create the volume {volume:?} of the image");
            let from = self.directory(place).during(what)?;
            let several = places.len() > 1;
            let resolved = from.as_ref().filter(|_| several).and_then(resolved_path);
            let known = resolved.as_ref().and_then(|resolved| copied.get(resolved));
            let host = match known {
                // Links can lead from several volumes to one directory. The runtime mounts all
                // these volumes on the same directory, so they can share one copy.
                Some(host) => host.clone(),
                None => {
                    let host = self.dir.join(made.len().to_string());
                    private_dir(&host)?;
                    let filled = self.fill(place, from.as_ref(), &host, &mut copier);
                    if filled.during(what)? {
                        copied.extend(resolved.map(|resolved| (resolved, host.clone())));
                    }
                    host
                }
            };
            made.push(Mount {
                container_path: place.to_string_lossy().into_owned(),
                host_path: host.to_string_lossy().into_owned(),
                selinux_relabel: true,
                ..Mount::default()
            });
        }
        Ok(made)
    }

    /// Returns the volumes to create, each with its path in the container.
    fn places(&self) -> Result<Vec<(&str, PathBuf)>> {
        let paths = self.requested.iter();
        let mut taken: HashSet<PathBuf> = paths.map(|it| cleaned(&it.container_path)).collect();
        taken.insert("/".into());
        let mut places = Vec::new();
        for volume in self.declared {
            let place = cleaned(volume);
            if taken.insert(place.clone()) {
                places.push((volume.as_str(), place));
            }
        }
        if places.len() > MAX_VOLUMES {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!("the image declares more than the limit of {MAX_VOLUMES} volumes"),
            ));
        }
        let paths = places.iter();
        let components: usize = paths.map(|(_, place)| place.iter().skip(1).count()).sum();
        if components > MAX_COMPONENTS {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!(
                    "the paths of the image's volumes have {components} components, and the limit is {MAX_COMPONENTS}"
                ),
            ));
        }
        Ok(places)
    }

    /// Opens the directory of a volume in the image. Returns `None` if it does not exist.
    fn directory(&self, place: &Path) -> Result<Option<OwnedFd>> {
        let root =
            InRoot::open(self.rootfs).during(|| "open the image's root file system".to_owned())?;
        let inside = place.strip_prefix("/").unwrap_or(place);
        match root.open_directory(inside) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(Error::of_file(
                Some(errno.raw_os_error()),
                format!(
                    "open the volume's directory in the image: {}",
                    describe(&errno.into())
                ),
            )),
        }
    }

    /// Fills the new directory `host` of a volume. Returns false if the contents of other volumes
    /// were omitted.
    fn fill<G: Fn() -> Result<()>>(
        &self,
        place: &Path,
        from: Option<&OwnedFd>,
        host: &Path,
        copier: &mut Copier<'_, G>,
    ) -> Result<bool> {
        // Ours: the server has just created this directory, so opening it by its path is safe.
        let into: OwnedFd = File::open(host)
            .during(|| format!("open {}", host.display()))?
            .into();
        let Some(from) = from else {
            let (uid, gid) = self.owner;
            fchmod(&into, Mode::from_raw_mode(0o755))
                .during(|| "set the volume's mode".to_owned())?;
            return std::os::unix::fs::fchown(&into, Some(uid), Some(gid))
                .map(|()| true)
                .during(|| "set the volume's owner".to_owned());
        };
        copier
            .copy(place, from, &into)
            .during(|| "copy the image's directory".to_owned())
    }
}

/// Returns the path of an open directory after all links in it were resolved. Returns `None` if the
/// path is too long.
fn resolved_path(directory: &OwnedFd) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd())).ok()
}

#[cfg(test)]
mod tests {
    use rustix::fs::XattrFlags;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    const UNLIMITED: Limits = Limits {
        bytes: u64::MAX,
        files: u64::MAX,
    };

    type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

    /// A root file system of an image, and the directory for the volumes. Dropping this value
    /// removes both.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> std::io::Result<Self> {
            let name = format!("rrun-volumes-{name}-{}", std::process::id());
            let place = Place(std::env::temp_dir().join(name));
            std::fs::create_dir_all(place.0.join("rootfs/data"))?;
            Ok(place)
        }

        fn image(&self, path: &str) -> PathBuf {
            self.0.join("rootfs").join(path)
        }

        fn volume(&self, path: &str) -> PathBuf {
            self.0.join("volumes").join(path)
        }

        fn make(
            &self,
            declared: &[&str],
            limits: Limits,
            go_on: impl Fn() -> Result<()>,
        ) -> Result<Vec<Mount>> {
            let declared: Vec<String> = declared.iter().map(|it| (*it).to_owned()).collect();
            let volumes = Volumes {
                declared: &declared,
                requested: &[],
                rootfs: &self.0.join("rootfs"),
                dir: &self.0.join("volumes"),
                owner: (
                    rustix::process::geteuid().as_raw(),
                    rustix::process::getegid().as_raw(),
                ),
                limits,
            };
            volumes.make(go_on)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// Returns the number of bytes that a file occupies on the disk.
    fn disk_bytes(path: &Path) -> std::io::Result<u64> {
        Ok(std::fs::metadata(path)?.blocks() * 512)
    }

    #[test]
    fn the_holes_of_a_sparse_file_are_not_copied() -> Outcome {
        use std::os::unix::fs::FileExt;
        let place = Place::new("sparse")?;
        let length = 1 << 40;
        let file = File::create(place.image("data/big"))?;
        file.write_all_at(b"first", 0)?;
        file.write_all_at(b"middle", 3 << 30)?;
        file.set_len(length)?;
        std::fs::write(place.image("data/small"), "dense")?;
        File::create(place.image("data/hole"))?.set_len(length)?;
        let limits = Limits {
            bytes: 1 << 20,
            files: 3,
        };
        place.make(&["/data"], limits, || Ok(()))?;
        for name in ["0/big", "0/hole"] {
            let copy = place.volume(name);
            assert_eq!(std::fs::metadata(&copy)?.len(), length, "{name}");
            assert!(disk_bytes(&copy)? <= 1 << 20, "{name}");
        }
        let copy = File::open(place.volume("0/big"))?;
        for (at, text) in [(0, &b"first"[..]), (3 << 30, b"middle")] {
            let mut found = vec![0; text.len()];
            copy.read_exact_at(&mut found, at)?;
            assert_eq!(found, text);
        }
        assert_eq!(std::fs::read_to_string(place.volume("0/small"))?, "dense");
        Ok(())
    }

    #[test]
    fn the_names_of_one_file_become_names_of_one_file() -> Outcome {
        let place = Place::new("names")?;
        std::fs::create_dir(place.image("data/sub"))?;
        std::fs::write(place.image("data/first"), vec![b'x'; 1 << 20])?;
        symlink("/nowhere", place.image("data/link"))?;
        for number in 0..100 {
            let name = place.image(&format!("data/sub/{number}"));
            std::fs::hard_link(place.image("data/first"), name)?;
        }
        std::fs::hard_link(place.image("data/link"), place.image("data/sub/link"))?;
        let limits = Limits {
            bytes: (1 << 20) + (1 << 12),
            files: 200,
        };
        place.make(&["/data"], limits, || Ok(()))?;
        let inode = |name: &str| std::fs::symlink_metadata(place.volume(name)).map(|it| it.ino());
        assert_eq!(inode("0/first")?, inode("0/sub/99")?);
        assert_eq!(inode("0/link")?, inode("0/sub/link")?);
        assert_eq!(std::fs::metadata(place.volume("0/first"))?.nlink(), 101);
        assert!(!place.volume("names").exists());
        Ok(())
    }

    #[test]
    fn volumes_that_lead_to_one_directory_share_one_copy() -> Outcome {
        let place = Place::new("shared")?;
        std::fs::write(place.image("data/file"), vec![b'x'; 1 << 20])?;
        let names: Vec<String> = (0..100).map(|number| format!("/link{number}")).collect();
        for name in &names {
            symlink("data", place.image(name.trim_start_matches('/')))?;
        }
        let mut declared: Vec<&str> = names.iter().map(String::as_str).collect();
        declared.extend(["/none", "/missing"]);
        let limits = Limits {
            bytes: 1 << 20,
            files: 1,
        };
        let made = place.make(&declared, limits, || Ok(()))?;
        assert_eq!(made.len(), 102);
        let hosts: HashSet<&str> = made.iter().map(|mount| mount.host_path.as_str()).collect();
        assert_eq!(hosts.len(), 3);
        Ok(())
    }

    #[test]
    fn a_volume_inside_another_volume_is_copied_once() -> Outcome {
        let place = Place::new("nested")?;
        std::fs::create_dir_all(place.image("data/a/b"))?;
        std::fs::write(place.image("data/a/b/file"), vec![b'x'; 1 << 20])?;
        std::fs::write(place.image("data/a/other"), "text")?;
        symlink("data", place.image("link"))?;
        let limits = Limits {
            bytes: (1 << 20) + (5 << 12),
            files: 9,
        };
        let made = place.make(&["/data", "/data/a", "/data/a/b"], limits, || Ok(()))?;
        assert_eq!(made.len(), 3);
        assert_eq!(std::fs::read_dir(place.volume("0/a"))?.count(), 0);
        assert_eq!(std::fs::read_to_string(place.volume("1/other"))?, "text");
        assert_eq!(std::fs::read_dir(place.volume("1/b"))?.count(), 0);
        assert_eq!(std::fs::metadata(place.volume("2/file"))?.len(), 1 << 20);
        // The volume /link can hide the volume /data/a/b, so it has its own copy.
        std::fs::remove_dir_all(place.volume(""))?;
        place.make(&["/data", "/data/a/b", "/link"], UNLIMITED, || Ok(()))?;
        assert_eq!(
            std::fs::metadata(place.volume("2/a/b/file"))?.len(),
            1 << 20
        );
        Ok(())
    }

    #[test]
    fn volumes_above_a_limit_are_refused() -> Outcome {
        let place = Place::new("limits")?;
        std::fs::create_dir(place.image("more"))?;
        for name in ["data/a", "data/b", "more/c"] {
            std::fs::write(place.image(name), [b'x'; 600])?;
        }
        for (bytes, files, expected) in [
            (12287, 9, "12287 bytes (image.volume_bytes)"),
            (12288, 2, "2 files (image.volume_files)"),
        ] {
            let limits = Limits { bytes, files };
            let refused = place.make(&["/data", "/more"], limits, || Ok(())).err();
            let error = refused.ok_or("the volumes were created")?;
            assert!(error.sentence().contains(expected), "{error}");
            assert_eq!(error.code(), Code::ResourceExhausted);
            std::fs::remove_dir_all(place.volume(""))?;
        }
        let limits = Limits {
            bytes: 12288,
            files: 3,
        };
        place.make(&["/data", "/more"], limits, || Ok(()))?;
        let many: Vec<String> = (0..1001).map(|number| format!("/v{number}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        std::fs::remove_dir_all(place.volume(""))?;
        let error = place.make(&many, UNLIMITED, || Ok(())).err();
        assert!(error.is_some_and(|error| error.sentence().contains("1000 volumes")));
        Ok(())
    }

    type Make<'a> = &'a dyn Fn(&Path) -> std::io::Result<()>;

    #[test]
    fn links_attributes_directories_and_names_count_against_the_limit() -> Outcome {
        let place = Place::new("small-parts")?;
        let limits = Limits {
            bytes: 100 << 10,
            files: 1 << 20,
        };
        let kinds: [(&str, Make); 5] = [
            ("links", &|path| symlink("x".repeat(1000), path)),
            ("files", &|path| std::fs::write(path, "x")),
            ("directories", &|path| std::fs::create_dir(path)),
            ("attributes", &|path| {
                std::fs::write(path, "")?;
                let value = [7; 1000];
                Ok(rustix::fs::setxattr(
                    path,
                    "user.a",
                    &value,
                    XattrFlags::empty(),
                )?)
            }),
            ("names", &|path| {
                for number in 0..20 {
                    let name = format!("{}-{number:0200}", path.display());
                    std::fs::hard_link(place.image("link-target"), name)?;
                }
                Ok(())
            }),
        ];
        std::fs::write(place.image("link-target"), "")?;
        for (kind, make) in kinds {
            std::fs::create_dir(place.image(kind))?;
            for number in 0..20 {
                make(&place.image(&format!("{kind}/{number}")))?;
            }
            place.make(&[&format!("/{kind}")], limits, || Ok(()))?;
            std::fs::remove_dir_all(place.volume(""))?;
            for number in 20..40 {
                make(&place.image(&format!("{kind}/{number}")))?;
            }
            let made = place.make(&[&format!("/{kind}")], limits, || Ok(()));
            let error = made.err().ok_or(format!("the {kind} were copied"))?;
            assert!(error.sentence().contains("image.volume_bytes"), "{error}");
            std::fs::remove_dir_all(place.volume(""))?;
        }
        Ok(())
    }

    #[test]
    fn volumes_with_too_long_paths_are_refused() -> Outcome {
        let place = Place::new("deep")?;
        let paths: Vec<String> = (0..101)
            .map(|number| format!("/{number}{}", "/d".repeat(99)))
            .collect();
        let mut paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let error = place.make(&paths, UNLIMITED, || Ok(())).err();
        let error = error.ok_or("the volumes were created")?;
        assert!(error.sentence().contains("10100 components"), "{error}");
        assert!(!place.volume("").exists());
        paths.pop();
        assert_eq!(place.make(&paths, UNLIMITED, || Ok(()))?.len(), 100);
        Ok(())
    }

    #[test]
    fn a_copy_ends_when_the_container_is_no_longer_needed() -> Outcome {
        let place = Place::new("ended")?;
        for number in 0..10 {
            std::fs::write(place.image(&format!("data/{number}")), "x")?;
        }
        let left = std::cell::Cell::new(5);
        let go_on = || {
            left.set(left.get() - 1);
            match left.get() {
                0 => Err(Error::wrong_state("the pod is not ready")),
                _ => Ok(()),
            }
        };
        let error = place.make(&["/data"], UNLIMITED, go_on).err();
        assert!(error.is_some_and(|error| error.sentence().ends_with("the pod is not ready")));
        assert!(std::fs::read_dir(place.volume("0"))?.count() < 5);
        Ok(())
    }

    #[test]
    fn a_volume_starts_as_a_copy_of_the_images_directory() -> Result<(), Box<dyn std::error::Error>>
    {
        let base = std::env::temp_dir().join(format!("rrun-volumes-{}", std::process::id()));
        let (rootfs, dir) = (base.join("rootfs"), base.join("volumes"));
        std::fs::create_dir_all(rootfs.join("real/sub"))?;
        std::fs::write(rootfs.join("real/sub/file"), "text")?;
        std::fs::set_permissions(rootfs.join("real/sub"), PermissionsExt::from_mode(0o1751))?;
        symlink("/etc/passwd", rootfs.join("real/link"))?;
        // If the link `data` is resolved inside the image, it leads to the image's directory /real.
        symlink("/real", rootfs.join("data"))?;
        symlink("../../../..", rootfs.join("out"))?;
        let declared =
            ["/data", "data/", "/none", "/taken", "/", "/out/real/sub"].map(String::from);
        let requested = [Mount {
            container_path: "/taken".into(),
            ..Mount::default()
        }];
        let ids = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let volumes = Volumes {
            declared: &declared,
            requested: &requested,
            rootfs: &rootfs,
            dir: &dir,
            owner: ids,
            limits: UNLIMITED,
        };
        let made = volumes.make(|| Ok(()))?;
        let places: Vec<&str> = made
            .iter()
            .map(|mount| mount.container_path.as_str())
            .collect();
        assert_eq!(places, ["/data", "/none", "/out/real/sub"]);
        assert_eq!(std::fs::read_to_string(dir.join("0/sub/file"))?, "text");
        assert_eq!(
            std::fs::metadata(dir.join("0/sub"))?.mode() & 0o7777,
            0o1751
        );
        assert_eq!(
            std::fs::read_link(dir.join("0/link"))?,
            Path::new("/etc/passwd")
        );
        assert_eq!(std::fs::read_dir(dir.join("1"))?.count(), 0);
        assert_eq!(std::fs::read_to_string(dir.join("2/file"))?, "text");
        std::fs::remove_dir_all(&base)?;
        Ok(())
    }
}
