//! Transcripts of turns: recording them with a real backend, and replaying them without.

use std::sync::Arc;

use cloud_continuator::{
    backend::{Backend, Event, Finish, Input, Parameters, Request, TokenScore, Usage, embedded},
    turn::{Effect, Incoming, Judgement, Turn},
};
use segue_shared::{
    proto::{self, CloudFrame, Tone, cloud_frame::Body},
    reply_log::{Correction, ReplyLog, Surface},
};
use serde_json::{Value, json};

use crate::programs::root;

/// What a transcript begins with.
#[derive(Clone, Debug)]
pub struct Setting {
    /// What was asked.
    pub question: String,
    /// What the μLM is made to have said.
    pub opener: String,
    /// Where it was shown.
    pub surface: Surface,
    /// The manner of a bridge.
    pub tone: Tone,
    /// Bytes that were heard before the verdict.
    pub heard: usize,
    /// Seed of the large model's sampling.
    pub seed: u64,
}

/// The default large model, in this process.
///
/// # Panics
/// When it cannot be loaded.
pub fn backend() -> Arc<dyn Backend> {
    let model = root().join(cloud_continuator::config::DEFAULT_MODEL);
    let options = embedded::Options {
        context: 2048,
        slots: 2,
        waiting: 4,
        ..embedded::Options::new(model)
    };
    Arc::new(embedded::Embedded::load(options).unwrap_or_else(|error| panic!("{error}")))
}

fn machine(setting: &Setting) -> Turn {
    Turn::new(1, setting.surface, Judgement::default(), setting.tone, Vec::new())
}

/// The turn's first events: what was heard, and the commit.
fn begin(turn: &mut Turn, setting: &Setting) -> Vec<Effect> {
    let mut effects = turn.on(Incoming::Heard(setting.heard));
    effects.extend(turn.on(Incoming::Commit {
        prefix: setting.opener.clone(),
        resumed: false,
    }));
    effects
}

/// Runs a turn with a real model and returns its transcript.
///
/// # Panics
/// When the backend fails.
pub async fn record(backend: &dyn Backend, setting: Setting) -> Value {
    let parameters = Parameters {
        max_tokens: 48,
        temperature: 0.3,
        top_p: 0.9,
        min_p: 0.0,
        seed: Some(setting.seed),
        stop: Vec::new(),
    };
    let request = Request {
        history: Vec::new(),
        user_text: setting.question.clone(),
        parameters,
    };
    let mut at_backend = backend.open(request).expect("there is room");
    let mut turn = machine(&setting);
    let (mut events, mut frames) = (Vec::new(), Vec::new());
    let mut effects = begin(&mut turn, &setting);
    loop {
        for effect in std::mem::take(&mut effects) {
            match effect {
                Effect::Backend(input) => at_backend.send(input).expect("there is room"),
                Effect::Send(frame) => frames.push(frame),
                Effect::Fail { message, .. } => panic!("{message}"),
                Effect::Reopen(_) | Effect::Mark(_) | Effect::End(..) => {}
            }
        }
        if turn.ended() {
            break;
        }
        let event = std::future::poll_fn(|context| at_backend.poll_next(context))
            .await
            .expect("the engine answers");
        events.push(event_json(&event));
        effects = turn.on(Incoming::Backend(event));
    }
    json!({
        "question": setting.question, "opener": setting.opener, "surface": format!("{:?}", setting.surface),
        "tone": setting.tone.as_str_name(), "heard": setting.heard, "seed": setting.seed,
        "directive": directive(&frames), "reply": reply(&setting, &frames),
        "backend": events, "frames": frames.iter().map(frame_json).collect::<Vec<_>>(),
    })
}

/// Replays a transcript through the continuator's machine; returns the frames as JSON and the reply text that an edge makes of them.
///
/// # Panics
/// When the transcript is malformed.
pub fn replay(transcript: &Value) -> (Vec<Value>, String) {
    let text = |key: &str| transcript[key].as_str().expect("a text").to_owned();
    let setting = Setting {
        question: text("question"),
        opener: text("opener"),
        surface: if text("surface") == "Revisable" {
            Surface::Revisable
        } else {
            Surface::AppendOnly
        },
        tone: Tone::from_str_name(&text("tone")).expect("a tone"),
        heard: transcript["heard"].as_u64().expect("a number") as usize,
        seed: 0,
    };
    let mut turn = machine(&setting);
    let mut effects = begin(&mut turn, &setting);
    for event in transcript["backend"].as_array().expect("a list") {
        effects.extend(turn.on(Incoming::Backend(event_from(event))));
    }
    assert!(turn.ended(), "the turn ends");
    let frames: Vec<CloudFrame> = effects
        .into_iter()
        .filter_map(|e| if let Effect::Send(frame) = e { Some(frame) } else { None })
        .collect();
    (frames.iter().map(frame_json).collect(), reply(&setting, &frames))
}

fn correction(directive: &proto::Directive) -> Correction {
    directive.kind.as_ref().expect("a directive has a kind").into()
}

fn reply(setting: &Setting, frames: &[CloudFrame]) -> String {
    let mut log = ReplyLog::new(setting.surface);
    log.push_opener(&setting.opener);
    log.hear(setting.heard).expect("it was said");
    for frame in frames {
        match frame.body.as_ref().expect("a frame has a body") {
            Body::Chunk(c) => drop(
                log.apply_chunk(c.revision, c.offset as usize, &c.text)
                    .expect("chunks join"),
            ),
            Body::Directive(d) => drop(
                log.apply_directive(d.revision, correction(d))
                    .expect("it can be carried out"),
            ),
            other => panic!("{other:?}"),
        }
    }
    log.text().to_owned()
}

fn directive(frames: &[CloudFrame]) -> Value {
    let name = frames.iter().find_map(|frame| match frame.body.as_ref()? {
        Body::Directive(d) => Some(match correction(d) {
            Correction::Bridge => "bridge",
            Correction::Revise { .. } => "revise",
            Correction::Restart => "restart",
        }),
        _ => None,
    });
    name.map_or(Value::Null, Value::from)
}

fn frame_json(frame: &CloudFrame) -> Value {
    match frame.body.as_ref().expect("a frame has a body") {
        Body::Directive(d) => {
            let keep = if let Correction::Revise { keep } = correction(d) {
                Some(keep)
            } else {
                None
            };
            json!({ "directive": directive(std::slice::from_ref(frame)), "revision": d.revision, "keep": keep, "reason": d.reason().as_str_name() })
        }
        Body::Chunk(c) => json!({ "revision": c.revision, "offset": c.offset, "text": c.text }),
        other => panic!("{other:?}"),
    }
}

fn event_json(event: &Event) -> Value {
    match event {
        Event::Prefilled => json!({ "event": "prefilled" }),
        Event::Scored(scores) => {
            let scores: Vec<_> = scores
                .iter()
                .map(|s| json!([s.end, s.log_probability, s.rank]))
                .collect();
            json!({ "event": "scored", "scores": scores })
        }
        Event::Text(text, _) => json!({ "event": "text", "text": text }),
        Event::Done(finish, _) => json!({ "event": "done", "length": *finish == Finish::Length }),
        Event::Failed(failure) => panic!("{failure}"),
    }
}

fn event_from(value: &Value) -> Event {
    match value["event"].as_str().expect("a name") {
        "prefilled" => Event::Prefilled,
        "scored" => {
            let scores = value["scores"].as_array().expect("a list").iter().map(|s| TokenScore {
                end: s[0].as_u64().expect("a number") as usize,
                log_probability: s[1].as_f64().expect("a number") as f32,
                rank: s[2].as_u64().expect("a number") as u32,
            });
            Event::Scored(scores.collect())
        }
        "text" => Event::Text(value["text"].as_str().expect("a text").into(), Usage::default()),
        "done" => {
            let finish = if value["length"] == true {
                Finish::Length
            } else {
                Finish::Stop
            };
            Event::Done(finish, Usage::default())
        }
        other => panic!("{other}"),
    }
}

/// Asks a real backend for the scores of an opener; for tests.
///
/// # Panics
/// When it fails.
pub async fn scores(backend: &dyn Backend, question: &str, opener: &str) -> Vec<TokenScore> {
    let parameters = Parameters {
        max_tokens: 1,
        temperature: 0.0,
        top_p: 1.0,
        min_p: 0.0,
        seed: None,
        stop: Vec::new(),
    };
    let request = Request {
        history: Vec::new(),
        user_text: question.to_owned(),
        parameters,
    };
    let mut turn = backend.open(request).expect("there is room");
    turn.send(Input::Commit(opener.to_owned())).expect("there is room");
    loop {
        match std::future::poll_fn(|context| turn.poll_next(context))
            .await
            .expect("the engine answers")
        {
            Event::Scored(scores) => return scores,
            Event::Failed(failure) => panic!("{failure}"),
            _ => {}
        }
    }
}
