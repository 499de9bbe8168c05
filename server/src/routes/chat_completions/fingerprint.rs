//! Owns the fingerprint of a request: whether two bodies under one key ask for the same reply.
//!
//! Invariant: it does not depend on the order of fields, on white space, on how a number is written or
//! on how the reply is delivered. Fields without effect are not there any more.

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// How and when a reply is delivered, which the reply does not depend on.
const DELIVERY: [&str; 3] = ["stream", "stream_options", "priority"];

/// Below it a float holds every whole number.
const LARGEST_EXACT: f64 = (1u64 << 53) as f64;

/// Hash of a checked body as canonical JSON.
pub(super) fn fingerprint(mut body: Value) -> [u8; 32] {
    if let Value::Object(object) = &mut body {
        object.retain(|name, _| !DELIVERY.contains(&name.as_str()));
    }
    Sha256::digest(sorted(body).to_string()).into()
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let mut entries: Vec<(String, Value)> = object.into_iter().collect();
            entries.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
            Value::Object(
                entries.into_iter().map(|(name, value)| (name, sorted(value))).collect::<Map<_, _>>(),
            )
        }
        // 0 and 0.0 are one number, which another client of the same user may write otherwise.
        Value::Number(number) => match number.as_f64() {
            Some(x) if number.is_f64() && x.fract() == 0.0 && x.abs() < LARGEST_EXACT => {
                Value::from(x as i64)
            }
            _ => Value::Number(number),
        },
        Value::Array(list) => Value::Array(list.into_iter().map(sorted).collect()),
        value => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delivery_order_and_space_do_not_count() {
        let print = |body: &str| fingerprint(serde_json::from_str(body).unwrap());
        let one = print(r#"{"a": {"x": 1, "y": [{"p": 1, "q": 2}]}, "b": 2}"#);
        assert_eq!(
            one,
            print(r#"{"b":2,"stream":true,"a":{"y":[{"q":2,"p":1}],"x":1},"stream_options":{}}"#)
        );
        assert_ne!(one, print(r#"{"a": {"x": 1, "y": [{"p": 1, "q": 3}]}, "b": 2}"#));
        assert_eq!(print(r#"{"t": 1, "u": [0.50]}"#), print(r#"{"t": 1.0, "u": [5e-1]}"#));
        let seeds = [9_007_199_254_740_993u64, 9_007_199_254_740_992];
        assert_ne!(print(&format!("{{\"s\": {}}}", seeds[0])), print(&format!("{{\"s\": {}}}", seeds[1])));
        assert_ne!(print(r#"{"a": {"stream": 1}}"#), print(r#"{"a": {}}"#));
    }
}
