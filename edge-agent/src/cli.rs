//! The command line.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use segue_shared::{
    client::Access,
    proto::{GenerationParameters, Tone},
    reply_log::Surface,
};

use crate::{
    conversation::{Offline, Options},
    link,
    opener::{MAX_WORDS, MIN_WORDS, Policy},
    ulm::{self, precision::Precision, sampler::Sampling},
};

/// The longest time that may be asked for.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How fast people read silently, in words a minute.
const READING: f32 = 238.0;

/// Says the first words of a reply at once with a micro language model and lets a continuator finish it.
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
    /// Ask one question.
    Ask {
        /// The question.
        question: String,
        /// How.
        #[command(flatten)]
        options: Box<Talk>,
    },
    /// Talk: a line, a reply, and so on until the end of the input.
    Chat {
        /// A new line interrupts the reply that is being given; on a terminal it always does.
        #[arg(long)]
        barge_in: bool,
        /// How.
        #[command(flatten)]
        options: Box<Talk>,
    },
}

/// Options of a conversation.
#[derive(Debug, Args)]
pub struct Talk {
    /// The continuator's address; several, separated by commas, are tried in this order.
    #[arg(
        long = "server",
        default_value = "http://127.0.0.1:50051",
        env = "SEGUE_SERVER",
        value_delimiter = ',',
        value_name = "URL"
    )]
    pub servers: Vec<String>,
    /// Folder of the micro language model (config.json, model.safetensors, tokenizer.json).
    #[arg(long, default_value = "edge-agent/model", env = "SEGUE_ULM")]
    pub model: PathBuf,
    /// Where replies are shown: on a screen, or spoken.
    #[arg(long, value_enum, default_value_t = SurfaceArg::Revisable)]
    pub surface: SurfaceArg,
    /// What is written to standard output: the reply for people, or events for programs.
    #[arg(long, value_enum, default_value_t = OutputArg::Text)]
    pub output: OutputArg,
    /// Leave out the line with the timings.
    #[arg(long, short)]
    pub quiet: bool,
    /// Most words of an opener.
    #[arg(long, default_value_t = MAX_WORDS as u8, value_parser = clap::value_parser!(u8).range(MIN_WORDS as i64..=MAX_WORDS as i64))]
    pub opener_words: u8,
    /// Rate of speech in words a minute, on an append-only surface.
    #[arg(long, default_value_t = 183.0, value_parser = rate)]
    pub wpm: f32,
    /// Speak through this program, which reads words from its standard input (espeak-ng, piper); needs --surface append-only.
    #[arg(long, value_name = "PROGRAM")]
    pub speak: Option<String>,
    /// Sampling temperature of both models; 0 takes the likeliest words.
    #[arg(long, default_value_t = 0.0, value_parser = temperature)]
    pub temperature: f32,
    /// Nucleus sampling of both models.
    #[arg(long, default_value_t = 1.0, value_parser = share)]
    pub top_p: f32,
    /// Seed of both models' sampling, for replies that can be repeated.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Most tokens of the continuation [default: the continuator's].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// Manner of the self-repair when an opener was wrong [default: the continuator's].
    #[arg(long, value_enum)]
    pub tone: Option<ToneArg>,
    /// Numbers that the micro language model computes in [default: the fastest here, by measurement].
    #[arg(long, value_enum)]
    pub precision: Option<Precision>,
    /// Threads of the micro language model [default: one per core].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,
    /// When the micro language model answers alone: never, when no continuator can be reached, or always.
    #[arg(long, value_enum, default_value_t)]
    pub offline: Offline,
    /// How long a reply that was cut off waits for a continuator to go on with it; after that, what was shown stays.
    #[arg(long, default_value = "30s", value_parser = time, value_name = "TIME")]
    pub resume_within: Duration,
    /// Silence of the continuator after which it counts as lost (before its first words up to four times that, if it said that it is slow).
    #[arg(long, default_value = "30s", value_parser = time, value_name = "TIME")]
    pub stall: Duration,
    /// Tokens (the micro language model's) of earlier conversation that the continuator is told at most; when they are exceeded, the
    /// oldest exchanges are left out until half remains.
    #[arg(long, default_value_t = 2048)]
    pub history_tokens: usize,
    /// This device's name; it must be the one that the token or the certificate was given to [default: the machine's name].
    #[arg(long, env = "SEGUE_DEVICE_ID", value_name = "NAME")]
    pub device_id: Option<String>,
    /// Security.
    #[command(flatten)]
    pub access: Access,
    /// Say these words in place of the micro language model's (for trying out directives).
    #[arg(long, value_name = "WORDS")]
    pub force_opener: Option<String>,
}

/// Surfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SurfaceArg {
    /// A screen: text can be taken back.
    Revisable,
    /// Speech: what was heard stays heard.
    AppendOnly,
}

/// Outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputArg {
    /// The reply.
    Text,
    /// One JSON object an event.
    Jsonl,
}

/// Tones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ToneArg {
    /// Matter-of-fact.
    Neutral,
    /// With a short apology.
    Apologetic,
    /// Light-hearted.
    Playful,
}

fn number(text: &str, what: &str, ok: impl Fn(f32) -> bool) -> Result<f32, String> {
    text.parse::<f32>()
        .ok()
        .filter(|value| ok(*value))
        .ok_or_else(|| what.to_owned())
}

fn time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|_| "a time is written like 500ms, 10s or 2m")?;
    if time > DAY {
        return Err("a day is the most".into());
    }
    Ok(time)
}

fn temperature(text: &str) -> Result<f32, String> {
    number(text, "a temperature is a number from 0 to 2", |v| {
        (0.0..=2.0).contains(&v)
    })
}

fn share(text: &str) -> Result<f32, String> {
    number(text, "a share is a number above 0 and up to 1", |v| v > 0.0 && v <= 1.0)
}

fn rate(text: &str) -> Result<f32, String> {
    number(
        text,
        "a rate of speech is a number from 20 to 2000 words a minute",
        |v| (20.0..=2000.0).contains(&v),
    )
}

impl Talk {
    /// What to load.
    pub fn ulm(&self) -> ulm::Options {
        ulm::Options {
            folder: self.model.clone(),
            precision: self.precision,
            threads: self.threads.map(usize::from),
        }
    }

    /// Whom to call.
    pub fn link(&self) -> link::Options {
        link::Options {
            servers: self.servers.clone(),
            access: self.access.clone(),
        }
    }

    /// The surface.
    pub fn surface(&self) -> Surface {
        match self.surface {
            SurfaceArg::Revisable => Surface::Revisable,
            SurfaceArg::AppendOnly => Surface::AppendOnly,
        }
    }

    /// How turns are run.
    pub fn options(&self) -> Options {
        let surface = self.surface();
        let pace = if surface == Surface::AppendOnly {
            self.wpm
        } else {
            READING
        };
        Options {
            surface,
            words_per_minute: self.wpm,
            policy: Policy::new(self.opener_words.into(), pace),
            sampling: Sampling {
                temperature: self.temperature,
                top_p: self.top_p,
                seed: self.seed,
            },
            parameters: GenerationParameters {
                max_tokens: self.max_tokens.unwrap_or(0),
                temperature: Some(self.temperature),
                top_p: Some(self.top_p),
                seed: self.seed,
                ..GenerationParameters::default()
            },
            tone: match self.tone {
                None => Tone::Unspecified,
                Some(ToneArg::Neutral) => Tone::Neutral,
                Some(ToneArg::Apologetic) => Tone::Apologetic,
                Some(ToneArg::Playful) => Tone::Playful,
            },
            forced_opener: self.force_opener.clone(),
            offline: self.offline,
            stall: self.stall,
            resume_within: self.resume_within,
            history_tokens: self.history_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (flag, value) in [
            ("--opener-words", "3"),
            ("--opener-words", "9"),
            ("--temperature", "NaN"),
            ("--temperature", "-1"),
            ("--top-p", "0"),
            ("--wpm", "0"),
            ("--max-tokens", "0"),
            ("--surface", "paper"),
            ("--output", "xml"),
            ("--tone", "angry"),
            ("--offline", "perhaps"),
            ("--resume-within", "-1s"),
            ("--stall", "soon"),
            ("--cert", "only.pem"),
        ] {
            let parsed = Cli::try_parse_from(["edge-agent", "ask", "why?", &format!("{flag}={value}")]);
            assert!(parsed.is_err(), "{flag} {value}");
        }
        assert!(Cli::try_parse_from(["edge-agent", "ask", "why?", "--opener-words=4"]).is_ok());
    }
}
