//! One turn at the edge, as a pure state machine: events in, effects out; no clock, socket or terminal.
//!
//! A turn outlives the continuator that serves it: what a continuator must know is the conversation and the reply so far, and both are here.

use std::time::Duration;

use segue_shared::{
    proto::{
        self, CommitOpener, DirectiveReason, EdgeFrame, EndTurn, FinishReason, OpenerDelta, RefuseDirective, StartTurn,
        TurnFailed, cloud_frame::Body, commit_opener::Opening,
    },
    reply_log::{Applied, Correction, DirectiveError, ReplyLog, Surface},
};

use crate::opener::Decision;

/// What happens to a turn.
#[derive(Clone, Debug)]
pub enum Event {
    /// A continuator is there, and the turn runs at it under this id: for the first time, or again.
    Connected(u64),
    /// The μLM's next word, with the white space before it.
    Word(String),
    /// The opener is complete.
    OpenerDone(Decision),
    /// A frame of this turn from the continuator.
    Frame(Body),
    /// The user has had this many bytes of the reply.
    Heard(usize),
    /// The user interrupted.
    Cancel,
    /// The continuator is gone, and another may come; why, in a sentence.
    Lost(String),
    /// No continuator can be had.
    GiveUp {
        /// Why, in a sentence.
        why: String,
        /// Whether the μLM may finish a reply that no continuator has touched.
        alone: bool,
    },
    /// The μLM, alone, has no more to say.
    AloneDone,
}

/// What the surface should do.
#[derive(Clone, Debug, PartialEq)]
pub enum Show {
    /// Show a word of the opener.
    OpenerWord(String),
    /// The opener is complete.
    Committed {
        /// The committed prefix.
        text: String,
        /// How it came about.
        decision: Decision,
    },
    /// The opener is corrected.
    Directive {
        /// What happens to it.
        correction: Correction,
        /// Bytes that stay.
        keep: usize,
        /// Why.
        reason: DirectiveReason,
        /// The new epoch.
        revision: u32,
        /// What is taken back.
        removed: String,
    },
    /// A directive came too late and was refused.
    Refused {
        /// Its epoch.
        revision: u32,
        /// Bytes that were heard.
        heard: usize,
    },
    /// Show more of the reply.
    Continuation {
        /// Where it stands.
        offset: usize,
        /// The text.
        text: String,
    },
    /// The continuator is gone; the reply waits for the next one.
    Lost(String),
    /// A continuator goes on with the reply, from its first `bytes` bytes.
    Resumed {
        /// Bytes of the reply text.
        bytes: usize,
    },
    /// No continuator: the μLM goes on alone; why.
    Alone(String),
    /// Show a word that the μLM says alone.
    AloneWord(String),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send a frame.
    Send(EdgeFrame),
    /// Show something.
    Show(Show),
    /// The continuator could not: connect the turn again, there or elsewhere, after this long.
    Retry(Option<Duration>),
    /// Have the μLM finish the reply.
    GoOnAlone,
    /// The turn is over.
    Over(Over),
}

/// How a turn ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Over {
    /// The reply is complete.
    Done(Box<EndTurn>),
    /// The μLM answered alone; why.
    Alone(String),
    /// The user interrupted.
    Cancelled,
    /// The continuator could not complete it.
    Failed {
        /// What went wrong, for a person.
        message: String,
        /// The continuator's error.
        error: proto::TurnError,
        /// Whether another try may help.
        retryable: bool,
    },
    /// The continuator was lost.
    Lost(String),
    /// The continuator broke the protocol.
    Broken(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Opening,
    Continuing,
    /// A directive was refused; what comes before the next one belongs to a text that does not exist.
    Refusing,
    /// The μLM finishes the reply.
    Alone,
    Over,
}

/// The machine.
#[derive(Debug)]
pub struct Turn {
    start: StartTurn,
    log: ReplyLog,
    state: State,
    /// Whether the turn runs at a continuator.
    connected: bool,
    /// How the opener ended, once it has.
    decision: Option<Decision>,
    /// A continuator has added to the reply, or corrected it: its words need no verdict any more.
    continued: bool,
    /// Tokens that this attempt's continuator generated, and those of the attempts before it.
    generated: u32,
    /// Times that it was connected.
    attempts: u32,
    /// What the last continuator said that could not.
    failed: Option<TurnFailed>,
    /// Why the μLM is alone.
    why: String,
}

impl Turn {
    /// A turn that no continuator knows of yet. `start`'s turn id does not matter: [`Event::Connected`] gives one.
    pub fn new(surface: Surface, start: StartTurn) -> Self {
        Self {
            start,
            log: ReplyLog::new(surface),
            state: State::Opening,
            connected: false,
            decision: None,
            continued: false,
            generated: 0,
            attempts: 0,
            failed: None,
            why: String::new(),
        }
    }

    /// The reply so far.
    pub fn log(&self) -> &ReplyLog {
        &self.log
    }

    /// How often the turn was taken up again.
    pub fn resumed(&self) -> u32 {
        self.attempts.saturating_sub(1)
    }

    /// Whether the opener is complete.
    pub fn opened(&self) -> bool {
        self.decision.is_some()
    }

    /// Whether the turn runs at a continuator.
    pub fn connected(&self) -> bool {
        self.connected
    }

    /// Whether the μLM is finishing the reply.
    pub fn alone(&self) -> bool {
        self.state == State::Alone
    }

    /// Whether a continuator has added to the reply or corrected it.
    pub fn continued(&self) -> bool {
        self.continued
    }

    /// Takes an event.
    pub fn on(&mut self, event: Event) -> Vec<Effect> {
        if self.state == State::Over {
            // Speech goes on after the last frame; what is heard of it belongs to the history.
            if let Event::Heard(bytes) = event {
                let _ = self.log.hear(bytes);
            }
            return Vec::new();
        }
        match event {
            Event::Connected(id) => self.connect(id),
            Event::Word(text) => self.word(text),
            Event::OpenerDone(decision) => self.commit(decision),
            Event::Frame(_) if !self.connected => Vec::new(),
            Event::Frame(body) => self.frame(body),
            Event::Heard(bytes) => match self.log.hear(bytes) {
                Ok(()) => self.send(self.heard()),
                Err(error) => self.over(Over::Broken(error.to_string())),
            },
            Event::Cancel => {
                let mut effects = self.send(proto::CancelTurn {
                    turn_id: self.start.turn_id,
                    heard_bytes: self.log.heard() as u32,
                });
                effects.extend(self.over(Over::Cancelled));
                effects
            }
            Event::Lost(why) => self.lost(why),
            Event::GiveUp { why, alone } => self.give_up(why, alone),
            Event::AloneDone if self.state == State::Alone => {
                let why = std::mem::take(&mut self.why);
                self.over(if self.log.text().is_empty() {
                    Over::Lost(why)
                } else {
                    Over::Alone(why)
                })
            }
            Event::AloneDone => Vec::new(),
        }
    }

    /// A frame, if there is somebody to send it to.
    fn send(&self, frame: impl Into<EdgeFrame>) -> Vec<Effect> {
        let frame = self.connected.then(|| Effect::Send(frame.into()));
        frame.into_iter().collect()
    }

    /// Tells a continuator all there is: recovery needs nothing of an earlier one.
    fn connect(&mut self, id: u64) -> Vec<Effect> {
        if self.connected || self.state == State::Alone {
            return Vec::new();
        }
        self.connected = true;
        self.attempts += 1;
        self.start.turn_id = id;
        let generated = std::mem::take(&mut self.generated);
        self.start.generated_tokens = self.start.generated_tokens.saturating_add(generated);
        self.log.resume();
        let mut effects = self.send(self.start.clone());
        if self.state == State::Opening {
            let text = self.log.text().to_owned();
            if !text.is_empty() {
                effects.extend(self.send(self.delta(0, text)));
            }
            if self.log.heard() > 0 {
                effects.extend(self.send(self.heard()));
            }
        } else {
            self.state = State::Continuing;
            if self.log.heard() > 0 {
                effects.extend(self.send(self.heard()));
            }
            effects.extend(self.send(self.committed()));
        }
        if self.attempts > 1 {
            effects.push(Effect::Show(Show::Resumed {
                bytes: self.log.text().len(),
            }));
        }
        effects
    }

    fn lost(&mut self, why: String) -> Vec<Effect> {
        if !std::mem::take(&mut self.connected) {
            return Vec::new();
        }
        vec![Effect::Show(Show::Lost(why))]
    }

    fn give_up(&mut self, why: String, alone: bool) -> Vec<Effect> {
        if self.state == State::Alone {
            return Vec::new();
        }
        // Nobody may send more of a reply that another goes on with.
        let mut effects = self.send(proto::CancelTurn {
            turn_id: self.start.turn_id,
            heard_bytes: self.log.heard() as u32,
        });
        self.connected = false;
        if alone && !self.continued {
            self.state = State::Alone;
            self.why.clone_from(&why);
            effects.extend([Effect::Show(Show::Alone(why)), Effect::GoOnAlone]);
            return effects;
        }
        let over = match self.failed.take() {
            Some(failed) => Over::Failed {
                error: failed.error(),
                message: failed.message,
                retryable: true,
            },
            None => Over::Lost(why),
        };
        effects.extend(self.over(over));
        effects
    }

    fn delta(&self, offset: usize, text: String) -> OpenerDelta {
        OpenerDelta {
            turn_id: self.start.turn_id,
            offset: offset as u32,
            text,
        }
    }

    fn heard(&self) -> proto::Heard {
        proto::Heard {
            turn_id: self.start.turn_id,
            bytes: self.log.heard() as u32,
        }
    }

    fn word(&mut self, text: String) -> Vec<Effect> {
        let offset = self.log.text().len();
        let show = match self.state {
            State::Opening => Show::OpenerWord(text.clone()),
            State::Alone => Show::AloneWord(text.clone()),
            _ => return Vec::new(),
        };
        self.log.push_opener(&text);
        let mut effects = vec![Effect::Show(show)];
        effects.extend(self.send(self.delta(offset, text)));
        effects
    }

    fn commit(&mut self, decision: Decision) -> Vec<Effect> {
        if self.state != State::Opening {
            return Vec::new();
        }
        self.state = State::Continuing;
        self.decision = Some(decision);
        let mut effects = self.send(self.committed());
        let text = self.log.text().to_owned();
        effects.push(Effect::Show(Show::Committed { text, decision }));
        effects
    }

    fn committed(&self) -> CommitOpener {
        let text = self.log.text();
        CommitOpener {
            turn_id: self.start.turn_id,
            opening: Some(if text.is_empty() {
                Opening::NoOpener(proto::NoOpener {})
            } else {
                Opening::CommittedPrefix(text.to_owned())
            }),
            mean_log_probability: self.decision.and_then(|decision| decision.mean_log_probability),
            resumed: self.continued && !text.is_empty(),
        }
    }

    fn frame(&mut self, body: Body) -> Vec<Effect> {
        match (body, &self.state) {
            (Body::TurnFailed(failed), _) => self.failed(failed),
            (Body::Chunk(_) | Body::Directive(_) | Body::EndTurn(_), State::Opening) => self.over(Over::Broken(
                "the continuator answered before the opener was committed".into(),
            )),
            (Body::Chunk(chunk), _) => {
                let offset = chunk.offset as usize;
                match self.log.apply_chunk(chunk.revision, offset, &chunk.text) {
                    Ok(Applied::Appended) => {
                        self.continued = true;
                        self.generated = chunk.generated_tokens;
                        self.failed = None;
                        vec![Effect::Show(Show::Continuation {
                            offset,
                            text: chunk.text,
                        })]
                    }
                    Ok(Applied::Stale) => Vec::new(),
                    Err(error) => self.over(Over::Broken(error.to_string())),
                }
            }
            (Body::Directive(directive), _) => self.directive(&directive),
            // The end of a text that does not exist.
            (Body::EndTurn(_), State::Refusing) => Vec::new(),
            (Body::EndTurn(end), _) => self.over(match end.finish_reason() {
                FinishReason::Cancelled => Over::Cancelled,
                _ => Over::Done(Box::new(end)),
            }),
            (Body::Welcome(_) | Body::Drain(_), _) => Vec::new(),
        }
    }

    fn directive(&mut self, directive: &proto::Directive) -> Vec<Effect> {
        let Some(correction) = directive.kind.as_ref().map(Correction::from) else {
            return self.over(Over::Broken("a directive came without a kind".into()));
        };
        let revision = directive.revision;
        match self.log.apply_directive(revision, correction) {
            Ok(removed) => {
                self.state = State::Continuing;
                // What is kept was found good; a bridge keeps what was not, and counts once its words are here.
                self.continued |= correction != Correction::Bridge;
                self.generated = 0;
                let (keep, reason) = (self.log.text().len(), directive.reason());
                vec![Effect::Show(Show::Directive {
                    correction,
                    keep,
                    reason,
                    revision,
                    removed,
                })]
            }
            Err(DirectiveError::AlreadyHeard { heard, .. }) => {
                self.state = State::Refusing;
                let refuse = RefuseDirective {
                    turn_id: self.start.turn_id,
                    revision,
                    heard_bytes: heard as u32,
                };
                vec![
                    Effect::Send(refuse.into()),
                    Effect::Show(Show::Refused { revision, heard }),
                ]
            }
            Err(DirectiveError::Repeated { .. }) => Vec::new(),
            Err(error @ (DirectiveError::Skipped { .. } | DirectiveError::NoBoundary { .. })) => {
                self.over(Over::Broken(error.to_string()))
            }
        }
    }

    fn failed(&mut self, failed: TurnFailed) -> Vec<Effect> {
        if failed.retryable {
            // It is over there; the reply so far goes on at the next continuator, or later.
            self.connected = false;
            let after = proto::std_duration(failed.retry_after);
            let show = Show::Lost(failed.message.clone());
            self.failed = Some(failed);
            return vec![Effect::Show(show), Effect::Retry(after)];
        }
        let error = failed.error();
        self.over(Over::Failed {
            message: failed.message,
            error,
            retryable: false,
        })
    }

    fn over(&mut self, over: Over) -> Vec<Effect> {
        self.state = State::Over;
        vec![Effect::Over(over)]
    }
}

#[cfg(test)]
#[path = "turn_tests.rs"]
mod tests;
