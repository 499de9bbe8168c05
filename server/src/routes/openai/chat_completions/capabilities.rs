//! Owns what clients and readers are told about the fields of a request, derived from their declarations.

use serde_json::{Map, Value, json};

use super::request::message::{MAX_MESSAGES, MAX_PARTS, MessageFields, PartFields};
use super::request::values::{MAX_STOP_BYTES, MAX_STOP_TOKEN_IDS, MAX_STOPS};
use super::request::{ChatCompletionRequest, StreamOptions};
use crate::fields::{Class, Field};
use glm_engine::MAX_LOGIT_BIAS;

/// The objects of a request: where each stands in it, and its fields.
const OBJECTS: [(&str, &[Field]); 4] = [
    ("", ChatCompletionRequest::FIELDS),
    ("stream_options", StreamOptions::FIELDS),
    ("messages[]", MessageFields::FIELDS),
    ("messages[].content[]", PartFields::FIELDS),
];

/// What `/v1/capabilities` says of chat completions.
pub(in crate::routes) fn capabilities() -> Value {
    let (mut honoured, mut without_effect, mut refused) = (Vec::new(), Vec::new(), Map::new());
    for (object, fields) in OBJECTS {
        for field in fields {
            let name = match object {
                "" => field.name.to_owned(),
                object => format!("{object}.{}", field.name),
            };
            match field.class {
                Class::Honoured | Class::Delivery => honoured.push(name),
                Class::NoEffect => without_effect.push(name),
                Class::Refused { supported, .. } => {
                    refused.insert(name, supported.into());
                }
            }
        }
    }
    json!({
        "fields": honoured,
        "fields_without_effect": without_effect,
        "fields_refused": refused,
        "max_messages": MAX_MESSAGES,
        "max_content_parts": MAX_PARTS,
        "max_logit_bias": MAX_LOGIT_BIAS,
        "max_stops": MAX_STOPS,
        "max_stop_bytes": MAX_STOP_BYTES,
        "max_stop_token_ids": MAX_STOP_TOKEN_IDS,
    })
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::path::Path;

    use super::*;

    const START: &str = "\
# Fields of a chat completion request

What `POST /v1/chat/completions` does with each field. A field that is not listed is refused with `unknown_parameter`,
and one that comes twice with `invalid_value`; null is the same as leaving a field out. `GET /v1/capabilities` has the
same lists as JSON. This file is generated: `GLMSERVE_WRITE_DOCS=1 cargo test --release -p glmserve --lib fields_md`
writes it.

A whole number may be written 16, 16.0 or 1.6e1. *honoured* changes the reply; *delivery* changes how or when it is
delivered, and two requests that differ only there are one under an Idempotency-Key; *no effect* is accepted with any
value; *refused* is an error that names the field, unless its value asks for nothing, as the last column says.
";

    fn fields_md() -> String {
        let mut text = START.to_owned();
        for (object, fields) in OBJECTS {
            let title = if object.is_empty() { "The body".to_owned() } else { format!("`{object}`") };
            write!(text, "\n## {title}\n\n| field | class | |\n|---|---|---|\n").unwrap();
            for Field { name, class, doc } in fields {
                let (class, doc) = match class {
                    Class::Honoured => ("honoured", doc),
                    Class::Delivery => ("delivery", doc),
                    Class::NoEffect => ("no effect", doc),
                    Class::Refused { supported, .. } => ("refused", supported),
                };
                writeln!(text, "| `{name}` | {class} | {} |", doc.trim()).unwrap();
            }
        }
        text
    }

    #[test]
    fn fields_md_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/fields.md");
        if std::env::var_os("GLMSERVE_WRITE_DOCS").is_some() {
            std::fs::write(&path, fields_md()).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap();
        assert!(
            found == fields_md(),
            "docs/fields.md says something else than the code; its head says how to write it"
        );
    }

    #[test]
    fn every_field_is_explained_and_has_one_name() {
        for (object, fields) in OBJECTS {
            for (i, field) in fields.iter().enumerate() {
                let is_explained = match field.class {
                    Class::Refused { supported, .. } => !supported.is_empty(),
                    _ => !field.doc.is_empty(),
                };
                assert!(is_explained, "{object}.{}", field.name);
                assert!(
                    fields[..i].iter().all(|other| other.name != field.name),
                    "{object}.{} twice",
                    field.name
                );
            }
        }
    }
}
