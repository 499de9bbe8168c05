//! Owns the description of a JSON object's fields: one declaration says how each is read and what it means here.
//!
//! Invariant: the declaration is the only source. Parsing, refusals, `/v1/capabilities`, the documentation and the
//! fingerprint are derived from it, so a field is never honoured in one place and unknown in another.

mod canonical;
mod field;
mod object;
mod parse;
mod read;
mod reader;
mod refused;
pub(crate) mod shape;

pub(crate) use self::canonical::Canonical;
pub(crate) use self::field::{Class, Field};
pub(crate) use self::parse::parse;
pub(crate) use self::read::{Ignored, Number, Read, Text, read_list};
pub(crate) use self::reader::{Reader, Step};
pub(crate) use self::refused::Refused;

/// Defines a struct that is read from a JSON object. Each field begins with its class:
///
/// * `#[honoured]`, `#[delivery]`: any type that is [`Read`] and [`Canonical`];
/// * `#[no_effect]`: of type [`Ignored`];
/// * `#[refused(unless NEUTRAL, "what is supported")]`: of type [`Refused`]; `NEUTRAL` is a function
///   of the value's [`shape::Shape`].
///
/// Absent and null are the same: the type's default. A doc comment after the class goes into the documentation. A
/// field whose name is a keyword of Rust says its name in JSON at the end: `kind: String = "type"`.
macro_rules! fields {
    ($(#[$meta:meta])* $vis:vis struct $name:ident<$lifetime:lifetime> { $($body:tt)* }) => {
        $crate::fields::fields! { @struct [$(#[$meta])*] [$vis] $name [<$lifetime>] $lifetime { $($body)* } }
    };
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($body:tt)* }) => {
        $crate::fields::fields! { @struct [$(#[$meta])*] [$vis] $name [] 'de { $($body)* } }
    };
    (@struct [$($meta:tt)*] [$vis:vis] $name:ident [$($generics:tt)*] $lifetime:lifetime {
        $(
            #[$class:ident $(($($rule:tt)*))?]
            $(#[doc = $doc:literal])*
            $field_vis:vis $field:ident: $type:ty $(= $json:literal)?,
        )*
    }) => {
        $($meta)*
        #[derive(Debug, Default)]
        $vis struct $name $($generics)* {
            $($(#[doc = $doc])* $field_vis $field: $type,)*
        }

        impl $($generics)* $name $($generics)* {
            /// Its fields, in the order of their declaration.
            $vis const FIELDS: &'static [$crate::fields::Field] = &[$($crate::fields::Field {
                name: $crate::fields::fields!(@name $field $($json)?),
                class: $crate::fields::fields!(@class $class $($($rule)*)?),
                doc: concat!($($doc),*),
            }),*];
        }

        impl<$lifetime> $crate::fields::Read<$lifetime> for $name $($generics)* {
            const EXPECTED: &'static str = "an object";

            fn object<A: serde::de::MapAccess<$lifetime>>(
                mut map: A,
                reader: &$crate::fields::Reader,
            ) -> Result<Self, A::Error> {
                let mut this = Self::default();
                let mut seen = [false; Self::FIELDS.len()];
                while let Some(field) = reader.next_field(&mut map, Self::FIELDS, &mut seen)? {
                    $(if field.name == $crate::fields::fields!(@name $field $($json)?) {
                        if let Some(value) = map.next_value_seed(reader.seed::<$type>())? {
                            this.$field = value;
                        }
                    } else)* {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    }
                    reader.leave();
                }
                Ok(this)
            }
        }

        impl $($generics)* $crate::fields::Canonical for $name $($generics)* {
            fn feed(&self, hasher: &mut sha2::Sha256) {
                for field in Self::FIELDS.iter().filter(|field| field.is_honoured()) {
                    $(if field.name == $crate::fields::fields!(@name $field $($json)?) {
                        $crate::fields::Canonical::feed(field.name, hasher);
                        $crate::fields::Canonical::feed(&self.$field, hasher);
                    })*
                }
            }
        }
    };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $json:literal) => { $json };
    (@class honoured) => { $crate::fields::Class::Honoured };
    (@class delivery) => { $crate::fields::Class::Delivery };
    (@class no_effect) => { $crate::fields::Class::NoEffect };
    (@class refused unless $unless:expr, $supported:literal) => {
        $crate::fields::Class::Refused { unless: $unless, supported: $supported }
    };
}
pub(crate) use fields;

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use sha2::{Digest, Sha256};

    use super::shape::Shape;
    use super::*;

    fields! {
        struct Outer<'a> {
            #[honoured] /// A text.
            text: Option<Cow<'a, str>>,
            #[honoured]
            temperature: Option<f32>,
            #[honoured]
            seed: Option<i64>,
            #[honoured]
            count: Option<u32>,
            #[honoured]
            inner: Inner = "type",
            #[delivery]
            stream: bool,
            #[no_effect]
            user: Ignored,
            #[refused(unless Shape::is_one, "only 1 is supported")]
            n: Refused,
            #[refused(unless |value| value.has_type("text"), "only text is supported")]
            format: Refused,
        }
    }

    fields! {
        struct Inner {
            #[honoured]
            flag: bool,
        }
    }

    fn read(body: &str) -> Result<Outer<'_>, String> {
        parse(body.as_bytes()).map_err(|error| {
            let body = error.body();
            format!("{}: {}", body["error"]["code"].as_str().unwrap(), error)
        })
    }

    #[test]
    fn values_of_each_class_are_read_and_null_is_absent() {
        let body = r#"{"text": "a\u00e9", "temperature": 1, "seed": -1, "type": {"flag": true}, "stream": true,
            "user": [{"a": [1]}], "n": 1.0, "format": {"type": "text", "more": [{}]}, "unknown": null, "count": null}"#;
        let outer = read(body).unwrap();
        assert_eq!(
            (
                outer.text.as_deref(),
                outer.temperature,
                outer.seed,
                outer.inner.flag,
                outer.stream,
                outer.count
            ),
            (Some("aé"), Some(1.0), Some(-1), true, true, None)
        );
        assert!(matches!(read(r#"{"text": "in the body"}"#).unwrap().text, Some(Cow::Borrowed(_))));
        assert!(read("\u{FEFF}{}").is_ok(), "a byte order mark");
    }

    #[test]
    fn whole_numbers_may_be_written_with_a_fraction_or_an_exponent() {
        for (text, expected) in [("16", 16), ("16.0", 16), ("1.6e1", 16), ("-0.0", 0), ("1E3", 1000)] {
            assert_eq!(read(&format!(r#"{{"seed": {text}}}"#)).unwrap().seed, Some(expected), "{text}");
        }
        for text in ["1.5", "1e30", "9223372036854775808", "18446744073709551616", "\"1\"", "true", "[1]"] {
            let error = read(&format!(r#"{{"seed": {text}}}"#)).unwrap_err();
            assert!(
                error.starts_with("invalid_value: seed must be an integer from -9223372036854775808"),
                "{error}"
            );
        }
    }

    #[test]
    fn errors_say_what_is_wrong_where_and_what_may_stand_there() {
        for (body, expected) in [
            ("[]", "invalid_value: body must be an object"),
            ("null", "invalid_value: body must be an object"),
            (r#"{"temperature": "warm"}"#, "invalid_value: temperature must be a number"),
            (r#"{"temperature": 1e999}"#, "invalid_value: temperature is too large a number"),
            (r#"{"count": -1}"#, "invalid_value: count must be an integer from 0 to 4294967295"),
            (r#"{"type": [true]}"#, "invalid_value: type must be an object"),
            (r#"{"type": {"flag": 1}}"#, "invalid_value: type.flag must be true or false"),
            (r#"{"type": {"flog": 1}}"#, "unknown_parameter: unknown parameter: type.flog"),
            (r#"{"n": 2}"#, "unsupported_parameter: n: only 1 is supported"),
            (r#"{"format": {"type": "json"}}"#, "unsupported_parameter: format: only text is supported"),
            (r#"{"format": {"type": "text", "type": "json"}}"#, "unsupported_parameter: format: only"),
            (r#"{"seed": 1, "text": "", "seed": 1}"#, "invalid_value: seed is given twice"),
            (r#"{"seed": null, "seed": 1}"#, "invalid_value: seed is given twice"),
            (r#"{"seed": 1"#, "invalid_json: the body is not valid JSON: EOF"),
            (r#"{"seed": 1}}"#, "invalid_json: the body is not valid JSON: trailing characters"),
            ("", "invalid_json: the body is not valid JSON: EOF"),
        ] {
            let error = read(body).unwrap_err();
            assert!(error.starts_with(expected), "{body}: {error}");
        }
    }

    #[test]
    fn only_what_is_honoured_is_part_of_the_canonical_form() {
        let hash = |body: &str| {
            let mut hasher = Sha256::new();
            read(body).unwrap().feed(&mut hasher);
            hasher.finalize()
        };
        let one = hash(r#"{"text": "a", "temperature": 0, "seed": 10}"#);
        for same in [
            r#"{"seed":1e1,"temperature":0.0,"text":"a"}"#,
            r#"{"seed": 10, "temperature": -0.0, "text": "\u0061", "count": null}"#,
            r#"{"seed": 10, "temperature": 0, "text": "a", "user": "u", "n": 1, "stream": true, "type": {}}"#,
        ] {
            assert_eq!(hash(same), one, "{same}");
        }
        for other in [
            r#"{"text": "a", "temperature": 0}"#,
            r#"{"text": "b", "temperature": 0, "seed": 10}"#,
            r#"{"text": "a", "temperature": 0.5, "seed": 10}"#,
            r#"{"text": "a", "temperature": 0, "seed": 10, "type": {"flag": true}}"#,
            r#"{"text": "a", "temperature": 0, "seed": 10, "count": 0}"#,
        ] {
            assert_ne!(hash(other), one, "{other}");
        }
        let seeds = ["9007199254740993", "9007199254740992"];
        assert_ne!(
            hash(&format!(r#"{{"seed": {}}}"#, seeds[0])),
            hash(&format!(r#"{{"seed": {}}}"#, seeds[1]))
        );
    }
}
