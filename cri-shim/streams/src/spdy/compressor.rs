//! The client's side of SPDY's header compression, which only the tests need.

use flate2::{Compress, Compression, FlushCompress};

use super::dictionary::DICTIONARY;

pub(super) struct Compressor(Compress);

impl Compressor {
    pub(super) fn begin() -> Self {
        let mut compress = Compress::new(Compression::best(), true);
        compress.set_dictionary(&DICTIONARY).unwrap();
        Compressor(compress)
    }

    pub(super) fn block(&mut self, pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut plain = (pairs.len() as u32).to_be_bytes().to_vec();
        for (name, value) in pairs {
            for text in [name, value] {
                plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
                plain.extend_from_slice(text.as_bytes());
            }
        }
        self.raw(&plain)
    }

    pub(super) fn raw(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut output = Vec::with_capacity(plain.len() + 1024);
        self.0
            .compress_vec(plain, &mut output, FlushCompress::Sync)
            .unwrap();
        output
    }
}
