//! The micro language model (μLM): loading, inference and sampling, on a thread of its own behind a cheap handle.

pub mod config;
mod engine;
pub mod model;
pub mod precision;
pub mod sampler;
pub mod text;
pub mod weights;

use std::path::PathBuf;

use thiserror::Error;

pub use engine::{Engine, Generate, Info, Options, Step, Stop};

/// Why a model folder cannot be used.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The folder, or a file in it, is not there.
    #[error("{0} cannot be read: {1}")]
    Missing(PathBuf, std::io::Error),
    /// `config.json` is malformed or describes another architecture.
    #[error("config.json: {0}")]
    Config(String),
    /// `model.safetensors` is damaged or does not fit `config.json`.
    #[error("model.safetensors: {0}")]
    Weights(String),
    /// `tokenizer.json` is damaged or belongs to another model.
    #[error("tokenizer.json: {0}")]
    Tokenizer(String),
    /// libtorch failed.
    #[error("libtorch: {0}")]
    Torch(String),
}
