//! The command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use segue_shared::proto::Tone;

use crate::{
    layout::Layout,
    policy,
    turn::Judgement,
    verify::{self, Thresholds},
};

/// The default large model, which `make setup` brings.
pub const DEFAULT_MODEL: &str = ".segue/models/SmolLM2-135M-Instruct.Q4_1.gguf";

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
    /// Load a model and serve continuations over gRPC.
    Serve(Box<Serve>),
    /// Ask a continuator whether it serves: exit code 0 if it does.
    Check {
        /// The continuator's address.
        #[arg(default_value = "http://127.0.0.1:50051")]
        url: String,
    },
}

/// Options of `serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// Address and port to listen on.
    #[arg(long, default_value = "127.0.0.1:50051", env = "SEGUE_LISTEN")]
    pub listen: SocketAddr,
    /// Large model: a GGUF file.
    #[arg(long, default_value = DEFAULT_MODEL, env = "SEGUE_MODEL")]
    pub model: PathBuf,
    /// How the conversation is put to the model [default: by the model].
    #[arg(long)]
    pub layout: Option<Layout>,
    /// KV cache for all turns together, in tokens.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(256..=1 << 22))]
    pub context: u32,
    /// Turns that run at a time; more wait.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=63))]
    pub slots: u32,
    /// Turns that may wait for a place; more are turned away.
    #[arg(long, default_value_t = 64)]
    pub waiting: usize,
    /// Threads for the model [default: one per core].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=512))]
    pub threads: Option<u16>,
    /// Layers of the model to put on a GPU (needs a build with the `cuda` or `vulkan` feature).
    #[arg(long, default_value_t = 0)]
    pub gpu_layers: u32,
    /// Verifier and directives.
    #[command(flatten)]
    pub judgement: JudgementArgs,
}

/// How openers are judged and corrected.
#[derive(Debug, Args)]
#[command(next_help_heading = "Directives")]
pub struct JudgementArgs {
    /// How openers are judged.
    #[arg(long, value_enum, default_value_t = verify::Kind::Likelihood)]
    pub verifier: verify::Kind,
    /// Directives that may be used besides `bridge`, which is always possible.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Allowed::Revise, Allowed::Restart])]
    pub directives: Vec<Allowed>,
    /// Continue every opener as it is.
    #[arg(long)]
    pub no_verify: bool,
    /// Manner of bridges, where the edge has no wish.
    #[arg(long, value_enum, default_value_t = ToneArg::Neutral)]
    pub tone: ToneArg,
    /// A word is wrong when the large model gives one of its tokens a log-probability below this.
    #[arg(long, allow_negative_numbers = true, value_parser = log_probability, default_value_t = Thresholds::default().word)]
    pub word_threshold: f32,
    /// An opener is wrong as a whole when the mean log-probability of its tokens is below this.
    #[arg(long, allow_negative_numbers = true, value_parser = log_probability, default_value_t = Thresholds::default().mean)]
    pub mean_threshold: f32,
}

/// Directives that can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Allowed {
    /// Only `bridge`.
    Bridge,
    /// Replace the tail of an opener.
    Revise,
    /// Drop an opener.
    Restart,
}

/// Manner of a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ToneArg {
    /// Matter-of-fact.
    Neutral,
    /// With a short apology.
    Apologetic,
    /// Light-hearted.
    Playful,
}

fn log_probability(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if (-100.0..=0.0).contains(&value) => Ok(value),
        _ => Err("a log-probability threshold is a number from -100 to 0".into()),
    }
}

impl JudgementArgs {
    /// The settings that these options mean.
    pub fn judgement(&self) -> Judgement {
        let tone = match self.tone {
            ToneArg::Neutral => Tone::Neutral,
            ToneArg::Apologetic => Tone::Apologetic,
            ToneArg::Playful => Tone::Playful,
        };
        Judgement {
            verifier: self.verifier,
            thresholds: Thresholds {
                word: self.word_threshold,
                mean: self.mean_threshold,
            },
            policy: policy::Settings {
                verify: !self.no_verify,
                revise: self.directives.contains(&Allowed::Revise),
                restart: self.directives.contains(&Allowed::Restart),
                tone,
                ..policy::Settings::default()
            },
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
    fn thresholds_have_a_range() {
        let parse = |value: &str| Cli::try_parse_from(["x", "serve", "--word-threshold", value]);
        assert!(parse("-8.5").is_ok());
        for bad in ["1", "-101", "NaN", "x"] {
            assert!(parse(bad).unwrap_err().to_string().contains("-100 to 0"), "{bad}");
        }
        assert!(Cli::try_parse_from(["x", "serve", "--tone", "angry"]).is_err());
    }
}
