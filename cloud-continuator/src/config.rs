//! The settings: what the file, the environment and the flags (in rising order) say together. `deploy/continuator.toml` shows them all.

mod check;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use segue_shared::proto::Tone;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::{
    admission,
    backend::{
        embedded,
        openai::{self, Mode, Secret, body::Style},
    },
    layout::Layout,
    policy, session, tls,
    turn::Judgement,
    verify::{self, Thresholds},
};

/// The default large model, which `make setup` brings.
pub const DEFAULT_MODEL: &str = ".segue/models/SmolLM2-135M-Instruct.Q4_1.gguf";

/// Everything that can be set.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Address and port to listen on.
    pub listen: SocketAddr,
    /// Address and port of metrics and probes; without, there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// TLS.
    pub transport: Transport,
    /// Who is let in.
    pub auth: Auth,
    /// What the model is told first; without one, each layout has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_prompt: Option<String>,
    /// Ask the next backend as well when the first token takes longer than this.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub hedge_after: Option<Duration>,
    /// How openers are judged and corrected.
    pub directives: Directives,
    /// What edges may ask for.
    pub limits: Limits,
    /// The backends, best first; where nobody describes one, the embedded engine with its defaults.
    pub backend: Vec<Backend>,
}

/// TLS.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Transport {
    /// Certificate chain (PEM).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_file: Option<PathBuf>,
    /// Its key (PEM).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// Authorities (PEM) whose certificates edges must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_ca_file: Option<PathBuf>,
    /// Serve other machines without TLS.
    pub allow_plaintext: bool,
}

/// Who is let in.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Auth {
    /// File of tokens; without, no token is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_file: Option<PathBuf>,
}

/// How openers are judged and corrected.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Directives {
    /// Judge openers at all.
    pub verify: bool,
    /// Who judges.
    pub verifier: verify::Kind,
    /// Directives that may be used besides `bridge`.
    pub allowed: Vec<Allowed>,
    /// Manner of bridges, where the edge has no wish.
    pub tone: ToneName,
    /// Log-probability below which a word is wrong.
    pub word_threshold: f32,
    /// Mean log-probability below which an opener is wrong.
    pub mean_threshold: f32,
}

/// Directives that can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Allowed {
    /// Only `bridge`.
    Bridge,
    /// Replace the tail of an opener.
    Revise,
    /// Drop an opener.
    Restart,
}

/// Manner of a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ToneName {
    /// Matter-of-fact.
    Neutral,
    /// With a short apology.
    Apologetic,
    /// Light-hearted.
    Playful,
}

/// What edges may ask for.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Largest frame, in bytes.
    pub frame_bytes: usize,
    /// Largest user text, in bytes.
    pub user_text_bytes: usize,
    /// Largest history, in bytes of text.
    pub history_bytes: usize,
    /// Connections at a time; 0: no limit.
    pub connections: usize,
    /// Streams at a time; 0: no limit.
    pub streams: usize,
    /// Streams of one device at a time; 0: no limit.
    pub streams_per_device: usize,
    /// Turns that run at a time; 0: no limit.
    pub turns: usize,
    /// Turns at a time on one stream.
    pub turns_per_stream: usize,
    /// Turns that a device may begin in a minute; 0: no limit.
    pub turns_per_minute: u32,
    /// Most tokens of a continuation.
    pub tokens: u32,
    /// Time for the first frame.
    #[serde(with = "humantime_serde")]
    pub first_frame: Duration,
    /// Longest time without a frame or a running turn.
    #[serde(with = "humantime_serde")]
    pub idle: Duration,
    /// Longest life of a stream.
    #[serde(with = "humantime_serde")]
    pub lifetime: Duration,
    /// Longest time for a turn.
    #[serde(with = "humantime_serde")]
    pub turn: Duration,
    /// How long running turns may take once the continuator was told to stop.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

/// One backend.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Backend {
    /// llama.cpp in this process.
    Embedded(Embedded),
    /// A server.
    OpenAi(Box<OpenAi>),
}

/// llama.cpp in this process.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Embedded {
    /// Its name in logs and metrics.
    pub name: String,
    /// A GGUF file, or `hf:OWNER/REPO/FILE.gguf`.
    pub model: String,
    /// How the conversation is put to the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// KV cells for all turns together, in tokens.
    pub context: u32,
    /// Turns that run at a time.
    pub slots: u32,
    /// Turns that may wait for a place.
    pub waiting: usize,
    /// Threads; without, one per core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u16>,
    /// Layers to put on a GPU.
    pub gpu_layers: u32,
    /// How much longer a step may take for reading prompts while others generate, as a share of the step.
    pub prefill_share: f32,
}

/// A server that speaks OpenAI's chat completions.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct OpenAi {
    /// Its name in logs and metrics.
    pub name: String,
    /// Address of the API, with the version.
    pub base_url: String,
    /// The model's name there.
    pub model: String,
    /// How it is asked to continue a reply.
    pub mode: Mode,
    /// How it is told to continue the last message.
    pub prefill_style: Style,
    /// A file with the API key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
    /// A variable with the API key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// Have the conversation read as soon as a turn begins.
    pub warm_up: bool,
    /// Limit of the time to connect.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Limit of the time to the first event of an answer.
    #[serde(with = "humantime_serde")]
    pub first_token_timeout: Duration,
    /// Limit of the time between two events.
    #[serde(with = "humantime_serde")]
    pub stall_timeout: Duration,
    /// Proxy, in place of what the environment names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// Certificates (PEM) of further authorities to trust.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Name of the field for the most tokens.
    pub max_tokens_field: String,
    /// Fields to leave out of requests.
    pub omit: Vec<String>,
    /// Fields to add to requests.
    pub extra_body: Map<String, Value>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            metrics_listen: None,
            transport: Transport::default(),
            auth: Auth::default(),
            system_prompt: None,
            hedge_after: None,
            directives: Directives::default(),
            limits: Limits::default(),
            backend: vec![Backend::Embedded(Embedded::default())],
        }
    }
}

impl Default for Directives {
    fn default() -> Self {
        let thresholds = Thresholds::default();
        Self {
            verify: true,
            verifier: verify::Kind::Auto,
            allowed: vec![Allowed::Revise, Allowed::Restart],
            tone: ToneName::Neutral,
            word_threshold: thresholds.word,
            mean_threshold: thresholds.mean,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        let (limits, admission) = (session::Limits::default(), admission::Limits::default());
        Self {
            connections: limits.connections,
            streams: admission.streams,
            streams_per_device: admission.streams_per_device,
            turns: admission.turns,
            turns_per_minute: admission.turns_per_minute,
            frame_bytes: limits.frame_bytes,
            user_text_bytes: limits.user_text_bytes,
            history_bytes: limits.history_bytes,
            turns_per_stream: limits.turns,
            tokens: limits.tokens,
            first_frame: limits.first_frame,
            idle: limits.idle,
            lifetime: limits.lifetime,
            turn: limits.turn,
            drain: Duration::from_secs(10),
        }
    }
}

impl Default for Embedded {
    fn default() -> Self {
        let options = embedded::Options::new(DEFAULT_MODEL.into());
        Self {
            name: "embedded".into(),
            model: DEFAULT_MODEL.into(),
            layout: options.layout,
            context: options.context,
            slots: options.slots,
            waiting: options.waiting,
            threads: None,
            gpu_layers: options.gpu_layers,
            prefill_share: options.prefill_share,
        }
    }
}

impl Default for OpenAi {
    fn default() -> Self {
        let options = openai::Options::default();
        Self {
            name: "openai".into(),
            base_url: String::new(),
            model: String::new(),
            mode: options.mode,
            prefill_style: options.style,
            api_key_file: None,
            api_key_env: None,
            warm_up: options.warm_up,
            connect_timeout: options.connect,
            first_token_timeout: options.first_token,
            stall_timeout: options.stall,
            proxy: None,
            ca_file: None,
            max_tokens_field: options.max_tokens_field,
            omit: Vec::new(),
            extra_body: Map::new(),
        }
    }
}

/// Why settings cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {0} cannot be read: {1}")]
    Unreadable(String, std::io::Error),
    /// It is no TOML, or has settings that do not exist.
    #[error("the configuration {0}:\n{1}")]
    Syntax(String, String),
    /// A value cannot be, or two contradict each other.
    #[error("{0}")]
    Invalid(String),
}

/// A log-probability threshold.
///
/// # Errors
/// What it may be.
pub fn log_probability(value: f32) -> Result<f32, String> {
    if (-100.0..=0.0).contains(&value) {
        Ok(value)
    } else {
        Err("a log-probability threshold is a number from -100 to 0".into())
    }
}

impl Settings {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| ConfigError::Unreadable(name.clone(), e))?;
        toml::from_str(&text).map_err(|e| ConfigError::Syntax(name, e.to_string()))
    }

    /// How openers are judged and corrected.
    pub fn judgement(&self) -> Judgement {
        let d = &self.directives;
        Judgement {
            verifier: d.verifier,
            thresholds: Thresholds {
                word: d.word_threshold,
                mean: d.mean_threshold,
            },
            policy: policy::Settings {
                verify: d.verify,
                revise: d.allowed.contains(&Allowed::Revise),
                restart: d.allowed.contains(&Allowed::Restart),
                tone: d.tone.into(),
                ..policy::Settings::default()
            },
        }
    }

    /// How much may be asked for at a time.
    pub fn admission(&self) -> admission::Limits {
        admission::Limits {
            streams: self.limits.streams,
            streams_per_device: self.limits.streams_per_device,
            turns: self.limits.turns,
            turns_per_minute: self.limits.turns_per_minute,
        }
    }

    /// The files of TLS, if it is used.
    pub fn tls(&self) -> Option<tls::Files> {
        let Transport {
            cert_file,
            key_file,
            client_ca_file,
            ..
        } = &self.transport;
        Some(tls::Files {
            cert: cert_file.clone()?,
            key: key_file.clone()?,
            client_ca: client_ca_file.clone(),
        })
    }

    /// What edges may ask for.
    pub fn limits(&self) -> session::Limits {
        let l = &self.limits;
        session::Limits {
            frame_bytes: l.frame_bytes,
            user_text_bytes: l.user_text_bytes,
            history_bytes: l.history_bytes,
            connections: l.connections,
            turns: l.turns_per_stream,
            tokens: l.tokens,
            first_frame: l.first_frame,
            idle: l.idle,
            lifetime: l.lifetime,
            turn: l.turn,
        }
    }
}

impl From<ToneName> for Tone {
    fn from(name: ToneName) -> Self {
        match name {
            ToneName::Neutral => Tone::Neutral,
            ToneName::Apologetic => Tone::Apologetic,
            ToneName::Playful => Tone::Playful,
        }
    }
}

impl Backend {
    /// Its name in logs and metrics.
    pub fn name(&self) -> &str {
        match self {
            Backend::Embedded(settings) => &settings.name,
            Backend::OpenAi(settings) => &settings.name,
        }
    }
}

impl OpenAi {
    /// The options that these settings mean; reads the key.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] when there is no key where one should be.
    pub fn options(&self, system_prompt: Option<&str>) -> Result<openai::Options, ConfigError> {
        let invalid = |fault: String| ConfigError::Invalid(format!("backend {:?}: {fault}", self.name));
        let key = match (&self.api_key_file, &self.api_key_env) {
            (Some(path), _) => {
                let text = std::fs::read_to_string(path);
                Some(text.map_err(|e| invalid(format!("api_key_file {}: {e}", path.display())))?)
            }
            (None, Some(name)) => {
                let text = std::env::var(name);
                Some(text.map_err(|_| invalid(format!("api_key_env names {name}, which is not set")))?)
            }
            (None, None) => None,
        };
        if key.as_ref().is_some_and(|key| key.trim().is_empty()) {
            return Err(invalid("the API key is empty".into()));
        }
        Ok(openai::Options {
            base_url: self.base_url.clone(),
            model: self.model.clone(),
            mode: self.mode,
            style: self.prefill_style,
            system_prompt: system_prompt.unwrap_or(crate::layout::SYSTEM_PROMPT).to_owned(),
            api_key: key.as_deref().map(Secret::new),
            warm_up: self.warm_up,
            connect: self.connect_timeout,
            first_token: self.first_token_timeout,
            stall: self.stall_timeout,
            proxy: self.proxy.clone(),
            ca_file: self.ca_file.clone(),
            max_tokens_field: self.max_tokens_field.clone(),
            omit: self.omit.clone(),
            extra_body: self.extra_body.clone(),
        })
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
