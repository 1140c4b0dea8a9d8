//! Response streams of server-streaming methods.

use std::pin::Pin;

use futures_util::stream::{self, Stream};
use tonic::Status;

/// The response stream of a server-streaming method.
pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The number of items in one message of a streamed list.
const ITEMS_PER_MESSAGE: usize = 256;

/// Splits a list into messages with up to [`ITEMS_PER_MESSAGE`] items each.
pub(super) fn in_chunks<T, M>(
    items: Vec<T>,
    message: impl Fn(Vec<T>) -> M + Send + 'static,
) -> Answers<M>
where
    T: Send + 'static,
    M: Send + 'static,
{
    let mut items = items.into_iter();
    let chunks = std::iter::from_fn(move || {
        let chunk: Vec<T> = items.by_ref().take(ITEMS_PER_MESSAGE).collect();
        (!chunk.is_empty()).then(|| Ok(message(chunk)))
    });
    Box::pin(stream::iter(chunks))
}
