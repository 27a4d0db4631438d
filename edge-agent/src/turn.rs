//! One turn at the edge, as a pure state machine: events in, effects out; no clock, socket or terminal.

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
    /// The opener's next word, with the white space before it.
    Word(String),
    /// The opener is complete.
    OpenerDone(Decision),
    /// A frame of this turn from the continuator.
    Frame(Body),
    /// The user has had this many bytes of the reply.
    Heard(usize),
    /// The user interrupted.
    Cancel,
    /// The continuator is gone; why, in a sentence.
    Lost(String),
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
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send a frame.
    Send(EdgeFrame),
    /// Show something.
    Show(Show),
    /// The turn is over.
    Over(Over),
}

/// How a turn ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Over {
    /// The reply is complete.
    Done(Box<EndTurn>),
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

#[derive(Debug, PartialEq, Eq)]
enum State {
    Opening,
    Continuing,
    /// A directive was refused; what comes before the next one belongs to a text that does not exist.
    Refusing,
    Over,
}

/// The machine.
#[derive(Debug)]
pub struct Turn {
    id: u64,
    log: ReplyLog,
    state: State,
}

impl Turn {
    /// Begins a turn; the effects send `start` before there is any opener.
    pub fn begin(surface: Surface, start: StartTurn) -> (Self, Vec<Effect>) {
        let turn = Self {
            id: start.turn_id,
            log: ReplyLog::new(surface),
            state: State::Opening,
        };
        (turn, vec![Effect::Send(start.into())])
    }

    /// The reply so far.
    pub fn log(&self) -> &ReplyLog {
        &self.log
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
            Event::Word(text) => self.word(text),
            Event::OpenerDone(decision) => self.commit(decision),
            Event::Frame(body) => self.frame(body),
            Event::Heard(bytes) => match self.log.hear(bytes) {
                Ok(()) => vec![Effect::Send(
                    proto::Heard {
                        turn_id: self.id,
                        bytes: self.log.heard() as u32,
                    }
                    .into(),
                )],
                Err(error) => self.over(Over::Broken(error.to_string())),
            },
            Event::Cancel => {
                let cancel = proto::CancelTurn {
                    turn_id: self.id,
                    heard_bytes: self.log.heard() as u32,
                };
                let mut effects = vec![Effect::Send(cancel.into())];
                effects.extend(self.over(Over::Cancelled));
                effects
            }
            Event::Lost(why) => self.over(Over::Lost(why)),
        }
    }

    fn word(&mut self, text: String) -> Vec<Effect> {
        if self.state != State::Opening {
            return Vec::new();
        }
        let offset = self.log.text().len() as u32;
        self.log.push_opener(&text);
        vec![
            Effect::Show(Show::OpenerWord(text.clone())),
            Effect::Send(
                OpenerDelta {
                    turn_id: self.id,
                    offset,
                    text,
                }
                .into(),
            ),
        ]
    }

    fn commit(&mut self, decision: Decision) -> Vec<Effect> {
        if self.state != State::Opening {
            return Vec::new();
        }
        self.state = State::Continuing;
        let text = self.log.text().to_owned();
        let opening = if text.is_empty() {
            Opening::NoOpener(proto::NoOpener {})
        } else {
            Opening::CommittedPrefix(text.clone())
        };
        let commit = CommitOpener {
            turn_id: self.id,
            opening: Some(opening),
            mean_log_probability: decision.mean_log_probability,
            resumed: false,
        };
        vec![
            Effect::Send(commit.into()),
            Effect::Show(Show::Committed { text, decision }),
        ]
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
                    Ok(Applied::Appended) => vec![Effect::Show(Show::Continuation {
                        offset,
                        text: chunk.text,
                    })],
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
                    turn_id: self.id,
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
        let error = failed.error();
        self.over(Over::Failed {
            message: failed.message,
            error,
            retryable: failed.retryable,
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
