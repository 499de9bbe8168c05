//! Owns the seam to where replies are found again: by their own name, or by the client's key.
//!
//! Invariant: a reply is found only by the owner who made it. Must not know how or where replies are
//! kept: one process keeps them in memory; replicas may share them.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::reply_stream::ReplyStream;

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

/// Whose a reply is: a hash of the API key, so that logs and replicas never see the key itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner([u8; 32]);

impl Owner {
    /// Everybody, where no key is asked for.
    pub const ANYBODY: Self = Self([0; 32]);

    /// Who holds this key.
    pub fn of(api_key: &str) -> Self {
        Self(Sha256::digest(api_key).into())
    }

    /// The hash.
    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
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

/// What became of a reply that was to be registered.
#[derive(Debug)]
pub enum Registered {
    /// It is new, and somebody has to start it.
    New(Arc<ReplyStream>),
    /// Its key names this one already.
    Existing(Arc<ReplyStream>),
}

/// Where replies are found again. Calls are short and never wait.
pub trait StreamStore: fmt::Debug + Send + Sync {
    /// Registers a reply, unless its owner's key names one already: of two at once, one is new. See
    /// [`ReplyStream::gives_key_up`].
    fn register(&self, stream: ReplyStream) -> Registered;

    /// A reply was refused before it started: nobody finds it any more, and its key is free. Who found it already
    /// hears of the refusal from its log.
    fn withdraw(&self, stream: &Arc<ReplyStream>);

    /// Whether a client may be told to fetch this running reply later. If so, it goes on without a reader until
    /// its own time limits, and its end is kept before others of the same client.
    fn promise(&self, stream: &Arc<ReplyStream>) -> bool;

    /// The reply of this name, if it is this owner's.
    fn find(&self, owner: Owner, id: &StreamId) -> Option<Arc<ReplyStream>>;

    /// The reply that this owner's key names.
    fn find_key(&self, owner: Owner, key: &str) -> Option<Arc<ReplyStream>>;

    /// The last reader of a reply that goes on has left, or the first has come back.
    fn set_detached(&self, stream: &Arc<ReplyStream>, is_detached: bool);

    /// A reply has ended: from now on it is kept for the retention time, or not at all.
    fn ended(&self, stream: &Arc<ReplyStream>);

    /// Forgets what nobody may ask for any more.
    fn sweep(&self);
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
