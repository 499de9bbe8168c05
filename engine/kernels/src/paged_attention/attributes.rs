//! Owns the node's attributes: what this kernel computes, and the refusal of everything else.
//!
//! Invariant: attributes that passed [`Attributes::check`] divide heads evenly and mean plain causal
//! attention; no feature of ONNX Runtime's schema is ignored silently.

/// What a node asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Attributes {
    /// Query heads.
    pub(super) num_heads: usize,
    /// Key/value heads.
    pub(super) kv_num_heads: usize,
    /// Factor of the scores; none is one over the root of the head size.
    pub(super) scale: Option<f32>,
    /// Whether queries and keys are rotated by their positions.
    pub(super) do_rotary: bool,
    /// Whether rotated channels are neighbours, else half the rotary width apart.
    pub(super) interleaved: bool,
}

/// Where attributes come from: a node, or a test.
pub(super) trait Source {
    /// An integer attribute, if the node has it.
    fn int(&self, name: &str) -> Option<i64>;
    /// A float attribute, if the node has it.
    fn float(&self, name: &str) -> Option<f32>;
    /// A string attribute, if the node has it.
    fn string(&self, name: &str) -> Option<String>;
}

/// Integer attributes of the schema that must keep their default.
const FIXED_INTS: [(&str, i64); 4] =
    [("is_causal", 1), ("local_window_size", -1), ("rotary_offset", 0), ("v_head_size", 0)];

/// String attributes of the schema and the values that mean what this kernel does.
const FIXED_STRINGS: [(&str, &[&str]); 5] = [
    ("k_quant_type", &["", "NONE"]),
    ("v_quant_type", &["", "NONE"]),
    ("k_cache_dtype", &["", "float", "float32"]),
    ("v_cache_dtype", &["", "float", "float32"]),
    ("kv_cache_layout", &["", "SEPARATE"]),
];

impl Attributes {
    /// Reads a node's attributes.
    ///
    /// # Errors
    /// Names the attribute that is missing, wrong or not supported.
    pub(super) fn check(source: &impl Source) -> Result<Self, String> {
        let positive = |name: &str| match source.int(name) {
            Some(value) if (1..=1 << 16).contains(&value) => Ok(value as usize),
            Some(value) => Err(format!("{name} is {value}")),
            None => Err(format!("{name} is missing")),
        };
        let flag = |name: &str| match source.int(name) {
            None | Some(0) => Ok(false),
            Some(1) => Ok(true),
            Some(value) => Err(format!("{name} is {value}, not 0 or 1")),
        };
        for (name, default) in FIXED_INTS {
            match source.int(name) {
                Some(value) if value != default => {
                    return Err(format!("{name} is {value}; only {default} is supported"));
                }
                _ => {}
            }
        }
        for (name, allowed) in FIXED_STRINGS {
            match source.string(name) {
                Some(value) if !allowed.contains(&value.as_str()) => {
                    return Err(format!("{name} is {value:?}, which is not supported"));
                }
                _ => {}
            }
        }
        if let Some(value) = source.float("softcap")
            && value != 0.0
        {
            return Err(format!("softcap is {value}; only 0 is supported"));
        }
        let scale = source.float("scale").filter(|scale| *scale != 0.0);
        if let Some(scale) = scale
            && !scale.is_finite()
        {
            return Err(format!("scale is {scale}"));
        }
        let (num_heads, kv_num_heads) = (positive("num_heads")?, positive("kv_num_heads")?);
        if !num_heads.is_multiple_of(kv_num_heads) {
            return Err(format!("num_heads {num_heads} is not a multiple of kv_num_heads {kv_num_heads}"));
        }
        Ok(Self {
            num_heads,
            kv_num_heads,
            scale,
            do_rotary: flag("do_rotary")?,
            interleaved: flag("rotary_interleaved")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    enum Value {
        Int(i64),
        Float(f32),
        String(&'static str),
    }
    use Value::{Float, Int, String as Text};

    struct Node(Vec<(&'static str, Value)>);

    impl Node {
        fn get(&self, wanted: &str) -> Option<&Value> {
            self.0.iter().rev().find(|(name, _)| *name == wanted).map(|(_, value)| value)
        }
    }

    impl Source for Node {
        fn int(&self, name: &str) -> Option<i64> {
            match self.get(name) {
                Some(Int(value)) => Some(*value),
                _ => None,
            }
        }
        fn float(&self, name: &str) -> Option<f32> {
            match self.get(name) {
                Some(Float(value)) => Some(*value),
                _ => None,
            }
        }
        fn string(&self, name: &str) -> Option<String> {
            match self.get(name) {
                Some(Text(value)) => Some((*value).into()),
                _ => None,
            }
        }
    }

    fn check(extra: impl IntoIterator<Item = (&'static str, Value)>) -> Result<Attributes, String> {
        let mut node = vec![("num_heads", Int(32)), ("kv_num_heads", Int(2))];
        node.extend(extra);
        Attributes::check(&Node(node))
    }

    #[test]
    fn defaults_may_be_absent_or_spelt_out() {
        let plain = check([]).unwrap();
        let spelt = check([
            ("scale", Float(0.0)),
            ("softcap", Float(0.0)),
            ("local_window_size", Int(-1)),
            ("is_causal", Int(1)),
            ("do_rotary", Int(0)),
            ("k_quant_type", Text("NONE")),
            ("kv_cache_layout", Text("SEPARATE")),
            ("k_cache_dtype", Text("")),
        ]);
        assert_eq!(spelt.unwrap(), plain);
        assert_eq!(plain.scale, None);
        assert_eq!(check([("scale", Float(0.5))]).unwrap().scale, Some(0.5));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let refused = [
            ("softcap", Float(30.0)),
            ("scale", Float(f32::NAN)),
            ("local_window_size", Int(4096)),
            ("is_causal", Int(0)),
            ("rotary_offset", Int(8)),
            ("v_head_size", Int(64)),
            ("k_quant_type", Text("PER_TENSOR")),
            ("v_cache_dtype", Text("int8")),
            ("kv_cache_layout", Text("LATENT")),
            ("do_rotary", Int(2)),
            ("num_heads", Int(0)),
            ("kv_num_heads", Int(5)),
        ];
        for (name, value) in refused {
            let message = check([(name, value)]).unwrap_err();
            assert!(message.contains(name), "{name}: {message}");
        }
        let message = Attributes::check(&Node(vec![])).unwrap_err();
        assert_eq!(message, "num_heads is missing");
    }
}
