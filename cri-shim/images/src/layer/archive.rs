//! Reads tar archives in every format that layers use: old, ustar, GNU and pax.
//!
//! This module uses `tar::Header`, but not `tar::Entry`. `tar::Entry` reads extended headers of any
//! size into memory, and does not support pax sparse files. This module trusts no number in the
//! archive.

use std::io::{self, Read};

use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

use super::error::{ArchiveError, malformed, printable};
use super::pax::{self, EXTENDED_BYTES, Pax, SPARSE_PIECES, decimal};
use rrun_kernel::device_number;

const BLOCK: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Directory,
    Symlink,
    HardLink,
    CharacterDevice,
    BlockDevice,
    Fifo,
}

/// One file, directory or link in the archive. The content of a file is read from the
/// [`TarArchive`]. The caller must read this content before it requests the next entry.
#[derive(Debug)]
pub(crate) struct Entry {
    pub kind: EntryKind,
    /// The unchanged path from the archive. The path can be absolute and need not be UTF-8. The
    /// path never contains a NUL.
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    /// The permission bits, including the set-uid, set-gid and sticky bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// The modification time: seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    /// The major and minor number of a device.
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub content: Content,
}

/// The length of a file, and the parts of the file whose bytes the archive contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Content {
    /// The file's length in bytes.
    pub length: u64,
    /// The (offset, length) pairs of the parts that the archive contains, in ascending order. All
    /// other parts of the file are holes.
    pub pieces: Vec<(u64, u64)>,
}

pub(crate) struct TarArchive<R> {
    reader: R,
    /// The number of unread bytes in the current entry's content.
    body: u64,
    padding: u64,
    global: Pax,
}

/// The values in the extended headers of one entry. The extended headers precede the entry.
struct ExtendedHeaders {
    pax: Pax,
    /// The path from GNU tar's header for long paths (type `L`).
    long_name: Option<Vec<u8>>,
    /// The link target from GNU tar's header for long link targets (type `K`).
    long_link: Option<Vec<u8>>,
}

impl ExtendedHeaders {
    /// Returns the entry's path and, if the entry is a link, the link's target.
    fn names(&self, header: &Header) -> Result<(Vec<u8>, Vec<u8>), ArchiveError> {
        let path = self
            .pax
            .get("GNU.sparse.name")
            .or_else(|| self.pax.get("path"))
            .or(self.long_name.as_deref())
            .map_or_else(|| header.path_bytes().into_owned(), <[u8]>::to_vec);
        let link = self
            .pax
            .get("linkpath")
            .or(self.long_link.as_deref())
            .map(<[u8]>::to_vec)
            .or_else(|| header.link_name_bytes().map(|name| name.into_owned()))
            .unwrap_or_default();
        if path.contains(&0) || link.contains(&0) {
            return malformed("a file name contains a NUL");
        }
        Ok((path, link))
    }
}

impl EntryKind {
    fn of(flag: u8, path: &[u8]) -> Result<Self, ArchiveError> {
        Ok(match flag {
            // In archives older than ustar, a directory has the type flag of a file. Its name ends
            // with a slash.
            b'0' | b'\0' | b'7' | b'S' if path.ends_with(b"/") => EntryKind::Directory,
            b'0' | b'\0' | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharacterDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' | b'D' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => {
                return malformed(format!(
                    "the entry {} has the unknown type {:?}",
                    printable(path),
                    char::from(other)
                ));
            }
        })
    }
}

/// Returns the user or group number of an entry. If the entry has the pax record `name`, the number
/// is in this record. Otherwise, the number is in the header.
fn id(pax: &Pax, name: &str, in_header: Option<u64>, path: &[u8]) -> Result<u32, ArchiveError> {
    // u32::MAX is excluded, because chown(2) interprets it as "do not change".
    match pax
        .number(name, in_header)
        .and_then(|id| u32::try_from(id).ok())
    {
        Some(id) if id != u32::MAX => Ok(id),
        _ => malformed(format!(
            "the entry {} has a {name} that is not a valid user or group number",
            printable(path)
        )),
    }
}

/// Returns the major and minor number of a device.
fn device(header: &Header, path: &[u8]) -> Result<(u32, u32), ArchiveError> {
    let major = header.device_major().ok().flatten().unwrap_or(0);
    let minor = header.device_minor().ok().flatten().unwrap_or(0);
    if !device_number::is_valid(major, minor) {
        return malformed(format!(
            "the entry {} has the device number {major}:{minor}, which no device can have",
            String::from_utf8_lossy(path)
        ));
    }
    Ok((major, minor))
}

impl<R: Read> TarArchive<R> {
    pub(crate) fn new(reader: R) -> Self {
        TarArchive {
            reader,
            body: 0,
            padding: 0,
            global: Pax::default(),
        }
    }

    /// Returns the stream that the archive is read from. Right after a call of
    /// [`TarArchive::next_entry`], the stream is at the beginning of the entry's content.
    pub(crate) fn reader(&self) -> &R {
        &self.reader
    }

    /// Returns the stream that the archive is read from.
    pub(crate) fn into_inner(self) -> R {
        self.reader
    }

    /// Returns the next entry, or `None` at the end of the archive.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let mut extended = ExtendedHeaders {
            pax: Pax::default(),
            long_name: None,
            long_link: None,
        };
        loop {
            let Some(header) = self.next_header()? else {
                return Ok(None);
            };
            let flag = header.as_old().linkflag[0];
            let Some(size) = field(&header.as_old().size, header.entry_size()) else {
                return malformed("the size field of a header is not a number");
            };
            match flag {
                b'x' | b'X' => {
                    let records = self.extended(size)?;
                    extended.pax.parse(&records)?;
                }
                b'g' => {
                    let records = self.extended(size)?;
                    self.global.parse_global(&records)?;
                }
                b'L' => extended.long_name = Some(truncate_at_nul(self.extended(size)?)),
                b'K' => extended.long_link = Some(truncate_at_nul(self.extended(size)?)),
                // Skip the content of a volume label.
                b'V' => self.open_body(size),
                _ => return self.entry(&header, flag, size, extended).map(Some),
            }
        }
    }

    /// Reads from the current entry's content. Returns 0 at the end of the content.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let most = usize::try_from(self.body).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let count = self.reader.read(&mut buffer[..most])?;
        if count == 0 {
            return malformed("the archive ends in the middle of a file");
        }
        self.body -= count as u64;
        Ok(count)
    }

    fn open_body(&mut self, size: u64) {
        self.body = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    fn skip_body(&mut self) -> Result<(), ArchiveError> {
        let mut buffer = [0; 8192];
        while self.read(&mut buffer)? > 0 {}
        self.body = std::mem::take(&mut self.padding);
        while self.read(&mut buffer)? > 0 {}
        Ok(())
    }

    /// Reads the next header block and verifies its checksum.
    fn next_header(&mut self) -> Result<Option<Header>, ArchiveError> {
        self.skip_body()?;
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < BLOCK {
            match self.reader.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return malformed("the archive ends in the middle of a header"),
                count => filled += count,
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum: u32 = block[..148]
            .iter()
            .chain(&block[156..])
            .map(|byte| u32::from(*byte))
            .sum::<u32>()
            + 8 * u32::from(b' ');
        if header.cksum().ok() != Some(sum) {
            return malformed(
                "a header's checksum is wrong: this is not a tar archive, or it is damaged",
            );
        }
        Ok(Some(header))
    }

    /// Reads the content of an extended header.
    fn extended(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > EXTENDED_BYTES {
            return malformed(format!(
                "an extended header has {size} bytes, and the limit is {EXTENDED_BYTES} bytes"
            ));
        }
        self.open_body(size);
        let mut content = Vec::new();
        let mut buffer = [0; 8192];
        loop {
            match self.read(&mut buffer)? {
                0 => return Ok(content),
                count => content.extend_from_slice(&buffer[..count]),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header,
        flag: u8,
        size: u64,
        mut extended: ExtendedHeaders,
    ) -> Result<Entry, ArchiveError> {
        extended.pax = extended.pax.with_global(&self.global);
        let (path, link) = extended.names(header)?;
        let pax = extended.pax;
        let kind = EntryKind::of(flag, &path)?;
        let uid = id(
            &pax,
            "uid",
            field(&header.as_old().uid, header.uid()),
            &path,
        )?;
        let gid = id(
            &pax,
            "gid",
            field(&header.as_old().gid, header.gid()),
            &path,
        )?;
        let Some(stored) = pax.number("size", Some(size)) else {
            return malformed("the size in a pax header is not a number");
        };
        let mtime = pax
            .get("mtime")
            .and_then(pax::time)
            .unwrap_or((header.mtime().map_or(0, u64::cast_signed), 0));
        let device = match kind {
            EntryKind::CharacterDevice | EntryKind::BlockDevice => device(header, &path)?,
            _ => (0, 0),
        };
        let mode = header.mode().unwrap_or(0) & 0o7777;
        let content = self.content(header, flag, kind, &pax, stored)?;
        Ok(Entry {
            kind,
            path,
            link,
            mode,
            uid,
            gid,
            mtime,
            device,
            xattrs: pax.into_xattrs(),
            content,
        })
    }

    /// Prepares to read an entry's content. Returns the length of the entry's file, and the parts
    /// of the file that the archive contains. `stored` is the number of bytes that follow the
    /// entry's header.
    fn content(
        &mut self,
        header: &Header,
        flag: u8,
        kind: EntryKind,
        pax: &Pax,
        stored: u64,
    ) -> Result<Content, ArchiveError> {
        match kind {
            EntryKind::File => {
                // The rest of an old GNU sparse map is stored between the header and the content.
                let old = if flag == b'S' {
                    Some(self.old_sparse(header)?)
                } else {
                    None
                };
                self.open_body(stored);
                let content = match old {
                    Some(content) => content,
                    None => self.pax_sparse(pax, stored)?,
                };
                content.check(self.body)?;
                Ok(content)
            }
            EntryKind::Directory if flag == b'D' => {
                self.open_body(stored);
                Ok(Content::none())
            }
            // Entries of other types have no content. The length in the header of a hard link, for
            // example, is the length of the link's target.
            _ => Ok(Content::none()),
        }
    }

    /// Reads the map of a sparse file in GNU tar's old format. The map is in the header and in the
    /// blocks that follow the header.
    fn old_sparse(&mut self, header: &Header) -> Result<Content, ArchiveError> {
        let Some(gnu) = header.as_gnu() else {
            return malformed("a sparse file's header is not in GNU tar's format");
        };
        let length = gnu
            .real_size()
            .or_else(|_| malformed("a sparse file's size is not a number"))?;
        let mut pieces = Vec::new();
        add_pieces(&mut pieces, &gnu.sparse)?;
        let mut extended = gnu.is_extended();
        while extended {
            let mut block = GnuExtSparseHeader::new();
            self.reader.read_exact(block.as_mut_bytes())?;
            add_pieces(&mut pieces, &block.sparse)?;
            extended = block.is_extended();
        }
        Ok(Content { length, pieces })
    }

    /// Reads the map of a sparse file. GNU tar writes this map into pax archives in one of three
    /// formats (0.0, 0.1 and 1.0). In the format 1.0, the map is at the beginning of the content.
    fn pax_sparse(&mut self, pax: &Pax, stored: u64) -> Result<Content, ArchiveError> {
        let bad = || ArchiveError::Malformed("a sparse file's map can't be read".into());
        let length = match pax
            .get("GNU.sparse.realsize")
            .or_else(|| pax.get("GNU.sparse.size"))
        {
            Some(length) => decimal(length).ok_or_else(bad)?,
            None => {
                return Ok(Content {
                    length: stored,
                    pieces: vec![(0, stored)],
                });
            }
        };
        let numbers: Vec<u64> = if pax.get("GNU.sparse.major") == Some(b"1") {
            let mut read = 0;
            let count = self.map_line(&mut read)?;
            let count = usize::try_from(count).map_err(|_| bad())?;
            if count > SPARSE_PIECES {
                return Err(bad());
            }
            let mut numbers = Vec::new();
            for _ in 0..count * 2 {
                numbers.push(self.map_line(&mut read)?);
            }
            let mut rest = (BLOCK - read % BLOCK) % BLOCK;
            let mut block = [0; BLOCK];
            while rest > 0 {
                match self.read(&mut block[..rest])? {
                    0 => return Err(bad()),
                    count => rest -= count,
                }
            }
            numbers
        } else if let Some(map) = pax.get("GNU.sparse.map") {
            map.split(|byte| *byte == b',')
                .filter(|number| !number.is_empty())
                .map(|number| decimal(number).ok_or_else(bad))
                .collect::<Result<_, _>>()?
        } else {
            pax.sparse.clone()
        };
        let pieces = numbers
            .chunks_exact(2)
            .filter_map(|pair| match pair {
                [_, 0] => None,
                [offset, length] => Some((*offset, *length)),
                _ => None,
            })
            .collect();
        Ok(Content { length, pieces })
    }

    /// Reads one decimal number and its newline from the map at the beginning of a sparse file's
    /// content. Increases `read` by the number of bytes that were read.
    fn map_line(&mut self, read: &mut usize) -> Result<u64, ArchiveError> {
        let mut digits = Vec::new();
        loop {
            let mut byte = [0];
            if self.read(&mut byte)? == 0 || digits.len() > 20 {
                return malformed("a sparse file's map can't be read");
            }
            *read += 1;
            if byte[0] == b'\n' {
                return decimal(&digits).ok_or_else(|| {
                    ArchiveError::Malformed("a sparse file's map can't be read".into())
                });
            }
            digits.push(byte[0]);
        }
    }
}

impl Content {
    fn none() -> Self {
        Content {
            length: 0,
            pieces: Vec::new(),
        }
    }

    /// Returns whether the file has holes or consists of several pieces in the archive.
    pub(crate) fn is_sparse(&self) -> bool {
        self.length > 0 && self.pieces != [(0, self.length)]
    }

    /// Checks that the pieces do not overlap, are inside the file, and have `stored` bytes in
    /// total.
    fn check(&self, stored: u64) -> Result<(), ArchiveError> {
        let mut end = 0;
        let mut sum: u64 = 0;
        for (offset, length) in &self.pieces {
            let next = offset.checked_add(*length);
            match next {
                Some(next) if *offset >= end && next <= self.length => end = next,
                _ => return malformed("a sparse file's pieces overlap or are outside the file"),
            }
            sum = sum.saturating_add(*length);
        }
        if sum != stored {
            return malformed(
                "the sizes of a sparse file's pieces do not add up to the size of its content in the archive",
            );
        }
        Ok(())
    }
}

fn add_pieces(
    pieces: &mut Vec<(u64, u64)>,
    headers: &[GnuSparseHeader],
) -> Result<(), ArchiveError> {
    for header in headers.iter().filter(|header| !header.is_empty()) {
        let (Ok(offset), Ok(length)) = (header.offset(), header.length()) else {
            return malformed("a sparse file's map can't be read");
        };
        if pieces.len() >= SPARSE_PIECES {
            return malformed("a sparse file has too many pieces");
        }
        if length > 0 {
            pieces.push((offset, length));
        }
    }
    Ok(())
}

/// Returns the value of a number field in a header. The value of an empty field is 0.
fn field(raw: &[u8], parsed: io::Result<u64>) -> Option<u64> {
    if raw.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return Some(0);
    }
    parsed.ok()
}

fn truncate_at_nul(mut name: Vec<u8>) -> Vec<u8> {
    if let Some(nul) = name.iter().position(|byte| *byte == 0) {
        name.truncate(nul);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_header_is_verified() {
        let garbage = [b'a'; 1024];
        assert!(TarArchive::new(&garbage[..]).next_entry().is_err());
    }

    /// The eleven octal digits of the size field can only express sizes below 8 GiB. A larger size
    /// is stored as a binary number in the field (GNU tar's "base-256"), or in a pax record.
    #[test]
    fn the_size_of_a_file_of_more_than_8_gib_is_read() -> Result<(), ArchiveError> {
        let size = (9 << 30) + 7;
        let mut binary = Header::new_gnu();
        binary.set_size(size);
        assert_eq!(
            binary.as_old().size[0] & 0x80,
            0x80,
            "the size field does not contain a binary number"
        );
        binary.set_cksum();
        let mut records = Header::new_ustar();
        records.set_entry_type(tar::EntryType::XHeader);
        let text = format!("19 size={size}\n");
        records.set_size(text.len() as u64);
        records.set_cksum();
        let mut plain = Header::new_ustar();
        plain.set_size(0);
        plain.set_cksum();
        let mut pax = records.as_bytes().to_vec();
        pax.extend(text.as_bytes());
        pax.resize(2 * BLOCK, 0);
        pax.extend(plain.as_bytes());
        for archive in [&binary.as_bytes()[..], &pax] {
            let mut archive = TarArchive::new(archive);
            let entry = archive.next_entry()?;
            assert_eq!(entry.map(|entry| entry.content.length), Some(size));
            assert_eq!(archive.body, size);
        }
        Ok(())
    }

    #[test]
    fn a_too_large_extended_header_is_refused() {
        let mut header = Header::new_ustar();
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_size(1 << 40);
        header.set_cksum();
        let error = TarArchive::new(&header.as_bytes()[..]).next_entry();
        assert!(error.is_err_and(|e| e.to_string().contains("extended header")));
    }

    /// In CVE-2025-58183 and CVE-2026-32288 (Go), the map of a sparse file used memory without a
    /// limit. A compressed map of many pieces is small.
    #[test]
    fn a_sparse_file_with_too_many_pieces_is_refused() {
        let mut old = Header::new_gnu();
        old.set_entry_type(tar::EntryType::GNUSparse);
        if let Some(gnu) = old.as_gnu_mut() {
            gnu.isextended = [1];
            gnu.realsize = *b"00000000001\0";
        }
        old.set_cksum();
        let mut block = GnuExtSparseHeader::new();
        block.isextended = [1];
        for piece in &mut block.sparse {
            piece.offset = *b"00000000001\0";
            piece.numbytes = *b"00000000001\0";
        }
        let blocks = SPARSE_PIECES / block.sparse.len() + 1;
        let mut archive = old.as_bytes().to_vec();
        archive.extend(block.as_bytes().repeat(blocks));
        let refused = |archive: &[u8]| match TarArchive::new(archive).next_entry() {
            Ok(_) => "accepted".to_owned(),
            Err(error) => error.to_string(),
        };
        let sentence = refused(&archive);
        assert!(sentence.contains("too many pieces"), "{sentence}");

        let records = "22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.realsize=1\n";
        let mut pax = Header::new_ustar();
        pax.set_entry_type(tar::EntryType::XHeader);
        pax.set_size(records.len() as u64);
        pax.set_cksum();
        let mut plain = Header::new_ustar();
        plain.set_size(BLOCK as u64);
        plain.set_cksum();
        let mut archive = pax.as_bytes().to_vec();
        archive.extend(records.as_bytes());
        archive.resize(2 * BLOCK, 0);
        archive.extend(plain.as_bytes());
        archive.extend(format!("{}\n", SPARSE_PIECES + 1).as_bytes());
        archive.resize(4 * BLOCK, b'\n');
        let sentence = refused(&archive);
        assert!(sentence.contains("map can't be read"), "{sentence}");
    }

    #[test]
    fn a_device_number_that_the_kernel_would_truncate_is_refused() -> io::Result<()> {
        for (major, minor, valid) in [
            (4095, 1_048_575, true),
            (4097, 3, false),
            (1, 1_048_579, false),
        ] {
            let mut header = Header::new_ustar();
            header.set_path("null")?;
            header.set_entry_type(tar::EntryType::Char);
            header.set_size(0);
            header.set_uid(0);
            header.set_gid(0);
            header.set_device_major(major)?;
            header.set_device_minor(minor)?;
            header.set_cksum();
            let entry = TarArchive::new(&header.as_bytes()[..]).next_entry();
            assert_eq!(entry.is_ok(), valid, "{major}:{minor}");
        }
        Ok(())
    }
}
