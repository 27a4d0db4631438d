//! Checking what a turn asks for.

use segue_shared::proto::{Role, StartTurn};

use crate::{
    backend::{Message, Parameters, Request},
    session::Limits,
};

/// Tokens of a continuation where the turn does not say.
const DEFAULT_TOKENS: u32 = 160;
/// Stop texts of one turn at most, and the longest, in bytes.
const STOPS: (usize, usize) = (16, 256);

/// The checked request of a turn.
///
/// # Errors
/// One sentence that names the field and what it may be; it never quotes what a user wrote.
pub fn check(start: &StartTurn, limits: &Limits) -> Result<Request, String> {
    let text = start.user_text.trim();
    if text.is_empty() {
        return Err("user_text is empty; ask something".into());
    }
    if start.user_text.len() > limits.user_text_bytes {
        return Err(format!(
            "user_text has {} bytes; at most {} are allowed",
            start.user_text.len(),
            limits.user_text_bytes
        ));
    }
    let bytes: usize = start.history.iter().map(|m| m.text.len()).sum();
    if bytes > limits.history_bytes {
        return Err(format!(
            "history has {bytes} bytes; at most {} are allowed, so leave out its oldest messages",
            limits.history_bytes
        ));
    }
    let history = start.history.iter().map(|message| match message.role() {
        Role::User => Ok(Message {
            assistant: false,
            text: message.text.clone(),
        }),
        Role::Assistant => Ok(Message {
            assistant: true,
            text: message.text.clone(),
        }),
        Role::Unspecified => Err("a message of the history has no role".to_owned()),
    });
    Ok(Request {
        history: history.collect::<Result<_, _>>()?,
        user_text: text.to_owned(),
        parameters: parameters(start, limits)?,
    })
}

/// Whether earlier attempts at the turn have generated all that it may have.
pub fn exhausted(start: &StartTurn, limits: &Limits) -> bool {
    start.generated_tokens > 0 && start.generated_tokens >= most_tokens(start, limits)
}

fn most_tokens(start: &StartTurn, limits: &Limits) -> u32 {
    match start.parameters.as_ref().map_or(0, |given| given.max_tokens) {
        0 => DEFAULT_TOKENS.min(limits.tokens),
        wanted => wanted,
    }
}

fn parameters(start: &StartTurn, limits: &Limits) -> Result<Parameters, String> {
    let given = start.parameters.clone().unwrap_or_default();
    let within = |name: &str, value: Option<f32>, default: f32, range: &str, ok: &dyn Fn(f32) -> bool| match value {
        None => Ok(default),
        Some(value) if ok(value) => Ok(value),
        Some(value) => Err(format!("{name} is {value}; it must be in {range}")),
    };
    if given.max_tokens > limits.tokens {
        return Err(format!(
            "max_tokens is {}; at most {} are allowed",
            given.max_tokens, limits.tokens
        ));
    }
    if given.stop.len() > STOPS.0 {
        return Err(format!(
            "there are {} stop texts; at most {} are allowed",
            given.stop.len(),
            STOPS.0
        ));
    }
    if given.stop.iter().any(|s| s.is_empty() || s.len() > STOPS.1) {
        return Err(format!("a stop text must have 1 to {} bytes", STOPS.1));
    }
    Ok(Parameters {
        max_tokens: most_tokens(start, limits).saturating_sub(start.generated_tokens).max(1),
        temperature: within("temperature", given.temperature, 0.0, "0 to 2", &|v| {
            (0.0..=2.0).contains(&v)
        })?,
        top_p: within("top_p", given.top_p, 1.0, "(0, 1]", &|v| v > 0.0 && v <= 1.0)?,
        min_p: within("min_p", given.min_p, 0.0, "[0, 1)", &|v| (0.0..1.0).contains(&v))?,
        seed: given.seed,
        stop: given.stop,
    })
}

#[cfg(test)]
mod tests {
    use segue_shared::proto::{self, GenerationParameters};

    use super::*;

    fn start() -> StartTurn {
        StartTurn {
            turn_id: 1,
            user_text: " Why? ".into(),
            ..StartTurn::default()
        }
    }

    fn with(parameters: GenerationParameters) -> Result<Request, String> {
        check(
            &StartTurn {
                parameters: Some(parameters),
                ..start()
            },
            &Limits::default(),
        )
    }

    #[test]
    fn defaults_are_greedy_and_bounded() {
        let request = check(&start(), &Limits::default()).unwrap();
        assert_eq!(request.user_text, "Why?");
        assert_eq!(
            (request.parameters.temperature, request.parameters.max_tokens),
            (0.0, DEFAULT_TOKENS)
        );
    }

    #[test]
    fn bad_values_are_named() {
        let p = GenerationParameters::default;
        for (request, says) in [
            (
                with(GenerationParameters {
                    temperature: Some(f32::NAN),
                    ..p()
                }),
                "temperature",
            ),
            (
                with(GenerationParameters {
                    temperature: Some(-1.0),
                    ..p()
                }),
                "temperature",
            ),
            (
                with(GenerationParameters {
                    top_p: Some(0.0),
                    ..p()
                }),
                "top_p",
            ),
            (
                with(GenerationParameters {
                    min_p: Some(1.0),
                    ..p()
                }),
                "min_p",
            ),
            (
                with(GenerationParameters {
                    max_tokens: 1_000_000,
                    ..p()
                }),
                "max_tokens",
            ),
            (
                with(GenerationParameters {
                    stop: vec![String::new()],
                    ..p()
                }),
                "stop",
            ),
            (
                check(
                    &StartTurn {
                        user_text: " \n".into(),
                        ..start()
                    },
                    &Limits::default(),
                ),
                "empty",
            ),
            (
                check(
                    &StartTurn {
                        user_text: "x".repeat(1 << 20),
                        ..start()
                    },
                    &Limits::default(),
                ),
                "user_text",
            ),
            (
                check(
                    &StartTurn {
                        history: vec![proto::Message {
                            role: 1,
                            text: "x".repeat(1 << 20),
                        }],
                        ..start()
                    },
                    &Limits::default(),
                ),
                "history",
            ),
            (
                check(
                    &StartTurn {
                        history: vec![proto::Message::default()],
                        ..start()
                    },
                    &Limits::default(),
                ),
                "role",
            ),
        ] {
            let message = request.unwrap_err();
            assert!(message.contains(says), "{message}");
        }
    }
}
