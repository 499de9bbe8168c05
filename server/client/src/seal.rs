//! Owns the check of an answer against the server's own account of it.
//!
//! Invariant: an answer counts as verified only if a seal came and both its parts hold.

use sha2::{Digest, Sha256};

use crate::chat::{Seal, StreamEvent};
use crate::error::ClientError;

/// Whether a whole answer was checked against its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verified {
    /// The text is the one that the server sent, to the byte.
    Yes,
    /// The server gives no hash: that the stream said `[DONE]` is all there is.
    No,
}

/// What was received so far.
#[derive(Debug, Default)]
pub(crate) struct SealCheck {
    text: Sha256,
    completion_tokens: Option<u64>,
    seal: Option<Seal>,
}

impl SealCheck {
    /// Takes note of the next event.
    pub(crate) fn take(&mut self, event: &StreamEvent) {
        match event {
            StreamEvent::Delta(text) => self.text.update(text),
            StreamEvent::Usage(usage) => self.completion_tokens = Some(usage.completion_tokens),
            StreamEvent::Seal(seal) => self.seal = Some(seal.clone()),
            _ => {}
        }
    }

    /// Compares; to be called when the stream said that it is whole.
    pub(crate) fn verify(&self) -> Result<Verified, ClientError> {
        let Some(seal) = &self.seal else { return Ok(Verified::No) };
        let digest = self.text.clone().finalize();
        let text_sha256: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        if !text_sha256.eq_ignore_ascii_case(&seal.text_sha256) {
            return Err(ClientError::HashMismatch {
                what: "text_sha256",
                received: text_sha256,
                sealed: seal.text_sha256.clone(),
            });
        }
        match self.completion_tokens {
            Some(count) if count != seal.completion_tokens => Err(ClientError::HashMismatch {
                what: "completion_tokens",
                received: count.to_string(),
                sealed: seal.completion_tokens.to_string(),
            }),
            _ => Ok(Verified::Yes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::Usage;

    /// Of `a你`.
    const SHA256: &str = "cf1dbc74a990715d08c2cab73e28bb25914ade1b258faefc19317b283fb16654";

    fn check(parts: &[&str], seal: Option<(u64, &str)>, tokens: Option<u64>) -> Result<Verified, String> {
        let mut check = SealCheck::default();
        parts.iter().for_each(|part| check.take(&StreamEvent::Delta((*part).to_owned())));
        if let Some((completion_tokens, sha256)) = seal {
            check.take(&StreamEvent::Seal(Seal { completion_tokens, text_sha256: sha256.to_owned() }));
        }
        if let Some(completion_tokens) = tokens {
            check.take(&StreamEvent::Usage(Usage { completion_tokens, ..Usage::default() }));
        }
        check.verify().map_err(|error| error.to_string())
    }

    #[test]
    fn text_and_tokens_must_both_hold() {
        assert_eq!(check(&["a", "你"], Some((2, SHA256)), Some(2)), Ok(Verified::Yes));
        assert_eq!(check(&["a你"], Some((2, &SHA256.to_uppercase())), None), Ok(Verified::Yes));
        let twice = check(&["a", "a", "你"], Some((2, SHA256)), Some(2)).expect_err("a delta came twice");
        assert!(twice.contains("text_sha256") && twice.contains(SHA256), "{twice}");
        let count = check(&["a你"], Some((3, SHA256)), Some(2)).expect_err("a token is missing");
        assert!(count.ends_with("completion_tokens: 2 was received, 3 was sent"), "{count}");
        assert_eq!(check(&["a"], None, Some(1)), Ok(Verified::No));
    }
}
