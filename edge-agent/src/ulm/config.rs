//! `config.json` of a model folder.

use serde::Deserialize;

use super::LoadError;

/// The shape of a Llama-family decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Entries of the vocabulary.
    pub vocab: i64,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Decoder layers.
    pub layers: i64,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads (grouped-query attention); divides `heads`.
    pub kv_heads: i64,
    /// Width of a head; even.
    pub head_dim: i64,
    /// Width of the feed-forward layer.
    pub ffn: i64,
    /// Base of the rotary embedding's wavelengths.
    pub rope_theta: f64,
    /// Epsilon of the RMS norms.
    pub norm_eps: f64,
    /// Positions that the model was made for.
    pub max_positions: i64,
    /// Whether the output layer is the input embedding.
    pub tied: bool,
    /// Tokens that end a reply.
    pub eos: Vec<u32>,
}

/// Families whose checkpoints have exactly Llama's tensors.
const FAMILIES: &[&str] = &["llama", "swen", "minimind", "mistral"];

#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    vocab_size: i64,
    hidden_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    intermediate_size: i64,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<Rope>,
    rope_scaling: Option<Rope>,
    max_position_embeddings: Option<i64>,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    eos_token_id: Option<OneOrMore>,
}

#[derive(Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(u32),
    More(Vec<u32>),
}

impl Config {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`LoadError::Config`] names the field and what is wrong with it.
    pub fn parse(json: &str) -> Result<Self, LoadError> {
        let bad = |what: String| LoadError::Config(what);
        let raw: Raw = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        if let Some(family) = raw.model_type.as_deref().filter(|family| !FAMILIES.contains(family)) {
            return Err(bad(format!(
                "model_type is `{family}`; Segue runs the Llama family ({})",
                FAMILIES.join(", ")
            )));
        }
        if raw.hidden_act.as_deref().is_some_and(|act| act != "silu") {
            return Err(bad("hidden_act is not `silu`; Segue runs the Llama family".into()));
        }
        if raw.attention_bias == Some(true) || raw.mlp_bias == Some(true) {
            return Err(bad(
                "attention_bias and mlp_bias must be false; Segue runs the Llama family".into(),
            ));
        }
        let ropes = [&raw.rope_parameters, &raw.rope_scaling];
        for rope in ropes.into_iter().flatten() {
            if let Some(kind) = rope.rope_type.as_deref().filter(|kind| *kind != "default") {
                return Err(bad(format!(
                    "rope type `{kind}` is not supported; only plain rotary embeddings are"
                )));
            }
        }
        let rope_theta = raw
            .rope_parameters
            .as_ref()
            .and_then(|r| r.rope_theta)
            .or(raw.rope_theta)
            .unwrap_or(10_000.0);
        let kv_heads = raw.num_key_value_heads.unwrap_or(raw.num_attention_heads);
        let positive = [
            ("vocab_size", raw.vocab_size, 1 << 20),
            ("hidden_size", raw.hidden_size, 1 << 14),
            ("num_hidden_layers", raw.num_hidden_layers, 1 << 9),
            ("num_attention_heads", raw.num_attention_heads, 1 << 10),
            ("num_key_value_heads", kv_heads, 1 << 10),
            ("intermediate_size", raw.intermediate_size, 1 << 17),
            (
                "max_position_embeddings",
                raw.max_position_embeddings.unwrap_or(2048),
                i64::from(i32::MAX),
            ),
        ];
        for (name, value, most) in positive {
            if value < 1 || value > most {
                return Err(bad(format!("{name} is {value}, which is not between 1 and {most}")));
            }
        }
        if raw.num_attention_heads % kv_heads != 0 {
            return Err(bad(format!(
                "{} query heads cannot share {kv_heads} key heads",
                raw.num_attention_heads
            )));
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads);
        if head_dim < 2 || head_dim % 2 != 0 || head_dim > 1 << 10 {
            return Err(bad(format!(
                "head_dim is {head_dim}, which is no even number between 2 and 1024"
            )));
        }
        let norm_eps = raw.rms_norm_eps.unwrap_or(1e-6);
        if !(rope_theta.is_finite() && rope_theta > 1.0 && norm_eps.is_finite() && norm_eps > 0.0) {
            return Err(bad(format!(
                "rope_theta {rope_theta} or rms_norm_eps {norm_eps} is out of range"
            )));
        }
        Ok(Self {
            vocab: raw.vocab_size,
            hidden: raw.hidden_size,
            layers: raw.num_hidden_layers,
            heads: raw.num_attention_heads,
            kv_heads,
            head_dim,
            ffn: raw.intermediate_size,
            rope_theta,
            norm_eps,
            max_positions: raw.max_position_embeddings.unwrap_or(2048),
            tied: raw.tie_word_embeddings.unwrap_or(false),
            eos: match raw.eos_token_id {
                Some(OneOrMore::One(id)) => vec![id],
                Some(OneOrMore::More(ids)) => ids,
                None => Vec::new(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"model_type":"llama","vocab_size":64,"hidden_size":16,"num_hidden_layers":2,"num_attention_heads":4,
        "num_key_value_heads":2,"intermediate_size":32,"rms_norm_eps":1e-5,"rope_theta":1e4,"eos_token_id":[2,3]}"#;

    #[test]
    fn both_places_of_rope_theta_are_read() {
        assert_eq!(Config::parse(GOOD).unwrap().rope_theta, 1e4);
        let newer = GOOD.replace(
            "\"rope_theta\":1e4",
            r#""rope_parameters":{"rope_type":"default","rope_theta":1e6}"#,
        );
        assert_eq!(Config::parse(&newer).unwrap().rope_theta, 1e6);
    }

    #[test]
    fn foreign_or_broken_configurations_are_refused_by_name() {
        for (from, to, says) in [
            ("llama", "gpt2", "gpt2"),
            ("\"vocab_size\":64", "\"vocab_size\":0", "vocab_size"),
            ("\"vocab_size\":64,", "", "vocab_size"),
            ("\"num_key_value_heads\":2", "\"num_key_value_heads\":3", "3 key heads"),
            ("\"rms_norm_eps\":1e-5", "\"hidden_act\":\"gelu\"", "hidden_act"),
            ("\"rms_norm_eps\":1e-5", "\"attention_bias\":true", "attention_bias"),
            ("\"rms_norm_eps\":1e-5", "\"rope_scaling\":{\"type\":\"yarn\"}", "yarn"),
            ("\"rms_norm_eps\":1e-5", "\"head_dim\":7", "head_dim"),
            ("}", "", "EOF"),
        ] {
            let error = Config::parse(&GOOD.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
