//! Random stacks of image layers, which rrun-cri, containerd and GNU tar must unpack to the same
//! tree.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::containerd::{CONTAINERD, CTR, Containerd};
use crate::support::images::build::{Compression, Image, image};
use crate::support::images::server::Server;
use crate::support::leak_check::unmount_below;
use crate::support::machine::{Dice, Directory, Failed, Result, command, fixed_seed, full, note};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::random_layers::{Kind, Layer, Member, archive, stack};
use crate::support::trees::{self, Tree};
use crate::{ensure, test};

pub(crate) const TESTS: &[Test] = &[test!(
    random_layers_become_the_same_tree_as_with_gnu_tar_and_containerd,
    A_NODE,
    Need::RrunCri,
    Need::NativeOrLong,
    Need::Program("tar"),
    CTR,
    CONTAINERD
)];

/// The number of stacks that one container mounts.
const AT_ONCE: usize = 16;

/// A stack of layers with its archives.
struct Drawn {
    number: u64,
    layers: Vec<Layer>,
    archives: Vec<Vec<u8>>,
    image: Image,
}

impl Drawn {
    fn new(seed: u64, number: u64) -> Result<Self> {
        let mut dice = Dice::from_seed(seed << 20 | number);
        let layers = stack(&mut dice);
        let archives: Vec<Vec<u8>> = layers
            .iter()
            .map(|layer| archive(&mut dice, layer))
            .collect();
        let all: Vec<_> = archives
            .iter()
            .map(|archive| {
                let all = [Compression::None, Compression::Gzip, Compression::Zstd];
                (archive.clone(), dice.pick(&all))
            })
            .collect();
        let image = image(&all, json!({}));
        Ok(Drawn {
            number,
            layers,
            archives,
            image,
        })
    }

    /// Returns the members of the layers in lines for error messages.
    fn described(&self) -> String {
        let layers = self.layers.iter().enumerate();
        let members = layers.flat_map(|(at, layer)| layer.iter().map(move |member| (at, member)));
        let lines = members.map(|(at, member)| format!("    layer {at}: {}", member.described()));
        lines.collect::<Vec<_>>().join("\n")
    }

    fn name(&self) -> String {
        format!("stack{}", self.number)
    }
}

fn random_layers_become_the_same_tree_as_with_gnu_tar_and_containerd() -> Result {
    let (seed, count) = (fixed_seed(), if full() { 400 } else { 40 });
    let mut failures = Vec::new();
    on_a_node(|node| {
        let containerd = Containerd::start()?;
        node.pull(BUSYBOX)?;
        for first in (0..count).step_by(AT_ONCE) {
            let numbers = first..count.min(first + AT_ONCE as u64);
            let stacks = numbers
                .map(|number| Drawn::new(seed, number))
                .collect::<Result<Vec<_>>>()?;
            compare(node, &containerd, &stacks, &mut failures)?;
        }
        Ok(())
    })?;
    note(format!(
        "{count} stacks of layers, drawn with RRUN_TEST_SEED={seed}"
    ));
    ensure!(
        failures.is_empty(),
        "of {count} stacks drawn with RRUN_TEST_SEED={seed}, {} become different trees:\n{}",
        failures.len(),
        failures.join("\n")
    );
    Ok(())
}

/// Unpacks the stacks with each program, and adds the differences to `failures`.
fn compare(
    node: &Node,
    containerd: &Containerd,
    stacks: &[Drawn],
    failures: &mut Vec<String>,
) -> Result {
    let images: Vec<(String, &Image)> = stacks
        .iter()
        .map(|stack| (stack.name(), &stack.image))
        .collect();
    let named: Vec<(&str, &Image)> = images
        .iter()
        .map(|(name, image)| (name.as_str(), *image))
        .collect();
    let server = Server::start(&named, |_| None).map_err(|error| error.to_string())?;
    let pod = node.pod("stacks");
    let pod_id = node.runp(&pod)?;
    let mut container = node.container("stacks", &["sleep", "600"]);
    for stack in stacks {
        let name = format!("{}/{}:1", server.host(), stack.name());
        node.pull(&name)?;
        let mount = json!({
            "container_path": format!("/{}", stack.name()), "readonly": true, "image": { "image": name },
        });
        if let Some(Value::Array(mounts)) = container.get_mut("mounts") {
            mounts.push(mount);
        }
    }
    let id = node.run(&pod_id, &pod, &container)?;
    let root = PathBuf::from(format!("/proc/{}/root", node.pid(&id)?));
    for stack in stacks {
        let rrun = trees::read(&root.join(stack.name()))?;
        let tar = by_tar(stack);
        let containerd = by_containerd(containerd, stack);
        for (peer, tree) in [("GNU tar", tar), ("containerd", containerd)] {
            let ignored = |path: &[u8], attribute: &str, rrun: &str, other: &str| {
                let difference = Difference {
                    peer,
                    path,
                    attribute,
                    rrun,
                    other,
                };
                reason(stack, &difference).is_some()
            };
            let found = match tree {
                Ok(tree) => trees::differences(&rrun, &tree, ignored),
                Err(failed) if is_known_failure(peer, &failed) => Vec::new(),
                Err(failed) => vec![failed.message().unwrap_or_default().to_owned()],
            };
            if !found.is_empty() {
                failures.push(format!(
                    "number {}, rrun and {peer}:\n  {}\n{}",
                    stack.number,
                    found.join("\n  "),
                    stack.described()
                ));
            }
        }
    }
    node.asks(&["rmp", "--force", &pod_id])?;
    for stack in stacks {
        node.asks(&["rmi", &format!("{}/{}:1", server.host(), stack.name())])?;
    }
    Ok(())
}

/// Unpacks the layers with GNU tar, one after the other into one directory. Before each layer, this
/// function removes what the layer removes or replaces (image-spec, layer.md, "Applying
/// changesets").
fn by_tar(stack: &Drawn) -> Result<Tree> {
    let directory = Directory::new("tar")?;
    let root = directory.join("root");
    fs::create_dir(&root)?;
    for (layer, archive) in stack.layers.iter().zip(&stack.archives) {
        // The removal of a directory's path precedes the removal of the paths in it. Otherwise, a
        // path could lead through a link that the layer replaces with a directory.
        let mut members: Vec<&Member> = layer.iter().collect();
        members.sort_by_key(|member| &member.path);
        for member in members {
            make_room(&root, member)?;
        }
        let file = directory.join("layer.tar");
        // Without this padding, GNU tar cannot seek in the file.
        let mut archive = archive.clone();
        archive.resize(archive.len().next_multiple_of(20 * 512), 0);
        fs::write(&file, &archive)?;
        command(
            "tar",
            [
                "--extract",
                "--preserve-permissions",
                "--same-owner",
                "--numeric-owner",
            ],
        )
        .args([
            "--xattrs",
            "--xattrs-include=*",
            "--delay-directory-restore",
            "--exclude=.wh.*",
        ])
        .arg("--directory")
        .arg(&root)
        .arg("--file")
        .arg(&file)
        .ok()?;
    }
    trees::read(&root)
}

/// Removes the files of the layers below that a member of a layer removes or replaces.
fn make_room(root: &Path, member: &Member) -> Result {
    let path = root.join(OsStr::from_bytes(&member.path));
    let parent = path.parent().unwrap_or(root);
    if !member.path.is_empty() && parent.canonicalize().is_ok_and(|real| real != parent) {
        return Err(format!("the path {} leads through a link", path.display()).into());
    }
    let found = fs::symlink_metadata(&path).map(|file| file.is_dir()).ok();
    match (found, member.kind) {
        (Some(true), Kind::Directory) => trees::remove_xattrs(&path)?,
        (Some(true), Kind::Opaque) => {
            for entry in fs::read_dir(&path)? {
                remove(&entry?.path())?;
            }
        }
        (Some(_), _) => remove(&path)?,
        (None, _) => {}
    }
    Ok(())
}

fn remove(path: &Path) -> Result {
    if fs::symlink_metadata(path)?.is_dir() {
        fs::remove_dir_all(path)?;
    } else {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn by_containerd(containerd: &Containerd, stack: &Drawn) -> Result<Tree> {
    let directory = Directory::new("mounted")?;
    let at = |name: &str| directory.join(name).display().to_string();
    let (layout, file, root) = (at("layout"), at("image.tar"), at("root"));
    stack
        .image
        .write_layout(Path::new(&layout))
        .map_err(|error| error.to_string())?;
    command(
        "tar",
        ["--create", "--file", &file, "--directory", &layout, "."],
    )
    .ok()?;
    let name = format!("localhost/{}", stack.name());
    containerd
        .ctr(&["images", "import", "--base-name", &name, &file])
        .ok()?;
    fs::create_dir(&root)?;
    let name = format!("{name}:latest");
    containerd.ctr(&["images", "mount", &name, &root]).ok()?;
    let tree = trees::read(Path::new(&root));
    unmount_below(directory.path());
    containerd.ctr(&["snapshots", "rm", &root]).end()?;
    containerd.ctr(&["images", "rm", &name]).ok()?;
    tree
}

/// Returns true for a failure of containerd. If a layer removes a path, and a later layer implies a
/// directory at this path, containerd takes the whiteout of the first layer for a file.
fn is_known_failure(peer: &str, failed: &Failed) -> bool {
    let message = failed.message().unwrap_or_default();
    peer == "containerd" && message.contains(": lstat /") && message.contains(": not a directory")
}

/// A difference in an attribute of a file: the peer, the path, the name of the attribute, and its
/// values in the trees of rrun and of the peer.
struct Difference<'a> {
    peer: &'a str,
    path: &'a [u8],
    attribute: &'a str,
    rrun: &'a str,
    other: &'a str,
}

/// Returns the reason of a difference, if the difference is known.
fn reason(stack: &Drawn, difference: &Difference<'_>) -> Option<&'static str> {
    let path = difference.path;
    let inside = [path, b"/"].concat();
    let is_entry = |kind| !matches!(kind, Kind::Whiteout | Kind::Opaque);
    let lists = |layer: &Layer| {
        layer
            .iter()
            .any(|member| member.path == path && is_entry(member.kind))
    };
    let changes = |layer: &Layer| {
        layer.iter().any(|member| {
            member.path == path || member.path.starts_with(&inside) || path.is_empty()
        })
    };
    let removes = |layer: &Layer| {
        layer.iter().any(|member| {
            let removed = [member.path.as_slice(), b"/"].concat();
            member.kind == Kind::Whiteout && (member.path == path || path.starts_with(&removed))
        })
    };
    let mut last = None;
    for (at, layer) in stack.layers.iter().enumerate() {
        if lists(layer) {
            last = Some(at);
        } else if removes(layer) {
            last = None;
        }
    }
    let lists = last;
    let first = |wanted: &dyn Fn(&Member) -> bool| {
        let layer = lists.and_then(|at| stack.layers.get(at));
        layer.and_then(|layer| layer.iter().position(wanted))
    };
    let follows_its_files = first(&|member| member.path.starts_with(&inside))
        < first(&|member| member.path == path && is_entry(member.kind))
        && first(&|member| member.path.starts_with(&inside)).is_some();
    let changes = stack.layers.iter().rposition(changes);
    let has_links = stack
        .layers
        .iter()
        .flatten()
        .any(|member| member.kind == Kind::HardLink);
    let sets_group = stack
        .layers
        .iter()
        .flatten()
        .any(|member| member.kind == Kind::Directory && member.mode & 0o2000 != 0);
    let mode = u32::from_str_radix(difference.rrun, 8).unwrap_or_default();
    let with_group_bit = format!("{:o}", mode | 0o2000);
    let by_containerd = difference.peer == "containerd";
    let without = |names: &[&str]| {
        let words = difference.rrun.split(' ');
        let words = words.filter(|word| !names.iter().any(|name| word.starts_with(name)));
        words.collect::<Vec<_>>().join(" ")
    };
    match difference.attribute {
        "time" if lists.is_none() => Some("no layer contains the time of the directory"),
        "time" if changes > lists => {
            Some("a later layer changes the directory, but does not contain its time")
        }
        "time" if !by_containerd && follows_its_files => {
            Some("GNU tar does not restore the time of a directory that follows its files")
        }
        "xattrs" if by_containerd && follows_its_files => Some(
            "containerd copies the attributes of an implied directory, and its entry does not remove them",
        ),
        "mode" | "owner" if lists.is_none() && sets_group => {
            Some("the peers let an implied directory inherit the group and the set-group-ID bit")
        }
        "mode" if !by_containerd && sets_group && difference.other == with_group_bit => {
            Some("GNU tar does not clear the set-group-ID bit that a directory has inherited")
        }
        "mode" | "owner" | "time" | "xattrs" if by_containerd && path.is_empty() => {
            Some("containerd ignores the entry of the root")
        }
        "time" if by_containerd && difference.rrun.starts_with('-') => {
            Some("containerd changes times before 1970 to 1970")
        }
        "xattrs" if by_containerd && without(&["trusted."]) == difference.other => {
            Some("containerd ignores attributes of the class `trusted`")
        }
        "xattrs"
            if by_containerd
                && has_links
                && without(&["trusted.", "security."]) == difference.other =>
        {
            Some(
                "containerd changes the owner of a file again for each hard link, which removes its capabilities",
            )
        }
        _ => None,
    }
}
