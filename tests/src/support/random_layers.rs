//! Random stacks of image layers, as image builders write them.
//!
//! The names come from a short list. Later layers therefore often replace or remove the files of
//! earlier layers.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::images::build::{Archive, Item};
use crate::support::machine::Dice;

pub(crate) type Path = Vec<u8>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File,
    Link,
    HardLink,
    Character,
    Block,
    Fifo,
    /// A file of the archive that removes the file with the same name from the layers below.
    Whiteout,
    /// A file of the archive that removes the content of a directory from the layers below.
    Opaque,
}

/// An entry of a layer's archive.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    /// For a whiteout, the path that it removes. For an opaque whiteout, the directory.
    pub(crate) path: Path,
    pub(crate) kind: Kind,
    link: Path,
    pub(crate) mode: u32,
    owner: (u64, u64),
    /// The modification time, as in a pax header, or whole seconds for the header itself.
    time: Time,
    device: (u32, u32),
    content: Vec<u8>,
    /// If not empty, the file is sparse, and these are the offsets and lengths of its data.
    pieces: Vec<(u64, u64)>,
    xattrs: Vec<(String, Vec<u8>)>,
}

#[derive(Clone, Debug)]
enum Time {
    Header(u64),
    Pax(String),
}

pub(crate) type Layer = Vec<Member>;

/// Returns one to four layers.
pub(crate) fn stack(dice: &mut Dice) -> Vec<Layer> {
    let mut below = BTreeMap::new();
    (0..=dice.below(4))
        .map(|_| {
            let mut drawing = Drawing {
                dice,
                tree: std::mem::take(&mut below),
                own: BTreeSet::new(),
                layer: Vec::new(),
            };
            drawing.layer();
            below = drawing.tree;
            drawing.layer
        })
        .collect()
}

/// A layer that is being drawn.
struct Drawing<'a> {
    dice: &'a mut Dice,
    /// The files after this layer has been applied.
    tree: BTreeMap<Path, Kind>,
    /// The paths that this layer itself contains.
    own: BTreeSet<Path>,
    layer: Layer,
}

const NAMES: &[&[u8]] = &[
    b"a",
    b"b",
    b"c",
    b"etc",
    b"usr",
    b".hidden",
    b"with space",
    b"-dash",
    b"*",
    b"new\nline",
    b"\xc3\xbc",
    b"\xff\xfe",
    b".wh",
    b"back\\slash",
    b"\"quoted\"",
    b"a=b",
];

impl Drawing<'_> {
    fn layer(&mut self) {
        if self.dice.one_in(4) {
            let root = self.member(Kind::Directory, Vec::new());
            self.layer.push(root);
        }
        for _ in 0..2 + self.dice.below(14) {
            match self.dice.below(20) {
                0..4 => self.directory(),
                4..6 => self.remove(),
                6 => self.empty_directory(),
                7..9 => self.hard_link(),
                9 => self.duplicate(),
                10 => self.sparse_file(),
                _ => self.other(),
            }
        }
        // An archive can contain a directory after the files in the directory.
        if self.dice.one_in(5) && !self.layer.is_empty() {
            let last = self.layer.len() - 1;
            let from = self.dice.below(self.layer.len() as u64) as usize;
            let is_link = |member: &Member| member.kind == Kind::HardLink;
            if self.layer[from].kind == Kind::Directory && !self.layer.iter().any(is_link) {
                self.layer.swap(from, last);
            }
        }
    }

    /// Returns a path in a directory. The directory exists, or the layer does not list it.
    fn path(&mut self) -> Option<Path> {
        let mut path = Vec::new();
        for depth in 0..=self.dice.below(3) {
            if depth > 0 {
                if *self.tree.get(&path).unwrap_or(&Kind::Directory) != Kind::Directory {
                    return None;
                }
                path.push(b'/');
            }
            if self.dice.one_in(40) {
                let letter = *b"xyz".get(depth as usize)?;
                path.extend(vec![letter; 150]);
            } else {
                path.extend(self.dice.pick(NAMES));
            }
        }
        Some(path)
    }

    fn member(&mut self, kind: Kind, path: Path) -> Member {
        let modes: &[u32] = match kind {
            Kind::Directory => &[0o755, 0o755, 0o700, 0o1777, 0o2755, 0o555, 0],
            _ => &[
                0o644, 0o644, 0o755, 0o600, 0o4755, 0o2755, 0o6711, 0o1644, 0,
            ],
        };
        let owners = [0, 0, 0, 1, 1000, 65534, 100_000, 2_097_152, 4_294_967_294];
        Member {
            path,
            kind,
            link: Vec::new(),
            mode: self.dice.pick(modes),
            owner: (self.dice.pick(&owners), self.dice.pick(&owners)),
            time: self.time(),
            device: (0, 0),
            content: Vec::new(),
            pieces: Vec::new(),
            xattrs: Vec::new(),
        }
    }

    fn time(&mut self) -> Time {
        let text = [
            "1700000000.123456789",
            "1.5",
            "-1.25",
            "-100",
            "4294967296.000000001",
            "1600000000.1",
        ];
        match self.dice.below(3) {
            0 => Time::Pax(self.dice.pick(&text).to_owned()),
            _ => Time::Header(
                self.dice
                    .pick(&[0, 1, 1_000_000_000, 1_700_000_000, 4_294_967_296]),
            ),
        }
    }

    fn xattrs(&mut self, member: &mut Member) {
        if !self.dice.one_in(4) {
            return;
        }
        // Version 2 of the attribute, with the capability CAP_NET_BIND_SERVICE.
        let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut all: Vec<(&str, Vec<u8>)> = vec![
            ("user.one", b"value".to_vec()),
            ("user.empty", Vec::new()),
            ("user.binary", vec![0, 10, 61, 255]),
            ("trusted.one", b"1".to_vec()),
        ];
        if member.kind == Kind::File {
            all.push(("security.capability", capability.to_vec()));
            all.push(("security.capability", capability.to_vec()));
        }
        for _ in 0..=self.dice.below(2) {
            let (name, value) = all[self.dice.below(all.len() as u64) as usize].clone();
            if member.xattrs.iter().all(|(other, _)| other != name) {
                member.xattrs.push((name.to_owned(), value));
            }
        }
    }

    /// Adds a member, and removes what the member replaces.
    fn add(&mut self, member: Member) {
        let path = member.path.clone();
        if member.kind != Kind::Directory {
            let inside = [path.as_slice(), b"/"].concat();
            self.tree.retain(|other, _| !other.starts_with(&inside));
            self.layer.retain(|other| {
                !other.path.starts_with(&inside) && !other.link.starts_with(&inside)
            });
            self.own.retain(|other| !other.starts_with(&inside));
        }
        let mut parent = path.as_slice();
        while let Some(slash) = parent.iter().rposition(|letter| *letter == b'/') {
            parent = &parent[..slash];
            self.tree.entry(parent.to_vec()).or_insert(Kind::Directory);
            self.own.insert(parent.to_vec());
        }
        self.tree.insert(path.clone(), member.kind);
        self.own.insert(path);
        self.layer.push(member);
    }

    /// Returns whether the layer can contain a member of this kind at the path. A builder does not
    /// write two files of different kinds to one path.
    fn is_free(&self, path: &Path, kind: Kind) -> bool {
        let same = self.tree.get(path) == Some(&kind);
        let is_target = |member: &Member| member.link == *path && member.kind == Kind::HardLink;
        let removed = |member: &Member| {
            matches!(member.kind, Kind::Whiteout) && (path.starts_with(&member.path))
        };
        (!self.own.contains(path) || kind == Kind::Directory && same)
            && !self
                .layer
                .iter()
                .any(|member| is_target(member) || removed(member))
    }

    fn directory(&mut self) {
        let Some(path) = self.path() else { return };
        if self.is_free(&path, Kind::Directory) {
            let mut member = self.member(Kind::Directory, path);
            self.xattrs(&mut member);
            self.add(member);
        }
    }

    fn other(&mut self) {
        let Some(path) = self.path() else { return };
        let kinds = [
            Kind::File,
            Kind::File,
            Kind::File,
            Kind::File,
            Kind::Link,
            Kind::Link,
            Kind::Character,
            Kind::Block,
            Kind::Fifo,
        ];
        let kind = self.dice.pick(&kinds);
        if !self.is_free(&path, kind) {
            return;
        }
        let mut member = self.member(kind, path);
        match kind {
            Kind::File => {
                let length = self.dice.pick(&[0, 1, 511, 512, 513, 5000]);
                member.content = vec![b'0' + self.dice.below(10) as u8; length];
                self.xattrs(&mut member);
            }
            Kind::Link => {
                let long = "l".repeat(180);
                let targets = [
                    "a",
                    "../b",
                    "/etc/passwd",
                    "missing",
                    ".",
                    "/",
                    "\u{fc}",
                    &long,
                ];
                member.link = self.dice.pick(&targets).as_bytes().to_vec();
            }
            Kind::Character | Kind::Block => {
                member.device =
                    self.dice
                        .pick(&[(1, 3), (7, 0), (0, 5), (255, 255), (259, 70_000)]);
            }
            _ => {}
        }
        self.add(member);
    }

    fn sparse_file(&mut self) {
        let Some(path) = self.path() else { return };
        if !self.is_free(&path, Kind::File) {
            return;
        }
        let mut member = self.member(Kind::File, path);
        let length = self.dice.pick(&[4096, 100_000, 1 << 20]);
        member.content = vec![0; length];
        let end = length as u64;
        // GNU tar writes only whole blocks of 512 bytes, except at the end of the file.
        let last = (end - 1) / 512 * 512;
        member.pieces = match self.dice.below(3) {
            0 => vec![(end, 0)],
            1 => vec![(512, 512), (end, 0)],
            _ => vec![(0, 512), (2048, 1024), (last, end - last)],
        };
        for (start, count) in &member.pieces {
            member.content[*start as usize..(start + count) as usize].fill(b'x');
        }
        self.add(member);
    }

    fn hard_link(&mut self) {
        // If several files have the same path, the link gets the attributes of the last one.
        let all = self.layer.iter().filter(|member| member.kind == Kind::File);
        let files: BTreeMap<Path, Member> =
            all.map(|file| (file.path.clone(), file.clone())).collect();
        let files: Vec<Member> = files.into_values().collect();
        let Some(path) = self.path().filter(|_| !files.is_empty()) else {
            return;
        };
        let inside = [path.as_slice(), b"/"].concat();
        let target = &files[self.dice.below(files.len() as u64) as usize];
        if self.is_free(&path, Kind::HardLink)
            && !target.path.starts_with(&inside)
            && target.path != path
        {
            let mut member = target.clone();
            member.kind = Kind::HardLink;
            member.link = std::mem::replace(&mut member.path, path);
            member.content = Vec::new();
            member.pieces = Vec::new();
            member.xattrs = Vec::new();
            self.add(member);
        }
    }

    /// Writes a file of the layer again, with other content.
    fn duplicate(&mut self) {
        let at = self.dice.below(self.layer.len().max(1) as u64) as usize;
        let Some(mut member) = self.layer.get(at).cloned() else {
            return;
        };
        let is_target = self.layer.iter().any(|other| other.link == member.path);
        if member.kind == Kind::File && !is_target && member.pieces.is_empty() {
            member.content.push(b'+');
            member.mode = 0o640;
            self.layer.push(member);
        }
    }

    /// Returns a path that only the layers below contain.
    fn lower(&mut self) -> Option<(Path, Kind)> {
        let own = &self.own;
        let is_lower = |path: &Path| {
            let inside = [path.as_slice(), b"/"].concat();
            !own.contains(path) && !own.iter().any(|other| other.starts_with(&inside))
        };
        let all: Vec<(Path, Kind)> = self
            .tree
            .iter()
            .filter(|(path, _)| is_lower(path))
            .map(|(path, kind)| (path.clone(), *kind))
            .collect();
        let at = self.dice.below(all.len().max(1) as u64) as usize;
        all.get(at).cloned()
    }

    fn remove(&mut self) {
        let Some((path, _)) = self.lower() else {
            return;
        };
        let member = self.member(Kind::Whiteout, path.clone());
        self.add(member);
        self.tree.remove(&path);
    }

    fn empty_directory(&mut self) {
        let Some((path, Kind::Directory)) = self.lower() else {
            return;
        };
        let inside = [path.as_slice(), b"/"].concat();
        let directory = self.member(Kind::Directory, path.clone());
        let opaque = self.member(Kind::Opaque, path);
        self.add(directory);
        self.tree.retain(|other, _| !other.starts_with(&inside));
        self.layer.push(opaque);
    }
}

impl Member {
    /// Returns the member in a line for error messages.
    pub(crate) fn described(&self) -> String {
        let (uid, gid) = self.owner;
        format!(
            "{:?} {} {} mode {:o} owner {uid}:{gid} {:?} {} bytes {:?}",
            self.kind,
            self.path.escape_ascii(),
            self.link.escape_ascii(),
            self.mode,
            self.time,
            self.content.len(),
            self.xattrs,
        )
    }

    /// Returns the path in the archive.
    fn name(&self) -> Path {
        let slash = self.path.iter().rposition(|letter| *letter == b'/');
        let (directory, last) = self.path.split_at(slash.map_or(0, |slash| slash + 1));
        match self.kind {
            Kind::Whiteout => [directory, b".wh.", last].concat(),
            Kind::Opaque => [&self.path, b"/.wh..wh..opq".as_slice()].concat(),
            Kind::Directory => [&self.path, b"/".as_slice()].concat(),
            _ => self.path.clone(),
        }
    }

    fn flag(&self) -> u8 {
        match self.kind {
            Kind::HardLink => b'1',
            Kind::Link => b'2',
            Kind::Character => b'3',
            Kind::Block => b'4',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
            Kind::File | Kind::Whiteout | Kind::Opaque => b'0',
        }
    }

    /// Returns the map of a sparse file in the format 1.0 of GNU tar, and the data.
    fn sparse_content(&self) -> Vec<u8> {
        let mut content = format!("{}\n", self.pieces.len());
        for (start, length) in &self.pieces {
            content += &format!("{start}\n{length}\n");
        }
        let mut content = content.into_bytes();
        content.resize(content.len().next_multiple_of(512), 0);
        for (start, length) in &self.pieces {
            content.extend(&self.content[*start as usize..(start + length) as usize]);
        }
        content
    }

    /// Adds the member to an archive. `prefix` is empty or `./`. If `pax` is true, or if the format
    /// of GNU tar lacks a field for an attribute, the member has a pax header.
    fn write(&self, mut archive: Archive, prefix: &[u8], pax: bool) -> Archive {
        let name = [prefix, &self.name()].concat();
        let link = match self.kind {
            Kind::HardLink => [prefix, &self.link].concat(),
            _ => self.link.clone(),
        };
        let mut records = self.records(&name);
        let ustar = pax || !records.is_empty();
        let (mut uid, mut gid) = self.owner;
        if ustar {
            // The field of the header has seven octal digits.
            for (key, id) in [("uid", &mut uid), ("gid", &mut gid)] {
                if *id > 0o777_7777 {
                    records.push((key.to_owned(), id.to_string().into_bytes()));
                    *id = 0;
                }
            }
            if name.len() > 100 && self.pieces.is_empty() {
                records.push(("path".to_owned(), name.clone()));
            }
            if link.len() > 100 {
                records.push(("linkpath".to_owned(), link.clone()));
            }
            let all = records
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_slice()));
            let all: Vec<(&str, &[u8])> = all.collect();
            if !all.is_empty() {
                archive = archive.pax(&all);
            }
        } else {
            for (kind, long) in [(b'L', &name), (b'K', &link)] {
                if long.len() > 100 {
                    archive = archive.gnu_long(kind, long);
                }
            }
        }
        let sparse = self.sparse_content();
        archive.item(&Item {
            path: &name,
            kind: self.flag(),
            link: &link,
            mode: self.mode,
            uid,
            gid,
            mtime: if let Time::Header(time) = self.time {
                time
            } else {
                0
            },
            device: self.device,
            content: if self.pieces.is_empty() {
                &self.content
            } else {
                &sparse
            },
            ustar,
        })
    }

    /// Returns the pax records of the attributes for which no header has a field.
    fn records(&self, name: &[u8]) -> Vec<(String, Vec<u8>)> {
        let mut records: Vec<(String, Vec<u8>)> = self
            .xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.clone()))
            .collect();
        if let Time::Pax(time) = &self.time {
            records.push(("mtime".to_owned(), time.clone().into_bytes()));
        }
        if !self.pieces.is_empty() {
            let length = self.content.len().to_string().into_bytes();
            let one = |name: &str, value: &[u8]| (format!("GNU.sparse.{name}"), value.to_vec());
            records.extend([
                one("major", b"1"),
                one("minor", b"0"),
                one("name", name),
                one("realsize", &length),
            ]);
        }
        records
    }
}

/// Returns the tar archive of a layer.
pub(crate) fn archive(dice: &mut Dice, layer: &Layer) -> Vec<u8> {
    let prefix: &[u8] = if dice.one_in(3) { b"./" } else { b"" };
    let pax = dice.one_in(2);
    let mut archive = Archive::new();
    for member in layer {
        let prefix = if member.path.is_empty() { b"." } else { prefix };
        archive = member.write(archive, prefix, pax);
    }
    archive.end()
}
