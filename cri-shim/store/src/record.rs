//! Serialisation of CRI messages inside the store's JSON. A message is stored as its protobuf bytes
//! in hexadecimal. A record therefore also keeps the fields of a message that this version does not
//! read.

use prost::Message;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serializer};

pub fn serialize<M: Message, S: Serializer>(message: &M, to: S) -> Result<S::Ok, S::Error> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let bytes = message.encode_to_vec();
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from(DIGITS[usize::from(nibble)]));
        }
    }
    to.serialize_str(&text)
}

pub fn deserialize<'de, M: Message + Default, D: Deserializer<'de>>(
    from: D,
) -> Result<M, D::Error> {
    let text = String::deserialize(from)?;
    let mut bytes = Vec::with_capacity(text.len() / 2);
    for pair in text.as_bytes().chunks(2) {
        let byte = std::str::from_utf8(pair)
            .ok()
            .filter(|pair| pair.len() == 2)
            .and_then(|pair| u8::from_str_radix(pair, 16).ok())
            .ok_or_else(|| D::Error::custom("the text is not hexadecimal"))?;
        bytes.push(byte);
    }
    M::decode(bytes.as_slice()).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::PodSandboxConfig;
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    struct Holder {
        #[serde(with = "super")]
        config: PodSandboxConfig,
    }

    #[test]
    fn a_message_survives_serialisation_unchanged() -> Result<(), serde_json::Error> {
        let config = PodSandboxConfig {
            hostname: "näme".into(),
            ..Default::default()
        };
        let json = serde_json::to_string(&Holder {
            config: config.clone(),
        })?;
        assert_eq!(serde_json::from_str::<Holder>(&json)?.config, config);
        assert!(serde_json::from_str::<Holder>(r#"{"config":"0"}"#).is_err());
        Ok(())
    }
}
