//! Owns how this server writes JSON, in streams and in answers of one piece.
//!
//! Invariant: besides what JSON requires, the line breaks that JSON allows (U+0085, U+2028, U+2029) are
//! escaped, in keys too. Client libraries that split text into lines would otherwise cut a document there.

use std::io::{self, Write};

use actix_web::web::{BufMut, BytesMut};
use actix_web::{HttpResponse, HttpResponseBuilder};
use serde::Serialize;
use serde_json::ser::Formatter;
use serde_json::{Serializer, json};

const LINE_BREAKS: [char; 3] = ['\u{85}', '\u{2028}', '\u{2029}'];

/// Appends `value` as one line. A value that is no JSON becomes the error that says so.
pub(crate) fn append(bytes: &mut BytesMut, value: &impl Serialize) {
    let start = bytes.len();
    if let Err(error) = write(bytes, value) {
        // A half-written document must not go out. The error itself is plain JSON, which has a form.
        bytes.truncate(start);
        let error =
            json!({"message": error.to_string(), "type": "server_error", "param": null, "code": "internal"});
        let _ = write(bytes, &json!({"error": error}));
    }
}

/// An answer whose body is `value`.
pub(crate) fn answer(mut response: HttpResponseBuilder, value: &impl Serialize) -> HttpResponse {
    let mut body = BytesMut::new();
    append(&mut body, value);
    response.content_type("application/json").body(body.freeze())
}

fn write(bytes: &mut BytesMut, value: &impl Serialize) -> serde_json::Result<()> {
    value.serialize(&mut Serializer::with_formatter(bytes.writer(), OneLine))
}

/// serde_json's compact form, with every line break escaped.
struct OneLine;

impl Formatter for OneLine {
    fn write_string_fragment<W>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()>
    where
        W: ?Sized + Write,
    {
        let mut rest = fragment;
        while let Some((start, found)) = rest.match_indices(LINE_BREAKS).next() {
            writer.write_all(&rest.as_bytes()[..start])?;
            for character in found.chars() {
                write!(writer, "\\u{:04x}", u32::from(character))?;
            }
            rest = &rest[start + found.len()..];
        }
        writer.write_all(rest.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use serde_json::{Value, json};

    use super::*;

    fn text(value: &impl Serialize) -> String {
        let mut bytes = BytesMut::from("x");
        append(&mut bytes, value);
        String::from_utf8(bytes[1..].to_vec()).unwrap()
    }

    #[test]
    fn every_line_break_is_escaped_in_values_and_keys() {
        let value =
            json!({"a\u{2028}b": ["\u{85}\u{85}入x\u{2029}", "\n\r\u{b}\u{c}\u{1c}\u{1d}\u{1e}\"\\"]});
        let expected = r#"{"a\u2028b":["\u0085\u0085入x\u2029","\n\r\u000b\f\u001c\u001d\u001e\"\\"]}"#;
        assert_eq!(text(&value), expected);
        assert_eq!(serde_json::from_str::<Value>(expected).unwrap(), value);
    }

    #[test]
    fn what_has_no_json_is_an_error_and_not_a_half_document() {
        let document: Value = serde_json::from_str(&text(&HashMap::from([([1, 2], "x")]))).unwrap();
        assert_eq!(document["error"]["code"], "internal");
    }
}
