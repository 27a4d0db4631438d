//! One turn at the continuator, as a pure state machine: events in, effects out; no clock, no socket.

mod events;

use segue_shared::{
    proto::{self, DirectiveReason},
    reply_log::{Correction, Surface},
    seam::Seam,
    words,
};

pub use self::events::{Effect, Incoming, Mark, failed, turn_failed};
use self::events::{invalid, too_long, too_much_heard, unexpected};
use crate::{
    backend::{Event, Finish, Input, Message, Usage},
    judge::Control,
    policy,
    verify::{self, Answer, Judged, Thresholds, Verdict, Verifier},
};

/// Longest opener, in bytes; far more than one ever has.
const OPENER_BYTES: usize = 16 << 10;
/// Longest reply text that is resumed, in bytes.
const REPLY_BYTES: usize = 1 << 20;

/// What verifying and correcting depend on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Judgement {
    /// Who judges.
    pub verifier: verify::Kind,
    /// The likelihood verifier's thresholds.
    pub thresholds: Thresholds,
    /// Which directives may be used.
    pub policy: policy::Settings,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Opening,
    Verifying,
    Generating,
    /// Complete; a directive may still be refused.
    Ended,
}

/// The machine.
pub struct Turn {
    id: u64,
    surface: Surface,
    judgement: Judgement,
    tone: proto::Tone,
    history: Vec<Message>,
    state: State,
    /// `None` when nothing is to be judged.
    verifier: Option<Box<dyn Verifier>>,
    /// The opener so far, then the committed prefix.
    opener: String,
    /// Bytes of the reply text that are fixed: sent, or committed and kept.
    length: usize,
    /// The most bytes that the reply text ever had.
    longest: usize,
    heard: usize,
    revision: u32,
    seam: Seam,
    spoke: bool,
    usage: Usage,
    /// What backends before the present one took.
    before: Usage,
    /// Whether the backend scores openers.
    scores: bool,
    /// The reply text that the seam joins the continuation to.
    joined_to: String,
    /// What the model has been asked to continue, and then has been heard to say.
    model_text: String,
    /// The model has said something since it was asked.
    went_on: bool,
    failed: bool,
    exhausted: bool,
    /// The last directive kept every word.
    bridged: bool,
    /// The generation that was asked for last, counted from 0 within the backend's turn, and what was asked.
    asked: Option<(u32, Input)>,
}

impl Turn {
    /// A turn that has begun. `tone` is the turn's own wish, if it has one; `history` tells which bridges were used.
    pub fn new(id: u64, surface: Surface, judgement: Judgement, tone: proto::Tone, history: Vec<Message>) -> Self {
        Self {
            id,
            surface,
            judgement,
            tone: if tone == proto::Tone::Unspecified {
                judgement.policy.tone
            } else {
                tone
            },
            history,
            state: State::Opening,
            verifier: None,
            opener: String::new(),
            length: 0,
            longest: 0,
            heard: 0,
            revision: 0,
            seam: Seam::new(""),
            spoke: false,
            usage: Usage::default(),
            before: Usage::default(),
            scores: true,
            joined_to: String::new(),
            model_text: String::new(),
            went_on: false,
            failed: false,
            exhausted: false,
            bridged: false,
            asked: None,
        }
    }

    /// The turn's tokens were used up by earlier attempts: when their reply is committed, it is complete.
    pub fn exhaust(&mut self) {
        self.exhausted = true;
    }

    /// The turn cannot go on.
    pub fn give_up(&mut self) {
        self.state = State::Ended;
        self.failed = true;
    }

    /// Says whether the backend that serves the turn scores openers.
    pub fn served_by(&mut self, scores: bool) {
        self.scores = scores;
    }

    /// Whether the turn is complete.
    pub fn ended(&self) -> bool {
        self.state == State::Ended
    }

    /// Whether an ended turn must be kept, because the edge may yet refuse what was done to its opener.
    pub fn may_be_refused(&self) -> bool {
        self.revision > 0 && self.surface == Surface::AppendOnly && !self.failed
    }

    /// What the turn took so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Takes an event.
    pub fn on(&mut self, incoming: Incoming) -> Vec<Effect> {
        let effects = match incoming {
            Incoming::Delta { offset, text } => self.delta(offset, &text),
            Incoming::Commit { prefix, resumed } => self.commit(prefix, resumed),
            // What is heard before the commit may be the reply of an earlier attempt: the commit tells.
            Incoming::Heard(bytes) | Incoming::Refused(_, bytes)
                if self.state != State::Opening && bytes > self.longest =>
            {
                too_much_heard(bytes, self.longest)
            }
            Incoming::Heard(bytes) => {
                self.heard = self.heard.max(bytes);
                Vec::new()
            }
            Incoming::Refused(revision, heard) => self.refused(revision, heard),
            Incoming::Backend(event) => self.backend(event),
            Incoming::Moved => self.moved(),
        };
        if effects.iter().any(|effect| matches!(effect, Effect::Fail { .. })) {
            self.give_up();
        }
        effects
    }

    fn delta(&mut self, offset: usize, text: &str) -> Vec<Effect> {
        if self.state != State::Opening {
            return unexpected("an opener delta came after the opener was committed");
        }
        if offset != self.opener.len() {
            return invalid(format!(
                "an opener delta stands at byte {offset}, but the opener has {} bytes",
                self.opener.len()
            ));
        }
        if offset.saturating_add(text.len()) > OPENER_BYTES {
            return too_long(OPENER_BYTES);
        }
        self.opener.push_str(text);
        vec![Effect::Backend(Input::Opener(self.opener.trim_end().to_owned()))]
    }

    fn commit(&mut self, prefix: String, resumed: bool) -> Vec<Effect> {
        if self.state != State::Opening {
            return unexpected("the opener was committed twice");
        }
        let most = if resumed { REPLY_BYTES } else { OPENER_BYTES };
        if prefix.len() > most {
            return too_long(most);
        }
        if self.heard > prefix.len() {
            return too_much_heard(self.heard, prefix.len());
        }
        self.length = prefix.len();
        self.longest = prefix.len();
        self.opener = prefix;
        if resumed && !self.opener.is_empty() {
            // The reply of an earlier attempt, judged there, and cut off wherever it was cut off: it goes on within it.
            let marks = vec![Effect::Mark(Mark::Committed), Effect::Mark(Mark::Verified(None, None))];
            if self.exhausted {
                self.state = State::Ended;
                return [marks, vec![Effect::End(Finish::Length, self.usage)]].concat();
            }
            self.state = State::Generating;
            self.seam = Seam::within();
            self.joined_to.clone_from(&self.opener);
            self.model_text.clone_from(&self.opener);
            self.went_on = true;
            let input = self.ask(Input::Resume(self.opener.clone()));
            return [marks, vec![input]].concat();
        }
        self.state = State::Verifying;
        let judged = self.judgement.policy.verify && words::count(&self.opener) > 0;
        self.verifier = judged.then(|| self.new_verifier());
        let question = self.question();
        vec![Effect::Mark(Mark::Committed), self.ask(question)]
    }

    fn new_verifier(&self) -> Box<dyn Verifier> {
        let kind = self.judgement.verifier.for_backend(self.scores);
        kind.verifier(self.judgement.thresholds)
    }

    fn question(&self) -> Input {
        let opener = self.opener.trim_end();
        self.verifier
            .as_ref()
            .map_or_else(|| Input::Commit(opener.to_owned()), |v| v.question(opener))
    }

    /// Puts what the turn waits for to another backend, whose generations are counted anew.
    fn moved(&mut self) -> Vec<Effect> {
        // What was generated and not said is lost; what was said is continued.
        let (said, lost) = if self.went_on {
            (self.usage.generated, 0)
        } else {
            (0, self.usage.generated)
        };
        self.before = Usage {
            wasted: self.usage.wasted.saturating_add(lost),
            generated: said,
            ..Usage::default()
        };
        self.usage = self.before;
        self.asked = None;
        let input = match self.state {
            State::Ended => return Vec::new(),
            State::Opening if self.opener.is_empty() => return Vec::new(),
            State::Opening => Input::Opener(self.opener.trim_end().to_owned()),
            State::Verifying => {
                if self.verifier.is_some() {
                    self.verifier = Some(self.new_verifier());
                }
                self.question()
            }
            State::Generating if self.went_on => {
                self.seam = Seam::within();
                Input::Resume(self.model_text.clone())
            }
            State::Generating => {
                self.seam = Seam::new(&self.joined_to);
                Input::Generate(self.model_text.clone())
            }
        };
        vec![self.ask(input)]
    }

    fn backend(&mut self, event: Event) -> Vec<Effect> {
        match (self.counted(event), &self.state) {
            (_, State::Ended) => Vec::new(),
            (Event::Prefilled, _) => vec![Effect::Mark(Mark::Prefilled)],
            (Event::Scored(scores), State::Verifying) => self.answer(Answer::Scores(&scores)),
            (Event::Text(_, usage), _) if !self.current(usage) => Vec::new(),
            (Event::Done(_, usage), State::Generating) if !self.current(usage) => {
                // The backend's turn had ended before it took what it was asked last.
                self.usage = usage;
                let asked = self.asked.take();
                asked.map(|(_, input)| self.ask_anew(input)).into_iter().collect()
            }
            (Event::Text(text, usage), State::Verifying) => {
                self.usage = usage;
                self.answer(Answer::Text(&text))
            }
            (Event::Text(text, usage), State::Generating) => {
                self.usage = usage;
                let text = self.seam.push(&text);
                self.go_on(text)
            }
            (Event::Done(finish, usage), State::Verifying | State::Generating) => {
                self.usage = usage;
                let mut effects = if self.state == State::Verifying {
                    self.answer(Answer::End)
                } else {
                    Vec::new()
                };
                if let Some(Effect::Backend(_)) = effects.last() {
                    // The judge's text was of no use, and its turn at the backend is over.
                    effects.pop();
                    let asked = self.asked.take();
                    effects.extend(asked.map(|(_, input)| self.ask_anew(input)));
                    return effects;
                }
                let rest = self.seam.finish();
                effects.extend(self.go_on(rest));
                self.state = State::Ended;
                effects.push(Effect::End(finish, usage));
                effects
            }
            (Event::Failed(failure), _) => vec![failed(&failure)],
            (Event::Scored(_) | Event::Text(..) | Event::Done(..), _) => Vec::new(),
        }
    }

    /// Adds what earlier backends took to what an event says.
    fn counted(&self, event: Event) -> Event {
        let sum = |usage: Usage| Usage {
            generated: usage.generated.saturating_add(self.before.generated),
            wasted: usage.wasted.saturating_add(self.before.wasted),
            ..usage
        };
        match event {
            Event::Text(text, usage) => Event::Text(text, sum(usage)),
            Event::Done(finish, usage) => Event::Done(finish, sum(usage)),
            other => other,
        }
    }

    /// Whether an event belongs to the generation that was asked for last.
    fn current(&self, usage: Usage) -> bool {
        self.asked
            .as_ref()
            .is_some_and(|(generation, _)| *generation == usage.generation)
    }

    /// Asks the backend, and remembers which generation its answer belongs to.
    fn ask(&mut self, input: Input) -> Effect {
        if input.generates() {
            let generation = self.asked.as_ref().map_or(0, |(generation, _)| generation + 1);
            self.asked = Some((generation, input.clone()));
        }
        Effect::Backend(input)
    }

    /// Asks a new turn at the backend, where generations are counted anew.
    fn ask_anew(&mut self, input: Input) -> Effect {
        // All that the old one generated is replaced.
        self.before = Usage {
            wasted: self.usage.wasted.saturating_add(self.usage.generated),
            ..Usage::default()
        };
        self.usage = self.before;
        self.asked = Some((0, input.clone()));
        Effect::Reopen(input)
    }

    fn answer(&mut self, answer: Answer<'_>) -> Vec<Effect> {
        let judged = match &mut self.verifier {
            None => return self.judge(None, None),
            Some(verifier) => verifier.answer(&self.opener, answer),
        };
        judged.map_or_else(Vec::new, |Judged { verdict, spoken }| self.judge(Some(verdict), spoken))
    }

    /// Acts on a verdict; `spoken` is what a judge decided itself and went on with.
    fn judge(&mut self, verdict: Option<Verdict>, spoken: Option<(Control, String)>) -> Vec<Effect> {
        let allowed = |verdict| policy::directive(verdict, self.surface, self.heard, &self.judgement.policy);
        let correction = match &spoken {
            Some((Control::Bridge, _)) => Some(Correction::Bridge),
            _ => verdict.and_then(allowed),
        };
        let mut effects = vec![Effect::Mark(Mark::Verified(verdict, correction))];
        let input = match correction {
            None => self.generate(&self.opener.clone(), &self.opener.clone()),
            Some(correction) => {
                let reason = match verdict {
                    _ if spoken.is_some() => DirectiveReason::Judged,
                    Some(Verdict::Wrong { off_topic: true, .. }) if correction == Correction::Restart => {
                        DirectiveReason::OffTopic
                    }
                    _ => DirectiveReason::UnlikelyWord,
                };
                let (more, input) = self.correct(correction, reason);
                effects.extend(more);
                input
            }
        };
        match spoken {
            // The judge went on as it decided, and that is what is done: its text is the continuation.
            Some((control, text)) if went_on(control, correction) => {
                let text = self.seam.push(&text);
                effects.extend(self.go_on(text));
            }
            _ => effects.push(self.ask(input)),
        }
        effects
    }

    /// Begins a new revision; returns what to send, and what to tell the backend.
    fn correct(&mut self, correction: Correction, reason: DirectiveReason) -> (Vec<Effect>, Input) {
        self.revision += 1;
        let kept = correction.kept(self.opener.len());
        let kind = match correction {
            Correction::Bridge => proto::directive::Kind::Bridge(proto::Bridge { tone: self.tone.into() }),
            Correction::Revise { keep } => proto::directive::Kind::Revise(proto::Revise {
                keep_bytes: keep as u32,
            }),
            Correction::Restart => proto::directive::Kind::Restart(proto::Restart {}),
        };
        let directive = proto::Directive {
            turn_id: self.id,
            revision: self.revision,
            kind: Some(kind),
            reason: reason.into(),
        };
        let mut effects = vec![Effect::Send(directive.into())];
        self.length = kept;
        self.spoke = false;
        let mut reply = self.opener[..kept].to_owned();
        let mut model_sees = reply.clone();
        self.bridged = correction == Correction::Bridge;
        if self.bridged {
            let bridge = policy::bridge(self.tone, &self.history, self.id);
            let joint = if reply.is_empty() || reply.ends_with(char::is_whitespace) {
                ""
            } else {
                " "
            };
            let text = format!("{joint}{bridge}");
            reply.push_str(&text);
            effects.extend(self.say(text));
            // The self-repair announces a fresh start, and the model makes one: led by the wrong words, a small one repeats their mistake or
            // ends the reply at once (it did in 6 of the first 24 recorded bridges).
            model_sees.clear();
        }
        let input = self.generate(&reply, &model_sees);
        (effects, input)
    }

    /// Has the backend continue `model_sees`; its text is joined to `reply`.
    fn generate(&mut self, reply: &str, model_sees: &str) -> Input {
        self.state = State::Generating;
        self.seam = Seam::new(reply);
        self.joined_to = reply.to_owned();
        self.model_text = model_sees.trim_end().to_owned();
        self.went_on = false;
        Input::Generate(self.model_text.clone())
    }

    fn refused(&mut self, revision: u32, heard: usize) -> Vec<Effect> {
        self.heard = self.heard.max(heard);
        if revision == 0 || revision != self.revision || self.bridged {
            return Vec::new(); // an older directive, or one that takes nothing back
        }
        let ended = self.state == State::Ended;
        if !ended {
            // What is replaced counts as wasted: the present backend's share it counts itself.
            self.before.wasted = self.before.wasted.saturating_add(self.before.generated);
            self.before.generated = 0;
            self.usage.generated = 0;
        }
        let (mut effects, input) = self.correct(Correction::Bridge, DirectiveReason::Refused);
        effects.push(if ended { self.ask_anew(input) } else { self.ask(input) });
        effects
    }

    /// Says what the model generated.
    fn go_on(&mut self, text: String) -> Vec<Effect> {
        self.went_on |= !text.is_empty();
        self.model_text.push_str(&text);
        self.say(text)
    }

    fn say(&mut self, text: String) -> Vec<Effect> {
        if text.is_empty() {
            return Vec::new();
        }
        let chunk = proto::Chunk {
            turn_id: self.id,
            revision: self.revision,
            offset: self.length as u32,
            text,
            generated_tokens: self.usage.generated,
        };
        self.length += chunk.text.len();
        self.longest = self.longest.max(self.length);
        let mut effects = vec![Effect::Send(chunk.into())];
        if !std::mem::replace(&mut self.spoke, true) {
            effects.push(Effect::Mark(Mark::FirstText));
        }
        effects
    }
}

/// Whether a judge that decided `control` has gone on as `correction` wants it.
fn went_on(control: Control, correction: Option<Correction>) -> bool {
    match (control, correction) {
        (_, None) => true, // accepted, or a number of words outside the opener
        (Control::Bridge, Some(Correction::Bridge))
        | (Control::Restart | Control::Revise(0), Some(Correction::Restart))
        | (Control::Revise(_), Some(Correction::Revise { .. })) => true,
        _ => false,
    }
}

#[cfg(test)]
#[path = "turn_tests.rs"]
mod tests;
