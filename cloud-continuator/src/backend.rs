//! What continues a reply: a large model behind one interface.

pub mod breaker;
pub mod embedded;
pub mod openai;

use std::{pin::Pin, sync::Arc, time::Duration};

use thiserror::Error;
use tokio_stream::Stream;

/// One earlier message of the conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Whether the assistant said it (else the user did).
    pub assistant: bool,
    /// The text.
    pub text: String,
}

/// How the continuation is sampled; every value has been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// Most tokens of the continuation; at least 1.
    pub max_tokens: u32,
    /// Sampling temperature; 0 is greedy.
    pub temperature: f32,
    /// Nucleus sampling, in (0, 1].
    pub top_p: f32,
    /// Least probability relative to the likeliest token's, in [0, 1).
    pub min_p: f32,
    /// Seed; `None` draws one.
    pub seed: Option<u64>,
    /// Texts that end the continuation; none is empty.
    pub stop: Vec<String>,
}

impl Parameters {
    /// Greedy, and nothing else.
    pub fn greedy(max_tokens: u32) -> Self {
        Self {
            max_tokens,
            temperature: 0.0,
            top_p: 1.0,
            min_p: 0.0,
            seed: None,
            stop: Vec::new(),
        }
    }
}

/// A turn as a backend sees it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The conversation so far.
    pub history: Vec<Message>,
    /// What the user said.
    pub user_text: String,
    /// How to sample.
    pub parameters: Parameters,
}

/// What a turn tells its backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The opener so far: the cache may be extended with it.
    Opener(String),
    /// The committed prefix; answered with [`Event::Scored`].
    Commit(String),
    /// Judge this opener and go on, in one request: answered like [`Input::Generate`], with a control line at the head of the text
    /// (see [`crate::judge`]).
    Judge(String),
    /// Continue this reply text; answered with [`Event::Text`]s and [`Event::Done`]. May come again with another text, which
    /// ends the generation before.
    Generate(String),
    /// Go on with this reply text, which another backend left off anywhere, even inside a word: answered like [`Input::Generate`], but the
    /// text must follow the given one as it is, for nothing mends the joint.
    Resume(String),
    /// The turn is over: free what it holds.
    Close,
}

impl Input {
    /// Whether it begins a generation, and so is answered with [`Event::Text`]s and [`Event::Done`].
    pub fn generates(&self) -> bool {
        matches!(self, Input::Judge(_) | Input::Generate(_) | Input::Resume(_))
    }
}

/// How probable the model finds one token of the committed prefix.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenScore {
    /// Byte of the prefix at which the token's text ends.
    pub end: usize,
    /// Natural logarithm of its probability.
    pub log_probability: f32,
    /// How many tokens the model finds likelier.
    pub rank: u32,
}

/// Tokens that a turn took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Which of the turn's generations this is about, counted from 0: events of one that was replaced may still be on their way.
    pub generation: u32,
    /// Tokens of the prompt, without the reply's.
    pub prompt: u32,
    /// Of these, tokens found in a cache.
    pub cached: u32,
    /// Tokens of the reply text that was continued.
    pub opener: u32,
    /// Tokens generated and delivered.
    pub generated: u32,
    /// Tokens computed and thrown away.
    pub wasted: u32,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its reply, or a stop text was reached.
    Stop,
    /// The most tokens allowed were generated.
    Length,
}

/// What a backend tells its turn.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The conversation is in the cache.
    Prefilled,
    /// The committed prefix is in the cache; one score per token of it.
    Scored(Vec<TokenScore>),
    /// More of the continuation (whole characters), and what the turn took so far.
    Text(String, Usage),
    /// The continuation is complete.
    Done(Finish, Usage),
    /// The backend gave up.
    Failed(Failure),
}

/// Why a backend cannot serve a turn.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Failure {
    /// The prompt and the reply do not fit the model's context.
    #[error(
        "the conversation needs {needed} tokens of context, but there are {available}; shorten the history or give the continuator a larger --context"
    )]
    ContextTooSmall {
        /// Tokens needed.
        needed: usize,
        /// Tokens that a turn can have.
        available: usize,
    },
    /// No room now.
    #[error("the continuator is at its limit of turns; try again shortly")]
    Overloaded {
        /// How long to leave it alone, where that is known.
        retry_after: Option<Duration>,
    },
    /// Every backend is being left alone after failures.
    #[error("no backend works at the moment; they are tried again in {0:?}")]
    Unavailable(Duration),
    /// The model cannot be run.
    #[error("the model failed: {0}")]
    Model(String),
    /// No connection to the upstream server.
    #[error("the upstream server cannot be reached: {0}")]
    Unreachable(String),
    /// The upstream server answered with an error. Its message may quote the user: it must not be logged.
    #[error("the upstream server refused: {status} {message}")]
    Refused {
        /// HTTP status; 200 for an error inside a stream.
        status: u16,
        /// What it said.
        message: String,
    },
    /// The upstream server sent nothing for this long.
    #[error("the upstream server sent nothing for {0:?}")]
    Stalled(Duration),
    /// The upstream server's reply broke off.
    #[error("the upstream server's reply broke off")]
    CutOff,
}

impl Failure {
    /// The engine's thread has ended.
    pub fn stopped() -> Self {
        Failure::Model("the engine stopped".into())
    }

    /// A name for logs, spans and metrics: it holds nothing that anybody wrote.
    pub fn kind(&self) -> &'static str {
        match self {
            Failure::ContextTooSmall { .. } => "context_too_small",
            Failure::Overloaded { .. } => "overloaded",
            Failure::Unavailable(_) => "unavailable",
            Failure::Model(_) => "model",
            Failure::Unreachable(_) => "unreachable",
            Failure::Refused { .. } => "refused",
            Failure::Stalled(_) => "stalled",
            Failure::CutOff => "cut_off",
        }
    }

    /// Whether the same turn may succeed later or elsewhere.
    pub fn retryable(&self) -> bool {
        match self {
            Failure::ContextTooSmall { .. } => false,
            Failure::Refused { status, .. } => matches!(status, 200 | 408 | 425 | 429 | 500..),
            _ => true,
        }
    }
}

/// What a backend is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The model's name.
    pub model: String,
    /// `gen_ai.provider.name`.
    pub provider: &'static str,
    /// Whether it scores a committed prefix; else [`Event::Scored`] comes without scores.
    pub scores: bool,
    /// Whether it runs in this process, where it was seen to work when it was loaded.
    pub local: bool,
}

/// Serves turns.
pub trait Backend: Send + Sync + 'static {
    /// What it is.
    fn info(&self) -> &Info;

    /// Begins a turn: starts reading the conversation at once. Dropping the returned turn cancels its work.
    ///
    /// # Errors
    /// [`Failure::Overloaded`] when no more turns can wait; other failures come as [`Event::Failed`].
    fn open(&self, request: Request) -> Result<Turn, Failure>;

    /// Whether it could serve a turn now.
    ///
    /// # Errors
    /// Why it could not.
    fn check(&self) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + '_>>;
}

type Events = Pin<Box<dyn Stream<Item = Event> + Send>>;

/// A turn at a backend.
pub struct Turn {
    input: Arc<dyn Fn(Input) -> Result<(), Failure> + Send + Sync>,
    events: Events,
}

impl Turn {
    /// A turn that takes input through `input` and reports through `events`.
    pub fn new(
        input: impl Fn(Input) -> Result<(), Failure> + Send + Sync + 'static,
        events: impl Stream<Item = Event> + Send + 'static,
    ) -> Self {
        Self {
            input: Arc::new(input),
            events: Box::pin(events),
        }
    }

    /// Tells the backend something.
    ///
    /// # Errors
    /// [`Failure`] when the backend cannot take it: the turn has failed.
    pub fn send(&self, input: Input) -> Result<(), Failure> {
        (self.input)(input)
    }

    /// The next event; `None` when there will be no more.
    pub fn poll_next(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<Event>> {
        self.events.as_mut().poll_next(context)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // If the backend's queue is full it will see the closed event channel instead.
        let _ = (self.input)(Input::Close);
    }
}
