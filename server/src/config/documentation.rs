//! Owns docs/configuration.md, which is written from the command line itself.
//!
//! Invariant: every option of every command is in it, with the variable, default and words that `--help` has.

use std::fmt::Write;
use std::path::Path;

use clap::{Arg, Command, CommandFactory};

use super::Cli;

const START: &str = "\
# Configuration

Every option of every command of `glmserve`, as `glmserve COMMAND --help` explains it. This file is generated:
`GLMSERVE_WRITE_DOCS=1 cargo test --release -p glmserve --lib configuration_md` writes it. The options of `glm-export`
are in [export/README.md](../export/README.md).

An option goes before its variable in the environment, and a variable before the default. An empty variable counts as
unset. The variables of flags, which take no value, are 1, true, yes or on, and 0, false, no or off. What cannot be read,
or is out of range, ends the process with exit code 2 and a message that names the option.

Two more variables: `RUST_LOG` chooses what is logged (`info,ort=warn,actix_server=warn` by default), and `GLMSERVE_SIMD`
forces the instruction set of the CPU's operators: `portable`, `avx2`, `avxvnni`, `avx512` or `amx`, the best one that the
processor has by default.

Exit codes: 1 for an error, 2 for a command line that is not understood, and 70 for an engine that failed while it served
and that only a new process heals.
";

fn configuration_md() -> String {
    let mut text = START.to_owned();
    for command in Cli::command().get_subcommands() {
        let about = command.get_about().expect("every command says what it does");
        write!(text, "\n## `glmserve {}`\n\n{about}.\n\n", command.get_name()).unwrap();
        text += "| option | variable | default | meaning |\n|---|---|---|---|\n";
        for arg in command.get_arguments() {
            write_row(&mut text, command, arg);
        }
    }
    text
}

fn write_row(text: &mut String, command: &Command, arg: &Arg) {
    let values = arg.get_value_names().unwrap_or_default().join(" ");
    let name = match arg.get_long() {
        Some(long) if arg.get_action().takes_values() => format!("--{long} {values}"),
        Some(long) => format!("--{long}"),
        None => values,
    };
    let variable = arg.get_env().map_or(String::new(), |name| format!("`{}`", name.to_string_lossy()));
    let help =
        arg.get_help().unwrap_or_else(|| panic!("{} {name} has no help", command.get_name())).to_string();
    // What has no fixed default says in words what it is.
    let (help, default) = match help.split_once(" [default: ") {
        Some((help, default)) => (help.to_owned(), default.trim_end_matches(']').to_owned()),
        None if !arg.get_action().takes_values() => (help, "off".to_owned()),
        None => {
            let values: Vec<_> =
                arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
            let default = if values.is_empty() { String::new() } else { format!("`{}`", values.join(",")) };
            (help, default)
        }
    };
    let required = if arg.is_required_set() { "required" } else { &default };
    let help = help.replace('|', "\\|");
    writeln!(text, "| `{name}` | {variable} | {required} | {} |", help.trim_end_matches('.')).unwrap();
}

#[test]
fn configuration_md_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    if std::env::var_os("GLMSERVE_WRITE_DOCS").is_some() {
        std::fs::write(&path, configuration_md()).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap();
    assert!(
        found == configuration_md(),
        "docs/configuration.md says something else than --help; its head says how to write it"
    );
}
