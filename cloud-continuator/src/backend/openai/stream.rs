//! Reading an upstream's answer: server-sent events, or an error.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use eventsource_stream::{EventStream, EventStreamError, Eventsource};
use serde::{
    Deserialize, Deserializer,
    de::{SeqAccess, Visitor},
};
use serde_json::Value;
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};
use tokio_stream::{Stream, StreamExt};

use crate::backend::{Failure, Finish};

/// Largest event, in bytes; a token's has a few hundred, a whole reply's (from a server that does not stream) some ten thousand.
const EVENT_BYTES: usize = 1 << 20;
/// Longest message of an error that is passed on, in characters.
const MESSAGE: usize = 300;
/// How long to wait for the usage, and the end, once the reply is complete.
const REST: Duration = Duration::from_millis(500);

/// Tokens as the upstream counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Of the prompt.
    pub prompt: u32,
    /// Of these, in a cache.
    pub cached: u32,
    /// Generated.
    pub completion: u32,
}

/// A piece of an upstream's answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// Text of the reply.
    Text(String),
    /// A sign of life without text: a role, or thinking.
    Life,
    /// The reply is complete. The usage may follow.
    Finish(Finish),
    /// What it took.
    Usage(Counted),
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Body {
    choices: Option<Vec<Choice>>,
    usage: Option<UsageBody>,
    error: Option<Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Choice {
    delta: Option<Content>,
    /// Of a server that does not stream.
    message: Option<Content>,
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Content {
    content: Option<Text>,
}

/// Mostly a string; models that think out loud may write a list of parts, of which only some are the reply's.
struct Text(String);

#[derive(Default, Deserialize)]
#[serde(default)]
struct Part {
    text: Option<String>,
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // (`untagged` would copy every string once more.)
        deserializer.deserialize_any(TextVisitor)
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct UsageBody {
    prompt_tokens: u32,
    completion_tokens: u32,
    prompt_tokens_details: Option<Details>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: Option<u32>,
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Text;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a string or a list of parts")
    }

    fn visit_str<E>(self, text: &str) -> Result<Text, E> {
        Ok(Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Text, E> {
        Ok(Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Text, A::Error> {
        let mut text = String::new();
        while let Some(part) = parts.next_element::<Part>()? {
            text.push_str(&part.text.unwrap_or_default());
        }
        Ok(Text(text))
    }
}

/// Takes an event's data apart; `[DONE]` is none.
///
/// # Errors
/// [`Failure::Refused`] when it is an error, [`Failure::CutOff`] when it is no JSON.
pub fn pieces(data: &str) -> Result<Vec<Piece>, Failure> {
    let body: Body = serde_json::from_str(data).map_err(|_| Failure::CutOff)?;
    if let Some(error) = &body.error {
        return Err(refused(200, error));
    }
    let mut pieces = Vec::new();
    for choice in body.choices.into_iter().flatten().take(1) {
        let text = choice
            .delta
            .or(choice.message)
            .and_then(|c| c.content)
            .map(|text| text.0);
        pieces.push(text.filter(|t| !t.is_empty()).map_or(Piece::Life, Piece::Text));
        match choice.finish_reason.as_deref() {
            None | Some("") => {}
            Some("length") => pieces.push(Piece::Finish(Finish::Length)),
            Some(_) => pieces.push(Piece::Finish(Finish::Stop)),
        }
    }
    if let Some(usage) = body.usage {
        pieces.push(Piece::Usage(Counted {
            prompt: usage.prompt_tokens,
            cached: usage.prompt_tokens_details.and_then(|d| d.cached_tokens).unwrap_or(0),
            completion: usage.completion_tokens,
        }));
    }
    Ok(pieces)
}

/// What an error's body means. `status` is the HTTP status.
pub fn error(status: u16, retry_after: Option<Duration>, body: &str) -> Failure {
    let value: Value = serde_json::from_str(body).unwrap_or(Value::Null);
    if matches!(status, 429 | 503) && retry_after.is_some() {
        return Failure::Overloaded { retry_after };
    }
    let error = value.get("error").unwrap_or(&value);
    if let Value::Null = error {
        let message = body.split_whitespace().collect::<Vec<_>>().join(" ");
        return refused(status, &Value::String(message));
    }
    refused(status, error)
}

fn refused(status: u16, error: &Value) -> Failure {
    // llama.cpp's server names both sizes.
    let size = |name: &str| error.get(name).and_then(Value::as_u64).map(|n| n as usize);
    if let (Some(needed), Some(available)) = (size("n_prompt_tokens"), size("n_ctx")) {
        return Failure::ContextTooSmall { needed, available };
    }
    let text = |name: &str| error.get(name).and_then(Value::as_str);
    let message = error
        .as_str()
        .or_else(|| text("message"))
        .or_else(|| text("detail"))
        .unwrap_or("without a message");
    let code = error
        .get("code")
        .and_then(Value::as_u64)
        .and_then(|n| u16::try_from(n).ok());
    // What is said about a refused key may quote it.
    let message = if matches!(status, 401 | 403) {
        "(the API key is refused)"
    } else {
        message
    };
    Failure::Refused {
        status: if status == 200 { code.unwrap_or(status) } else { status },
        message: message.chars().take(MESSAGE).collect(),
    }
}

/// The value of a `Retry-After` header in seconds.
pub fn retry_after(value: Option<&str>) -> Option<Duration> {
    let seconds: f64 = value?.trim().parse().ok()?;
    // (A date is possible too, but means little between clocks that differ.)
    (seconds.is_finite() && seconds >= 0.0).then(|| Duration::from_secs_f64(seconds.min(3600.0)))
}

type Bytes = Pin<Box<dyn Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>;

/// An answer that comes as events.
pub struct Answer {
    events: EventStream<Bounded>,
    queue: VecDeque<Piece>,
    stall: Duration,
    deadline: Instant,
    /// Fires at the deadline, or before: it is set anew only when it has fired, for a timer costs more than reading an event.
    timer: Pin<Box<Sleep>>,
    finished: bool,
}

impl Answer {
    /// Reads `response`, whose first event must come until `first`, and every other within `stall` of the one before.
    ///
    /// # Errors
    /// Those of [`Answer::next`], from a server that does not stream.
    pub async fn read(response: reqwest::Response, first: Instant, stall: Duration) -> Result<Self, Failure> {
        let streams = response
            .headers()
            .get(reqwest::header::CONTENT_TYPE)
            .is_none_or(|kind| !kind.as_bytes().starts_with(b"application/json"));
        let mut bounded = Bounded {
            bytes: Box::pin(response.bytes_stream()),
            head: Some(Vec::new()),
            since_event: 0,
            in_line: false,
        };
        let mut queue = VecDeque::new();
        if !streams {
            let mut whole = Vec::new();
            while let Some(bytes) = timeout_at(first, bounded.next())
                .await
                .map_err(|_| Failure::Stalled(stall))?
            {
                whole.extend_from_slice(&bytes.map_err(|_| Failure::CutOff)?);
                if whole.len() > EVENT_BYTES {
                    return Err(Failure::CutOff);
                }
            }
            queue.extend(pieces(&String::from_utf8_lossy(&whole))?);
        }
        Ok(Self {
            events: bounded.eventsource(),
            queue,
            stall,
            deadline: first,
            timer: Box::pin(sleep_until(first)),
            finished: false,
        })
    }

    /// The next piece; `None` at the end of a complete reply.
    ///
    /// # Errors
    /// [`Failure::Stalled`], [`Failure::CutOff`], or what the upstream reported.
    pub async fn next(&mut self) -> Result<Option<Piece>, Failure> {
        loop {
            if let Some(piece) = self.queue.pop_front() {
                if matches!(piece, Piece::Finish(_)) {
                    self.finished = true;
                    self.deadline = Instant::now() + REST;
                }
                return Ok(Some(piece));
            }
            let event = match self.event().await {
                Some(Some(Ok(event))) => event,
                // A complete reply may end in any way.
                _ if self.finished => return Ok(None),
                None => return Err(Failure::Stalled(self.stall)),
                Some(_) => return Err(Failure::CutOff),
            };
            if event.data.trim() == "[DONE]" {
                if self.finished {
                    return Ok(None);
                }
                self.queue.push_back(Piece::Finish(Finish::Stop));
                continue;
            }
            self.queue.extend(pieces(&event.data)?);
            if !self.finished {
                self.deadline = Instant::now() + self.stall;
            }
        }
    }
}

impl Answer {
    /// The next event; `None` when it is not there by the deadline.
    async fn event(&mut self) -> Option<Option<Result<eventsource_stream::Event, EventStreamError<TooLong>>>> {
        if self.timer.deadline() > self.deadline {
            self.timer.as_mut().reset(self.deadline);
        }
        loop {
            tokio::select! {
                biased;
                event = self.events.next() => return Some(event),
                () = self.timer.as_mut() => {}
            }
            if self.deadline <= Instant::now() {
                return None;
            }
            self.timer.as_mut().reset(self.deadline);
        }
    }
}

/// Bytes of which no event may have too many: a peer must not fill our memory.
struct Bounded {
    bytes: Bytes,
    /// What came of byte order marks at the very beginning, while there may be more of them: the reader of events trips over them.
    head: Option<Vec<u8>>,
    since_event: usize,
    in_line: bool,
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

impl Bounded {
    /// The bytes without marks in front of the first.
    fn unmarked(&mut self, bytes: bytes::Bytes) -> bytes::Bytes {
        let Some(mut head) = self.head.take() else { return bytes };
        head.extend_from_slice(&bytes);
        let mut rest = &head[..];
        while let Some(after) = rest.strip_prefix(BYTE_ORDER_MARK) {
            rest = after;
        }
        if BYTE_ORDER_MARK.starts_with(rest) {
            self.head = Some(rest.to_vec());
            return bytes::Bytes::new();
        }
        bytes::Bytes::copy_from_slice(rest)
    }
}

impl Stream for Bounded {
    type Item = Result<bytes::Bytes, TooLong>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = std::task::ready!(self.bytes.as_mut().poll_next(context));
        Poll::Ready(match next {
            None => None,
            Some(Err(_)) => Some(Err(TooLong)),
            Some(Ok(bytes)) => {
                let bytes = self.unmarked(bytes);
                for byte in &bytes {
                    match byte {
                        // An empty line ends an event.
                        b'\n' if !self.in_line => self.since_event = 0,
                        b'\n' => self.in_line = false,
                        b'\r' => {}
                        _ => self.in_line = true,
                    }
                    self.since_event += 1;
                }
                Some(if self.since_event > EVENT_BYTES {
                    Err(TooLong)
                } else {
                    Ok(bytes)
                })
            }
        })
    }
}

/// The bytes broke off, or have no end.
#[derive(Debug)]
pub struct TooLong;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_known_servers() {
        let text = |t: &str| Piece::Text(t.into());
        for (data, wanted) in [
            // vLLM's first, with a role; then text; thinking; the end; the usage.
            (
                r#"{"id":"x","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
                vec![Piece::Life],
            ),
            (
                r#"{"choices":[{"index":0,"delta":{"content":" caf\u00e9"}}]}"#,
                vec![text(" café")],
            ),
            (
                r#"{"choices":[{"delta":{"reasoning_content":"Hm","content":null}}]}"#,
                vec![Piece::Life],
            ),
            (
                r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#,
                vec![Piece::Life, Piece::Finish(Finish::Length)],
            ),
            (
                r#"{"choices":[],"usage":{"prompt_tokens":30,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":16}}}"#,
                vec![Piece::Usage(Counted {
                    prompt: 30,
                    cached: 16,
                    completion: 4,
                })],
            ),
            // A server that does not stream.
            (
                r#"{"choices":[{"message":{"role":"assistant","content":"Hi."},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2,"prompt_tokens_details":null}}"#,
                vec![
                    text("Hi."),
                    Piece::Finish(Finish::Stop),
                    Piece::Usage(Counted {
                        prompt: 3,
                        cached: 0,
                        completion: 2,
                    }),
                ],
            ),
            (r#"{"object":"keepalive"}"#, vec![]),
            (r#"{"choices":null}"#, vec![]),
            (
                r#"{"choices":[{"delta":{"content":[{"type":"thinking","thinking":[{"text":"Hm"}]},{"type":"text","text":" So"}]}}]}"#,
                vec![text(" So")],
            ),
        ] {
            assert_eq!(pieces(data).unwrap(), wanted, "{data}");
        }
        assert_eq!(pieces("{\"choices\":[{"), Err(Failure::CutOff));
    }

    #[test]
    fn errors_of_known_servers() {
        let refused = |status, message: &str| Failure::Refused {
            status,
            message: message.into(),
        };
        let wait = Some(Duration::from_secs(2));
        for (status, after, body, wanted) in [
            (
                400,
                None,
                r#"{"error":{"message":"no prefill","type":"invalid_request_error","code":null}}"#,
                refused(400, "no prefill"),
            ),
            (
                400,
                None,
                r#"{"object":"error","message":"bad","code":400}"#,
                refused(400, "bad"),
            ),
            (422, None, r#"{"detail":"extra fields"}"#, refused(422, "extra fields")),
            (
                502,
                None,
                "<html>\nBad Gateway</html>",
                refused(502, "<html> Bad Gateway</html>"),
            ),
            (
                429,
                wait,
                r#"{"error":{"message":"slow down"}}"#,
                Failure::Overloaded { retry_after: wait },
            ),
            (429, None, r#"{"error":"slow down"}"#, refused(429, "slow down")),
            (
                400,
                None,
                r#"{"error":{"code":400,"message":"too long","type":"exceed_context_size_error","n_prompt_tokens":900,"n_ctx":512}}"#,
                Failure::ContextTooSmall {
                    needed: 900,
                    available: 512,
                },
            ),
        ] {
            assert_eq!(error(status, after, body), wanted, "{body}");
        }
        assert_eq!(
            pieces(r#"{"error":{"message":"gone","code":500}}"#),
            Err(refused(500, "gone"))
        );
    }

    #[test]
    fn retry_after_is_seconds() {
        assert_eq!(retry_after(Some(" 1.5 ")), Some(Duration::from_millis(1500)));
        for odd in [
            None,
            Some("Wed, 21 Oct 2026 07:28:00 GMT"),
            Some("-1"),
            Some("NaN"),
            Some(""),
        ] {
            assert_eq!(retry_after(odd), None, "{odd:?}");
        }
    }
}
