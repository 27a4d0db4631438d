//! One JSON object a line for every event.

use std::{io::Write, time::Duration};

use segue_shared::{proto, words};
use serde_json::{Value, json};

use crate::{
    conversation::{Happening, Outcome, View},
    turn::{Over, Show},
};

/// Writes events as JSON lines.
pub struct Json<W>(pub W);

impl<W: Write + Send> Json<W> {
    fn line(&mut self, at: Duration, event: &str, mut fields: Value) {
        let head = json!({ "t_ms": millis(at), "event": event });
        if let (Value::Object(head), Value::Object(rest)) = (head, &mut fields) {
            // `t_ms` and `event` first, for people who read along.
            let mut line = head;
            line.append(rest);
            // A reader that has gone is noticed at the end of the program.
            let _ = writeln!(self.0, "{}", Value::Object(line));
            let _ = self.0.flush();
        }
    }
}

impl<W: Write + Send> View for Json<W> {
    fn event(&mut self, at: Duration, event: &Happening<'_>) {
        match event {
            Happening::Produced(Show::OpenerWord(text)) => self.line(at, "opener_word", json!({ "text": text })),
            Happening::Produced(Show::Committed { text, decision }) => self.line(
                at,
                "opener_committed",
                json!({
                    "text": text, "words": decision.words, "reason": decision.reason.name(),
                    "mean_log_probability": decision.mean_log_probability,
                }),
            ),
            Happening::Produced(Show::Directive {
                correction,
                keep,
                reason,
                revision,
                removed,
            }) => self.line(
                at,
                "directive",
                json!({
                    "kind": correction.name(), "keep_bytes": keep, "reason": reason_name(*reason), "revision": revision,
                    "removed": removed,
                }),
            ),
            Happening::Produced(Show::Refused { revision, heard }) => {
                self.line(
                    at,
                    "directive_refused",
                    json!({ "revision": revision, "heard_bytes": heard }),
                );
            }
            Happening::Produced(Show::Continuation { offset, text }) => {
                self.line(at, "continuation", json!({ "offset": offset, "text": text }));
            }
            Happening::Produced(Show::Lost(why)) => self.line(at, "lost", json!({ "message": why })),
            Happening::Produced(Show::Resumed { bytes }) => self.line(at, "resumed", json!({ "offset": bytes })),
            Happening::Produced(Show::Alone(why)) => self.line(at, "offline", json!({ "message": why })),
            Happening::Produced(Show::AloneWord(text)) => self.line(at, "offline_word", json!({ "text": text })),
            Happening::Played(_) => {}
            Happening::Heard(bytes) => self.line(at, "heard", json!({ "bytes": bytes })),
        }
    }

    fn end(&mut self, at: Duration, outcome: &Outcome) {
        let timings = &outcome.timings;
        let mut times = json!({
            "first_word_ms": timings.first_word.map(millis),
            "opener_committed_ms": timings.committed.map(millis),
            "handoff_gap_ms": timings.handoff_gap.map(millis),
            "total_ms": millis(timings.total),
        });
        match &outcome.over {
            Over::Done(end) => {
                if let Some(server) = &end.timings {
                    let time = |t: Option<prost_types::Duration>| proto::std_duration(t).map(millis);
                    times["continuator"] = json!({
                        "prefill_ms": time(server.prefill), "verify_ms": time(server.verify),
                        "first_token_ms": time(server.first_token), "total_ms": time(server.total),
                    });
                }
                let usage = end.usage.unwrap_or_default();
                let reason = end.finish_reason().as_str_name().trim_start_matches("FINISH_REASON_").to_lowercase();
                self.line(
                    at,
                    "end",
                    json!({
                        "text": outcome.text, "finish_reason": reason, "offline": false, "resumed": outcome.resumed, "timings": times,
                        "usage": {
                            "prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens,
                            "opener_tokens": usage.opener_tokens, "generated_tokens": usage.generated_tokens,
                            "wasted_tokens": usage.wasted_tokens,
                        },
                    }),
                );
            }
            Over::Alone(_) => self.line(
                at,
                "end",
                json!({
                    "text": outcome.text, "finish_reason": "stop", "offline": true, "resumed": outcome.resumed, "timings": times,
                    "usage": null,
                }),
            ),
            Over::Cancelled => self.line(
                at,
                "end",
                json!({ "text": &outcome.text[..outcome.heard], "finish_reason": "cancelled", "timings": times, "usage": null }),
            ),
            over => {
                let (code, message) = failure(over);
                self.line(
                    at,
                    "error",
                    json!({
                        "code": code, "message": message, "text": outcome.text, "words": words::count(&outcome.text),
                        "timings": times,
                    }),
                );
            }
        }
    }
}

/// A short name and a sentence for a turn that failed.
pub fn failure(over: &Over) -> (String, String) {
    match over {
        Over::Failed { message, error, .. } => (
            error.as_str_name().trim_start_matches("TURN_ERROR_").to_lowercase(),
            message.clone(),
        ),
        Over::Lost(why) => (
            "connection_lost".into(),
            format!("{why}; what is shown is all that came"),
        ),
        Over::Broken(why) => ("protocol".into(), format!("the continuator broke the protocol: {why}")),
        Over::Done(_) | Over::Alone(_) | Over::Cancelled => ("none".into(), String::new()),
    }
}

fn reason_name(reason: proto::DirectiveReason) -> String {
    reason
        .as_str_name()
        .trim_start_matches("DIRECTIVE_REASON_")
        .to_lowercase()
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}
