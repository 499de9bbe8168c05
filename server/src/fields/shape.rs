//! Owns the outline of a JSON value: enough to see whether it asks for anything.
//!
//! Invariant: it is small, whatever the value. What does not fit is [`Shape::Large`], which never asks for nothing.

/// The outline of a value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Shape {
    /// True or false.
    Boolean(bool),
    /// A number.
    Number(f64),
    /// A short string.
    Text(String),
    /// A short list, of values that are no lists or objects with entries.
    List(Vec<Shape>),
    /// An object of a few fields with such values; null is absent.
    Object(Vec<(String, Shape)>),
    /// Anything else.
    Large,
}

impl Shape {
    /// `false`.
    pub(crate) fn is_false(&self) -> bool {
        *self == Self::Boolean(false)
    }

    /// `true`.
    pub(crate) fn is_true(&self) -> bool {
        *self == Self::Boolean(true)
    }

    /// 0.
    pub(crate) fn is_zero(&self) -> bool {
        *self == Self::Number(0.0)
    }

    /// 1.
    pub(crate) fn is_one(&self) -> bool {
        *self == Self::Number(1.0)
    }

    /// An empty string, list or object.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::List(entries) => entries.is_empty(),
            Self::Object(fields) => fields.is_empty(),
            _ => false,
        }
    }

    /// `false` or empty.
    pub(crate) fn is_off(&self) -> bool {
        self.is_false() || self.is_empty()
    }

    /// One of these strings.
    pub(crate) fn is_one_of(&self, texts: &[&str]) -> bool {
        matches!(self, Self::Text(text) if texts.contains(&text.as_str()))
    }

    /// An empty list, or one of nothing but this string.
    pub(crate) fn is_list_of(&self, text: &str) -> bool {
        matches!(self, Self::List(entries) if entries.iter().all(|entry| entry.is_one_of(&[text])))
    }

    /// An object whose `type` is this.
    pub(crate) fn has_type(&self, kind: &str) -> bool {
        // A name may come twice, and its last value counts for some readers.
        let mut kinds = self.fields().iter().filter(|(name, _)| name == "type").peekable();
        kinds.peek().is_some() && kinds.all(|(_, value)| value.is_one_of(&[kind]))
    }

    /// An object in which only these fields have values, all of them `false`.
    pub(crate) fn has_off(&self, names: &[&str]) -> bool {
        let is_off = |(name, value): &(String, Self)| names.contains(&name.as_str()) && value.is_false();
        matches!(self, Self::Object(fields) if fields.iter().all(is_off))
    }

    fn fields(&self) -> &[(String, Self)] {
        match self {
            Self::Object(fields) => fields,
            _ => &[],
        }
    }
}
