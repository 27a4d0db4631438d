//! The `openai` backend: any server that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp's server, Ollama, LM Studio, the clouds.

pub mod body;
pub mod stream;
pub mod text;
mod turn;

use std::{fmt, path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use reqwest::{
    StatusCode, Url,
    header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER},
};
use segue_shared::telemetry::TraceContext;
use serde_json::{Map, Value};
use thiserror::Error;
use tokio::{
    sync::{Mutex, mpsc, mpsc::error::TrySendError},
    time::Instant,
};
use tracing::{Span, field::Empty, info_span};

use self::{
    body::{PROBE, Style, Way},
    stream::{Counted, Piece},
    turn::Driven,
};
use super::{Backend, Failure, Info, Input, Request, Turn};

/// Inputs that may wait for a turn: it takes them at once, unless nobody reads its events.
const INPUTS: usize = 64;
/// How long a failed probe speaks for those that wait for it.
const PROBE_AGAIN: Duration = Duration::from_secs(1);
/// Longest error body that is read, in bytes.
const ERROR_BYTES: usize = 16 << 10;

/// How the server is asked to continue a reply text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Probe once whether the server continues the last message; ask it in words if it does not.
    #[default]
    Auto,
    /// The reply text is the last message, which the server continues.
    Prefill,
    /// Ask in words.
    Prompt,
}

/// An upstream server, and how to treat it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its API's address, with the version: `http://127.0.0.1:8000/v1`.
    pub base_url: String,
    /// The model's name there.
    pub model: String,
    /// How it is asked.
    pub mode: Mode,
    /// How it is told to continue the last message.
    pub style: Style,
    /// What the model is told first; empty: nothing.
    pub system_prompt: String,
    /// Sent as a bearer token.
    pub api_key: Option<Secret>,
    /// Have the conversation read as soon as a turn begins.
    pub warm_up: bool,
    /// Limit of the time to connect.
    pub connect: Duration,
    /// Limit of the time to the first event of an answer.
    pub first_token: Duration,
    /// Limit of the time between two events.
    pub stall: Duration,
    /// Proxy, in place of what the environment names.
    pub proxy: Option<String>,
    /// Certificates (PEM) of further authorities to trust.
    pub ca_file: Option<PathBuf>,
    /// Name of the field for the most tokens.
    pub max_tokens_field: String,
    /// Fields to leave out of requests.
    pub omit: Vec<String>,
    /// Fields to add to requests.
    pub extra_body: Map<String, Value>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            base_url: String::new(),
            model: String::new(),
            mode: Mode::Auto,
            style: Style::Flags,
            system_prompt: String::new(),
            api_key: None,
            warm_up: true,
            connect: Duration::from_secs(3),
            first_token: Duration::from_secs(20),
            stall: Duration::from_secs(10),
            proxy: None,
            ca_file: None,
            max_tokens_field: "max_tokens".into(),
            omit: Vec::new(),
            extra_body: Map::new(),
        }
    }
}

/// A secret that does not show itself.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Takes it, without white space around it.
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Why an upstream cannot be used at all.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The address.
    #[error("base_url is no address ({0}); write it like http://127.0.0.1:8000/v1")]
    Address(String),
    /// The key.
    #[error("the API key has characters that no HTTP header can hold")]
    Key,
    /// The certificates.
    #[error("ca_file {0}: {1}; it must hold PEM certificates")]
    Certificates(String, String),
    /// The proxy.
    #[error("proxy is no address ({0}); write it like http://proxy:3128")]
    Proxy(String),
    /// The HTTP client.
    #[error("the HTTP client does not start: {0}")]
    Client(String),
    /// A setting.
    #[error("{0}")]
    Settings(String),
}

/// The backend.
pub struct OpenAi {
    info: Info,
    upstream: Arc<Upstream>,
}

/// What all turns share.
struct Upstream {
    options: Options,
    client: reqwest::Client,
    completions: Url,
    models: Url,
    /// The way that was found, in mode `auto`. Held while probing, so that one turn probes and the others wait.
    way: Mutex<Option<Found>>,
}

/// What came of the last probe.
enum Found {
    Way(Way),
    Failure(Failure, Instant),
}

impl OpenAi {
    /// A backend for an upstream, which need not be there yet.
    ///
    /// # Errors
    /// [`SetupError`] names the setting that is wrong.
    pub fn new(options: Options) -> Result<Self, SetupError> {
        let base = options.base_url.trim_end_matches('/');
        let address = SetupError::Address;
        let url = |path: &str| Url::parse(&format!("{base}/{path}")).map_err(|e| address(e.to_string()));
        let completions = url("chat/completions")?;
        if !matches!(completions.scheme(), "http" | "https") || completions.host_str().is_none() {
            return Err(address("it is neither http:// nor https://".into()));
        }
        if options.model.trim().is_empty() {
            return Err(SetupError::Settings(
                "an openai backend needs the model's name there: set model".into(),
            ));
        }
        let mut headers = HeaderMap::new();
        if let Some(Secret(key)) = &options.api_key {
            let mut value = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| SetupError::Key)?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("segue/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .connect_timeout(options.connect)
            // A redirect would turn the request into another one, and show it to another server.
            .redirect(reqwest::redirect::Policy::none())
            .tcp_nodelay(true);
        builder = trusting(builder, &options, completions.scheme() == "https")?;
        if let Some(proxy) = &options.proxy {
            let wrong = |e: reqwest::Error| SetupError::Proxy(reasons(&e));
            builder = builder.proxy(reqwest::Proxy::all(proxy).map_err(wrong)?);
        }
        let client = builder.build().map_err(|e| SetupError::Client(reasons(&e)))?;
        let provider = match completions.host_str() {
            Some("api.openai.com") => "openai",
            Some("api.mistral.ai") => "mistral_ai",
            Some("api.deepseek.com") => "deepseek",
            _ => "openai_compatible",
        };
        Ok(Self {
            info: Info {
                model: options.model.clone(),
                provider,
                scores: false,
                local: false,
            },
            upstream: Arc::new(Upstream {
                client,
                completions,
                models: url("models")?,
                way: Mutex::new(None),
                options,
            }),
        })
    }
}

/// Whom to trust: the system's authorities, and those of `ca_file`. Without TLS the system needs none.
fn trusting(
    builder: reqwest::ClientBuilder,
    options: &Options,
    tls: bool,
) -> Result<reqwest::ClientBuilder, SetupError> {
    // The first provider of the process stays; all are this one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let Some(path) = &options.ca_file else {
        let direct = !tls && options.proxy.is_none();
        return Ok(if direct { builder.tls_certs_only([]) } else { builder });
    };
    let wrong = |e: String| SetupError::Certificates(path.display().to_string(), e);
    let pem = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
    let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| wrong(e.to_string()))?;
    if certificates.is_empty() {
        return Err(wrong("there is no certificate in it".into()));
    }
    Ok(builder.tls_certs_merge(certificates))
}

impl Backend for OpenAi {
    fn info(&self) -> &Info {
        &self.info
    }

    fn open(&self, request: Request) -> Result<Turn, Failure> {
        let (inputs, receiver) = mpsc::channel(INPUTS);
        let driven = Driven::new(self.upstream.clone(), request, receiver);
        let send = move |input: Input| match inputs.try_send(input) {
            // What is said of the opener before its commit is repeated by it.
            Ok(()) | Err(TrySendError::Full(Input::Opener(_))) => Ok(()),
            Err(TrySendError::Full(_)) => Err(Failure::Overloaded { retry_after: None }),
            Err(TrySendError::Closed(_)) => Err(Failure::CutOff),
        };
        Ok(Turn::new(send, driven))
    }

    fn check(&self) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + '_>> {
        Box::pin(async {
            let response = self.upstream.client.get(self.upstream.models.clone()).send().await;
            let status = response.map_err(|e| unreachable(&e))?.status();
            // A server without this page answers 404, and is there.
            if status.is_server_error() || matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
                return Err(Failure::Refused {
                    status: status.as_u16(),
                    message: "to list its models".into(),
                });
            }
            // So that no turn has to wait for the probe.
            self.upstream.way().await.map(drop)
        })
    }
}

impl Upstream {
    /// Sends a request; an answer that is no success is a failure.
    async fn post(&self, body: &Value) -> Result<reqwest::Response, Failure> {
        let trace = TraceContext::of(&Span::current());
        let mut request = self.client.post(self.completions.clone()).json(body);
        if !trace.traceparent.is_empty() {
            request = request.header("traceparent", trace.traceparent);
        }
        let response = request.send().await.map_err(|e| unreachable(&e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let after = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok());
        let after = stream::retry_after(after);
        let body = beginning(response, ERROR_BYTES).await;
        Err(stream::error(status.as_u16(), after, &body))
    }

    /// Has the conversation read, so that the continuation finds it in the upstream's cache.
    async fn warm_up(self: &Arc<Self>, request: &Request) -> Result<Counted, Failure> {
        let way = self.way().await?;
        let mut counted = Counted::default();
        let mut answer = self.ask(&body::warm_up(&self.options, request, way)).await?;
        while let Some(piece) = answer.next().await? {
            if let Piece::Usage(usage) = piece {
                counted = usage;
            }
        }
        Ok(counted)
    }

    /// How the server is asked; probes it if that is not known.
    async fn way(self: &Arc<Self>) -> Result<Way, Failure> {
        match self.options.mode {
            Mode::Prefill => Ok(Way::Prefill(self.options.style)),
            Mode::Prompt => Ok(Way::Prompt),
            Mode::Auto => self.probed(None).await,
        }
    }

    /// What a probe found, or finds now if the `refused` way is what it found before.
    ///
    /// The probe runs in a task of its own: it belongs to all turns that wait for it, and must not stand still with the one that began it.
    async fn probed(self: &Arc<Self>, refused: Option<Way>) -> Result<Way, Failure> {
        let this = self.clone();
        let probe = tokio::spawn(async move {
            let mut known = this.way.lock().await;
            match &*known {
                Some(Found::Way(way)) if Some(*way) != refused => return Ok(*way),
                Some(Found::Failure(failure, at)) if at.elapsed() < PROBE_AGAIN => return Err(failure.clone()),
                _ => {}
            }
            let found = this.probe().await;
            match &found {
                Ok(way) => *known = Some(Found::Way(*way)),
                // What was known before may still be right.
                Err(_) if matches!(*known, Some(Found::Way(_))) => {}
                Err(failure) => *known = Some(Found::Failure(failure.clone(), Instant::now())),
            }
            found
        });
        let limit = self.options.first_token;
        let found = tokio::time::timeout(limit, probe).await;
        found
            .map_err(|_| Failure::Stalled(limit))?
            .unwrap_or(Err(Failure::CutOff))
    }

    /// Finds out whether the server continues the last message, and how it wants to be told.
    async fn probe(&self) -> Result<Way, Failure> {
        let styles = match self.options.style {
            Style::Flags => &[Style::Flags, Style::Prefix][..],
            ref style => std::slice::from_ref(style),
        };
        let mut way = Way::Prompt;
        for style in styles {
            match self.said(&body::probe(&self.options, *style)).await {
                Ok(text) => {
                    let text = text.trim_start();
                    if text.starts_with(PROBE.2) || text.starts_with(PROBE.1) {
                        way = Way::Prefill(*style);
                    }
                    // Another style would be taken as well, and ignored as well.
                    break;
                }
                Err(Failure::Refused { status: 400 | 422, .. }) => {}
                Err(failure) => return Err(failure),
            }
        }
        tracing::info!(model = self.options.model, ?way, "upstream probed");
        Ok(way)
    }

    /// The text of an answer.
    async fn said(&self, body: &Value) -> Result<String, Failure> {
        let mut text = String::new();
        let mut answer = self.ask(body).await?;
        while let Some(piece) = answer.next().await? {
            if let Piece::Text(more) = piece {
                text.push_str(&more);
            }
        }
        Ok(text)
    }

    /// The span of one request, as OpenTelemetry's GenAI conventions want it.
    fn client_span(&self, parent: &Span) -> Span {
        info_span!(
            parent: parent,
            "chat",
            otel.name = format!("chat {}", self.options.model),
            otel.kind = "client",
            gen_ai.operation.name = "chat",
            gen_ai.request.model = self.options.model,
            gen_ai.usage.input_tokens = Empty,
            gen_ai.usage.cache_read.input_tokens = Empty,
            gen_ai.usage.output_tokens = Empty,
            server.address = self.completions.host_str(),
            server.port = self.completions.port_or_known_default(),
            error.type = Empty,
            otel.status_code = Empty,
        )
    }
}

/// A request that got no answer.
fn unreachable(error: &reqwest::Error) -> Failure {
    if error.is_connect() || error.is_timeout() || error.is_builder() {
        Failure::Unreachable(reasons(error))
    } else {
        Failure::CutOff
    }
}

/// An error with its causes, without the address, which may hold a password.
fn reasons(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    if text.is_empty() { "no connection".into() } else { text }
}

/// The first bytes of a body, as text.
async fn beginning(mut response: reqwest::Response, most: usize) -> String {
    let mut bytes = Vec::new();
    while let Ok(Ok(Some(chunk))) = tokio::time::timeout(Duration::from_secs(2), response.chunk()).await {
        bytes.extend_from_slice(&chunk);
        if bytes.len() >= most {
            bytes.truncate(most);
            break;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
