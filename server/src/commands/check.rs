//! Owns `glmserve check`: everything that can be known of a model folder before it serves, a line each.
//!
//! Invariant: a check that fails does not hide the others, except those that would only repeat it.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use glm_engine::Manifest;
use glm_engine::model::known_answer::{Agreement, KnownAnswer};
use glm_engine::model::manifest::FileEntry;
use glm_engine::runner::ModelRunner;
use glm_engine::runner::ort::{OrtOptions, OrtRunner};

use crate::config::CheckArgs;
use crate::serve_error::LoadFailure;
use crate::text::chat_format::{ChatFormat, Message, Role};
use crate::text::detokenizer::Detokenizer;
use crate::text::tokenizer::Tokenizer;
use crate::verify::verify;

/// A larger file tells how far it is, each time this many bytes were read.
const PROGRESS_BYTES: u64 = 1 << 30;
/// What a tokenizer must give back as it was.
const TEXTS: [&str; 5] = [
    "Hello, world!",
    "你好，世界。",
    "def f(x):\n    return x  # two  spaces\n",
    "1 + 1 = 2, 3.14 and 你好👋",
    "naïve café \u{1F469}\u{200D}\u{1F680}",
];

/// Checks a folder and prints what it finds.
pub(super) fn run(args: &CheckArgs) -> Result<(), LoadFailure> {
    // Not eprintln, which panics when nobody takes what it prints.
    let mut progress = |line: &str| drop(writeln!(std::io::stderr(), "{line}"));
    let options = |kv_cache_bytes| args.runtime.options(kv_cache_bytes);
    let num_wrong = check(&args.dir, options, &mut std::io::stdout(), &mut progress)?;
    match num_wrong {
        0 => Ok(()),
        _ => Err(format!("{}: {num_wrong} of the checks above failed", args.dir.display()).into()),
    }
}

/// Prints a line for each check of the folder `dir`, with `progress` of what takes long; returns how
/// many failed. `options` says how to run the graph with so many bytes of cache.
///
/// # Errors
/// `out` takes no more lines.
fn check(
    dir: &Path,
    options: impl FnOnce(usize) -> OrtOptions,
    out: &mut impl Write,
    progress: &mut dyn FnMut(&str),
) -> io::Result<usize> {
    let mut report = Report { out, num_wrong: 0 };
    let manifest = Manifest::read(dir).map(|manifest| {
        let words = format!("{}, {}, {}", manifest.model.name, manifest.graph.precision, manifest.digest);
        (words, manifest)
    });
    let Some(manifest) = report.line("manifest", manifest)? else { return Ok(report.num_wrong) };
    for (name, entry) in &manifest.files {
        report.line(&format!("file {name}"), check_file(dir, name, entry, progress))?;
    }
    let files_are_whole = report.num_wrong == 0;
    let tokenizer = Tokenizer::load(dir, &manifest).map_err(|error| error.to_string());
    let tokenizer = tokenizer.and_then(|tokenizer| {
        check_tokenizer(&tokenizer, &manifest)?;
        Ok((
            format!(
                "{} texts are the same after encoding and decoding, no text is taken for one of the {} special tokens",
                TEXTS.len(),
                manifest.chat.special_tokens.len()
            ),
            tokenizer,
        ))
    });
    if let Some(tokenizer) = report.line("tokenizer", tokenizer)? {
        report.line("chat format", check_chat(&tokenizer, &manifest))?;
    }
    if !files_are_whole {
        writeln!(report.out, "skip graph and known answer: the files are not those that were exported")?;
        return Ok(report.num_wrong);
    }
    // What is wrong with the file is said below.
    let known = KnownAnswer::load(dir, &manifest).ok().flatten();
    let num_tokens = known.map_or(1, |known| known.token_ids.len());
    let num_blocks = num_tokens.div_ceil(manifest.graph.block_size);
    let block_bytes =
        manifest.geometry.kv_bytes_per_token(manifest.graph.kv_cache_dtype) * manifest.graph.block_size;
    let runner = OrtRunner::load(dir, &manifest, &options(num_blocks * block_bytes));
    let runner = runner.map(|runner| ("inputs and outputs are as the manifest says".to_owned(), runner));
    if let Some(mut runner) = report.line("graph", runner)? {
        report.line("known answer", check_known_answer(&mut runner, dir, &manifest))?;
    }
    Ok(report.num_wrong)
}

struct Report<'a, W> {
    out: &'a mut W,
    num_wrong: usize,
}

impl<W: Write> Report<'_, W> {
    /// One line; what the check found, if it went well.
    fn line<T>(&mut self, name: &str, result: Result<(String, T), impl Display>) -> io::Result<Option<T>> {
        match result {
            Ok((words, value)) => writeln!(self.out, "ok   {name}: {words}").map(|()| Some(value)),
            Err(error) => {
                self.num_wrong += 1;
                writeln!(self.out, "FAIL {name}: {error}").map(|()| None)
            }
        }
    }
}

fn check_file(
    dir: &Path,
    name: &str,
    entry: &FileEntry,
    progress: &mut dyn FnMut(&str),
) -> Result<(String, ()), String> {
    let mut next = PROGRESS_BYTES;
    let mut tell = |num_read: u64| {
        if num_read >= next {
            next += PROGRESS_BYTES;
            progress(&format!("{name}: {} of {} GiB", num_read >> 30, entry.bytes.div_ceil(1 << 30)));
        }
    };
    entry.check(dir, name, &mut tell).map_err(|error| error.to_string())?;
    Ok((format!("{} bytes, sha256 {}", entry.bytes, entry.sha256), ()))
}

fn check_tokenizer(tokenizer: &Tokenizer, manifest: &Manifest) -> Result<(), String> {
    let encode = |text: &str| {
        let mut ids = Vec::new();
        tokenizer.encode_into(text, &mut ids).map(|()| ids).map_err(|error| error.to_string())
    };
    let (num_ids, vocab_size) = (tokenizer.vocabulary().num_ids(), manifest.geometry.vocab_size);
    if num_ids > vocab_size {
        return Err(format!("it has ids up to {}, and the model {vocab_size} tokens", num_ids - 1));
    }
    for (token, id) in &manifest.chat.special_tokens {
        if [token.clone(), format!("a {token}b")]
            .iter()
            .any(|text| encode(text).is_ok_and(|ids| ids.contains(id)))
        {
            return Err(format!("the text {token} becomes the special id {id}: users could forge turns"));
        }
    }
    for text in TEXTS {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer.vocabulary()));
        let mut found = String::new();
        encode(text)?.into_iter().for_each(|id| detokenizer.push(id, &mut found));
        detokenizer.finish(&mut found);
        if found != text {
            return Err(format!(
                "{text:?} comes back as {found:?}: it is another model's, or of another kind"
            ));
        }
    }
    Ok(())
}

fn check_chat(tokenizer: &Tokenizer, manifest: &Manifest) -> Result<(String, ()), String> {
    let message = |role, content: &str| Message { role, content: content.to_owned() };
    let messages = [message(Role::System, TEXTS[0]), message(Role::User, TEXTS[1])];
    let format = ChatFormat::new(&manifest.chat).map_err(|error| error.to_string())?;
    if !format.has_chat() {
        return Ok(("none: a base model, chat completions are refused".to_owned(), ()));
    }
    let ids = format.encode(&messages, tokenizer).map_err(|error| error.to_string())?;
    Ok((format!("{}, two messages are {} tokens", manifest.chat.format, ids.len()), ()))
}

fn check_known_answer(
    runner: &mut impl ModelRunner,
    dir: &Path,
    manifest: &Manifest,
) -> Result<(String, ()), String> {
    match verify(runner, dir, manifest).map_err(|error| error.to_string())? {
        Some(Agreement { error, tolerance }) => {
            Ok((format!("logits are off by {error:.2e} deviations, {tolerance:.2e} is tolerated"), ()))
        }
        None => Err("the folder has none: export again with the glm-export of this release".into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::fixtures::{self, ModelDir};

    /// The lines without what they found, of a machine that has no ONNX Runtime.
    fn lines(folder: &ModelDir) -> (Vec<String>, usize) {
        let library = "no/such/library".into();
        let options = |kv_cache_bytes| OrtOptions::new(library, 1, kv_cache_bytes);
        let mut out = Vec::new();
        let num_wrong = check(folder.path(), options, &mut out, &mut |_| ()).unwrap();
        (String::from_utf8(out).unwrap().lines().map(str::to_owned).collect(), num_wrong)
    }

    fn edit(folder: &ModelDir, change: impl FnOnce(&mut Value)) {
        let path = folder.path().join("manifest.json");
        let mut manifest = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        change(&mut manifest);
        std::fs::write(&path, manifest.to_string()).unwrap();
    }

    #[test]
    fn each_check_has_a_line() {
        for folder in fixtures::all_chats().into_iter().chain([fixtures::base()]) {
            let (lines, num_wrong) = lines(&folder);
            let found: Vec<&str> = lines.iter().map(|line| line.split(':').next().unwrap()).collect();
            let expected = [
                "ok   manifest",
                "ok   file model.onnx",
                "ok   file tokenizer.json",
                "ok   tokenizer",
                "ok   chat format",
                "FAIL graph",
            ];
            assert_eq!((found, num_wrong), (expected.to_vec(), 1), "{lines:#?}");
            assert!(lines[5].contains("no/such/library"), "{lines:#?}");
        }
    }

    #[test]
    #[ignore = "needs ChatGLM3's own tokenizer"]
    fn the_real_tokenizer_gives_the_texts_back() {
        let file = std::env::var_os("GLMSERVE_TEST_CHATGLM3_TOKENIZER").expect("the variable names it");
        let (lines, _) = lines(&fixtures::chatglm3_with(Path::new(&file)));
        assert!(lines[3].starts_with("ok   tokenizer"), "{lines:#?}");
    }

    #[test]
    fn what_is_wrong_is_named_and_hides_nothing_else() {
        let folder = fixtures::chatglm3();
        edit(&folder, |manifest| manifest["chat"]["format"] = json!("alpaca"));
        let (found, num_wrong) = lines(&folder);
        assert!(found[4].starts_with("FAIL chat format: ") && found[4].contains("alpaca"), "{found:#?}");
        assert_eq!(num_wrong, 2);

        let folder = fixtures::chatglm3();
        edit(&folder, |manifest| manifest["chat"]["special_tokens"]["a"] = json!(100));
        let (found, _) = lines(&folder);
        assert!(found[3].contains("the text a becomes the special id 100"), "{found:#?}");

        let folder = fixtures::chatglm3();
        edit(&folder, |manifest| manifest["tokenizer"]["pieces"] = json!("byte_level"));
        let (found, _) = lines(&folder);
        assert!(found[3].contains("comes back as"), "{found:#?}");

        let folder = fixtures::chatglm3();
        std::fs::write(folder.path().join("model.onnx"), "x").unwrap();
        let (found, num_wrong) = lines(&folder);
        assert!(found[1].contains("has 1 bytes, and 0 were exported"), "{found:#?}");
        assert!(found[5].starts_with("skip graph and known answer"), "{found:#?}");
        assert_eq!(num_wrong, 1);
    }

    #[test]
    fn a_later_manifest_says_which_version_it_needs() {
        let folder = fixtures::chatglm3();
        edit(&folder, |manifest| manifest["schema_version"] = json!(7));
        let (found, num_wrong) = lines(&folder);
        assert_eq!((found.len(), num_wrong), (1, 1));
        assert!(found[0].contains("schema_version 7 and needs a glmserve that reads it"), "{found:#?}");
    }
}
