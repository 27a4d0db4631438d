//! Both turn machines against each other, over a network that delays, cuts and comes back, in 100,000 histories: every turn ends, its text
//! is what it would have been on a good day, and nothing that was heard is taken back or said twice.

use std::collections::VecDeque;

use cloud_continuator::{
    backend::{self, Finish, Input, TokenScore, Usage},
    turn::{self as cloud, Incoming, Judgement},
};
use edge_agent::{
    opener::{Decision, Reason},
    turn::{self as edge, Over},
};
use proptest::prelude::*;
use segue_shared::{
    proto::{self, EdgeFrame, StartTurn, Tone, cloud_frame::Body, commit_opener::Opening, edge_frame},
    reply_log::Surface,
    words,
};

const OPENER: &[&str] = &["The", " capital", " of", " Australia", " is", " Sydney"];
/// What the large model has to say. Its first letter is nowhere else, so that the end of a text tells how much of it was said.
const ANSWER: &str = "Zwölf 🎉 words, it's so: 東京, and \u{201c}then\u{201d} some.";

/// What the model says after `text`.
fn rest(text: &str) -> String {
    let said = ANSWER
        .char_indices()
        .map(|(at, _)| at)
        .chain([ANSWER.len()])
        .rev()
        .find(|at| text.ends_with(&ANSWER[..*at]))
        .expect("every text ends with nothing");
    let space = if said == 0 && !text.is_empty() { " " } else { "" };
    format!("{space}{}", &ANSWER[said..])
}

/// The model: scores words from `good` on as impossible, and continues any text.
struct Model {
    good: usize,
    asked: Option<Input>,
    left: Option<Vec<char>>,
    usage: Usage,
    generations: u32,
}

impl Model {
    fn take(&mut self, input: Input) {
        if let Input::Generate(text) | Input::Resume(text) = &input {
            self.left = Some(rest(text).chars().collect());
            self.usage.generation = self.generations;
            self.generations += 1;
        }
        self.asked = Some(input);
    }

    /// The next event, of up to `size` characters.
    fn next(&mut self, size: usize) -> Option<backend::Event> {
        if let Some(Input::Commit(text)) = &self.asked {
            let words = words::ranges(text);
            let score = |(n, range): (usize, &std::ops::Range<usize>)| TokenScore {
                end: range.end,
                log_probability: if n >= self.good { -30.0 } else { -0.1 },
                rank: 0,
            };
            let scores = words.iter().enumerate().map(score).collect();
            self.asked = None;
            return Some(backend::Event::Scored(scores));
        }
        let left = self.left.as_mut()?;
        if left.is_empty() {
            self.left = None;
            return Some(backend::Event::Done(Finish::Stop, self.usage));
        }
        let piece: String = left.drain(..size.clamp(1, left.len())).collect();
        self.usage.generated += 1;
        Some(backend::Event::Text(piece, self.usage))
    }
}

/// A stream to a continuator, and the turn there.
struct Stream {
    up: VecDeque<EdgeFrame>,
    down: VecDeque<Body>,
    turn: Option<(cloud::Turn, Model)>,
}

struct World {
    surface: Surface,
    good: usize,
    edge: edge::Turn,
    over: Option<Over>,
    alone: bool,
    stream: Option<Stream>,
    id: u64,
    said: usize,
    committed: bool,
    cancelled: bool,
    gave_up: bool,
    /// What the user has had.
    heard: String,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Word,
    Up,
    Down,
    Model(usize),
    Hear(usize),
    Cut,
    Connect,
    Fail,
    Cancel,
    GiveUp,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => Just(Op::Word),
        12 => Just(Op::Up),
        12 => Just(Op::Down),
        12 => (1..9usize).prop_map(Op::Model),
        4 => (0..80usize).prop_map(Op::Hear),
        2 => Just(Op::Cut),
        4 => Just(Op::Connect),
        1 => Just(Op::Fail),
    ]
}

/// The last word on a history: mostly none.
fn ending() -> impl Strategy<Value = Option<Op>> {
    prop_oneof![8 => Just(None), 1 => Just(Some(Op::Cancel)), 1 => Just(Some(Op::GiveUp))]
}

impl World {
    fn new(surface: Surface, good: usize) -> Self {
        let start = StartTurn {
            user_text: "?".into(),
            ..StartTurn::default()
        };
        Self {
            surface,
            good,
            edge: edge::Turn::new(surface, start),
            over: None,
            alone: false,
            stream: None,
            id: 0,
            said: 0,
            committed: false,
            cancelled: false,
            gave_up: false,
            heard: String::new(),
        }
    }

    fn edge(&mut self, event: edge::Event) {
        for effect in self.edge.on(event) {
            match effect {
                edge::Effect::Send(frame) => self
                    .stream
                    .as_mut()
                    .expect("frames are sent on a stream")
                    .up
                    .push_back(frame),
                edge::Effect::Over(over) => {
                    assert!(self.over.replace(over).is_none(), "a turn ends once");
                }
                edge::Effect::GoOnAlone => self.alone = true,
                // Tried again by the next `Connect`.
                edge::Effect::Retry(_) | edge::Effect::Show(_) => {}
            }
        }
        let log = self.edge.log();
        assert!(log.text().starts_with(log.heard_text()));
        if self.surface == Surface::AppendOnly {
            assert!(log.text().starts_with(&self.heard), "what was heard stays");
            self.heard = log.heard_text().to_owned();
        }
    }

    fn cloud(&mut self, effects: Vec<cloud::Effect>) {
        let Some(stream) = &mut self.stream else { return };
        for effect in effects {
            match effect {
                cloud::Effect::Send(frame) => stream.down.extend(frame.body),
                cloud::Effect::Backend(input) | cloud::Effect::Reopen(input) => {
                    let (_, model) = stream.turn.as_mut().expect("a turn has a model");
                    if matches!(input, Input::Generate(_)) && model.generations > 0 && model.left.is_none() {
                        model.generations = 0; // begun anew
                    }
                    model.take(input);
                }
                cloud::Effect::Mark(_) => {}
                cloud::Effect::End(..) => stream.down.push_back(Body::EndTurn(proto::EndTurn {
                    turn_id: self.id,
                    finish_reason: proto::FinishReason::Stop.into(),
                    ..proto::EndTurn::default()
                })),
                cloud::Effect::Fail { message, .. } => panic!("the continuator finds fault with the edge: {message}"),
            }
        }
    }

    fn step(&mut self, op: Op) {
        if self.over.is_some() {
            return;
        }
        match op {
            Op::Word if self.alone => self.edge(edge::Event::Word(" alone".into())),
            Op::Word if self.said < OPENER.len() => {
                self.said += 1;
                self.edge(edge::Event::Word(OPENER[self.said - 1].into()));
            }
            Op::Word if !self.committed => {
                self.committed = true;
                self.edge(edge::Event::OpenerDone(Decision {
                    words: OPENER.len(),
                    reason: Reason::Length,
                    mean_log_probability: None,
                }));
            }
            Op::Word => {}
            Op::Up => self.up(),
            Op::Down => {
                let body = self.stream.as_mut().and_then(|stream| stream.down.pop_front());
                if let Some(body) = body.filter(|body| turn_of(body) == self.id) {
                    self.edge(edge::Event::Frame(body));
                }
            }
            Op::Model(size) => {
                let turn = self.stream.as_mut().and_then(|stream| stream.turn.as_mut());
                let Some((turn, model)) = turn else { return };
                if let Some(event) = model.next(size) {
                    let effects = turn.on(Incoming::Backend(event));
                    self.cloud(effects);
                }
            }
            Op::Hear(bytes) => {
                let text = self.edge.log().text();
                let bytes = (0..=bytes.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
                self.edge(edge::Event::Heard(bytes.unwrap_or(0)));
            }
            Op::Cut => {
                self.stream = None;
                self.edge(edge::Event::Lost("cut".into()));
            }
            // A try at a new stream, or again on the one there is.
            Op::Connect if !self.edge.connected() && !self.alone => {
                if self.stream.is_none() {
                    self.stream = Some(Stream {
                        up: VecDeque::new(),
                        down: VecDeque::new(),
                        turn: None,
                    });
                    self.id = self.id.max(1);
                } else {
                    self.id += 1;
                }
                let id = self.id;
                self.edge(edge::Event::Connected(id));
            }
            Op::Connect => {}
            Op::Fail => {
                let id = self.id;
                let Some(stream) = self.stream.as_mut().filter(|stream| stream.turn.is_some()) else {
                    return;
                };
                stream.turn = None;
                stream.down.push_back(Body::TurnFailed(proto::TurnFailed {
                    turn_id: id,
                    error: proto::TurnError::Backend.into(),
                    retryable: true,
                    ..proto::TurnFailed::default()
                }));
            }
            Op::Cancel => {
                self.cancelled = true;
                self.edge(edge::Event::Cancel);
            }
            Op::GiveUp => {
                self.gave_up = true;
                self.edge(edge::Event::GiveUp {
                    why: "nobody".into(),
                    alone: true,
                });
            }
        }
    }

    /// The continuator takes a frame, as its session does.
    fn up(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        let Some(body) = stream.up.pop_front().and_then(|frame| frame.body) else {
            return;
        };
        if let edge_frame::Body::StartTurn(start) = &body {
            let turn = cloud::Turn::new(
                start.turn_id,
                self.surface,
                Judgement::default(),
                Tone::Neutral,
                Vec::new(),
            );
            let model = Model {
                good: self.good,
                asked: None,
                left: None,
                usage: Usage::default(),
                generations: 0,
            };
            stream.turn = Some((turn, model));
            return;
        }
        let incoming = match body {
            edge_frame::Body::OpenerDelta(f) => Incoming::Delta {
                offset: f.offset as usize,
                text: f.text,
            },
            edge_frame::Body::CommitOpener(f) => Incoming::Commit {
                prefix: match f.opening {
                    Some(Opening::CommittedPrefix(prefix)) => prefix,
                    _ => String::new(),
                },
                resumed: f.resumed,
            },
            edge_frame::Body::Heard(f) => Incoming::Heard(f.bytes as usize),
            edge_frame::Body::RefuseDirective(f) => Incoming::Refused(f.revision, f.heard_bytes as usize),
            edge_frame::Body::CancelTurn(_) => {
                stream.turn = None;
                return;
            }
            other => panic!("{other:?}"),
        };
        if let Some((turn, _)) = &mut stream.turn {
            let effects = turn.on(incoming);
            self.cloud(effects);
        }
    }

    /// A good day from here on.
    fn finish(&mut self) {
        for _ in 0..600 {
            if self.over.is_some() {
                return;
            }
            if self.alone {
                self.step(Op::Word);
                self.edge(edge::Event::AloneDone);
                continue;
            }
            for op in [Op::Connect, Op::Word, Op::Up, Op::Model(3), Op::Down] {
                self.step(op);
            }
        }
        panic!("the turn does not end: {:?}", self.edge);
    }

    /// Whether the reply is one of those that a good day allows.
    fn check(&self) {
        let (opener, text) = (OPENER.concat(), self.edge.log().text());
        match self.over.as_ref().expect("it is over") {
            Over::Cancelled => {
                assert!(self.cancelled);
                return;
            }
            Over::Alone(_) => {
                let said = text.split(" alone").next().unwrap_or_default();
                assert!(opener.starts_with(said), "{text}");
                return;
            }
            // Given up in mid-reply.
            Over::Lost(_) | Over::Failed { retryable: true, .. } if self.gave_up => return,
            Over::Done(_) => {}
            other => panic!("{other:?}"),
        }
        let head = text.strip_suffix(ANSWER).unwrap_or_else(|| panic!("{text:?}"));
        assert!(!head.contains(ANSWER), "{text:?}");
        let head = head.trim_end();
        let kept: usize = OPENER[..self.good.min(OPENER.len())]
            .iter()
            .map(|word| word.len())
            .sum();
        if self.good >= OPENER.len() {
            assert_eq!(head, opener);
        } else if let Some(bridge) = head.strip_prefix(opener.as_str()) {
            assert!(!bridge.is_empty() && self.surface == Surface::AppendOnly, "{text:?}");
            assert_eq!(
                bridge.matches(|c: char| "—…:".contains(c)).count().min(1),
                1,
                "one bridge: {bridge:?}"
            );
        } else {
            assert!(head == &opener[..kept] || head.is_empty(), "{text:?}");
        }
    }
}

fn turn_of(body: &Body) -> u64 {
    match body {
        Body::Chunk(f) => f.turn_id,
        Body::Directive(f) => f.turn_id,
        Body::EndTurn(f) => f.turn_id,
        Body::TurnFailed(f) => f.turn_id,
        Body::Welcome(_) | Body::Drain(_) => 0,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100_000, max_shrink_iters: 5_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_reply_comes_whole_and_once_whatever_happens(
        append_only: bool, good in 0..9usize, ops in prop::collection::vec(op(), 0..120), ending in ending(),
    ) {
        let surface = if append_only { Surface::AppendOnly } else { Surface::Revisable };
        let mut world = World::new(surface, good);
        for op in ops.into_iter().chain(ending) {
            world.step(op);
        }
        world.finish();
        world.check();
    }
}
