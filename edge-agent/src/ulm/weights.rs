//! `model.safetensors` of a model folder, as libtorch tensors. Nothing is ever unpickled.

use safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};

use super::{LoadError, config::Config};

/// One layer's weights, with projections that read the same input fused into one matrix.
#[derive(Debug)]
pub struct LayerWeights {
    /// RMS norm before attention, [hidden].
    pub attention_norm: Tensor,
    /// Query, key and value projections, [(heads + 2 kv_heads) head_dim, hidden].
    pub qkv: Tensor,
    /// Attention's output projection, [hidden, heads head_dim].
    pub out: Tensor,
    /// RMS norm before the feed-forward layer, [hidden].
    pub ffn_norm: Tensor,
    /// Gate and up projections, [2 ffn, hidden].
    pub gate_up: Tensor,
    /// Down projection, [hidden, ffn].
    pub down: Tensor,
}

/// All weights, in 32-bit floating point.
#[derive(Debug)]
pub struct Weights {
    /// Token embeddings, [vocab, hidden].
    pub embedding: Tensor,
    /// The decoder's layers.
    pub layers: Vec<LayerWeights>,
    /// Final RMS norm, [hidden].
    pub norm: Tensor,
    /// Output layer, [vocab, hidden]; the embedding itself where they are tied.
    pub output: Tensor,
}

impl Weights {
    /// Reads the weights that `config` calls for out of a safetensors file's bytes.
    ///
    /// # Errors
    /// [`LoadError`] names the tensor that is missing, misshapen or not finite.
    pub fn parse(bytes: &[u8], config: &Config) -> Result<Self, LoadError> {
        if bytes.starts_with(b"PK") || bytes.starts_with(b"\x80") {
            return Err(LoadError::Weights(
                "it is a pickled PyTorch checkpoint; convert it to safetensors".into(),
            ));
        }
        let file = SafeTensors::deserialize(bytes)
            .map_err(|e| LoadError::Weights(format!("it is cut off or no safetensors file ({e})")))?;
        let Config {
            vocab,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn,
            ..
        } = *config;
        let get = |name: &str, shape: &[i64]| tensor(&file, name, shape);
        let embedding = get("model.embed_tokens.weight", &[vocab, hidden])?;
        let mut layers = Vec::new();
        for n in 0..config.layers {
            let get = |name: &str, shape: &[i64]| tensor(&file, &format!("model.layers.{n}.{name}.weight"), shape);
            layers.push(LayerWeights {
                attention_norm: get("input_layernorm", &[hidden])?,
                qkv: Tensor::cat(
                    &[
                        get("self_attn.q_proj", &[heads * head_dim, hidden])?,
                        get("self_attn.k_proj", &[kv_heads * head_dim, hidden])?,
                        get("self_attn.v_proj", &[kv_heads * head_dim, hidden])?,
                    ],
                    0,
                ),
                out: get("self_attn.o_proj", &[hidden, heads * head_dim])?,
                ffn_norm: get("post_attention_layernorm", &[hidden])?,
                gate_up: Tensor::cat(
                    &[
                        get("mlp.gate_proj", &[ffn, hidden])?,
                        get("mlp.up_proj", &[ffn, hidden])?,
                    ],
                    0,
                ),
                down: get("mlp.down_proj", &[hidden, ffn])?,
            });
        }
        let tied = config.tied || file.tensor("lm_head.weight").is_err();
        Ok(Self {
            output: if tied {
                embedding.shallow_clone()
            } else {
                get("lm_head.weight", &[vocab, hidden])?
            },
            norm: get("model.norm.weight", &[hidden])?,
            embedding,
            layers,
        })
    }
}

fn tensor(file: &SafeTensors<'_>, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
    let view = file
        .tensor(name)
        .map_err(|_| LoadError::Weights(format!("tensor {name} is missing; it should be {shape:?}")))?;
    let found: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
    if found != shape {
        return Err(LoadError::Weights(format!(
            "tensor {name} is {found:?}, but config.json calls for {shape:?}"
        )));
    }
    let kind = match view.dtype() {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => {
            return Err(LoadError::Weights(format!(
                "tensor {name} is {other:?}; Segue reads F32, F16 and BF16"
            )));
        }
    };
    let tensor = Tensor::f_from_data_size(view.data(), shape, kind)
        .map_err(|e| LoadError::Weights(format!("tensor {name}: {e}")))?
        .to_kind(Kind::Float);
    // A NaN or an infinity anywhere makes the sum of products not finite; this is one pass without a temporary copy.
    if !tensor.dot_self().is_finite() {
        return Err(LoadError::Weights(format!(
            "tensor {name} holds values that are not finite"
        )));
    }
    Ok(tensor)
}

trait DotSelf {
    /// The sum of squares.
    fn dot_self(&self) -> f64;
}

impl DotSelf for Tensor {
    fn dot_self(&self) -> f64 {
        let flat = self.view(-1);
        flat.dot(&flat).double_value(&[])
    }
}
