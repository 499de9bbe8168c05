//! Owns what a reply is called: by this server, and by the client.

use std::fmt;

/// Random bytes in a stream's name: more than can be guessed.
const ID_BYTES: usize = 20;

/// A stream's name: 160 random bits in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StreamId(String);

impl StreamId {
    /// A new one.
    ///
    /// # Errors
    /// The operating system has no random numbers.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; ID_BYTES];
        getrandom::fill(&mut bytes)?;
        Ok(Self(hex(&bytes)))
    }

    /// One that a client brings; it may name nothing.
    pub fn given(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the client names a request by, and which request it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestKey {
    /// The `Idempotency-Key`.
    pub key: String,
    /// Hash of the request, without how it is delivered.
    pub fingerprint: [u8; 32],
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_long_and_differ() {
        let [a, b] = [StreamId::random().unwrap(), StreamId::random().unwrap()];
        assert_ne!(a, b);
        assert_eq!(a.to_string().len(), 40);
        assert_eq!(StreamId::given(&a.to_string()), a);
    }
}
