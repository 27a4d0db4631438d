//! A conversation: turns one after the other, each with the μLM, the continuator, the surface and the clock around its state machine.

use std::{future::pending, ops::ControlFlow, time::Duration};

use segue_shared::{
    client,
    proto::{self, Role, StartTurn, cloud_frame::Body},
    reply_log::Surface,
    telemetry::TraceContext,
    words,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::{Span, field::Empty, info_span};

use crate::{
    opener::{Decision, Opener, Policy, Reason},
    player::{Piece, Player},
    turn::{Effect, Event, Over, Show, Turn},
    ulm::{Engine, Generate, Step, sampler::Sampling, text::Word},
};

/// Silence of the continuator after which it counts as lost.
const STALL: Duration = Duration::from_secs(30);
/// Tokens that the μLM may spend on an opener.
const OPENER_TOKENS: usize = 32;
/// Bytes of history that are sent at most. When it grows past this, the oldest exchanges are left out until half of it remains: a history
/// that lost its head a little every turn would have to be read anew by the continuator every turn.
const HISTORY_BYTES: usize = 8 << 10;

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
}

/// A conversation with one continuator.
pub struct Conversation {
    engine: Engine,
    link: client::Conversation,
    options: Options,
    history: Vec<proto::Message>,
    next_turn: u64,
    /// The continuator's estimate of its time to the first text.
    estimate: Option<Duration>,
    /// How long the μLM took for its last first word.
    own_first_word: Option<Duration>,
}

impl Conversation {
    /// A conversation over an open link.
    pub fn new(engine: Engine, link: client::Conversation, options: Options) -> Self {
        let estimate = proto::std_duration(link.welcome.first_token_estimate);
        Self {
            engine,
            link,
            options,
            history: Vec::new(),
            next_turn: 1,
            estimate,
            own_first_word: None,
        }
    }

    /// The large model's name.
    pub fn model(&self) -> &str {
        &self.link.welcome.model
    }

    /// Bytes that a question may have.
    pub fn question_limit(&self) -> usize {
        self.link
            .welcome
            .limits
            .map_or(usize::MAX, |limits| limits.max_user_text_bytes as usize)
    }

    /// Changes how the following turns are run.
    pub fn options(&mut self) -> &mut Options {
        &mut self.options
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
            otel.status_code = Empty,
        );
        let start = self.start_frame(question, &TraceContext::of(&span));
        let (turn, effects) = Turn::begin(self.options.surface, start);
        let mut run = Run {
            started: Instant::now(),
            turn,
            player: Player::new(self.options.surface, self.options.words_per_minute),
            surface: self.options.surface,
            outgoing: self.link.outgoing.clone(),
            view,
            over: None,
            timings: Timings::default(),
            opened: false,
            opener_span: info_span!(parent: &span, "opener.generate", gen_ai.request.model = self.engine.info().name),
            handoff_span: Span::none(),
            render_span: Span::none(),
            span,
        };
        self.next_turn += 1;
        run.apply(effects).await;
        let mut words = self.speak(question);
        let mut interrupt = std::pin::pin!(interrupt);
        let mut interrupted = false;
        let mut news = Instant::now();
        while run.over.is_none() || !run.player.idle() {
            let over = run.over.is_some();
            let wake = run.player.wake();
            tokio::select! {
                biased;
                () = &mut interrupt, if !interrupted => {
                    interrupted = true;
                    run.interrupt().await;
                }
                () = async { match wake { Some(at) => sleep_until(at).await, None => pending().await } } => {}
                Some(step) = words.recv(), if !over => match step {
                    Said::Word(text) => run.on(Event::Word(text)).await,
                    Said::Done(decision) => {
                        run.opener_done(&decision);
                        news = Instant::now();
                        run.on(Event::OpenerDone(decision)).await;
                    }
                },
                frame = self.link.incoming.message(), if !over => {
                    news = Instant::now();
                    let event = match frame {
                        Ok(Some(frame)) => self.frame(frame),
                        Ok(None) => Some(Event::Lost("the continuator closed the connection".into())),
                        Err(status) => Some(Event::Lost(lost(&status))),
                    };
                    if let Some(event) = event {
                        run.on(event).await;
                    }
                }
                () = sleep_until(news + STALL), if !over => {
                    run.on(Event::Lost(format!("the continuator said nothing for {STALL:?}"))).await;
                }
            }
            run.pump().await;
        }
        let outcome = run.finish();
        if outcome.opened {
            self.own_first_word = outcome.timings.first_word;
        }
        if let Over::Done(end) = &outcome.over {
            self.estimate = proto::std_duration(end.first_token_estimate).or(self.estimate);
        }
        self.remember(question, &outcome.text[..outcome.heard]);
        outcome
    }

    fn start_frame(&self, question: &str, trace: &TraceContext) -> StartTurn {
        StartTurn {
            turn_id: self.next_turn,
            traceparent: trace.traceparent.clone(),
            tracestate: trace.tracestate.clone(),
            history: self.history.clone(),
            user_text: question.to_owned(),
            parameters: Some(self.options.parameters.clone()),
            deadline: None,
            tone: self.options.tone.into(),
        }
    }

    /// Starts the opener; its words come through the returned channel, which an opener cannot fill.
    fn speak(&self, question: &str) -> mpsc::Receiver<Said> {
        let forced = self.options.forced_opener.as_deref().map_or(0, words::count);
        let (say, words) = mpsc::channel((2 * OPENER_TOKENS).max(forced + 1));
        if let Some(forced) = &self.options.forced_opener {
            for word in split_words(forced) {
                let _ = say.try_send(Said::Word(word));
            }
            let decision = Decision {
                words: words::count(forced),
                reason: Reason::Forced,
                mean_log_probability: None,
            };
            let _ = say.try_send(Said::Done(decision));
            return words;
        }
        if self
            .estimate
            .zip(self.own_first_word)
            .is_some_and(|(cloud, own)| cloud < own)
        {
            let decision = Decision {
                words: 0,
                reason: Reason::FastCloud,
                mean_log_probability: None,
            };
            let _ = say.try_send(Said::Done(decision));
            return words;
        }
        let mut opener = Opener::new(self.options.policy, self.estimate);
        let request = Generate {
            question: question.to_owned(),
            sampling: self.options.sampling,
            max_tokens: OPENER_TOKENS,
        };
        self.engine.generate(
            request,
            Box::new(move |step| {
                if say.is_closed() {
                    return ControlFlow::Break(()); // the turn is over
                }
                let saying = match step {
                    Step::Word(word) => opener.word(word),
                    Step::End { stop, .. } => opener.end_of_words(stop),
                };
                for Word { text, .. } in saying.words {
                    let _ = say.try_send(Said::Word(text));
                }
                match saying.decision {
                    Some(decision) => {
                        let _ = say.try_send(Said::Done(decision));
                        ControlFlow::Break(())
                    }
                    None => ControlFlow::Continue(()),
                }
            }),
        );
        words
    }

    /// The event that a frame means for the running turn.
    fn frame(&self, frame: proto::CloudFrame) -> Option<Event> {
        let body = frame.body?;
        let id = match &body {
            Body::Chunk(f) => f.turn_id,
            Body::Directive(f) => f.turn_id,
            Body::EndTurn(f) => f.turn_id,
            Body::TurnFailed(f) => f.turn_id,
            Body::Welcome(_) | Body::Drain(_) => return None,
        };
        // The last frames of an interrupted turn may still be on their way.
        (id == self.next_turn - 1).then_some(Event::Frame(body))
    }

    fn remember(&mut self, question: &str, heard: &str) {
        self.history.push(proto::Message {
            role: Role::User.into(),
            text: question.to_owned(),
        });
        if !heard.is_empty() {
            self.history.push(proto::Message {
                role: Role::Assistant.into(),
                text: heard.to_owned(),
            });
        }
        let limit = self
            .link
            .welcome
            .limits
            .map_or(HISTORY_BYTES, |l| HISTORY_BYTES.min(l.max_history_bytes as usize));
        let bytes = |history: &[proto::Message]| history.iter().map(|m| m.text.len()).sum::<usize>();
        if bytes(&self.history) <= limit {
            return;
        }
        while bytes(&self.history) > limit / 2 {
            // An exchange goes whole.
            self.history.remove(0);
            while self.history.first().is_some_and(|m| m.role() == Role::Assistant) {
                self.history.remove(0);
            }
        }
    }
}

enum Said {
    Word(String),
    Done(Decision),
}

/// The words of a text, each with the white space before it; without white space around the whole.
fn split_words(text: &str) -> Vec<String> {
    let mut from = text.len() - text.trim_start().len();
    words::ranges(text)
        .into_iter()
        .map(|range| {
            let word = text[from..range.end].to_owned();
            from = range.end;
            word
        })
        .collect()
}

fn lost(status: &tonic::Status) -> String {
    match status.code() {
        tonic::Code::Unavailable | tonic::Code::DeadlineExceeded if !status.message().is_empty() => {
            format!("the continuator ended the conversation: {}", status.message())
        }
        _ => "the connection to the continuator broke".into(),
    }
}

/// A turn while it runs.
struct Run<'v> {
    started: Instant,
    turn: Turn,
    player: Player,
    surface: Surface,
    outgoing: mpsc::Sender<proto::EdgeFrame>,
    view: &'v mut dyn View,
    over: Option<Over>,
    timings: Timings,
    opened: bool,
    span: Span,
    opener_span: Span,
    handoff_span: Span,
    render_span: Span,
}

impl Run<'_> {
    async fn on(&mut self, event: Event) {
        let effects = self.turn.on(event);
        self.apply(effects).await;
    }

    async fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                // If the stream is gone its other half says so.
                Effect::Send(frame) => drop(self.outgoing.send(frame).await),
                Effect::Show(show) => self.show(&show),
                Effect::Over(over) => {
                    self.player.finish();
                    self.over = Some(over);
                }
            }
        }
    }

    fn show(&mut self, show: &Show) {
        let at = self.started.elapsed();
        self.view.event(at, &Happening::Produced(show));
        match show {
            Show::OpenerWord(text) => self.player.push(text, true),
            Show::Continuation { text, .. } => self.player.push(text, false),
            Show::Directive { correction, keep, .. } => {
                self.player.retract(*keep);
                self.span.record("segue.directive", correction.name());
            }
            Show::Committed { .. } => {
                self.timings.committed = Some(at);
                self.handoff_span = info_span!(parent: &self.span, "handoff");
            }
            Show::Refused { .. } => {}
        }
    }

    fn opener_done(&mut self, decision: &Decision) {
        self.span.record("segue.opener.words", decision.words as u64);
        self.span.record("segue.opener.reason", decision.reason.name());
        self.span.record(
            "segue.opener.mean_log_probability",
            decision.mean_log_probability.map(f64::from),
        );
        self.opener_span = Span::none();
        self.opened = decision.words > 0;
    }

    /// Plays what is due and reports what was heard.
    async fn pump(&mut self) {
        while let Some(piece) = self.player.next(Instant::now()) {
            if !piece.opener && !self.handoff_span.is_none() {
                self.handoff_span = Span::none();
                self.render_span = info_span!(parent: &self.span, "render");
            }
            self.view.event(self.started.elapsed(), &Happening::Played(&piece));
        }
        let heard = self.player.heard();
        if self.surface == Surface::AppendOnly && heard > self.turn.log().heard() {
            self.view.event(self.started.elapsed(), &Happening::Heard(heard));
            self.on(Event::Heard(heard)).await;
        }
    }

    /// Ctrl-C: what has been heard stays, nothing more comes.
    async fn interrupt(&mut self) {
        let heard = self.player.heard();
        if self.surface == Surface::Revisable {
            self.on(Event::Heard(heard)).await;
        }
        self.on(Event::Cancel).await;
        self.player.retract(heard);
        self.over = Some(Over::Cancelled);
    }

    fn finish(mut self) -> Outcome {
        let _ = self.turn.on(Event::Heard(self.player.heard()));
        self.timings.total = self.started.elapsed();
        self.timings.first_word = self.player.first().map(|at| at.duration_since(self.started));
        self.timings.handoff_gap = self.player.gap();
        let micros = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
        self.span
            .record("segue.opener.first_word", micros(self.timings.first_word));
        self.span.record("segue.handoff.gap", micros(self.timings.handoff_gap));
        let over = self.over.take().unwrap_or(Over::Cancelled);
        if !matches!(over, Over::Done(_) | Over::Cancelled) {
            self.span.record("otel.status_code", "ERROR");
        }
        let log = self.turn.log();
        let outcome = Outcome {
            text: log.text().to_owned(),
            heard: log.heard(),
            over,
            timings: self.timings,
            opened: self.opened,
        };
        self.view.end(outcome.timings.total, &outcome);
        outcome
    }
}
