//! Owns the values of a chat completion request that are bounded while they are read.

use std::borrow::Cow;

use glm_engine::MAX_LOGIT_BIAS;
use serde::de::{Error, MapAccess, SeqAccess};
use sha2::Sha256;

use crate::fields::{Canonical, Number, Read, Reader, Step, Text, read_list};

/// Most stop strings of a request.
pub(in super::super) const MAX_STOPS: usize = 64;
/// A longer one would hold back too much text.
pub(in super::super) const MAX_STOP_BYTES: usize = 1024;
/// Most stop ids of a request: each token is compared with all of them.
pub(in super::super) const MAX_STOP_TOKEN_IDS: usize = 128;
const MAX_MODEL_NAME_BYTES: usize = 1024;
/// How much of a wrong token id an error repeats.
const MAX_SHOWN_CHARS: usize = 50;

/// The name of a model.
#[derive(Debug)]
pub(in super::super) struct ModelName<'a>(pub(in super::super) Cow<'a, str>);

impl<'de> Read<'de> for ModelName<'de> {
    const EXPECTED: &'static str = "a string";

    fn text<E: Error>(name: Text<'de, '_>, reader: &Reader) -> Result<Self, E> {
        match name.as_str().len() {
            0..=MAX_MODEL_NAME_BYTES => Ok(Self(name.into_cow())),
            _ => Err(reader.invalid(&format!("must have at most {MAX_MODEL_NAME_BYTES} bytes"))),
        }
    }
}

impl Canonical for ModelName<'_> {
    fn feed(&self, hasher: &mut Sha256) {
        self.0.feed(hasher);
    }
}

/// Most tokens to generate; `None` is no limit but the context's.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct TokenLimit(pub(in super::super) Option<usize>);

impl Read<'_> for TokenLimit {
    const EXPECTED: &'static str =
        "an integer of at least 1, or -1 (or left out) for as many as the context holds";

    fn number<E: Error>(value: Number, reader: &Reader) -> Result<Self, E> {
        match value.whole() {
            Some(-1) => Ok(Self(None)),
            // The context's room cuts it.
            Some(limit) if limit > 0 => Ok(Self(Some(limit.try_into().unwrap_or(usize::MAX)))),
            _ => Err(reader.unexpected(Self::EXPECTED)),
        }
    }
}

impl Canonical for TokenLimit {
    fn feed(&self, hasher: &mut Sha256) {
        self.0.feed(hasher);
    }
}

/// A number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct TokenCount(pub(in super::super) usize);

impl Read<'_> for TokenCount {
    const EXPECTED: &'static str = "an integer of at least 0";

    fn number<E: Error>(value: Number, reader: &Reader) -> Result<Self, E> {
        match value.whole() {
            Some(count) if count >= 0 => Ok(Self(count.try_into().unwrap_or(usize::MAX))),
            _ => Err(reader.unexpected(Self::EXPECTED)),
        }
    }
}

impl Canonical for TokenCount {
    fn feed(&self, hasher: &mut Sha256) {
        self.0.feed(hasher);
    }
}

/// Stop strings, none of them empty.
#[derive(Debug, Default)]
pub(in super::super) struct Stops(pub(in super::super) Vec<String>);

impl<'de> Read<'de> for Stops {
    const EXPECTED: &'static str = "a string or a list of strings";

    fn text<E: Error>(stop: Text<'de, '_>, reader: &Reader) -> Result<Self, E> {
        let Stop(stop) = Stop::text(stop, reader)?;
        Ok(Self(Some(stop).filter(|stop| !stop.is_empty()).into_iter().collect()))
    }

    fn list<A: SeqAccess<'de>>(list: A, reader: &Reader) -> Result<Self, A::Error> {
        let mut stops = Vec::new();
        read_list(list, MAX_STOPS, reader, |Stop(stop)| stops.push(stop))?;
        stops.retain(|stop| !stop.is_empty());
        Ok(Self(stops))
    }
}

impl Canonical for Stops {
    fn feed(&self, hasher: &mut Sha256) {
        self.0.as_slice().feed(hasher);
    }
}

struct Stop(String);

impl<'de> Read<'de> for Stop {
    const EXPECTED: &'static str = "a string";

    fn text<E: Error>(stop: Text<'de, '_>, reader: &Reader) -> Result<Self, E> {
        match stop.as_str() {
            stop if stop.len() <= MAX_STOP_BYTES => Ok(Self(stop.to_owned())),
            _ => Err(reader.invalid(&format!("must have at most {MAX_STOP_BYTES} bytes"))),
        }
    }
}

/// Ids that end the reply.
#[derive(Debug, Default)]
pub(in super::super) struct StopTokenIds(pub(in super::super) Vec<u32>);

impl<'de> Read<'de> for StopTokenIds {
    const EXPECTED: &'static str = "a list of token ids";

    fn list<A: SeqAccess<'de>>(list: A, reader: &Reader) -> Result<Self, A::Error> {
        let mut ids = Vec::new();
        read_list(list, MAX_STOP_TOKEN_IDS, reader, |id| ids.push(id))?;
        Ok(Self(ids))
    }
}

impl Canonical for StopTokenIds {
    fn feed(&self, hasher: &mut Sha256) {
        self.0.as_slice().feed(hasher);
    }
}

/// What is added to the logits of tokens: each id once, in ascending order.
#[derive(Debug, Default)]
pub(in super::super) struct LogitBias(pub(in super::super) Vec<(u32, f32)>);

impl<'de> Read<'de> for LogitBias {
    const EXPECTED: &'static str = "an object";

    fn object<A: MapAccess<'de>>(mut map: A, reader: &Reader) -> Result<Self, A::Error> {
        let mut biases = Vec::new();
        while let Some(id) = map.next_key_seed(reader.seed::<TokenId>())? {
            if biases.len() == MAX_LOGIT_BIAS {
                return Err(reader.invalid(&format!("must have at most {MAX_LOGIT_BIAS} tokens")));
            }
            // The name of a field is never null.
            let TokenId(id) = id.ok_or_else(|| reader.unexpected(Self::EXPECTED))?;
            reader.enter(Step::Key(id.to_string()));
            let bias = map.next_value_seed(reader.seed::<f32>())?;
            biases.push((id, bias.ok_or_else(|| reader.unexpected(f32::EXPECTED))?));
            reader.leave();
        }
        biases.sort_unstable_by_key(|&(id, _)| id);
        // "7" and "07" are two names of one token, whose sum could leave the range of either.
        if let Some(twice) = biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(reader.invalid_field(&twice[0].0.to_string(), "is given twice"));
        }
        Ok(Self(biases))
    }
}

impl Canonical for LogitBias {
    fn feed(&self, hasher: &mut Sha256) {
        self.0.as_slice().feed(hasher);
    }
}

/// A token's id as the name of a field.
struct TokenId(u32);

impl<'de> Read<'de> for TokenId {
    const EXPECTED: &'static str = "a token id";

    fn text<E: Error>(id: Text<'de, '_>, reader: &Reader) -> Result<Self, E> {
        id.as_str().parse().map(Self).map_err(|_| {
            let id: String = id.as_str().chars().take(MAX_SHOWN_CHARS).collect();
            reader.invalid_field(&id, "is not a token id")
        })
    }
}
