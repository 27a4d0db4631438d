//! Names of span attributes: OpenTelemetry's GenAI conventions where they have one, ours where they do not.
//!
//! (`tracing` wants literal names in its macros; these constants are for recording values later and for tests.)

/// Who serves the model.
pub const PROVIDER: &str = "gen_ai.provider.name";
/// The model's name.
pub const MODEL: &str = "gen_ai.request.model";
/// Tokens of the prompt.
pub const INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
/// Tokens generated.
pub const OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
/// Prompt tokens found in a cache.
pub const CACHED_TOKENS: &str = "gen_ai.usage.cache_read.input_tokens";
/// Why the generation ended.
pub const FINISH_REASONS: &str = "gen_ai.response.finish_reasons";
/// The verifier's verdict: `accept` or `wrong`.
pub const VERDICT: &str = "segue.verdict";
/// Words of the opener before the first wrong one.
pub const GOOD_WORDS: &str = "segue.verdict.good_words";
/// Whether the turn went on from the reply of an earlier stream.
pub const RESUMED: &str = "segue.turn.resumed";
/// `none`, `bridge`, `revise` or `restart`.
pub const DIRECTIVE: &str = "segue.directive";
/// Tokens computed and thrown away.
pub const WASTED_TOKENS: &str = "segue.tokens.wasted";
/// The typed error of a failed turn.
pub const ERROR_TYPE: &str = "error.type";
