//! The variables of the environment, as the program reads them.

use std::process::{Command, Output};

use clap::ArgAction;
use glmserve::config::Cli;

/// `glmserve serve` of a folder that is not there, which is what it fails on if its options are right.
fn serve(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_glmserve"));
    let names = std::env::vars_os().map(|(name, _)| name);
    names.filter(|name| name.to_string_lossy().starts_with("GLMSERVE_")).for_each(|name| {
        command.env_remove(name);
    });
    command.env_remove("RUST_LOG").envs(variables.iter().copied());
    command.args(["serve", "--model", "no/such/folder"]).args(arguments).output().unwrap()
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The variables of `serve`: of flags, and of all options.
fn names() -> (Vec<String>, Vec<String>) {
    let command = Cli::command_line();
    let serve = command.find_subcommand("serve").unwrap();
    let (mut flags, mut all) = (Vec::new(), Vec::new());
    for arg in serve.get_arguments() {
        let Some(name) = arg.get_env().and_then(|name| name.to_str()) else { continue };
        all.push(name.to_owned());
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            flags.push(name.to_owned());
        }
    }
    (flags, all)
}

#[test]
fn each_flag_takes_booleans_in_every_usual_spelling() {
    let (flags, _) = names();
    assert!(flags.len() >= 4, "{flags:?}");
    for flag in &flags {
        for value in ["1", "0", "true", "FALSE", "yes", "No", "on", "off", ""] {
            let error = error(&serve(&[], &[(flag, value)]));
            assert!(error.contains("no/such/folder"), "{flag}={value}: {error}");
        }
        let output = serve(&[], &[(flag, "maybe")]);
        let option = flag.strip_prefix("GLMSERVE_").unwrap().to_lowercase().replace('_', "-");
        assert_eq!(output.status.code(), Some(2), "{flag}");
        assert!(error(&output).contains(&format!("--{option}")), "{}", error(&output));
    }
}

#[test]
fn a_flag_that_says_no_contradicts_nothing() {
    let salt = ["--prefix-cache-salt-per-key"];
    let error_with = |value| error(&serve(&salt, &[("GLMSERVE_NO_PREFIX_CACHE", value)]));
    assert!(error_with("no").contains("no/such/folder"), "{}", error_with("no"));
    assert!(error_with("yes").contains("cannot be used with"), "{}", error_with("yes"));
}

#[test]
fn empty_variables_are_unset() {
    let (_, all) = names();
    let variables: Vec<(&str, &str)> = all.iter().map(|name| (name.as_str(), "")).collect();
    let error = error(&serve(&[], &[&variables[..], &[("RUST_LOG", "")]].concat()));
    assert!(error.contains("no/such/folder"), "{error}");
}

#[test]
fn a_log_filter_that_cannot_be_read_is_named() {
    let output = serve(&[], &[("RUST_LOG", "info,ort=loud")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(error(&output).contains("RUST_LOG") && error(&output).contains("loud"), "{}", error(&output));
}
