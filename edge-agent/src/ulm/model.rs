//! The forward pass of a Llama-family decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU) with a preallocated KV cache.
//!
//! Architecture: "LLaMA: Open and Efficient Foundation Language Models" (arXiv 2302.13971), with grouped-query attention
//! (arXiv 2305.13245). Layouts follow Hugging Face transformers, whose logits the tests compare with.

use tch::{Device, Kind, Tensor};

use super::{
    config::Config,
    precision::{Linear, Precision},
    weights::Weights,
};

struct Layer {
    attention_norm: Tensor,
    qkv: Linear,
    out: Linear,
    ffn_norm: Tensor,
    gate_up: Linear,
    down: Linear,
    /// Keys and values, each [kv_heads, capacity, head_dim].
    keys: Tensor,
    values: Tensor,
}

/// A loaded model with the cache of one sequence.
pub struct Model {
    config: Config,
    kind: Kind,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    output: Linear,
    /// Rotary factors per position, [capacity, head_dim]; the second half of `sin` repeats the first.
    cos: Tensor,
    sin: Tensor,
    capacity: usize,
    length: usize,
}

impl Model {
    /// Builds the model for at most `capacity` positions.
    pub fn new(config: Config, weights: Weights, precision: Precision, capacity: usize) -> Self {
        let kind = precision.activations();
        let linear = |weight: Tensor| Linear::new(weight, precision);
        let cache = || Tensor::zeros([config.kv_heads, capacity as i64, config.head_dim], (kind, Device::Cpu));
        let output = linear(weights.output);
        let layers = weights
            .layers
            .into_iter()
            .map(|layer| Layer {
                attention_norm: layer.attention_norm.to_kind(kind),
                qkv: linear(layer.qkv),
                out: linear(layer.out),
                ffn_norm: layer.ffn_norm.to_kind(kind),
                gate_up: linear(layer.gate_up),
                down: linear(layer.down),
                keys: cache(),
                values: cache(),
            })
            .collect();
        let (cos, sin) = rotary(&config, capacity);
        Self {
            kind,
            embedding: weights.embedding.to_kind(kind),
            layers,
            norm: weights.norm.to_kind(kind),
            output,
            cos: cos.to_kind(kind),
            sin: sin.to_kind(kind),
            capacity,
            length: 0,
            config,
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Positions that the cache can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Positions that are in the cache.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Forgets all but the first `length` positions.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Appends `tokens` to the sequence and returns the logits after the last of them, [vocab] values.
    ///
    /// # Panics
    /// When `tokens` is empty or does not fit, or a token is outside the vocabulary; the engine checks that before.
    pub fn forward(&mut self, tokens: &[i64]) -> Vec<f32> {
        let hidden = self.hidden(tokens);
        let last = hidden.narrow(0, tokens.len() as i64 - 1, 1);
        self.logits(&last)
    }

    /// Like [`Model::forward`], with the logits after every token, one after the other; for comparisons.
    pub fn forward_all(&mut self, tokens: &[i64]) -> Vec<f32> {
        let hidden = self.hidden(tokens);
        self.logits(&hidden)
    }

    fn logits(&self, hidden: &Tensor) -> Vec<f32> {
        let logits = self.output.apply(hidden).to_kind(Kind::Float).view(-1);
        let mut values = vec![0.0; logits.numel()];
        logits.copy_data(&mut values, logits.numel());
        values
    }

    /// Final hidden states [tokens, hidden] of `tokens`, appended to the cache.
    fn hidden(&mut self, tokens: &[i64]) -> Tensor {
        assert!(
            !tokens.is_empty() && self.length + tokens.len() <= self.capacity,
            "the sequence does not fit the cache"
        );
        let Config {
            heads,
            kv_heads,
            head_dim,
            hidden,
            ffn,
            norm_eps,
            ..
        } = self.config;
        let (count, start) = (tokens.len() as i64, self.length as i64);
        let end = start + count;
        let norm = |x: &Tensor, weight: &Tensor| x.rms_norm([hidden], Some(weight), norm_eps);
        let (cos, sin) = (
            self.cos.narrow(0, start, count).unsqueeze(1),
            self.sin.narrow(0, start, count).unsqueeze(1),
        );
        // A single query sees everything; a first prompt is plainly causal; later ones need their mask shifted.
        let mask = (count > 1 && start > 0).then(|| {
            Tensor::ones([count, end], (Kind::Bool, Device::Cpu))
                .tril(start)
                .unsqueeze(0)
                .unsqueeze(0)
        });
        let mut x = self.embedding.index_select(0, &Tensor::from_slice(tokens));
        for layer in &mut self.layers {
            let qkv = layer
                .qkv
                .apply(&norm(&x, &layer.attention_norm))
                .view([count, heads + 2 * kv_heads, head_dim]);
            let rotated = rotate(&qkv.narrow(1, 0, heads + kv_heads), &cos, &sin);
            let place = |cache: &Tensor| cache.narrow(1, start, count);
            place(&layer.keys).copy_(&rotated.narrow(1, heads, kv_heads).transpose(0, 1));
            place(&layer.values).copy_(&qkv.narrow(1, heads + kv_heads, kv_heads).transpose(0, 1));
            let attended = Tensor::scaled_dot_product_attention(
                &rotated.narrow(1, 0, heads).transpose(0, 1).unsqueeze(0),
                &layer.keys.narrow(1, 0, end).unsqueeze(0),
                &layer.values.narrow(1, 0, end).unsqueeze(0),
                mask.as_ref(),
                0.0,
                count > 1 && start == 0,
                None,
                heads != kv_heads,
            );
            x += layer.out.apply(
                &attended
                    .squeeze_dim(0)
                    .transpose(0, 1)
                    .reshape([count, heads * head_dim]),
            );
            let gate_up = layer.gate_up.apply(&norm(&x, &layer.ffn_norm));
            x += layer
                .down
                .apply(&(gate_up.narrow(1, 0, ffn).silu() * gate_up.narrow(1, ffn, ffn)));
        }
        self.length += tokens.len();
        debug_assert_eq!(x.kind(), self.kind);
        norm(&x, &self.norm)
    }
}

/// Rotary embedding's factors (arXiv 2104.09864), [positions, head_dim] each.
fn rotary(config: &Config, positions: usize) -> (Tensor, Tensor) {
    let half = config.head_dim / 2;
    let float = (Kind::Float, Device::Cpu);
    let exponents = Tensor::arange(half, float) * (-2.0 / config.head_dim as f64);
    let frequencies = (exponents * config.rope_theta.ln()).exp();
    let angles = Tensor::arange(positions as i64, float).unsqueeze(1) * frequencies.unsqueeze(0);
    let angles = Tensor::cat(&[&angles, &angles], 1);
    (angles.cos(), angles.sin())
}

/// Rotates heads [tokens, heads, head_dim] in Hugging Face's half-split layout.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let half = x.size()[2] / 2;
    let turned = Tensor::cat(&[-x.narrow(2, half, half), x.narrow(2, 0, half)], 2);
    x * cos + turned * sin
}
