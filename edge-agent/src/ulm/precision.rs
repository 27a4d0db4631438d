//! In what numbers the model's matrices are kept and multiplied.

use std::time::{Duration, Instant};

use clap::ValueEnum;
use tch::{Kind, Tensor};

/// Precision of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum Precision {
    /// 32-bit floating point: exact, and the slowest.
    F32,
    /// bfloat16 weights and activations: half the memory traffic; fast where the processor has bfloat16 instructions.
    Bf16,
    /// 8-bit integer weights with one scale per row, bfloat16 activations: a quarter of the memory traffic. (libtorch's kernel is
    /// fast with bfloat16 activations only.)
    Int8,
}

impl Precision {
    /// The kind of activations and of the KV cache.
    pub fn activations(self) -> Kind {
        match self {
            Precision::F32 => Kind::Float,
            Precision::Bf16 | Precision::Int8 => Kind::BFloat16,
        }
    }

    /// The fastest on this machine for one token at a time through a matrix like `sample` ([out, in], 32-bit), by measurement
    /// (a few milliseconds).
    pub fn fastest(sample: &Tensor) -> Self {
        let x = Tensor::ones([1, sample.size()[1]], (Kind::Float, tch::Device::Cpu));
        let cost = |precision: Precision| {
            let (linear, x) = (
                Linear::new(sample.shallow_clone(), precision),
                x.to_kind(precision.activations()),
            );
            (0..12)
                .map(|_| {
                    let started = Instant::now();
                    let _ = linear.apply(&x);
                    started.elapsed()
                })
                .min()
                .unwrap_or(Duration::MAX)
        };
        [Precision::F32, Precision::Bf16, Precision::Int8]
            .into_iter()
            .min_by_key(|p| cost(*p))
            .unwrap_or(Precision::F32)
    }
}

/// A matrix that activations are multiplied with: x [rows, in] -> [rows, out].
#[derive(Debug)]
pub enum Linear {
    /// Floating-point weights, [out, in].
    Dense(Tensor),
    /// 8-bit weights [out, in] and a scale per output, [out].
    Int8 {
        /// The rounded weights.
        weight: Tensor,
        /// What a step of them is worth.
        scales: Tensor,
    },
}

impl Linear {
    /// Prepares a 32-bit weight [out, in].
    pub fn new(weight: Tensor, precision: Precision) -> Self {
        match precision {
            Precision::F32 | Precision::Bf16 => Linear::Dense(weight.to_kind(precision.activations())),
            Precision::Int8 => {
                // Symmetric, per output row: the largest weight of a row becomes 127.
                let scales = weight.abs().amax([1i64].as_slice(), true).clamp_min(1e-12) / 127.0;
                let rounded = (&weight / &scales).round().clamp(-127.0, 127.0).to_kind(Kind::Int8);
                Linear::Int8 {
                    weight: rounded,
                    scales: scales.squeeze_dim(1).to_kind(Kind::BFloat16),
                }
            }
        }
    }

    /// The product with `x` [rows, in].
    pub fn apply(&self, x: &Tensor) -> Tensor {
        match self {
            Linear::Dense(weight) => x.linear(weight, None::<Tensor>),
            Linear::Int8 { weight, scales } => x.internal_weight_int8pack_mm(weight, scales),
        }
    }
}
