//! The engine's thread: continuous batching over all turns.
//!
//! Every step decodes one token for each turn that generates, plus as much of what others still have to read as [`Pace`] allows, in one batch. All
//! sequences share one pool of KV cells; the prompt's shared head is read once and copied (which copies no data), and a finished turn's
//! sequence stays as a cache for the conversation's next turn until its cells are needed.

mod places;
mod sampling;
mod step;
mod text;

use std::{
    collections::VecDeque,
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use llama_cpp_2::{
    context::LlamaContext, llama_batch::LlamaBatch, model::LlamaModel, sampling::LlamaSampler, token::LlamaToken,
};
use tokio::sync::mpsc;

use self::sampling::sampler;
use super::{
    Options,
    pace::Pace,
    sequence::{Sequence, Token},
};
use crate::{
    backend::{Event, Failure, Input, Message, Parameters, Request, Usage},
    layout::Layout,
    stop::StopFilter,
};

/// Tokens of one batch at most.
pub const BATCH: usize = 512;
/// Tokens of an opener that are read whatever the pace.
const AT_ONCE: usize = 8;
/// How long to wait for what follows from an opener's scores.
const VERDICT: Duration = Duration::from_millis(1);
/// Room for an opener that is not known yet, in tokens.
const OPENER_ROOM: usize = 48;
/// A turn generates only while its event queue has this much room; one token makes at most two events.
const EVENT_ROOM: usize = 4;
/// How often to look again when every turn waits for its reader.
const READERS_BUSY: Duration = Duration::from_millis(2);

/// What callers tell the thread.
pub enum Command {
    /// A turn begins.
    Open(u64, Box<Request>, mpsc::Sender<Event>),
    /// A turn's input.
    Input(u64, Input),
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// Prompt and opener are being read.
    Reading,
    /// The opener is committed; its scores are due when it is read.
    Committed,
    /// The verdict is being thought over.
    Scored,
    /// Tokens are being generated.
    Generating,
}

struct Active {
    id: u64,
    events: mpsc::Sender<Event>,
    history: Vec<Message>,
    user_text: String,
    parameters: Parameters,
    prompt: Vec<Token>,
    phase: Phase,
    /// Words of its opener are being said: it will be committed soon.
    opened: bool,
    prefilled: bool,
    /// Most tokens that the sequence may have.
    room: usize,
    sampler: Option<LlamaSampler>,
    stop: StopFilter,
    /// Bytes of a character that is still incomplete.
    partial: Vec<u8>,
    usage: Usage,
    /// How often a generation was begun.
    generations: u32,
}

/// Whether a turn's prompt is read, and that is news.
fn is_read(sequence: &Sequence, active: &Active) -> bool {
    !active.prefilled && sequence.cached().len() >= active.prompt.len()
}

/// Whether a turn's committed opener is scored, and that is news.
fn is_scored(sequence: &Sequence, active: &Active) -> bool {
    active.phase == Phase::Committed && sequence.tail().is_some()
}

#[derive(Default)]
struct Slot {
    sequence: Sequence,
    active: Option<Active>,
    /// When it was last used, in steps; the oldest is given away first.
    used: u64,
}

struct Waiting {
    id: u64,
    request: Box<Request>,
    prompt: Vec<Token>,
    events: mpsc::Sender<Event>,
    /// The last input that came before there was a place. Each holds the whole text, so that it stands for those before it.
    input: Option<Input>,
    /// Generations that were asked for before that one.
    replaced: u32,
}

/// The engine's state; lives on its thread.
pub struct Engine<'m> {
    model: &'m LlamaModel,
    context: LlamaContext<'m>,
    layout: Layout,
    system_prompt: Option<&'m str>,
    batch: LlamaBatch<'static>,
    slots: Vec<Slot>,
    waiting: VecDeque<Waiting>,
    most_waiting: usize,
    cells: usize,
    /// Tokens of the shared head, in sequence 0.
    head: Vec<Token>,
    step: u64,
    pace: Pace,
}

impl<'m> Engine<'m> {
    /// An engine with places for `slots` turns; reads the shared head.
    pub fn new(
        model: &'m LlamaModel,
        context: LlamaContext<'m>,
        layout: Layout,
        options: &'m Options,
    ) -> Result<Self, String> {
        let cells = context.n_ctx() as usize;
        let mut engine = Self {
            model,
            context,
            layout,
            batch: LlamaBatch::new(BATCH, 1),
            system_prompt: options.system_prompt.as_deref(),
            slots: std::iter::repeat_with(Slot::default)
                .take(options.slots as usize)
                .collect(),
            waiting: VecDeque::new(),
            most_waiting: options.waiting,
            cells,
            head: Vec::new(),
            step: 0,
            pace: Pace::new(options.prefill_share, options.slots as usize),
        };
        // What the prompts of two conversations have in common is the head of all.
        let [one, other] = ["a", "The"].map(|text| engine.prompt(&[], text));
        let (one, other) = (one?, other?);
        let head: Vec<Token> = one
            .iter()
            .zip(&other)
            .take_while(|(a, b)| a == b)
            .map(|(a, _)| *a)
            .collect();
        if head.len() + OPENER_ROOM >= cells {
            return Err(format!(
                "a context of {cells} tokens is too small: the layout's own text has {}",
                head.len()
            ));
        }
        for (n, chunk) in head.chunks(BATCH).enumerate() {
            engine.batch.clear();
            for (m, token) in chunk.iter().enumerate() {
                let position = (n * BATCH + m) as i32;
                engine
                    .batch
                    .add(LlamaToken(*token), position, &[0], false)
                    .map_err(|e| e.to_string())?;
            }
            engine.context.decode(&mut engine.batch).map_err(|e| e.to_string())?;
        }
        engine.head = head;
        Ok(engine)
    }

    /// Serves commands until all callers are gone.
    pub fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let idle = !self.waiting.is_empty() || self.slots.iter().any(|s| s.active.is_some());
            // With nothing to decode, sleep until somebody speaks.
            let first = match (self.work_left(), idle) {
                (true, _) => commands
                    .try_recv()
                    .map_err(|e| e == std::sync::mpsc::TryRecvError::Disconnected),
                (false, true) => commands
                    .recv_timeout(READERS_BUSY)
                    .map_err(|e| e == RecvTimeoutError::Disconnected),
                (false, false) => commands.recv().map_err(|_| true),
            };
            match first {
                Ok(command) => {
                    self.take(command);
                    while let Ok(command) = commands.try_recv() {
                        self.take(command);
                    }
                }
                Err(true) => return,
                Err(false) => {}
            }
            self.reap();
            self.admit();
            if self.report() {
                self.hear_verdicts(commands);
            }
            self.advance();
        }
    }

    /// Opener scores have just been reported. What follows from them takes much less time than the step that would begin now.
    fn hear_verdicts(&mut self, commands: &Receiver<Command>) {
        let until = Instant::now() + VERDICT;
        let undecided = |slot: &Slot| slot.active.as_ref().is_some_and(|a| a.phase == Phase::Scored);
        while self.slots.iter().any(undecided) {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(command) = commands.recv_timeout(left) else {
                return;
            };
            self.take(command);
        }
    }

    fn work_left(&self) -> bool {
        self.slots.iter().any(|slot| {
            slot.active.as_ref().is_some_and(|active| {
                !slot.sequence.pending().is_empty()
                    || is_read(&slot.sequence, active)
                    || is_scored(&slot.sequence, active)
                    || (active.phase == Phase::Generating && active.events.capacity() >= EVENT_ROOM)
            })
        })
    }

    // --- commands ---

    fn take(&mut self, command: Command) {
        match command {
            Command::Open(id, request, events) => match self.prompt(&request.history, &request.user_text) {
                Err(error) => fail(&events, Failure::Model(error)),
                Ok(prompt) => {
                    let needed = prompt.len() + OPENER_ROOM + request.parameters.max_tokens as usize;
                    if needed > self.cells {
                        fail(
                            &events,
                            Failure::ContextTooSmall {
                                needed,
                                available: self.cells,
                            },
                        );
                    } else if self.waiting.len() >= self.most_waiting {
                        fail(&events, Failure::Overloaded { retry_after: None });
                    } else {
                        self.waiting.push_back(Waiting {
                            id,
                            request,
                            prompt,
                            events,
                            input: None,
                            replaced: 0,
                        });
                    }
                }
            },
            Command::Input(id, input) => {
                if let Some(n) = self
                    .slots
                    .iter()
                    .position(|s| s.active.as_ref().is_some_and(|a| a.id == id))
                {
                    self.input(n, input);
                } else if let Some(n) = self.waiting.iter().position(|w| w.id == id) {
                    if input == Input::Close {
                        self.waiting.remove(n);
                    } else {
                        let replaced = self.waiting[n].input.replace(input);
                        self.waiting[n].replaced += u32::from(replaced.as_ref().is_some_and(Input::generates));
                    }
                }
            }
        }
    }

    fn input(&mut self, n: usize, input: Input) {
        if let Some(active) = &mut self.slots[n].active {
            active.opened = true;
        }
        let (text, phase) = match input {
            Input::Close => {
                self.slots[n].active = None;
                return;
            }
            Input::Opener(text) => (text, Phase::Reading),
            Input::Commit(text) => (text, Phase::Committed),
            Input::Generate(text) | Input::Resume(text) => (text, Phase::Generating),
            Input::Judge(text) => return self.judge(n, &text),
        };
        let reply = self.reply(&text);
        let stops = self.layout.stops().iter().map(|s| (*s).to_owned()).collect();
        self.retarget(n, phase, None, &reply, stops);
    }

    /// Judging is generating after another prompt, in which the opener is quoted; a reply may have several lines there.
    fn judge(&mut self, n: usize, opener: &str) {
        let Some(active) = &self.slots[n].active else { return };
        let user_text = crate::judge::ask(&active.user_text, opener);
        match self.prompt(&active.history, &user_text) {
            Ok(prompt) => self.retarget(n, Phase::Generating, Some(prompt), &[], vec!["\nUser:".into()]),
            Err(error) => self.end(n, Event::Failed(Failure::Model(error))),
        }
    }

    /// Brings a turn to a new phase, with another reply text (and, to judge, another prompt).
    fn retarget(
        &mut self,
        n: usize,
        phase: Phase,
        prompt: Option<Vec<Token>>,
        reply: &[(Token, usize)],
        stops: Vec<String>,
    ) {
        let Slot {
            sequence,
            active: Some(active),
            ..
        } = &mut self.slots[n]
        else {
            return;
        };
        let prompt = prompt.unwrap_or_else(|| active.prompt.clone());
        let needed = prompt.len() + reply.len() + active.parameters.max_tokens as usize;
        if phase == Phase::Generating {
            // Words that were read and are not continued, and what an earlier generation made, were for nothing.
            let wanted: Vec<Token> = prompt.iter().copied().chain(reply.iter().map(|r| r.0)).collect();
            let kept = sequence.common(&wanted).max(active.prompt.len());
            let dropped = sequence.cached().len().saturating_sub(kept);
            active.usage.wasted += dropped as u32;
            active.usage.generated = 0;
            active.usage.generation = active.generations;
            active.generations += 1;
            active.usage.opener = reply.len() as u32;
            active.sampler = sampler(&active.parameters);
            active.partial.clear();
            active.stop = StopFilter::new(stops.into_iter().chain(active.parameters.stop.iter().cloned()));
        }
        active.phase = phase;
        let room = active.room;
        active.room = room.max(needed);
        if needed > room && !self.make_room() {
            let available = self.cells;
            let failure = if needed > available {
                Failure::ContextTooSmall { needed, available }
            } else {
                Failure::Overloaded { retry_after: None }
            };
            return self.end(n, Event::Failed(failure));
        }
        let keep = self.slots[n].sequence.retarget(&prompt, reply);
        self.cut(n, keep);
    }
}

fn sequence_id(slot: usize) -> i32 {
    slot as i32 + 1 // 0 holds the shared head
}

fn fail(events: &mpsc::Sender<Event>, failure: Failure) {
    let _ = events.try_send(Event::Failed(failure));
}
