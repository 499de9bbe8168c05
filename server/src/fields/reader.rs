//! Owns the position in a body that is being read, and what is wrong there.
//!
//! Invariant: an error names its position by a path in JSON's terms, and holds at most a part of what a client sent.

use std::cell::RefCell;
use std::fmt::Write;

use serde::de::Error;
use serde_json::error::Category;

use super::field::{Class, Field};
use super::shape::Shape;
use crate::error::ApiError;

/// Whether a value of a refused field asks for nothing, and what is supported.
type Rule = (fn(&Shape) -> bool, &'static str);

/// A step on the way to a value.
#[derive(Debug)]
pub(crate) enum Step {
    /// A field that is declared.
    Field(&'static Field),
    /// An index into a list.
    Index(usize),
    /// A name that the client chose.
    Key(String),
}

/// Where reading has come to.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    path: RefCell<Vec<Step>>,
    /// serde's errors carry text only; the whole one waits here.
    refusal: RefCell<Option<ApiError>>,
}

impl Reader {
    /// Goes one step deeper.
    pub(crate) fn enter(&self, step: Step) {
        self.path.borrow_mut().push(step);
    }

    /// Goes back by one step.
    pub(crate) fn leave(&self) {
        self.path.borrow_mut().pop();
    }

    /// The rule of the field that is being read, if it is refused.
    pub(super) fn rule(&self) -> Option<Rule> {
        match self.path.borrow().last() {
            Some(Step::Field(Field { class: Class::Refused { unless, supported }, .. })) => {
                Some((*unless, supported))
            }
            _ => None,
        }
    }

    /// An error about the value that is being read: its path, and then `what`.
    pub(crate) fn invalid<E: Error>(&self, what: &str) -> E {
        let path = self.path();
        let message = format!("{path} {what}");
        self.fail(ApiError::invalid_value(path, message))
    }

    /// An error about the field `name` of the object that is being read.
    pub(crate) fn invalid_field<E: Error>(&self, name: &str, what: &str) -> E {
        self.enter(Step::Key(name.to_owned()));
        self.invalid(what)
    }

    /// An error: the value that is being read is not `expected`.
    pub(crate) fn unexpected<E: Error>(&self, expected: &str) -> E {
        self.invalid(&format!("must be {expected}"))
    }

    /// An error: the value that is being read can't be honoured, and what can.
    pub(crate) fn unsupported<E: Error>(&self, what: &str) -> E {
        let path = self.path();
        let message = format!("{path}: {what}");
        self.fail(ApiError::unsupported_parameter(path, message))
    }

    pub(super) fn fail<E: Error>(&self, error: ApiError) -> E {
        self.refusal.replace(Some(error));
        E::custom("refused")
    }

    pub(super) fn path(&self) -> String {
        let mut text = String::new();
        for step in self.path.borrow().iter() {
            if !text.is_empty() && !matches!(step, Step::Index(_)) {
                text.push('.');
            }
            match step {
                Step::Field(field) => text.push_str(field.name),
                Step::Key(name) => text.push_str(name),
                Step::Index(index) => {
                    // Writing to a string can't fail.
                    let _ = write!(text, "[{index}]");
                }
            }
        }
        if text.is_empty() { "body".to_owned() } else { text }
    }

    pub(super) fn explain(&self, error: &serde_json::Error) -> ApiError {
        if let Some(refusal) = self.refusal.take() {
            return refusal;
        }
        let path = self.path();
        if error.classify() == Category::Syntax && error.to_string().starts_with("number out of range") {
            return ApiError::invalid_value(path.clone(), format!("{path} is too large a number"));
        }
        ApiError::invalid_json(error)
    }
}
