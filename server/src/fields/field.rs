//! Owns what is declared of a field.

use super::shape::Shape;

/// What a field means to this server.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Class {
    /// Its value changes the reply.
    Honoured,
    /// Its value changes how or when the reply is delivered, and never the reply itself.
    Delivery,
    /// It is accepted with any value and changes nothing.
    NoEffect,
    /// It is refused by name, unless its value asks for nothing.
    Refused {
        /// Whether a value asks for nothing.
        unless: fn(&Shape) -> bool,
        /// What is supported, for the error and the documentation.
        supported: &'static str,
    },
}

/// A field of a JSON object.
#[derive(Debug)]
pub(crate) struct Field {
    /// Its name in JSON.
    pub(crate) name: &'static str,
    /// What it means here.
    pub(crate) class: Class,
    /// What the documentation says of it.
    #[cfg_attr(not(test), expect(dead_code, reason = "a test keeps the documentation current"))]
    pub(crate) doc: &'static str,
}

impl Field {
    /// Whether it changes the reply.
    pub(crate) fn is_honoured(&self) -> bool {
        matches!(self.class, Class::Honoured)
    }
}
