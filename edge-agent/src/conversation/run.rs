//! A turn while it runs: its state machine with the surface, the clock and the spans around it.

use std::time::Duration;

use segue_shared::{proto, reply_log::Surface};
use tokio::{sync::mpsc, time::Instant};
use tracing::{Span, info_span};

use super::{Happening, Options, Outcome, Timings, View};
use crate::{
    opener::Decision,
    player::Player,
    turn::{Effect, Event, Over, Show, Turn},
};

/// A turn while it runs.
pub(super) struct Run<'v> {
    started: Instant,
    turn: Turn,
    player: Player,
    surface: Surface,
    outgoing: Option<mpsc::Sender<proto::EdgeFrame>>,
    view: &'v mut dyn View,
    over: Option<Over>,
    /// What the machine wants of the conversation.
    wishes: Vec<Wish>,
    timings: Timings,
    opened: bool,
    span: Span,
    opener_span: Span,
    handoff_span: Span,
    render_span: Span,
}

/// What a turn needs besides its surface and its stream.
pub(super) enum Wish {
    /// Another attempt, after this long.
    Retry(Option<Duration>),
    /// The μLM's own end of the reply.
    GoOnAlone,
}

impl<'v> Run<'v> {
    /// A turn that begins now, within its span.
    pub(super) fn new(turn: Turn, options: &Options, view: &'v mut dyn View, span: Span, opener_span: Span) -> Self {
        Self {
            started: Instant::now(),
            turn,
            player: Player::new(options.surface, options.words_per_minute),
            surface: options.surface,
            outgoing: None,
            view,
            over: None,
            wishes: Vec::new(),
            timings: Timings::default(),
            opened: false,
            span,
            opener_span,
            handoff_span: Span::none(),
            render_span: Span::none(),
        }
    }

    /// The turn runs at a continuator, under this id.
    pub(super) async fn connect(&mut self, outgoing: &mpsc::Sender<proto::EdgeFrame>, id: u64) {
        self.outgoing = Some(outgoing.clone());
        self.on(Event::Connected(id)).await;
    }

    /// The continuator is gone.
    pub(super) async fn lose(&mut self, why: String) {
        self.outgoing = None;
        self.on(Event::Lost(why)).await;
    }

    pub(super) fn machine(&self) -> &Turn {
        &self.turn
    }

    /// Whether nothing can happen to the turn any more.
    pub(super) fn settled(&self) -> bool {
        self.over.is_some() && self.player.idle()
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.is_some()
    }

    /// When the surface has something to do.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.player.wake()
    }

    pub(super) fn take_wishes(&mut self) -> Vec<Wish> {
        std::mem::take(&mut self.wishes)
    }

    pub(super) async fn on(&mut self, event: Event) {
        let effects = self.turn.on(event);
        self.apply(effects).await;
    }

    async fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                // If the stream is gone its other half says so.
                Effect::Send(frame) => {
                    if let Some(outgoing) = &self.outgoing {
                        let _ = outgoing.send(frame).await;
                    }
                }
                Effect::Retry(after) => self.wishes.push(Wish::Retry(after)),
                Effect::GoOnAlone => self.wishes.push(Wish::GoOnAlone),
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
            Show::OpenerWord(text) | Show::AloneWord(text) => self.player.push(text, true),
            Show::Continuation { text, .. } => self.player.push(text, false),
            Show::Directive { correction, keep, .. } => {
                self.player.retract(*keep);
                self.span.record("segue.directive", correction.name());
            }
            Show::Committed { .. } => {
                self.timings.committed = Some(at);
                self.handoff_span = info_span!(parent: &self.span, "handoff");
            }
            Show::Refused { .. } | Show::Lost(_) | Show::Resumed { .. } | Show::Alone(_) => {}
        }
    }

    pub(super) fn opener_done(&mut self, decision: &Decision) {
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
    pub(super) async fn pump(&mut self) {
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
    pub(super) async fn interrupt(&mut self) {
        let heard = self.player.heard();
        if self.surface == Surface::Revisable {
            self.on(Event::Heard(heard)).await;
        }
        self.on(Event::Cancel).await;
        self.player.retract(heard);
        self.over = Some(Over::Cancelled);
    }

    pub(super) fn finish(mut self) -> Outcome {
        let _ = self.turn.on(Event::Heard(self.player.heard()));
        self.timings.total = self.started.elapsed();
        self.timings.first_word = self.player.first().map(|at| at.duration_since(self.started));
        self.timings.handoff_gap = self.player.gap();
        let micros = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
        self.span
            .record("segue.opener.first_word", micros(self.timings.first_word));
        self.span.record("segue.handoff.gap", micros(self.timings.handoff_gap));
        let over = self.over.take().unwrap_or(Over::Cancelled);
        self.span.record("segue.turn.resumed", u64::from(self.turn.resumed()));
        if !matches!(over, Over::Done(_) | Over::Alone(_) | Over::Cancelled) {
            self.span.record("otel.status_code", "ERROR");
        }
        let log = self.turn.log();
        let outcome = Outcome {
            text: log.text().to_owned(),
            heard: log.heard(),
            over,
            timings: self.timings,
            opened: self.opened,
            resumed: self.turn.resumed(),
        };
        self.view.end(outcome.timings.total, &outcome);
        outcome
    }
}
