//! Owns the API keys: how their file is read, and whose a given key is.
//!
//! Invariants: keys are kept as hashes only; comparing takes the same time whichever key is given and however much of
//! it is right; what is wrong with the file is told by line, and never with a key in it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use glm_engine::TenantId;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::principal::{Owner, Principal};

/// Largest share of a key.
const MAX_WEIGHT: u32 = 1000;
/// More than ten thousand long keys.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// What is shorter can be tried out: 16 random characters have about 95 bits.
const SHORT_KEY_BYTES: usize = 16;

struct ApiKey {
    owner: Owner,
    weight: u32,
}

/// The keys that open `/v1`, each a tenant.
pub struct ApiKeys(Vec<ApiKey>);

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({} hidden)", self.0.len())
    }
}

impl ApiKeys {
    /// Reads a key file; see [`Self::parse`].
    ///
    /// # Errors
    /// The file can't be read or is too large, and those of [`Self::parse`].
    pub fn load(path: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(io::Error::other(format!("the file has more than {MAX_FILE_BYTES} bytes")));
        }
        Self::parse(&bytes).map_err(io::Error::other)
    }

    /// Reads one key a line and, after it, `weight=N` if its share is not 1. Spaces and tabs separate words, a word
    /// that starts with `#` starts a comment, and empty lines are skipped.
    ///
    /// # Errors
    /// What is wrong in which line, or that there is no key, which would lock everybody out.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let number = bytes[..error.valid_up_to()].split(|byte| *byte == b'\n').count();
            format!("line {number}: this is not UTF-8 text")
        })?;
        let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
        let mut keys = Vec::new();
        let mut lines = HashMap::new();
        for (number, line) in (1usize..).zip(text.split('\n')) {
            let line = line.strip_suffix('\r').unwrap_or(line);
            let key = parse_line(line).map_err(|message| format!("line {number}: {message}"))?;
            let Some((key, is_short)) = key else { continue };
            if let Some(first) = lines.insert(key.owner, number) {
                return Err(format!("line {number}: the key is the same as in line {first}"));
            }
            if is_short {
                tracing::warn!(
                    line = number,
                    "an API key of fewer than {SHORT_KEY_BYTES} characters is easily guessed"
                );
            }
            keys.push(key);
        }
        if keys.is_empty() {
            return Err("the file has no key".to_owned());
        }
        Ok(Self(keys))
    }

    /// The shares of the tenants.
    pub fn weights(&self) -> Vec<u32> {
        self.0.iter().map(|key| key.weight).collect()
    }

    /// The holder of a key. Its tenant is the key's position in the file.
    pub(crate) fn find(&self, given: &str) -> Option<Principal> {
        let owner = Owner::of(given);
        // No early end: every key is compared.
        let mut found = (Choice::from(0), 0);
        for (tenant, key) in (0u32..).zip(&self.0) {
            let is_it = key.owner.as_bytes().ct_eq(owner.as_bytes());
            found = (found.0 | is_it, u32::conditional_select(&found.1, &tenant, is_it));
        }
        bool::from(found.0).then_some(Principal { owner, tenant: TenantId(found.1) })
    }
}

/// The key of a line, if it has one, and whether it is short. The errors never repeat the line: it has the key.
fn parse_line(line: &str) -> Result<Option<(ApiKey, bool)>, String> {
    let words = line.split([' ', '\t']).filter(|word| !word.is_empty());
    let mut words = words.take_while(|word| !word.starts_with('#'));
    let Some(key) = words.next() else { return Ok(None) };
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("a key may only have visible ASCII characters, as no other can be sent".to_owned());
    }
    let mut weight = None;
    for word in words {
        let Some(number) = word.strip_prefix("weight=") else {
            return Err(
                "after the key there may only be `weight=N` and a comment that starts with #".to_owned()
            );
        };
        match number.parse() {
            Ok(number @ 1..=MAX_WEIGHT) if weight.is_none() => weight = Some(number),
            Ok(1..=MAX_WEIGHT) => return Err("the weight is given twice".to_owned()),
            _ => return Err(format!("the weight must be a whole number from 1 to {MAX_WEIGHT}")),
        }
    }
    let is_short = key.len() < SHORT_KEY_BYTES;
    Ok(Some((ApiKey { owner: Owner::of(key), weight: weight.unwrap_or(1) }, is_short)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let error = ApiKeys::parse(text.as_bytes()).unwrap_err();
        assert!(!error.contains("secret"), "{error}");
        error
    }

    #[test]
    fn comments_and_empty_lines_are_no_keys() {
        let text =
            "# team a\nalpha\n\n  beta   weight=20\n\t\n#x\ngamma\tweight=3\t# team c weight=x\ndelta#1 # d";
        let keys = ApiKeys::parse(text.as_bytes()).unwrap();
        assert_eq!(keys.weights(), [1, 20, 3, 1]);
        for (tenant, key) in (0..).zip(["alpha", "beta", "gamma", "delta#1"]) {
            assert_eq!(
                keys.find(key),
                Some(Principal { owner: Owner::of(key), tenant: TenantId(tenant) }),
                "{key}"
            );
        }
        for key in ["", "alph", "alphaa", "# team a", "gamma\tweight=3", "#x"] {
            assert!(keys.find(key).is_none(), "{key}");
        }
        assert!(["alpha", "2c"].iter().all(|key| !format!("{keys:?}").contains(key)));
    }

    #[test]
    fn files_of_other_systems_are_read() {
        let keys = ApiKeys::parse("\u{FEFF}alpha\r\nbeta weight=2\r\n".as_bytes()).unwrap();
        assert_eq!(keys.weights(), [1, 2]);
        assert!(keys.find("alpha").is_some() && keys.find("beta").is_some());
    }

    #[test]
    fn what_is_wrong_is_told_by_line_and_without_the_key() {
        for weight in ["0", "1001", "x", "-1", ""] {
            let error = error(&format!("a\nsecret weight={weight}\n"));
            assert_eq!(error, "line 2: the weight must be a whole number from 1 to 1000", "{weight}");
        }
        for (text, expected) in [
            ("secret weight=2 weight=2", "line 1: the weight is given twice"),
            ("a\n\nsecret wieght=2", "line 3: after the key there may only be"),
            ("secret secret2", "line 1: after the key there may only be"),
            ("# b\nsecret\na\nsecret weight=2\n", "line 4: the key is the same as in line 2"),
            ("secret\u{e9}", "line 1: a key may only have visible ASCII"),
            ("secret\rsecret2", "line 1: a key may only have visible ASCII"),
            ("# nothing\n", "the file has no key"),
            ("", "the file has no key"),
        ] {
            let error = error(text);
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
        let error = ApiKeys::parse(b"a\nb\xff\n").unwrap_err();
        assert_eq!(error, "line 2: this is not UTF-8 text");
    }

    #[test]
    fn who_holds_a_key_keeps_its_name_and_its_replies_when_lines_move() {
        let find = |text: &str| ApiKeys::parse(text.as_bytes()).unwrap().find("second-key-of-16").unwrap();
        let before = find("first-key-of-16c\nsecond-key-of-16\n");
        let after = find("new-key-of-16-ch\nfirst-key-of-16c\nsecond-key-of-16 weight=3\n");
        assert_eq!((before.owner, before.to_string()), (after.owner, after.to_string()));
        assert_eq!(before.to_string().len(), 8, "{before}");
        assert_eq!(Principal::ANYBODY.to_string(), "anybody");
    }
}
