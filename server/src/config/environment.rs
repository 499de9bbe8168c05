//! Owns the rules for variables of the environment, which hold for every option of every command.
//!
//! Invariants: an empty variable is an unset one; a flag's variable is a boolean in any of the usual spellings, and
//! one that says no is an unset one. An option can't miss this: it is applied to the finished command line.

use std::ffi::{OsStr, OsString};

use clap::builder::{BoolishValueParser, Resettable};
use clap::{Arg, ArgAction, Command};

/// What a flag's variable says no with, as [`BoolishValueParser`] reads it.
const NO: [&str; 6] = ["0", "n", "no", "f", "false", "off"];

/// The command with these rules; `variable` reads the environment.
pub(super) fn apply(command: Command, variable: &dyn Fn(&OsStr) -> Option<OsString>) -> Command {
    command.mut_args(|arg| apply_to_arg(arg, variable)).mut_subcommands(|command| apply(command, variable))
}

fn apply_to_arg(arg: Arg, variable: &dyn Fn(&OsStr) -> Option<OsString>) -> Arg {
    let Some(value) = arg.get_env().and_then(variable) else { return flag(arg) };
    let is_flag = matches!(arg.get_action(), ArgAction::SetTrue);
    let says_no = |text: &str| NO.iter().any(|no| text.eq_ignore_ascii_case(no));
    // A flag that is off must not conflict with others, nor count as given in any other way.
    match value.is_empty() || (is_flag && value.to_str().is_some_and(says_no)) {
        true => arg.env(Resettable::Reset),
        false => flag(arg),
    }
}

fn flag(arg: Arg) -> Arg {
    match arg.get_action() {
        ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
        _ => arg,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::config::Cli;

    /// Variables of the command and of its subcommands that are looked at when each of them is `value`.
    fn variables(value: Option<&str>) -> (Vec<String>, Vec<String>) {
        let command = apply(Cli::command(), &|_| value.map(OsString::from));
        let (mut flags, mut others) = (Vec::new(), Vec::new());
        for arg in command.get_subcommands().flat_map(Command::get_arguments) {
            let Some(name) = arg.get_env() else { continue };
            let names = if matches!(arg.get_action(), ArgAction::SetTrue) { &mut flags } else { &mut others };
            names.push(name.to_str().unwrap().to_owned());
        }
        (flags, others)
    }

    #[test]
    fn an_empty_variable_is_unset_and_so_is_a_flag_that_says_no() {
        let (flags, others) = variables(None);
        assert!(flags.contains(&"GLMSERVE_ENFORCE_EAGER".to_owned()), "{flags:?}");
        assert!(others.contains(&"GLMSERVE_THREADS".to_owned()), "{others:?}");
        assert_eq!(variables(Some("")), (Vec::new(), Vec::new()));
        for no in ["0", "false", "False", "no", "NO", "off", "f", "n"] {
            assert_eq!(variables(Some(no)), (Vec::new(), others.clone()), "{no}");
        }
        for yes in ["1", "true", "yes", "on", "what else"] {
            assert_eq!(variables(Some(yes)), (flags.clone(), others.clone()), "{yes}");
        }
    }
}
