//! The command line.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use segue_shared::client::Access;

use crate::{
    backend::openai::Mode,
    config::{self, Allowed, Backend, ConfigError, Embedded, OpenAi, Settings, ToneName},
    layout::Layout,
    verify,
};

/// Continues the openers of micro language models with a large one.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Load a model, or find an upstream server, and serve continuations over gRPC.
    Serve(Box<Serve>),
    /// Show the settings that `serve` would use with the same options, as a configuration file.
    Config(Box<Serve>),
    /// Ask a continuator whether it serves: exit code 0 if it does.
    Check {
        /// The continuator's address.
        #[arg(default_value = "http://127.0.0.1:50051")]
        url: String,
        /// How to be let in.
        #[command(flatten)]
        access: Access,
        /// The device to be.
        #[arg(long, default_value = "check")]
        device_id: String,
    },
    /// Make, revoke and list the tokens of edges.
    #[command(subcommand)]
    Token(TokenCommand),
}

/// Options of `serve`; each outweighs the configuration file.
#[derive(Debug, Default, Args)]
pub struct Serve {
    /// Configuration file; deploy/continuator.toml shows all settings. What is given here and in the environment outweighs it.
    #[arg(long, env = "SEGUE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Address and port to listen on [default: 127.0.0.1:50051].
    #[arg(long, env = "SEGUE_LISTEN")]
    pub listen: Option<SocketAddr>,
    /// Address and port for Prometheus (/metrics) and probes (/healthz, /readyz) [default: none].
    #[arg(long, env = "SEGUE_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
    /// Security.
    #[command(flatten)]
    pub security: SecurityArgs,
    /// What the model is told first [default: to be a helpful voice assistant].
    #[arg(long, env = "SEGUE_SYSTEM_PROMPT")]
    pub system_prompt: Option<String>,
    /// The embedded engine.
    #[command(flatten)]
    pub embedded: EmbeddedArgs,
    /// An upstream server.
    #[command(flatten)]
    pub upstream: UpstreamArgs,
    /// Verifier and directives.
    #[command(flatten)]
    pub directives: DirectiveArgs,
}

/// Who can listen in, and who is let in.
#[derive(Clone, Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "Security")]
pub struct SecurityArgs {
    /// Certificate chain (PEM): serve over TLS. Read again when it changes.
    #[arg(long, env = "SEGUE_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Key (PEM) of the certificate.
    #[arg(long, env = "SEGUE_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Ask edges for a certificate of one of these authorities (PEM): mutual TLS.
    #[arg(long, env = "SEGUE_CLIENT_CA", value_name = "FILE")]
    pub client_ca: Option<PathBuf>,
    /// Let in only edges with a token of this file; `cloud-continuator token new` makes them. Read again when it changes.
    #[arg(long, env = "SEGUE_TOKENS", value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// Serve other machines without TLS.
    #[arg(long)]
    pub allow_plaintext: bool,
}

/// What to do with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token for a device and print it: it is shown this once, and only its hash is kept.
    New {
        /// The device that may use it (edge-agent --device-id).
        device: String,
        /// How long it is valid, like 90d [default: until it is revoked].
        #[arg(long, value_parser = duration, value_name = "TIME")]
        expires: Option<Duration>,
        /// File of tokens.
        #[command(flatten)]
        file: TokenFile,
    },
    /// Make a token invalid; streams that use it end.
    Revoke {
        /// Its id, as `list` shows it.
        id: String,
        /// File of tokens.
        #[command(flatten)]
        file: TokenFile,
    },
    /// Show ids, devices and states.
    List {
        /// File of tokens.
        #[command(flatten)]
        file: TokenFile,
    },
}

/// Where tokens are kept.
#[derive(Debug, Args)]
pub struct TokenFile {
    /// File of tokens, which `serve --tokens` reads.
    #[arg(
        long = "tokens",
        env = "SEGUE_TOKENS",
        default_value = "tokens.toml",
        value_name = "FILE"
    )]
    pub path: PathBuf,
}

const HUNDRED_YEARS: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

fn duration(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|_| "a time is written like 12h, 90d or 1y")?;
    if time > HUNDRED_YEARS {
        return Err("a hundred years are the most".into());
    }
    Ok(time)
}

/// The embedded engine.
#[derive(Clone, Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "Embedded engine")]
pub struct EmbeddedArgs {
    /// Large model: a GGUF file, or hf:OWNER/REPO/FILE.gguf [default: the one that `make setup` brings].
    #[arg(long, env = "SEGUE_MODEL")]
    pub model: Option<String>,
    /// How the conversation is put to the model [default: by the model].
    #[arg(long)]
    pub layout: Option<Layout>,
    /// KV cache for all turns together, in tokens [default: 8192].
    #[arg(long, value_parser = clap::value_parser!(u32).range(256..=1 << 22))]
    pub context: Option<u32>,
    /// Turns that run at a time; more wait [default: 16].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=63))]
    pub slots: Option<u32>,
    /// Turns that may wait for a place; more are turned away [default: 64].
    #[arg(long)]
    pub waiting: Option<usize>,
    /// Threads for the model [default: one per core].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=512))]
    pub threads: Option<u16>,
    /// Layers of the model to put on a GPU (needs a build with the `cuda` or `vulkan` feature) [default: 0].
    #[arg(long)]
    pub gpu_layers: Option<u32>,
}

/// An upstream server.
#[derive(Clone, Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "Upstream server (instead of the embedded engine)")]
pub struct UpstreamArgs {
    /// Address of an OpenAI-compatible API, like http://127.0.0.1:8000/v1.
    #[arg(long, env = "SEGUE_UPSTREAM", requires = "upstream_model")]
    pub upstream: Option<String>,
    /// The model's name there.
    #[arg(long, env = "SEGUE_UPSTREAM_MODEL", requires = "upstream")]
    pub upstream_model: Option<String>,
    /// How the upstream is asked to continue a reply [default: auto].
    #[arg(long, env = "SEGUE_UPSTREAM_MODE", requires = "upstream")]
    pub upstream_mode: Option<Mode>,
    /// File with the upstream's API key.
    #[arg(long, env = "SEGUE_UPSTREAM_KEY_FILE", requires = "upstream")]
    pub upstream_key_file: Option<PathBuf>,
}

/// How openers are judged and corrected.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Directives")]
pub struct DirectiveArgs {
    /// How openers are judged [default: auto].
    #[arg(long, value_enum)]
    pub verifier: Option<verify::Kind>,
    /// Directives that may be used besides `bridge`, which is always possible [default: revise,restart].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub directives: Option<Vec<Allowed>>,
    /// Continue every opener as it is.
    #[arg(long)]
    pub no_verify: bool,
    /// Manner of bridges, where the edge has no wish [default: neutral].
    #[arg(long, value_enum)]
    pub tone: Option<ToneName>,
    /// A word is wrong when the large model gives one of its tokens a log-probability below this [default: -7.5].
    #[arg(long, allow_negative_numbers = true, value_parser = log_probability)]
    pub word_threshold: Option<f32>,
    /// An opener is wrong as a whole when the mean log-probability of its tokens is below this [default: -2.8].
    #[arg(long, allow_negative_numbers = true, value_parser = log_probability)]
    pub mean_threshold: Option<f32>,
}

fn log_probability(text: &str) -> Result<f32, String> {
    config::log_probability(text.parse().unwrap_or(f32::NAN))
}

impl Serve {
    /// The settings of the file (or the defaults) with these options over them, checked.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn settings(&self) -> Result<Settings, ConfigError> {
        let mut settings = match &self.config {
            Some(path) => Settings::read(path)?,
            None => Settings::default(),
        };
        self.apply(&mut settings).map_err(ConfigError::Invalid)?;
        settings.check()?;
        Ok(settings)
    }

    fn apply(&self, settings: &mut Settings) -> Result<(), String> {
        set(&mut settings.listen, &self.listen);
        settings.metrics_listen = self.metrics_listen.or(settings.metrics_listen);
        let (to, from) = (&mut settings.transport, &self.security);
        for (to, from) in [
            (&mut to.cert_file, &from.tls_cert),
            (&mut to.key_file, &from.tls_key),
            (&mut to.client_ca_file, &from.client_ca),
            (&mut settings.auth.tokens_file, &from.tokens),
        ] {
            if from.is_some() {
                to.clone_from(from);
            }
        }
        to.allow_plaintext |= from.allow_plaintext;
        if self.system_prompt.is_some() {
            settings.system_prompt.clone_from(&self.system_prompt);
        }
        self.upstream(settings)?;
        self.embedded(settings)?;
        let (to, from) = (&mut settings.directives, &self.directives);
        to.verify &= !from.no_verify;
        set(&mut to.verifier, &from.verifier);
        set(&mut to.allowed, &from.directives);
        set(&mut to.tone, &from.tone);
        set(&mut to.word_threshold, &from.word_threshold);
        set(&mut to.mean_threshold, &from.mean_threshold);
        Ok(())
    }

    fn upstream(&self, settings: &mut Settings) -> Result<(), String> {
        let from = &self.upstream;
        let Some(base_url) = &from.upstream else { return Ok(()) };
        if self.config.is_some() && settings.backend != Settings::default().backend {
            return Err("--upstream contradicts the backends of the configuration file: describe it there".into());
        }
        if self.embedded != EmbeddedArgs::default() {
            return Err("--upstream takes the place of the embedded engine, so that --model and its kin mean nothing; to use both, describe them in a configuration file".into());
        }
        settings.backend = vec![Backend::OpenAi(Box::new(OpenAi {
            base_url: base_url.clone(),
            model: from.upstream_model.clone().unwrap_or_default(),
            mode: from.upstream_mode.unwrap_or_default(),
            api_key_file: from.upstream_key_file.clone(),
            ..OpenAi::default()
        }))];
        Ok(())
    }

    fn embedded(&self, settings: &mut Settings) -> Result<(), String> {
        let from = &self.embedded;
        if *from == EmbeddedArgs::default() {
            return Ok(());
        }
        let embedded = settings.backend.iter_mut().find_map(|backend| match backend {
            Backend::Embedded(embedded) => Some(embedded),
            Backend::OpenAi(_) => None,
        });
        let Some(to) = embedded else {
            return Err("--model and its kin are about the embedded engine, but the configuration has none".into());
        };
        let Embedded {
            model,
            layout,
            context,
            slots,
            waiting,
            threads,
            gpu_layers,
            ..
        } = to;
        set(model, &from.model);
        set(context, &from.context);
        set(slots, &from.slots);
        set(waiting, &from.waiting);
        set(gpu_layers, &from.gpu_layers);
        *layout = from.layout.or(*layout);
        *threads = from.threads.or(*threads);
        Ok(())
    }
}

fn set<T: Clone>(to: &mut T, from: &Option<T>) {
    if let Some(value) = from {
        to.clone_from(value);
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn settings(args: &[&str]) -> Result<Settings, String> {
        let cli = Cli::try_parse_from(["x", "serve"].iter().chain(args)).map_err(|e| e.to_string())?;
        match cli.command {
            Command::Serve(serve) => serve.settings().map_err(|e| e.to_string()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn without_options_the_defaults_are_in_force() {
        assert_eq!(settings(&[]).unwrap(), Settings::default());
    }

    #[test]
    fn help_names_the_defaults() {
        let help = Cli::command()
            .find_subcommand_mut("serve")
            .unwrap()
            .render_long_help()
            .to_string();
        let (d, e) = (config::Directives::default(), Embedded::default());
        for (flag, value) in [
            ("--listen", Settings::default().listen.to_string()),
            ("--context", e.context.to_string()),
            ("--slots", e.slots.to_string()),
            ("--waiting", e.waiting.to_string()),
            ("--gpu-layers", e.gpu_layers.to_string()),
            ("--word-threshold", d.word_threshold.to_string()),
            ("--mean-threshold", d.mean_threshold.to_string()),
        ] {
            let text = help.split(&format!("{flag} ")).nth(1).unwrap();
            let default = text.split("[default: ").nth(1).unwrap().split(']').next().unwrap();
            assert_eq!(default, value, "{flag}");
        }
    }

    #[test]
    fn thresholds_have_a_range() {
        assert!(settings(&["--word-threshold", "-8.5"]).is_ok());
        for bad in ["1", "-101", "NaN", "x"] {
            assert!(
                settings(&["--word-threshold", bad]).unwrap_err().contains("-100 to 0"),
                "{bad}"
            );
        }
        assert!(settings(&["--tone", "angry"]).is_err());
    }

    #[test]
    fn an_upstream_takes_the_engines_place() {
        let settings = settings(&[
            "--upstream",
            "http://x/v1",
            "--upstream-model",
            "m",
            "--upstream-mode",
            "prompt",
        ]);
        let settings = settings.unwrap();
        let [Backend::OpenAi(upstream)] = &settings.backend[..] else {
            panic!("{settings:?}")
        };
        assert_eq!(
            (upstream.base_url.as_str(), upstream.mode),
            ("http://x/v1", Mode::Prompt)
        );
    }

    #[test]
    fn contradictions_are_named() {
        let upstream = ["--upstream", "http://x/v1", "--upstream-model", "m"];
        for (args, says) in [
            (&["--upstream", "http://x/v1"][..], "--upstream-model"),
            (&[&upstream[..], &["--slots", "2"]].concat(), "--model and its kin"),
            (
                &[&upstream[..], &["--verifier", "likelihood"]].concat(),
                "no backend scores",
            ),
            (&["--context", "3"], "--context"),
            (&["--listen", "0.0.0.0:1"], "--allow-plaintext"),
            (&["--tls-cert", "c.pem"], "--tls-key"),
            (&["--client-ca", "c.pem"], "--client-ca"),
            (&["--config", "/nowhere.toml"], "/nowhere.toml"),
        ] {
            let error = settings(args).unwrap_err();
            assert!(error.contains(says), "{args:?}: {error}");
        }
    }
}
