//! Estimates how many bytes of the disk a tree of files needs.

/// File systems allocate whole blocks of this size.
const BLOCK: u64 = 4096;

/// The number of bytes up to which file systems store the target of a symbolic link in its inode.
/// Ext4 has the lowest number of the common file systems.
const LINK_IN_INODE: usize = 59;

/// The number of bytes up to which file systems store extended attributes in the file's inode. An
/// inode of ext4 with 256 bytes has the least space.
const XATTRS_IN_INODE: u64 = 80;

/// The bytes of an extended attribute in addition to its name and value, and the bytes of a
/// directory's entry in addition to the file's name (ext4).
const XATTR_HEAD: u64 = 16;
const NAME_HEAD: u64 = 8;

/// The estimated size of a tree on the disk. Inodes themselves do not count.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskUse {
    blocks: u64,
    /// The bytes of all entries of directories.
    names: u64,
}

impl DiskUse {
    /// Adds `bytes` of a file's content. The bytes must follow each other in the file.
    pub fn add_content(&mut self, bytes: u64) {
        let blocks = bytes.div_ceil(BLOCK).saturating_mul(BLOCK);
        self.blocks = self.blocks.saturating_add(blocks);
    }

    /// Adds an empty directory.
    pub fn add_directory(&mut self) {
        self.add_content(BLOCK);
    }

    /// Adds the target of a symbolic link.
    pub fn add_link(&mut self, target: &[u8]) {
        if target.len() > LINK_IN_INODE {
            self.add_content(target.len() as u64);
        }
    }

    /// Adds the extended attributes of one file. Each item has the length of a name and of its
    /// value.
    pub fn add_xattrs(&mut self, lengths: impl Iterator<Item = (usize, usize)>) {
        let bytes = lengths.fold(0_u64, |bytes, (name, value)| {
            bytes.saturating_add(XATTR_HEAD + name as u64 + value as u64)
        });
        if bytes > XATTRS_IN_INODE {
            self.add_content(bytes);
        }
    }

    /// Adds a name of a file to its directory.
    pub fn add_name(&mut self, name: &[u8]) {
        self.names = self.names.saturating_add(NAME_HEAD + name.len() as u64);
    }

    pub fn bytes(&self) -> u64 {
        // The first block of each directory already counts, so only whole blocks of names are
        // added.
        self.blocks.saturating_add(self.names / BLOCK * BLOCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_outside_of_inodes_counts_in_whole_blocks() {
        let mut used = DiskUse::default();
        used.add_link(&[b'x'; LINK_IN_INODE]);
        used.add_xattrs([("security.capability".len(), 20)].into_iter());
        used.add_name(b"file");
        used.add_content(0);
        assert_eq!(used.bytes(), 0);
        used.add_link(&[b'x'; LINK_IN_INODE + 1]);
        assert_eq!(used.bytes(), BLOCK);
        used.add_xattrs([(10, 4000), (10, 100)].into_iter());
        assert_eq!(used.bytes(), 3 * BLOCK);
        used.add_directory();
        used.add_content(1);
        assert_eq!(used.bytes(), 5 * BLOCK);
        for _ in 0..16 {
            used.add_name(&[b'x'; 255]);
        }
        assert_eq!(used.bytes(), 6 * BLOCK);
        used.add_content(u64::MAX);
        assert_eq!(used.bytes(), u64::MAX);
    }
}
