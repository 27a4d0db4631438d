//! A scripted OpenAI-compatible server, for what real ones do only on bad days: it writes bytes, waits, and breaks off.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// Arguments that put the model `m` of an upstream behind a continuator.
pub fn args<'a>(url: &'a str, mode: &'a str) -> [&'a str; 6] {
    ["--upstream", url, "--upstream-model", "m", "--upstream-mode", mode]
}

/// A step of an answer.
#[derive(Clone, Debug)]
pub enum Step {
    /// Bytes of the HTTP answer.
    Send(Vec<u8>),
    /// Nothing for a while.
    Wait(Duration),
    /// The connection is reset.
    Reset,
    /// Nothing any more, but the connection stays.
    Hang,
}

/// What is answered to a completion request: its number (from 0), and its body.
pub type Script = dyn Fn(usize, &Value) -> Vec<Step> + Send + Sync;

/// The server; ends when dropped.
pub struct Upstream {
    /// Its API's address.
    pub url: String,
    seen: Arc<Seen>,
    server: JoinHandle<()>,
}

#[derive(Default)]
struct Seen {
    requests: Mutex<Vec<(Vec<String>, Value)>>,
    running: AtomicUsize,
    abandoned: AtomicUsize,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Upstream {
    /// Starts one on a free port.
    ///
    /// # Panics
    /// When there is none.
    pub async fn start(script: impl Fn(usize, &Value) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let url = format!("http://{}/v1", listener.local_addr().expect("it is bound"));
        let seen = Arc::new(Seen::default());
        let (script, kept): (Arc<Script>, _) = (Arc::new(script), seen.clone());
        let server = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                connections.spawn(serve(stream, script.clone(), kept.clone()));
            }
        });
        Self { url, seen, server }
    }

    /// One that refuses connections.
    ///
    /// # Panics
    /// When no port is free.
    pub async fn dead() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        format!("http://{}/v1", listener.local_addr().expect("it is bound"))
    }

    /// Bodies of completion requests so far.
    ///
    /// # Panics
    /// When the server panicked.
    pub fn requests(&self) -> Vec<Value> {
        self.with_headers().into_iter().map(|(_, body)| body).collect()
    }

    /// The same with the request line and the headers.
    ///
    /// # Panics
    /// When the server panicked.
    pub fn with_headers(&self) -> Vec<(Vec<String>, Value)> {
        self.seen.requests.lock().expect("no panic").clone()
    }

    /// Answers that are being given.
    pub fn running(&self) -> usize {
        self.seen.running.load(Ordering::SeqCst)
    }

    /// Answers whose reader went away.
    pub fn abandoned(&self) -> usize {
        self.seen.abandoned.load(Ordering::SeqCst)
    }
}

async fn serve(mut stream: TcpStream, script: Arc<Script>, seen: Arc<Seen>) {
    let mut buffer = Vec::new();
    while let Some((head, body)) = read_request(&mut stream, &mut buffer).await {
        let steps = if head[0].starts_with("GET") {
            vec![Step::Send(whole(200, &[], r#"{"object":"list","data":[]}"#))]
        } else {
            let request: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
            let number = {
                let mut requests = seen.requests.lock().expect("no panic");
                requests.push((head, request.clone()));
                requests.len() - 1
            };
            script(number, &request)
        };
        seen.running.fetch_add(1, Ordering::SeqCst);
        let goes_on = answer(&mut stream, steps).await;
        seen.running.fetch_sub(1, Ordering::SeqCst);
        match goes_on {
            Answered::Whole => {}
            Answered::Broken => return,
            Answered::Abandoned => {
                seen.abandoned.fetch_add(1, Ordering::SeqCst);
                return;
            }
        }
    }
}

enum Answered {
    Whole,
    Broken,
    Abandoned,
}

async fn answer(stream: &mut TcpStream, steps: Vec<Step>) -> Answered {
    let closes = !matches!(steps.last(), Some(Step::Send(last)) if last.ends_with(b"0\r\n\r\n") || steps.len() == 1);
    for step in steps {
        let done = async {
            match step {
                Step::Send(bytes) => stream.write_all(&bytes).await.map(|()| true),
                Step::Wait(time) => {
                    // Whoever waits with us may lose patience.
                    let mut byte = [0];
                    match tokio::time::timeout(time, stream.peek(&mut byte)).await {
                        Ok(Ok(0) | Err(_)) => Err(std::io::ErrorKind::ConnectionReset.into()),
                        _ => Ok(true),
                    }
                }
                Step::Reset => {
                    #[expect(deprecated, reason = "it does not block: there is nothing to send any more")]
                    stream.set_linger(Some(Duration::ZERO))?;
                    Ok(false)
                }
                Step::Hang => {
                    let mut byte = [0];
                    while matches!(stream.peek(&mut byte).await, Ok(1)) {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    Err(std::io::ErrorKind::ConnectionReset.into())
                }
            }
        };
        let done: std::io::Result<bool> = done.await;
        match done {
            Ok(true) => {}
            Ok(false) => return Answered::Broken,
            Err(_) => return Answered::Abandoned,
        }
    }
    if closes { Answered::Broken } else { Answered::Whole }
}

async fn read_request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<(Vec<String>, Vec<u8>)> {
    let mut chunk = [0; 16 << 10];
    loop {
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buffer[..at]).into_owned();
            let head: Vec<String> = head.split("\r\n").map(str::to_owned).collect();
            let length = head
                .iter()
                .find_map(|line| line.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
            let end = at + 4 + length.unwrap_or(0usize);
            if buffer.len() >= end {
                let body = buffer[at + 4..end].to_vec();
                buffer.drain(..end);
                return Some((head, body));
            }
        }
        match stream.read(&mut chunk).await {
            Ok(0) | Err(_) => return None,
            Ok(n) => buffer.extend_from_slice(&chunk[..n]),
        }
    }
}

/// A whole HTTP answer with a JSON body.
pub fn whole(status: u16, headers: &[&str], body: &str) -> Vec<u8> {
    let headers: String = headers.iter().map(|h| format!("{h}\r\n")).collect();
    format!(
        "HTTP/1.1 {status} Scripted\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// An error as OpenAI writes it.
pub fn error(status: u16, headers: &[&str], message: &str) -> Vec<Step> {
    let body = json!({"error": {"message": message, "type": "scripted", "code": null}}).to_string();
    vec![Step::Send(whole(status, headers, &body))]
}

/// The head of an answer that comes as events.
pub fn head() -> Vec<u8> {
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_vec()
}

/// A chunk of the HTTP body.
pub fn chunk(bytes: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

/// An event.
pub fn event(value: &Value) -> Vec<u8> {
    chunk(format!("data: {value}\n\n").as_bytes())
}

/// An event with a piece of text.
pub fn delta(text: &str) -> Vec<u8> {
    event(
        &json!({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": null}]}),
    )
}

/// The last events: finish reason, usage, end.
pub fn end(reason: &str) -> Vec<u8> {
    let finish = json!({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]});
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 16}}});
    [
        event(&finish),
        event(&usage),
        chunk(b"data: [DONE]\n\n"),
        b"0\r\n\r\n".to_vec(),
    ]
    .concat()
}

/// A complete answer, in pieces.
pub fn reply(pieces: &[&str]) -> Vec<u8> {
    let deltas = pieces.iter().flat_map(|piece| delta(piece));
    head().into_iter().chain(deltas).chain(end("stop")).collect()
}

/// The text of a request's last message, if the assistant says it: what is to be continued.
pub fn prefix(request: &Value) -> Option<&str> {
    let last = request["messages"].as_array()?.last()?;
    (last["role"] == "assistant").then(|| last["content"].as_str())?
}

/// Whether a request is the warm-up of a turn.
pub fn warms_up(request: &Value) -> bool {
    request["max_tokens"] == 1
}

/// Cuts a text into pieces like a tokenizer's: a space begins a piece.
pub fn pieces(text: &str) -> Vec<&str> {
    let mut starts: Vec<usize> = text.match_indices(' ').map(|(at, _)| at).filter(|at| *at > 0).collect();
    starts.insert(0, 0);
    starts.push(text.len());
    starts
        .windows(2)
        .map(|w| &text[w[0]..w[1]])
        .filter(|p| !p.is_empty())
        .collect()
}
