//! A conversation: turns one after the other, each with the μLM, a continuator (one after the other, if need be), the surface and the
//! clock around its state machine.

mod history;
mod run;
mod speaker;

use std::{future::pending, time::Duration};

use segue_shared::{
    client::ConnectError,
    proto::{self, EdgeFrame, StartTurn, Welcome, cloud_frame::Body},
    reply_log::Surface,
    telemetry::TraceContext,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::{field::Empty, info_span};

use self::{
    history::History,
    run::{Run, Wish},
    speaker::Said,
};
use crate::{
    link::{Link, News},
    opener::Policy,
    player::Piece,
    turn::{Event, Over, Show, Turn},
    ulm::{Engine, sampler::Sampling},
};

/// Bytes that a question may have where no continuator has said otherwise.
const QUESTION_BYTES: usize = 16 << 10;
/// How long to wait before a turn is put again to the only server there is, when that does not say.
const RETRY: Duration = Duration::from_secs(1);

/// When the μLM answers without a continuator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Offline {
    /// Never: without a continuator there is no reply.
    Never,
    /// When no continuator can be reached.
    #[default]
    Auto,
    /// Always: no continuator is called.
    Always,
}

/// How turns are run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where replies are shown.
    pub surface: Surface,
    /// Words a minute of speech.
    pub words_per_minute: f32,
    /// The opener policy.
    pub policy: Policy,
    /// How the μLM is sampled.
    pub sampling: Sampling,
    /// How the large model is sampled.
    pub parameters: proto::GenerationParameters,
    /// The manner of bridges.
    pub tone: proto::Tone,
    /// Words to say in place of the μLM's.
    pub forced_opener: Option<String>,
    /// When the μLM answers alone.
    pub offline: Offline,
    /// Silence of the continuator after which it counts as lost.
    pub stall: Duration,
    /// How long a reply waits for a continuator that goes on with it.
    pub resume_within: Duration,
    /// Tokens (the μLM's) of earlier conversation that are told to the continuator at most.
    pub history_tokens: usize,
}

/// What a view is told, in the order in which it happens.
#[derive(Clone, Debug)]
pub enum Happening<'a> {
    /// Something was produced.
    Produced(&'a Show),
    /// A piece of the reply reached the surface.
    Played(&'a Piece),
    /// The user has had this many bytes (speech only).
    Heard(usize),
}

/// Shows a turn to a person or a program.
pub trait View: Send {
    /// Something happened, `at` after the question.
    fn event(&mut self, at: Duration, event: &Happening<'_>);
    /// The turn is over.
    fn end(&mut self, at: Duration, outcome: &Outcome);
}

/// Times of a turn, since the question unless said otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// The first word of the reply was shown.
    pub first_word: Option<Duration>,
    /// The opener was committed.
    pub committed: Option<Duration>,
    /// Silence between the opener's last word and the continuation's first, on the surface.
    pub handoff_gap: Option<Duration>,
    /// The reply was complete, and shown.
    pub total: Duration,
}

/// How a turn went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The reply text.
    pub text: String,
    /// How many bytes of it the user has had.
    pub heard: usize,
    /// How it ended.
    pub over: Over,
    /// Its times.
    pub timings: Timings,
    /// Whether the μLM said the first word.
    pub opened: bool,
    /// How often the turn was taken up again after its continuator was lost.
    pub resumed: u32,
}

/// A conversation with continuators.
pub struct Conversation {
    engine: Engine,
    /// `None` when none is wanted, or none will come.
    link: Option<Link>,
    /// Whether there are several servers to choose from.
    several: bool,
    server: Option<Server>,
    /// Whether there ever was one.
    known: bool,
    /// Bytes of history that all of them took.
    history_bytes: usize,
    /// Why there was no server, the last time.
    failure: Option<ConnectError>,
    options: Options,
    history: History,
    next_turn: u64,
    /// The continuator's estimate of its time to the first text.
    estimate: Option<Duration>,
    /// How long the μLM took for its last first word.
    own_first_word: Option<Duration>,
}

/// The continuator that serves us.
struct Server {
    /// Which connection of the link it is.
    number: u64,
    welcome: Welcome,
    outgoing: mpsc::Sender<EdgeFrame>,
    /// It is going away: the next turn goes elsewhere.
    draining: bool,
}

impl Conversation {
    /// A conversation over `link`, which has a choice of `servers` servers; without one, the μLM is alone.
    pub fn new(engine: Engine, link: Option<Link>, servers: usize, options: Options) -> Self {
        Self {
            engine,
            link,
            several: servers > 1,
            server: None,
            known: false,
            history_bytes: usize::MAX,
            failure: None,
            options,
            history: History::default(),
            next_turn: 1,
            estimate: None,
            own_first_word: None,
        }
    }

    /// Waits until a continuator is there, or cannot be had, or `limit` has passed.
    pub async fn ready(&mut self, limit: Duration) {
        let news = async {
            while self.server.is_none() && self.failure.is_none() && self.link.is_some() {
                self.news().await;
            }
        };
        let _ = tokio::time::timeout(limit, news).await;
    }

    /// Looks after the link while there is no turn; never returns, and may be dropped at any time.
    pub async fn attend(&mut self) {
        loop {
            self.news().await;
            self.leave_what_drains();
        }
    }

    /// The large model's name, where a continuator is there.
    pub fn model(&self) -> Option<&str> {
        self.server.as_ref().map(|server| server.welcome.model.as_str())
    }

    /// Why there is no continuator.
    pub fn failure(&self) -> Option<&ConnectError> {
        self.failure.as_ref()
    }

    /// Whether there will be no continuator any more.
    pub fn ended(&self) -> bool {
        self.link.is_none() && self.failure.is_some()
    }

    /// Bytes that a question may have.
    pub fn question_limit(&self) -> usize {
        let limits = self.server.as_ref().and_then(|server| server.welcome.limits);
        limits.map_or(QUESTION_BYTES, |limits| limits.max_user_text_bytes as usize)
    }

    /// Changes how the following turns are run.
    pub fn options(&mut self) -> &mut Options {
        &mut self.options
    }

    /// Takes the link's next news; the frame, if it was one.
    async fn news(&mut self) -> Option<Body> {
        let news = match &mut self.link {
            Some(link) => link.next().await,
            None => pending().await,
        };
        self.learn(news)
    }

    fn learn(&mut self, news: Option<News>) -> Option<Body> {
        match news {
            Some(News::Connected {
                number,
                welcome,
                outgoing,
            }) => {
                self.failure = None;
                self.known = true;
                let bytes = welcome
                    .limits
                    .map_or(usize::MAX, |limits| limits.max_history_bytes as usize);
                self.history_bytes = self.history_bytes.min(bytes);
                self.estimate = proto::std_duration(welcome.first_token_estimate).or(self.estimate);
                self.server = Some(Server {
                    number,
                    welcome: *welcome,
                    outgoing,
                    draining: false,
                });
            }
            Some(News::Frame(frame)) => {
                if let (Some(Body::Drain(_)), Some(server)) = (&frame.body, &mut self.server) {
                    server.draining = true;
                }
                return frame.body;
            }
            Some(News::Lost(_)) => self.server = None,
            Some(News::Failed { error, ended }) => {
                self.failure = Some(error);
                if ended {
                    self.link = None;
                }
            }
            None => self.link = None,
        }
        None
    }

    fn leave_what_drains(&mut self) {
        if self.server.as_ref().is_some_and(|server| server.draining) {
            self.leave();
        }
    }

    /// Goes from the present continuator to the next.
    fn leave(&mut self) {
        if let (Some(link), Some(server)) = (&self.link, self.server.take()) {
            link.leave(server.number);
        }
    }

    /// Asks a question and shows the reply; `interrupt` resolves when the user has had enough.
    pub async fn turn(
        &mut self,
        question: &str,
        view: &mut dyn View,
        interrupt: impl Future<Output = ()> + Send,
    ) -> Outcome {
        let span = info_span!(
            "turn",
            otel.kind = "client",
            segue.turn_id = self.next_turn,
            segue.surface = ?self.options.surface,
            segue.opener.words = Empty,
            segue.opener.reason = Empty,
            segue.opener.mean_log_probability = Empty,
            segue.opener.first_word = Empty,
            segue.handoff.gap = Empty,
            segue.directive = Empty,
            segue.turn.resumed = Empty,
            otel.status_code = Empty,
        );
        while let Some(news) = self.link.as_mut().and_then(Link::try_next) {
            self.learn(Some(news));
        }
        self.leave_what_drains();
        let opener_span = info_span!(parent: &span, "opener.generate", gen_ai.request.model = self.engine.info().name);
        let turn = Turn::new(
            self.options.surface,
            self.start_frame(question, &TraceContext::of(&span)),
        );
        let options = self.options.clone();
        let mut run = Run::new(turn, &options, view, span, opener_span);
        let mut id = self.new_id();
        let mut words = if self.link.is_none() {
            let wanted = self.failure.as_ref().map(ToString::to_string);
            let why = wanted
                .as_deref()
                .unwrap_or("no continuator was wanted (--offline always)");
            run.on(give_up(why, wanted.is_none())).await;
            mpsc::channel(1).1 // nobody opens; the wish to go on alone is granted below
        } else {
            speaker::open(
                &self.engine,
                question,
                &self.options,
                self.estimate,
                self.own_first_word,
            )
        };
        match (&self.server, &self.link) {
            (Some(server), _) => run.connect(&server.outgoing, id).await,
            (None, Some(link)) => link.hurry(),
            (None, None) => {}
        }
        let mut interrupt = std::pin::pin!(interrupt);
        let mut interrupted = false;
        // Since when nothing has come of what was waited for, and since when there is no continuator.
        let (mut quiet_since, mut stuck_since) = (Instant::now(), None::<Instant>);
        let mut retry_at = None;
        while !run.settled() {
            for wish in run.take_wishes() {
                match wish {
                    Wish::GoOnAlone => {
                        words = speaker::alone(&self.engine, question, run.machine().log().text(), &self.options);
                    }
                    // Another one may have room now.
                    Wish::Retry(_) if self.several => self.leave(),
                    Wish::Retry(after) => retry_at = Some(Instant::now() + after.unwrap_or(RETRY)),
                }
            }
            let over = run.is_over();
            let connected = run.machine().connected();
            if connected || over || run.machine().alone() {
                retry_at = None;
            } else {
                stuck_since.get_or_insert_with(Instant::now);
            }
            let give_up_at = stuck_since
                .filter(|_| !connected && !run.machine().alone())
                .map(|since| since + self.options.resume_within);
            // Before its first words a continuator may take as long as it said it does, with some to spare, and within bounds.
            let patience = match self.estimate {
                Some(estimate) if !run.machine().continued() => {
                    (estimate * 3).clamp(self.options.stall, self.options.stall * 4)
                }
                _ => self.options.stall,
            };
            let stall_at = (connected && run.machine().opened()).then(|| quiet_since + patience);
            let linked = self.link.is_some();
            tokio::select! {
                biased;
                () = &mut interrupt, if !interrupted => {
                    interrupted = true;
                    run.interrupt().await;
                }
                () = at(run.wake()) => {}
                Some(said) = words.recv(), if !over => match said {
                    Said::Word(text) => run.on(Event::Word(text)).await,
                    Said::AloneDone => run.on(Event::AloneDone).await,
                    Said::Done(decision) => {
                        run.opener_done(&decision);
                        quiet_since = Instant::now();
                        run.on(Event::OpenerDone(decision)).await;
                    }
                },
                body = self.news(), if linked => {
                    quiet_since = Instant::now();
                    match body {
                        Some(body) => {
                            if let (Body::Chunk(_) | Body::Directive(_), true) = (&body, turn_of(&body) == Some(id)) {
                                stuck_since = None;
                            }
                            if turn_of(&body) == Some(id) && !over {
                                run.on(Event::Frame(body)).await;
                            }
                        }
                        None if over => {}
                        None => self.relinked(&mut run, id).await,
                    }
                }
                () = at(retry_at) => {
                    retry_at = None;
                    id = self.new_id();
                    if let Some(server) = &self.server {
                        quiet_since = Instant::now();
                        run.connect(&server.outgoing, id).await;
                    }
                }
                () = at(give_up_at), if !over => {
                    let did = if run.machine().continued() { "went on with the reply" } else { "answered" };
                    let why = match &self.failure {
                        Some(error) => error.to_string(),
                        None => format!("no continuator {did} within {:?}", self.options.resume_within),
                    };
                    run.on(give_up(&why, self.options.offline == Offline::Auto)).await;
                }
                () = at(stall_at), if !over => {
                    run.lose(format!("the continuator said nothing for {patience:?}")).await;
                    self.leave();
                }
            }
            run.pump().await;
        }
        self.leave_what_drains();
        let outcome = run.finish();
        if outcome.opened {
            self.own_first_word = outcome.timings.first_word;
        }
        if let Over::Done(end) = &outcome.over {
            self.estimate = proto::std_duration(end.first_token_estimate).or(self.estimate);
        }
        let count = |text: &str| self.engine.count(text);
        self.history.add(question, &outcome.text[..outcome.heard], count);
        outcome
    }

    /// The link has changed while a turn runs: there is a continuator now, or none.
    async fn relinked(&self, run: &mut Run<'_>, id: u64) {
        if let Some(server) = &self.server {
            return run.connect(&server.outgoing, id).await;
        }
        run.lose("the continuator was lost".into()).await;
        if let Some(link) = &self.link {
            link.want();
        }
        let Some(failure) = &self.failure else { return };
        let why = failure.to_string();
        let hopeless = self.link.is_none();
        if !hopeless && self.options.offline == Offline::Auto && !run.machine().continued() {
            run.on(give_up(&why, true)).await;
        } else if hopeless || !self.known {
            // Nobody will be there, or ever was.
            run.on(give_up(&why, false)).await;
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_turn += 1;
        self.next_turn - 1
    }

    fn start_frame(&mut self, question: &str, trace: &TraceContext) -> StartTurn {
        self.history.trim(self.options.history_tokens, self.history_bytes);
        StartTurn {
            turn_id: 0,
            traceparent: trace.traceparent.clone(),
            tracestate: trace.tracestate.clone(),
            history: self.history.messages(),
            user_text: question.to_owned(),
            parameters: Some(self.options.parameters.clone()),
            deadline: None,
            tone: self.options.tone.into(),
            generated_tokens: 0,
        }
    }
}

fn give_up(why: &str, alone: bool) -> Event {
    Event::GiveUp {
        why: why.to_owned(),
        alone,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}

/// The turn that a frame is about.
fn turn_of(body: &Body) -> Option<u64> {
    match body {
        Body::Chunk(f) => Some(f.turn_id),
        Body::Directive(f) => Some(f.turn_id),
        Body::EndTurn(f) => Some(f.turn_id),
        Body::TurnFailed(f) => Some(f.turn_id),
        Body::Welcome(_) | Body::Drain(_) => None,
    }
}
