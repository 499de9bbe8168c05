//! Owns what makes a manifest, and the folder around it, consistent.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Dtype, FileEntry, Kernel, Manifest, OutputKind, Provider, SCHEMA_VERSION};
use crate::error::LoadError;
use crate::sampling_params::SamplingParams;

/// Files up to this size are hashed at each start: graph, tokenizer and notices.
const MAX_HASHED_BYTES: u64 = 64 << 20;
/// Bytes that are read at a time.
const READ_BYTES: usize = 1 << 20;

// Far beyond any network of the family, small enough that a damaged number is refused by name before memory is
// taken for it.
const MAX_LAYERS: usize = 1 << 10;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 12;
/// Of vocabularies and sequences.
const MAX_TOKENS: usize = 1 << 24;

impl Manifest {
    /// Reads and checks `dir/manifest.json`, and the sizes of the files that it lists.
    ///
    /// # Errors
    /// [`LoadError`] names the file, and the field where one is wrong.
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        let manifest = Self::read(dir)?;
        // All sizes, since a cut copy is the commonest damage, and the contents of all but the
        // weights, which take minutes to read.
        for (name, entry) in &manifest.files {
            entry.check_size(dir, name)?;
            if entry.bytes <= MAX_HASHED_BYTES {
                entry.check_content(dir, name, &mut |_| ())?;
            }
        }
        Ok(manifest)
    }

    /// Reads and checks `dir/manifest.json` alone.
    ///
    /// # Errors
    /// [`LoadError`] names the field that is wrong.
    pub fn read(dir: &Path) -> Result<Self, LoadError> {
        let path = dir.join("manifest.json");
        let text =
            std::fs::read_to_string(&path).map_err(|source| LoadError::Io { path: path.clone(), source })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: PathBuf) -> Result<Self, LoadError> {
        let bad = |message: String| LoadError::Manifest { path: path.clone(), message };
        // The version first: another version may have another shape.
        let value: serde_json::Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        let found =
            value["schema_version"].as_u64().ok_or_else(|| bad("schema_version is missing".into()))?;
        if found != SCHEMA_VERSION {
            return Err(LoadError::SchemaVersion { path, found, expected: SCHEMA_VERSION });
        }
        let manifest: Self = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
        manifest.check().map_err(bad)?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        let g = &self.geometry;
        let positive = [
            ("num_layers", g.num_layers, MAX_LAYERS),
            ("hidden_size", g.hidden_size, MAX_WIDTH),
            ("num_attention_heads", g.num_attention_heads, MAX_HEADS),
            ("num_kv_heads", g.num_kv_heads, MAX_HEADS),
            ("head_dim", g.head_dim, MAX_WIDTH),
            ("vocab_size", g.vocab_size, MAX_TOKENS),
            ("padded_vocab_size", g.padded_vocab_size, MAX_TOKENS),
            ("max_model_len", g.max_model_len, MAX_TOKENS),
        ];
        if let Some((name, value, most)) =
            positive.iter().find(|(_, value, most)| !(1..=*most).contains(value))
        {
            return Err(format!("geometry.{name} is {value}, not between 1 and {most}"));
        }
        if !g.num_attention_heads.is_multiple_of(g.num_kv_heads) {
            return Err(format!(
                "geometry.num_attention_heads {} is not a multiple of num_kv_heads {}",
                g.num_attention_heads, g.num_kv_heads
            ));
        }
        if g.rotary_dim > g.head_dim || !g.rotary_dim.is_multiple_of(2) {
            return Err(format!("geometry.rotary_dim {} must be even and at most head_dim", g.rotary_dim));
        }
        if g.vocab_size > g.padded_vocab_size {
            return Err("geometry.vocab_size is larger than padded_vocab_size".into());
        }
        let block_size = self.graph.block_size;
        if !(16..=256).contains(&block_size) || !block_size.is_power_of_two() {
            return Err(format!("graph.block_size {block_size} is not a power of two from 16 to 256"));
        }
        if g.checked_kv_bits(self.graph.kv_cache_dtype, block_size).is_none() {
            return Err("geometry: keys and values of one block are more than memory can have".into());
        }
        let mut listing = Sha256::new();
        for (name, entry) in &self.files {
            listing.update(format!("{name} {}\n", entry.sha256));
        }
        if self.digest != format!("sha256:{}", hex(&listing.finalize())) {
            return Err("digest is not that of files: it was edited".into());
        }
        let ids = self.chat.special_tokens.values().chain(&self.stop_token_ids);
        if let Some(id) = ids.into_iter().find(|id| **id as usize >= g.vocab_size) {
            return Err(format!("token id {id} is not below geometry.vocab_size {}", g.vocab_size));
        }
        if self.stop_token_ids.is_empty() {
            return Err("stop_token_ids is empty: no reply would ever end by itself".into());
        }
        for file in [&self.graph.file, &self.tokenizer.file] {
            if !self.files.contains_key(file) {
                return Err(format!("files does not list {file}"));
            }
        }
        if let Some(file) = self.files.keys().find(|file| file.contains(['/', '\\'])) {
            return Err(format!("files lists {file}, which is not in the folder itself"));
        }
        if self.model.name.trim().is_empty() {
            return Err("model.name is empty".into());
        }
        let names = &self.graph.names;
        for pattern in [&names.key_cache, &names.value_cache] {
            if !pattern.contains("{layer}") {
                return Err(format!("graph.names: {pattern} has no {{layer}}"));
            }
        }
        let mut distinct: Vec<String> = names.small_inputs().map(str::to_owned).into();
        distinct.push(names.logits.clone());
        distinct.extend(names.topk().into_iter().flatten().map(str::to_owned));
        // As the graph has them: two patterns may differ and still meet in some layers.
        distinct.extend((0..g.num_layers).flat_map(|layer| names.caches(layer)));
        distinct.sort_unstable();
        if let Some(twice) = distinct.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("graph.names: {} stands for two tensors", twice[0]));
        }
        // The ranges that a request's own values must keep: a default outside would fail every request.
        let defaults = SamplingParams {
            temperature: self.generation.temperature.unwrap_or(1.0),
            top_p: self.generation.top_p.unwrap_or(1.0),
            repetition_penalty: self.generation.repetition_penalty.unwrap_or(1.0),
            ..Default::default()
        };
        defaults.validate(g.vocab_size).map_err(|error| format!("generation.{error}"))?;
        let stops = SamplingParams { stop_token_ids: self.stop_token_ids.clone(), ..Default::default() };
        stops.validate(g.vocab_size).map_err(|error| error.to_string())?;
        if (self.graph.output == OutputKind::Topk) != names.topk().is_some() {
            return Err("graph.names: topk_ids, topk_values and logsumexp belong to output topk".into());
        }
        self.check_dtypes()?;
        Ok(())
    }

    /// What each provider computes in, and what it can keep keys and values as.
    fn check_dtypes(&self) -> Result<(), String> {
        let graph = &self.graph;
        let (activations, cache) = (graph.activation_dtype, graph.kv_cache_dtype);
        let may_compute = match graph.provider {
            Provider::Cpu => activations == Dtype::Float32,
            Provider::Cuda => matches!(activations, Dtype::Float16 | Dtype::Bfloat16),
        };
        if !may_compute {
            return Err(format!(
                "graph.activation_dtype {activations:?}: {:?} cannot run it",
                graph.provider
            ));
        }
        let may_keep = match graph.provider {
            Provider::Cpu => cache == Dtype::Bfloat16,
            Provider::Cuda => matches!(cache, Dtype::Float8e4m3fn | Dtype::Int8 | Dtype::Int4),
        };
        if cache != activations && !may_keep {
            return Err(format!(
                "graph.kv_cache_dtype {cache:?} does not go with {activations:?} on {:?}",
                graph.provider
            ));
        }
        if graph.kernel == Kernel::Glmserve && graph.provider != Provider::Cpu {
            return Err(format!("graph.kernel glmserve does not go with {:?}", graph.provider));
        }
        Ok(())
    }
}

impl FileEntry {
    /// Compares the file `name` of the folder `dir` with the entry: place, size and content, however
    /// large; `progress` hears how many bytes were read.
    ///
    /// # Errors
    /// [`LoadError`] names the file.
    pub fn check(&self, dir: &Path, name: &str, progress: &mut dyn FnMut(u64)) -> Result<(), LoadError> {
        self.check_size(dir, name)?;
        self.check_content(dir, name, progress)
    }

    fn check_size(&self, dir: &Path, name: &str) -> Result<(), LoadError> {
        let path = dir.join(name);
        let found = path.metadata().map_err(|source| LoadError::Io { path: path.clone(), source })?.len();
        if found != self.bytes {
            return Err(LoadError::FileSize { path, wanted: self.bytes, found });
        }
        check_place(dir, &path)
    }

    fn check_content(&self, dir: &Path, name: &str, progress: &mut dyn FnMut(u64)) -> Result<(), LoadError> {
        let path = dir.join(name);
        let failed = |source| LoadError::Io { path: path.clone(), source };
        let mut file = File::open(&path).map_err(failed)?;
        let (mut hash, mut buffer, mut num_read) = (Sha256::new(), vec![0; READ_BYTES], 0);
        loop {
            let len = file.read(&mut buffer).map_err(failed)?;
            if len == 0 {
                break;
            }
            hash.update(&buffer[..len]);
            num_read += len as u64;
            progress(num_read);
        }
        match hex(&hash.finalize()) {
            found if found == self.sha256 => Ok(()),
            found => Err(LoadError::FileContent { path, wanted: self.sha256.clone(), found }),
        }
    }
}

/// ONNX Runtime reads weights only from the graph's own folder, and follows links to see that.
fn check_place(dir: &Path, path: &Path) -> Result<(), LoadError> {
    let real =
        |path: &Path| path.canonicalize().map_err(|source| LoadError::Io { path: path.into(), source });
    let found = real(path)?;
    match found.starts_with(real(dir)?) {
        true => Ok(()),
        false => Err(LoadError::LinkOutside { path: path.into(), found }),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    /// The exporter's tests compare what they write with this same file.
    const GOLDEN: &str = include_str!("../../../../export/tests/golden/manifest.json");

    fn parse(text: &str) -> Result<Manifest, LoadError> {
        Manifest::parse(text, PathBuf::from("manifest.json"))
    }

    #[test]
    fn the_golden_manifest_of_the_exporter_is_understood() {
        let manifest = parse(GOLDEN).unwrap();
        assert_eq!(manifest.schema_version, SCHEMA_VERSION);
        assert_eq!(manifest.graph.output, OutputKind::Logits);
        assert_eq!(manifest.graph.kernel, Kernel::Glmserve);
        assert!(manifest.files.contains_key(&manifest.graph.file));
    }

    #[test]
    fn a_file_that_is_a_link_to_elsewhere_is_refused() {
        let root = std::env::temp_dir().join(format!("glm-engine-links-{}", std::process::id()));
        let dir = root.join("model");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(root.join("blob"), "").unwrap();
        std::fs::write(dir.join("inside"), "").unwrap();
        std::os::unix::fs::symlink("../blob", dir.join("away")).unwrap();
        std::os::unix::fs::symlink("inside", dir.join("near")).unwrap();
        let found = ["inside", "near", "away"].map(|name| check_place(&dir, &dir.join(name)).is_ok());
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, [true, true, false]);
    }

    #[test]
    fn a_file_that_is_not_as_exported_is_named() {
        let dir = std::env::temp_dir().join(format!("glm-engine-files-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let entry = FileEntry { bytes: 4, sha256: hex(&Sha256::digest("data")) };
        let check = |content| {
            std::fs::write(dir.join("weights"), content).unwrap();
            entry.check(&dir, "weights", &mut |_| ()).map_err(|error| error.to_string())
        };
        let [whole, cut, other] = ["data", "dat", "date"].map(check);
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(whole, Ok(()));
        let path = dir.join("weights").display().to_string();
        let (cut, other) = (cut.unwrap_err(), other.unwrap_err());
        assert!(cut.starts_with(&format!("{path} has 3 bytes, and 4 were exported")), "{cut}");
        assert!(other.starts_with(&format!("{path} has another content")), "{other}");
        assert!(other.ends_with(&entry.sha256), "{other}");
    }

    #[test]
    fn a_cuda_graph_with_candidates_is_understood() {
        let mut text: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        let graph = text["graph"].as_object_mut().unwrap();
        for (key, value) in [
            ("provider", "cuda"),
            ("kernel", "ort"),
            ("activation_dtype", "bfloat16"),
            ("kv_cache_dtype", "int4"),
            ("output", "topk"),
        ] {
            graph.insert(key.into(), value.into());
        }
        for name in ["topk_ids", "topk_values", "logsumexp"] {
            assert!(parse(&text.to_string()).unwrap_err().to_string().contains("topk_ids"));
            text["graph"]["names"][name] = name.into();
        }
        let manifest = parse(&text.to_string()).unwrap();
        assert_eq!(manifest.graph.names.topk(), Some(["topk_ids", "topk_values", "logsumexp"]));
        let bytes = |dtype| manifest.geometry.kv_bytes_per_token(dtype);
        assert_eq!(bytes(Dtype::Float16), 4 * bytes(manifest.graph.kv_cache_dtype));
    }

    #[test]
    fn caches_that_are_one_tensor_in_some_layer_are_refused() {
        let mut text: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        text["geometry"]["num_layers"] = 12.into();
        text["graph"]["names"]["key_cache"] = "cache.{layer}".into();
        text["graph"]["names"]["value_cache"] = "cache.1{layer}".into();
        let error = parse(&text.to_string()).unwrap_err().to_string();
        assert!(error.contains("cache.10 stands for two tensors"), "{error}");
        text["geometry"]["num_layers"] = 10.into();
        assert!(parse(&text.to_string()).is_ok());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        let cases = [
            ("/schema_version", serde_json::json!(2), "schema_version 2"),
            ("/geometry/num_layers", serde_json::json!(0), "geometry.num_layers"),
            ("/geometry/rotary_dim", serde_json::json!(3), "geometry.rotary_dim"),
            ("/geometry/num_kv_heads", serde_json::json!(1000), "num_attention_heads"),
            ("/geometry/hidden_size", serde_json::json!(1u64 << 40), "geometry.hidden_size"),
            ("/geometry/num_layers", serde_json::json!(1 << 24), "geometry.num_layers"),
            ("/geometry/head_dim", serde_json::json!(1 << 24), "geometry.head_dim"),
            ("/geometry/max_model_len", serde_json::json!(u64::MAX), "geometry.max_model_len"),
            ("/graph/block_size", serde_json::json!(48), "graph.block_size"),
            ("/graph/names/value_cache", golden["graph"]["names"]["key_cache"].clone(), "stands for two"),
            ("/stop_token_ids", serde_json::json!(vec![1; 1025]), "stop_token_ids"),
            ("/graph/output", serde_json::json!("topk"), "belong to output topk"),
            ("/graph/output", serde_json::json!("ids"), "unknown variant `ids`"),
            ("/graph/provider", serde_json::json!("cuda"), "graph.activation_dtype Float32"),
            ("/graph/activation_dtype", serde_json::json!("float16"), "graph.activation_dtype Float16"),
            ("/graph/kernel", serde_json::json!("other"), "unknown variant `other`"),
            ("/graph/kv_cache_dtype", serde_json::json!("int8"), "graph.kv_cache_dtype Int8"),
            ("/graph/kv_cache_dtype", serde_json::json!("float16"), "graph.kv_cache_dtype Float16"),
            ("/graph/names/key_cache", serde_json::json!("key"), "{layer}"),
            ("/stop_token_ids", serde_json::json!([]), "stop_token_ids"),
            ("/stop_token_ids/0", serde_json::json!(1_000_000), "1000000"),
            ("/graph/names/past_seqlens", serde_json::json!("token_ids"), "token_ids stands for two"),
            ("/generation/top_p", serde_json::json!(7), "generation.top_p"),
            ("/generation/temperature", serde_json::json!(-5), "generation.temperature"),
            ("/model/name", serde_json::json!(" "), "model.name"),
            ("/files", serde_json::json!({}), "files"),
            ("/files", serde_json::json!({"../x": {"bytes": 1, "sha256": ""}}), "files"),
        ];
        for (pointer, value, words) in cases {
            let mut damaged = golden.clone();
            *damaged.pointer_mut(pointer).unwrap() = value;
            let error = parse(&damaged.to_string()).unwrap_err().to_string();
            assert!(error.contains(words), "{pointer}: {error}");
        }
    }
}
