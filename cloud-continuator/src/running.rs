//! A turn in progress: the state machine with its backend, its clock and its trace.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use segue_shared::{
    proto::{self, CloudFrame, StartTurn, TurnError, TurnFailed},
    reply_log::{Correction, Surface},
    telemetry::TraceContext,
};
use tokio::time::Instant;
use tracing::{Span, field::Empty, info_span};

use crate::{
    admission::{Refused, TurnPlace},
    attempts::{Attempts, News},
    backend::{Event, Failure, Finish, Request, Usage},
    metrics::Outcome,
    names, request,
    session::Service,
    turn::{Effect, Incoming, Mark, Turn, failed, turn_failed},
    verify::Verdict,
};

/// A turn with what it needs of the world.
pub struct Running {
    id: u64,
    machine: Turn,
    attempts: Attempts,
    service: Arc<Service>,
    started: Instant,
    deadline: Instant,
    committed: Option<Instant>,
    prefill: Option<Duration>,
    verify: Option<Duration>,
    first_text: Option<Duration>,
    /// `continuation`, and what of it runs now: the prefill, and then `verify` or `generate`.
    span: Span,
    prefill_span: Span,
    phase: Span,
    device: String,
    /// Its place among the turns that run, as long as it does.
    place: Option<TurnPlace>,
    /// Whether its end was counted.
    counted: bool,
}

impl Running {
    /// Opens a turn at the backend, which begins to read the conversation at once.
    ///
    /// # Errors
    /// The frame that tells the edge why not.
    pub fn open(
        service: &Arc<Service>,
        surface: Surface,
        start: &StartTurn,
        request: Request,
        device: &str,
        place: TurnPlace,
    ) -> Result<Self, TurnFailed> {
        let span = info_span!(
            "continuation",
            otel.kind = "server",
            segue.turn_id = start.turn_id,
            gen_ai.operation.name = "chat",
            gen_ai.provider.name = Empty,
            gen_ai.request.model = Empty,
            gen_ai.usage.input_tokens = Empty,
            gen_ai.usage.cache_read.input_tokens = Empty,
            gen_ai.usage.output_tokens = Empty,
            gen_ai.response.finish_reasons = Empty,
            segue.verdict = Empty,
            segue.verdict.good_words = Empty,
            segue.directive = Empty,
            segue.turn.resumed = Empty,
            segue.tokens.wasted = Empty,
            error.type = Empty,
            otel.status_code = Empty,
        );
        TraceContext {
            traceparent: start.traceparent.clone(),
            tracestate: start.tracestate.clone(),
        }
        .adopt(&span);
        let history = request.history.clone();
        let attempts = Attempts::open(&service.backends, request, service.hedge_after, &span).map_err(|failure| {
            span.record(names::ERROR_TYPE, failure.kind());
            let Effect::Fail {
                error,
                message,
                retryable,
                retry_after,
            } = failed(&failure)
            else {
                unreachable!("failed() makes Fail")
            };
            service.metrics.turn(error);
            turn_failed(start.turn_id, error, message, retryable, retry_after)
        })?;
        let now = Instant::now();
        let limit = service.limits.turn;
        let allowed = proto::std_duration(start.deadline).map_or(limit, |wish| wish.min(limit));
        let mut this = Self {
            id: start.turn_id,
            machine: Turn::new(start.turn_id, surface, service.judgement, start.tone(), history),
            attempts,
            service: service.clone(),
            started: now,
            deadline: now + allowed,
            committed: None,
            prefill: None,
            verify: None,
            first_text: None,
            prefill_span: info_span!(parent: &span, "prefill"),
            phase: Span::none(),
            span,
            device: device.to_owned(),
            place: Some(place),
            counted: false,
        };
        if request::exhausted(start, &service.limits) {
            this.machine.exhaust();
        }
        this.served_anew();
        Ok(this)
    }

    /// When the turn fails if it has not ended.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether it is complete.
    pub fn ended(&self) -> bool {
        self.machine.ended()
    }

    /// Whether it must be kept after its end.
    pub fn kept(&self) -> bool {
        self.machine.may_be_refused()
    }

    /// The backends' next news.
    pub fn poll_news(&mut self, context: &mut Context<'_>) -> Poll<News> {
        let stopped = || News::Event(Event::Failed(Failure::stopped()));
        self.attempts
            .poll_next(context)
            .map(|news| news.unwrap_or_else(stopped))
    }

    /// Takes the backends' news; returns the frames to send.
    pub fn news(&mut self, news: News) -> Vec<CloudFrame> {
        match news {
            News::Event(Event::Failed(failure)) => {
                let generated = self.machine.usage().generated;
                match self.attempts.move_on(failure, generated) {
                    Ok(()) => {
                        self.served_anew();
                        self.on(Incoming::Moved)
                    }
                    Err(failure) => self.on(Incoming::Backend(Event::Failed(failure))),
                }
            }
            News::Event(event) => self.on(Incoming::Backend(event)),
            News::Overtaken(event) => {
                // The machine's question is the one that the new backend is answering: it must not depend on who that is.
                self.machine.on(Incoming::Moved);
                self.served_anew();
                event.map(|event| self.on(Incoming::Backend(event))).unwrap_or_default()
            }
        }
    }

    /// A backend serves the turn from here on.
    fn served_anew(&mut self) {
        let info = self.service.backends.members()[self.attempts.member()].backend.info();
        self.span.record(names::PROVIDER, info.provider);
        self.span.record(names::MODEL, info.model.as_str());
        self.machine.served_by(info.scores);
    }

    /// Takes an event; returns the frames to send.
    pub fn on(&mut self, incoming: Incoming) -> Vec<CloudFrame> {
        if let Incoming::Commit { resumed: true, .. } = incoming {
            self.service.metrics.resumed();
            self.span.record(names::RESUMED, true);
        }
        let effects = self.machine.on(incoming);
        let mut frames = Vec::new();
        for effect in effects {
            match effect {
                Effect::Send(frame) => frames.push(frame),
                Effect::Mark(mark) => self.mark(mark),
                Effect::End(finish, usage) => frames.push(self.end(finish, usage).into()),
                Effect::Fail {
                    error,
                    message,
                    retryable,
                    retry_after,
                } => {
                    self.record_failure(error);
                    frames.push(turn_failed(self.id, error, message, retryable, retry_after).into());
                }
                Effect::Backend(input) => {
                    if let Err(failure) = self.attempts.send(input) {
                        frames.extend(self.news(News::Event(Event::Failed(failure))));
                    }
                }
                Effect::Reopen(input) => {
                    if self.place.is_none() {
                        match self.service.admission.turn(&self.device, Instant::now()) {
                            Ok(place) => self.place = Some(place),
                            Err(refused) => {
                                frames.push(self.overloaded(refused).into());
                                continue;
                            }
                        }
                    }
                    if let Err(failure) = self.attempts.reopen().and_then(|()| self.attempts.send(input)) {
                        frames.extend(self.news(News::Event(Event::Failed(failure))));
                    }
                }
            }
        }
        frames
    }

    /// There is no place for a turn that would have to go on.
    fn overloaded(&mut self, refused: Refused) -> TurnFailed {
        self.machine.give_up();
        self.record_failure(TurnError::Overloaded);
        turn_failed(
            self.id,
            TurnError::Overloaded,
            refused.message,
            true,
            Some(refused.retry_after),
        )
    }

    fn mark(&mut self, mark: Mark) {
        let since_commit = self.committed.map(|at| at.elapsed());
        match mark {
            Mark::Prefilled => {
                self.prefill.get_or_insert(self.started.elapsed());
                self.prefill_span = Span::none();
            }
            Mark::Committed => {
                self.committed = Some(Instant::now());
                self.phase = info_span!(parent: &self.span, "verify");
            }
            Mark::Verified(verdict, correction) => {
                self.verify = since_commit;
                if let Some(verdict) = verdict {
                    let (name, words) = match verdict {
                        Verdict::Accept => ("accept", None),
                        Verdict::Wrong { good_words, .. } => ("wrong", Some(good_words as u64)),
                    };
                    self.span.record(names::VERDICT, name);
                    self.span.record(names::GOOD_WORDS, words);
                }
                self.span
                    .record(names::DIRECTIVE, correction.map_or("none", Correction::name));
                self.phase = info_span!(parent: &self.span, "generate");
            }
            Mark::FirstText => {
                if let (None, Some(time)) = (self.first_text, since_commit) {
                    self.first_text = Some(time);
                    // What an edge without an opener would wait for: reading the conversation, and the first token.
                    self.service.measured(self.prefill.unwrap_or_default() + time);
                }
            }
        }
    }

    fn end(&mut self, finish: Finish, usage: Usage) -> proto::EndTurn {
        let reason = match finish {
            Finish::Stop => proto::FinishReason::Stop,
            Finish::Length => proto::FinishReason::Length,
        };
        self.close(reason, usage)
    }

    /// The edge cancelled the turn: the frame that ends it. Dropping `self` cancels the backend's work.
    pub fn cancelled(mut self) -> proto::EndTurn {
        let usage = self.machine.usage();
        let wasted = usage.wasted.saturating_add(usage.generated);
        self.close(
            proto::FinishReason::Cancelled,
            Usage {
                generated: 0,
                wasted,
                ..usage
            },
        )
    }

    /// The turn failed for a reason outside its backend.
    pub fn failed(mut self, error: TurnError) {
        self.record_failure(error);
    }

    fn close(&mut self, reason: proto::FinishReason, mut usage: Usage) -> proto::EndTurn {
        // Whoever lost a race had read the same prompt.
        let read = usage.prompt.saturating_add(usage.opener);
        usage.wasted = usage
            .wasted
            .saturating_add(self.attempts.take_losers().saturating_mul(read));
        let name = reason.as_str_name().trim_start_matches("FINISH_REASON_").to_lowercase();
        self.span.record(names::INPUT_TOKENS, usage.prompt + usage.opener);
        self.span.record(names::CACHED_TOKENS, usage.cached);
        self.span.record(names::OUTPUT_TOKENS, usage.generated);
        self.span.record(names::WASTED_TOKENS, usage.wasted);
        self.span.record(names::FINISH_REASONS, name);
        self.phase = Span::none();
        self.count(match reason {
            proto::FinishReason::Cancelled => Outcome::cancelled,
            _ => Outcome::complete,
        });
        if !self.kept() || reason == proto::FinishReason::Cancelled {
            self.span = Span::none();
        }
        let duration = |value: Option<Duration>| value.map(proto::duration);
        proto::EndTurn {
            turn_id: self.id,
            finish_reason: reason.into(),
            usage: Some(proto::Usage {
                prompt_tokens: usage.prompt,
                cached_tokens: usage.cached,
                opener_tokens: usage.opener,
                generated_tokens: usage.generated,
                wasted_tokens: usage.wasted,
            }),
            timings: Some(proto::Timings {
                prefill: duration(self.prefill),
                verify: duration(self.verify),
                first_token: duration(self.first_text),
                total: duration(self.committed.map(|at| at.elapsed())),
            }),
            first_token_estimate: duration(self.service.first_text_estimate()),
        }
    }

    fn record_failure(&mut self, error: TurnError) {
        self.count(error);
        let name = error.as_str_name().trim_start_matches("TURN_ERROR_").to_lowercase();
        self.span.record(names::ERROR_TYPE, name.as_str());
        self.span.record("otel.status_code", "ERROR");
        tracing::warn!(turn = self.id, error = name, "turn failed");
    }

    /// The turn is over: it is counted, once, and its place is free.
    fn count(&mut self, outcome: impl Into<Outcome>) {
        self.place = None;
        if !std::mem::replace(&mut self.counted, true) {
            self.service.metrics.turn(outcome);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.count(Outcome::dropped);
    }
}
