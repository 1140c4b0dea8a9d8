//! Response streams of server-streaming methods.

use std::pin::Pin;

use futures_util::stream::{self, Stream};
use tonic::Status;

use crate::report_size::{self, Report};

/// The response stream of a server-streaming method.
pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The maximum number of items in one message of a streamed list.
const ITEMS_PER_MESSAGE: usize = 256;

/// The maximum number of bytes of all items in one message of a streamed list. The author of a pod
/// or image determines the length of some fields. A client of gRPC refuses a message of more than
/// 4 MiB by default, and kubelet refuses a message of more than 16 MiB.
const BYTES_PER_MESSAGE: usize = 2 << 20;

/// Splits a list into messages with at most [`ITEMS_PER_MESSAGE`] items and [`BYTES_PER_MESSAGE`]
/// bytes. An item that needs a longer message is shortened.
pub(super) fn in_chunks<T, M>(
    items: Vec<T>,
    message: impl Fn(Vec<T>) -> M + Send + 'static,
) -> Answers<M>
where
    T: Report + 'static,
    M: Send + 'static,
{
    let shortened = |mut item: T| {
        report_size::limit(&mut item, BYTES_PER_MESSAGE);
        item
    };
    let mut items = items.into_iter().map(shortened).peekable();
    let chunks = std::iter::from_fn(move || {
        let mut chunk = Vec::new();
        let mut bytes: usize = 0;
        while let Some(item) = items.next_if(|item| {
            bytes = bytes.saturating_add(item.encoded_len());
            let fits = chunk.len() < ITEMS_PER_MESSAGE && bytes <= BYTES_PER_MESSAGE;
            fits || chunk.is_empty()
        }) {
            chunk.push(item);
        }
        (!chunk.is_empty()).then(|| Ok(message(chunk)))
    });
    Box::pin(stream::iter(chunks))
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use rrun_proto::v1::Image;

    use super::*;

    #[tokio::test]
    async fn a_message_of_a_list_has_few_items_and_few_bytes() {
        let lengths = |items: Vec<Image>| async {
            let messages = in_chunks(items, |chunk| chunk.len()).collect::<Vec<_>>();
            messages.await.into_iter().flatten().collect::<Vec<_>>()
        };
        assert_eq!(lengths(Vec::new()).await, [0; 0]);
        assert_eq!(lengths(vec![Image::default(); 600]).await, [256, 256, 88]);
        let items = [1, 3 << 20, 1 << 19, 1 << 19, 1 << 20, 1].map(|length| Image {
            id: "x".repeat(length),
            ..Image::default()
        });
        assert_eq!(lengths(items.into()).await, [1, 1, 2, 2]);
    }
}
