//! Owns the API keys and the guard in front of `/v1`.
//!
//! Invariant: comparing takes the same time whichever key is given and however much of it is right.

use std::path::Path;

use actix_web::body::{BoxBody, EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::{Method, header};
use actix_web::middleware::Next;
use actix_web::{HttpMessage, web};
use glm_engine::TenantId;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::error::ApiError;
use crate::lifecycle::Lifecycle;
use crate::stream::store::Owner;

/// Largest share of a key.
const MAX_WEIGHT: u32 = 1000;

struct ApiKey {
    key: String,
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
    /// Reads a file with one key a line and, after it, `weight=N` if its share is not 1; `#` starts a
    /// comment line.
    ///
    /// # Errors
    /// The file can't be read, a weight is none, or there is no key, which would lock everybody out.
    pub fn load(path: &Path) -> std::io::Result<Self> {
        Self::parse(&std::fs::read_to_string(path)?)
            .map_err(std::io::Error::other)?
            .ok_or_else(|| std::io::Error::other("the file has no key"))
    }

    pub(crate) fn parse(text: &str) -> Result<Option<Self>, String> {
        let lines = (1..).zip(text.lines().map(str::trim));
        let keys = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let keys = keys.map(|(number, line)| match line.rsplit_once(" weight=") {
            None => Ok(ApiKey { key: line.to_owned(), weight: 1 }),
            // Never the line itself: it has the key.
            Some((key, weight)) => match weight.parse() {
                Ok(weight @ 1..=MAX_WEIGHT) => Ok(ApiKey { key: key.trim_end().to_owned(), weight }),
                _ => Err(format!("line {number}: the weight must be a whole number from 1 to {MAX_WEIGHT}")),
            },
        });
        let keys = keys.collect::<Result<Vec<ApiKey>, String>>()?;
        Ok((!keys.is_empty()).then_some(Self(keys)))
    }

    /// The shares of the tenants.
    pub fn weights(&self) -> Vec<u32> {
        self.0.iter().map(|key| key.weight).collect()
    }

    /// The tenant that a key belongs to: its place in the file.
    fn find(&self, given: &str) -> Option<TenantId> {
        // No early end: every key is compared.
        let mut found = (Choice::from(0), 0);
        for (tenant, key) in (0u32..).zip(&self.0) {
            let is_it = key.key.as_bytes().ct_eq(given.as_bytes());
            found = (found.0 | is_it, u32::conditional_select(&found.1, &tenant, is_it));
        }
        bool::from(found.0).then_some(TenantId(found.1))
    }
}

/// Lets a request pass that brings a key, if keys are asked for, and notes whose it is.
///
/// Others are answered with 401.
///
/// # Errors
/// Those of the inner service.
pub async fn guard<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B, BoxBody>>, actix_web::Error> {
    let keys = request.app_data::<web::Data<Lifecycle>>().and_then(|lifecycle| lifecycle.keys.as_ref());
    let (mut owner, mut tenant) = (Owner::ANYBODY, TenantId::default());
    if let Some(keys) = keys {
        let header = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = header.and_then(|value| {
            let (scheme, key) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
        });
        let found = given.and_then(|key| Some((keys.find(key)?, key)));
        (owner, tenant) = match found {
            Some((found, key)) => (Owner::of(key), found),
            // It says which methods a path takes, and does nothing.
            None if request.method() == Method::OPTIONS => (owner, tenant),
            None => return Ok(request.error_response(ApiError::invalid_api_key()).map_into_right_body()),
        };
    }
    request.extensions_mut().insert(owner);
    request.extensions_mut().insert(tenant);
    Ok(next.call(request).await?.map_into_left_body())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_empty_lines_are_no_keys() {
        let keys = ApiKeys::parse("# team a\nalpha\n\n  beta   weight=20\n").unwrap().unwrap();
        assert_eq!(keys.weights(), [1, 20]);
        assert_eq!((keys.find("alpha"), keys.find("beta")), (Some(TenantId(0)), Some(TenantId(1))));
        assert!(["", "alph", "# team a"].into_iter().all(|key| keys.find(key).is_none()));
        assert!(ApiKeys::parse("# nothing\n").unwrap().is_none());
        for weight in ["0", "1001", "x", "-1", ""] {
            let error = ApiKeys::parse(&format!("a\nsecret weight={weight}\n")).unwrap_err();
            assert!(error.starts_with("line 2:") && !error.contains("secret"), "{error}");
        }
    }
}
