//! One layer's way from the registry to its directory.
//!
//! The network's side is a future; decompression, hashing and unpacking have a thread of their
//! own, with a short queue between the two, so that a slow disk slows the sender down instead of
//! filling memory.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};

use super::catalog::{Layer, directory};
use super::error::{ImageError, Kind};
use super::source::Source;
use crate::layer::{self, Bounds, LayerError, Promise, Unpacked};

/// Chunks on their way to the thread. The HTTP client makes them up to 400 KiB.
const QUEUE: usize = 8;

/// A layer that has just been unpacked.
#[derive(Clone, Debug)]
pub struct Fetched {
    pub layer: Layer,
    pub implied: Vec<Vec<u8>>,
}

/// Fetches, verifies and unpacks one layer into `layers/NUMBER`. Dropped before its end, it
/// leaves nothing; after it the layer is the caller's.
pub async fn fetch(
    source: Arc<Source>,
    root: PathBuf,
    number: u64,
    promise: Promise,
    bounds: Bounds,
    progress: impl Fn(u64),
) -> Result<Fetched, ImageError> {
    let (to_thread, chunks) = mpsc::channel(QUEUE);
    let (done, unpacked) = oneshot::channel();
    let for_thread = promise.clone();
    std::thread::Builder::new()
        .name(format!("layer-{number}"))
        .stack_size(512 << 10)
        .spawn(move || {
            // If nobody waits any more the answer is dropped, and the layer removed with it.
            let _ = done.send(receive(chunks, &root, number, &for_thread, &bounds));
        })
        .map_err(|error| {
            ImageError::new(
                Kind::Internal,
                format!("start a thread for a layer: {error}"),
            )
        })?;
    let sent = source
        .blob(&promise.digest, promise.size, &to_thread, progress)
        .await;
    drop(to_thread);
    let unpacked = unpacked.await.unwrap_or_else(|_| {
        Err(LayerError::Stream(io::Error::other(
            "the thread that unpacked it ended",
        )))
    });
    let named = |error: ImageError| error.context(format_args!("layer {}", promise.digest));
    match (sent, unpacked) {
        (Ok(()), Ok(placed)) => {
            let unpacked = placed.keep();
            Ok(Fetched {
                layer: Layer {
                    number,
                    bytes: unpacked.bytes,
                    inodes: unpacked.inodes,
                    opaque_root: unpacked.opaque_root,
                },
                implied: unpacked.implied,
            })
        }
        // What broke on this side stopped the sending, not the other way round.
        (_, Err(error @ (LayerError::System { .. } | LayerError::Bound(_)))) => {
            Err(named(error.into()))
        }
        (Err(error), _) => Err(named(error)),
        (_, Err(error)) => Err(named(error.into())),
    }
}

fn receive(
    chunks: mpsc::Receiver<Bytes>,
    root: &Path,
    number: u64,
    promise: &Promise,
    bounds: &Bounds,
) -> Result<Placed, LayerError> {
    let ingest = root.join("ingest").join(number.to_string());
    let fail = |what: &str, error: io::Error| LayerError::System {
        what: format!("{what} {}", ingest.display()),
        errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
    };
    std::fs::create_dir(&ingest).map_err(|error| fail("make the directory", error))?;
    let chunks = Chunks {
        chunks,
        current: Bytes::new(),
    };
    let result = layer::unpack(chunks, &ingest.join("fs"), promise, bounds).and_then(|unpacked| {
        let path = directory(root, number);
        std::fs::rename(&ingest, &path)
            .map_err(|error| fail("move to its place the layer in", error))?;
        Ok(Placed {
            path: Some(path),
            unpacked,
        })
    });
    if result.is_err() {
        remove(&ingest);
    }
    result
}

/// A layer in its place that belongs to nobody yet; it goes when it is dropped.
struct Placed {
    path: Option<PathBuf>,
    unpacked: Unpacked,
}

impl Placed {
    fn keep(mut self) -> Unpacked {
        self.path = None;
        std::mem::take(&mut self.unpacked)
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            // It may be dropped where nothing must block.
            let removal = std::thread::Builder::new().spawn(move || remove(&path));
            if let Err(error) = removal {
                log::warn!("start a thread to remove a layer: {error}");
            }
        }
    }
}

/// Removes a directory that nobody names; what can't be removed now is at the next start.
pub fn remove(path: &Path) {
    if let Err(error) = layer::remove_path(path) {
        log::warn!("remove {}: {}", path.display(), io::Error::from(error));
    }
}

struct Chunks {
    chunks: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.current = chunk,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

impl From<LayerError> for ImageError {
    fn from(error: LayerError) -> Self {
        let kind = match &error {
            LayerError::Stream(error) if error.kind() == io::ErrorKind::Unsupported => {
                Kind::Unimplemented
            }
            LayerError::Stream(_) | LayerError::Malformed(_) | LayerError::Digest(_) => {
                Kind::DataLoss
            }
            LayerError::Bound(_) => Kind::ResourceExhausted,
            LayerError::System {
                errno: Errno::NOSPC | Errno::DQUOT | Errno::FBIG,
                ..
            } => Kind::ResourceExhausted,
            LayerError::System { .. } => Kind::Internal,
        };
        ImageError::new(kind, error.to_string())
    }
}
