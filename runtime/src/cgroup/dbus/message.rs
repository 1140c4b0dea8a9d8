//! D-Bus messages: encodes method calls, and parses the messages that rrun receives. The D-Bus
//! Specification, "Message Protocol", defines the wire format.

const CALL: u8 = 1;
pub(super) const RETURN: u8 = 2;
pub(super) const ERROR: u8 = 3;
pub(super) const SIGNAL: u8 = 4;

/// The value of a unit's property, with the D-Bus type of the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BusValue {
    Bool(bool),
    I32(i32),
    U32(u32),
    I64(i64),
    U64(u64),
    Text(String),
    Texts(Vec<String>),
    Bytes(Vec<u8>),
    U32s(Vec<u32>),
    Pairs(Vec<(String, String)>),
    Rates(Vec<(String, u64)>),
}

pub(crate) type Property = (String, BusValue);

impl BusValue {
    fn signature(&self) -> &'static str {
        match self {
            BusValue::Bool(_) => "b",
            BusValue::I32(_) => "i",
            BusValue::U32(_) => "u",
            BusValue::I64(_) => "x",
            BusValue::U64(_) => "t",
            BusValue::Text(_) => "s",
            BusValue::Texts(_) => "as",
            BusValue::Bytes(_) => "ay",
            BusValue::U32s(_) => "au",
            BusValue::Pairs(_) => "a(ss)",
            BusValue::Rates(_) => "a(st)",
        }
    }
}

/// The bytes of a D-Bus message that is being built, in little-endian order.
#[derive(Default)]
pub(super) struct MessageWriter(pub(super) Vec<u8>);

impl MessageWriter {
    pub(super) fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.align(8);
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn text(&mut self, text: &str) {
        self.u32(text.len() as u32);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.0.push(text.len() as u8);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// Appends an array. The length in front of the array does not include the padding before the
    /// array's first element.
    fn array<T>(&mut self, items: &[T], alignment: usize, put: impl Fn(&mut MessageWriter, &T)) {
        self.u32(0);
        let length_at = self.0.len() - 4;
        self.align(alignment);
        let start = self.0.len();
        for item in items {
            put(self, item);
        }
        let length = (self.0.len() - start) as u32;
        if let Some(place) = self.0.get_mut(length_at..length_at + 4) {
            place.copy_from_slice(&length.to_le_bytes());
        }
    }

    fn variant(&mut self, value: &BusValue) {
        self.signature(value.signature());
        match value {
            BusValue::Bool(value) => self.u32(u32::from(*value)),
            BusValue::I32(value) => self.u32(*value as u32),
            BusValue::U32(value) => self.u32(*value),
            BusValue::I64(value) => self.u64(*value as u64),
            BusValue::U64(value) => self.u64(*value),
            BusValue::Text(text) => self.text(text),
            BusValue::Texts(all) => self.array(all, 4, |writer, text| writer.text(text)),
            BusValue::Bytes(all) => self.array(all, 1, |writer, byte| writer.0.push(*byte)),
            BusValue::U32s(all) => self.array(all, 4, |writer, value| writer.u32(*value)),
            BusValue::Pairs(all) => self.array(all, 8, |writer, (first, second)| {
                writer.align(8);
                writer.text(first);
                writer.text(second);
            }),
            BusValue::Rates(all) => self.array(all, 8, |writer, (first, second)| {
                writer.align(8);
                writer.text(first);
                writer.u64(*second);
            }),
        }
    }
}

/// The arguments of a D-Bus method call.
#[derive(Default)]
pub(crate) struct Body {
    writer: MessageWriter,
    signature: String,
}

impl Body {
    pub(crate) fn text(mut self, text: &str) -> Body {
        self.signature.push('s');
        self.writer.text(text);
        self
    }

    pub(crate) fn flag(mut self, value: bool) -> Body {
        self.signature.push('b');
        self.writer.u32(u32::from(value));
        self
    }

    pub(crate) fn properties(mut self, properties: &[Property]) -> Body {
        self.signature.push_str("a(sv)");
        self.writer.array(properties, 8, |writer, (name, value)| {
            writer.align(8);
            writer.text(name);
            writer.variant(value);
        });
        self
    }

    /// Appends an empty list for the auxiliary units that StartTransientUnit can create.
    pub(crate) fn no_units(mut self) -> Body {
        self.signature.push_str("a(sa(sv))");
        self.writer.array::<()>(&[], 8, |_, ()| {});
        self
    }

    /// Returns the message that calls `method` with these arguments. The other arguments of this
    /// function are the serial number of the message, and the destination, path and interface of the
    /// object.
    pub(super) fn into_call(
        self,
        serial: u32,
        (destination, path, interface): (&str, &str, &str),
        method: &str,
    ) -> Vec<u8> {
        let mut message = MessageWriter(vec![b'l', CALL, 0, 1]);
        message.u32(self.writer.0.len() as u32);
        message.u32(serial);
        let fields: [(u8, &str, &str); 5] = [
            (1, "o", path),
            (2, "s", interface),
            (3, "s", method),
            (6, "s", destination),
            (8, "g", &self.signature),
        ];
        let used = if self.signature.is_empty() { 4 } else { 5 };
        message.array(
            fields.get(..used).unwrap_or_default(),
            8,
            |writer, (code, kind, text)| {
                writer.align(8);
                writer.0.push(*code);
                writer.signature(kind);
                match *kind {
                    "g" => writer.signature(text),
                    _ => writer.text(text),
                }
            },
        );
        message.align(8);
        message.0.extend(&self.writer.0);
        message.0
    }
}

/// A reader of the bytes of a received D-Bus message. The methods of the reader return `None` if
/// the bytes end too early.
pub(super) struct MessageReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> MessageReader<'a> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(length)?)?;
        self.at += length;
        Some(taken)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.align(4);
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub(super) fn text(&mut self) -> Option<&'a str> {
        let length = self.u32()? as usize;
        let text = std::str::from_utf8(self.take(length)?).ok()?;
        self.take(1)?;
        Some(text)
    }

    pub(super) fn signature(&mut self) -> Option<&'a str> {
        let length = *self.take(1)?.first()? as usize;
        let text = std::str::from_utf8(self.take(length)?).ok()?;
        self.take(1)?;
        Some(text)
    }
}

/// A received D-Bus message, reduced to the parts that rrun uses.
pub(super) struct BusMessage {
    pub(super) kind: u8,
    pub(super) reply_to: u32,
    pub(super) member: String,
    pub(super) error: String,
    /// The unique name of the sender on the message bus. Empty on systemd's private socket.
    pub(super) sender: String,
    body: Vec<u8>,
}

impl BusMessage {
    pub(super) fn parse(header: &[u8], fields: &[u8], body: Vec<u8>) -> Option<BusMessage> {
        let mut message = BusMessage {
            kind: *header.get(1)?,
            reply_to: 0,
            member: String::new(),
            error: String::new(),
            sender: String::new(),
            body,
        };
        let mut reader = MessageReader {
            bytes: fields,
            at: 0,
        };
        while reader.at < fields.len() {
            // Each header field begins at a multiple of eight bytes within the message.
            reader.align(8);
            let code = *reader.take(1)?.first()?;
            match (code, reader.signature()?) {
                (3, "s") => message.member = reader.text()?.to_owned(),
                (4, "s") => message.error = reader.text()?.to_owned(),
                (7, "s") => message.sender = reader.text()?.to_owned(),
                (5, "u") => message.reply_to = reader.u32()?,
                (_, "s" | "o") => {
                    reader.text()?;
                }
                (_, "g") => {
                    reader.signature()?;
                }
                (_, "u") => {
                    reader.u32()?;
                }
                _ => return None,
            }
        }
        Some(message)
    }

    pub(super) fn reader(&self) -> MessageReader<'_> {
        MessageReader {
            bytes: &self.body,
            at: 0,
        }
    }

    /// Returns the first argument in the message's body, if the argument is a string or an object
    /// path.
    pub(super) fn first_text(&self) -> Option<String> {
        self.reader().text().map(str::to_owned)
    }
}

/// Parses `input` as a D-Bus message: sixteen bytes of the fixed header, one byte with the length of
/// the header fields, and the fields and the body.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz_message(input: &[u8]) {
    let (Some(header), Some(length), Some(rest)) =
        (input.get(..16), input.get(16), input.get(17..))
    else {
        return;
    };
    let (fields, body) = rest.split_at(usize::from(*length).min(rest.len()));
    if let Some(message) = BusMessage::parse(header, fields, body.to_vec()) {
        let _ = message.first_text();
        let mut reader = message.reader();
        while reader.signature().is_some() && reader.text().is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_encoded_as_the_specification_requires() {
        let body = Body::default()
            .text("a")
            .flag(true)
            .properties(&[("B".to_owned(), BusValue::Rates(vec![("/x".to_owned(), 7)]))]);
        assert_eq!(body.signature, "sba(sv)");
        let expected: &[u8] = &[
            1, 0, 0, 0, b'a', 0, 0, 0, // "a", padded to a multiple of four bytes
            1, 0, 0, 0, // true
            40, 0, 0, 0, // the length of the array in bytes
            1, 0, 0, 0, b'B', 0, // the property's name
            5, b'a', b'(', b's', b't', b')', 0, // its type
            0, 0, 0, // padding to a multiple of four bytes
            16, 0, 0, 0, 0, 0, 0, 0, // the length of the inner array, padded to eight bytes
            2, 0, 0, 0, b'/', b'x', 0, 0, // the path
            7, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(body.writer.0, expected);
    }

    #[test]
    fn messages_that_end_early_or_have_a_wrong_length_are_rejected() {
        let mut fields = MessageWriter::default();
        fields.0.extend([5, 1, b'u', 0]);
        fields.u32(9);
        fields.align(8);
        fields.0.extend([4, 1, b's', 0]);
        fields.text("org.freedesktop.systemd1.NoSuchUnit");
        let mut body = MessageWriter::default();
        body.text("Unit x.scope not loaded.");
        let message = BusMessage::parse(&[b'l', ERROR], &fields.0, body.0.clone()).unwrap();
        assert_eq!(message.reply_to, 9);
        assert_eq!(message.error, "org.freedesktop.systemd1.NoSuchUnit");
        assert_eq!(
            message.first_text().as_deref(),
            Some("Unit x.scope not loaded.")
        );
        for length in 1..fields.0.len() {
            // Parsing must succeed if `length` is the end of a field, and fail if `length` is
            // inside a field.
            let cut = &fields.0[..length];
            let parsed = BusMessage::parse(&[b'l', ERROR], cut, Vec::new());
            assert_eq!(parsed.is_some(), length == 8, "{length}");
        }
        body.0[0] = 200;
        let wrong = BusMessage::parse(&[b'l', ERROR], &[], body.0).unwrap();
        assert_eq!(wrong.first_text(), None);
    }
}
