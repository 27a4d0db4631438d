use proptest::prelude::*;
use segue_shared::{
    proto::{cloud_frame::Body, directive::Kind},
    reply_log::ReplyLog,
};

use super::*;
use crate::backend::{Failure, Finish, TokenScore};

#[path = "turn_moved_tests.rs"]
mod moved;

fn turn(surface: Surface) -> Turn {
    Turn::new(1, surface, Judgement::default(), proto::Tone::Neutral, Vec::new())
}

/// Scores in which the words of `opener` from `bad` on are very unlikely.
fn scores(opener: &str, bad: usize) -> Vec<TokenScore> {
    let words = segue_shared::words::ranges(opener);
    let score = |(n, word): (usize, &std::ops::Range<usize>)| TokenScore {
        end: word.end,
        log_probability: if n >= bad { -20.0 } else { -0.5 },
        rank: 0,
    };
    words.iter().enumerate().map(score).collect()
}

fn commit(turn: &mut Turn, prefix: &str) -> Vec<Effect> {
    turn.on(Incoming::Commit {
        prefix: prefix.into(),
        resumed: false,
    })
}

fn scored(turn: &mut Turn, prefix: &str, bad: usize) -> Vec<Effect> {
    turn.on(Incoming::Backend(Event::Scored(scores(prefix, bad))))
}

fn frames(effects: &[Effect]) -> Vec<Body> {
    effects
        .iter()
        .filter_map(|e| {
            if let Effect::Send(frame) = e {
                frame.body.clone()
            } else {
                None
            }
        })
        .collect()
}

fn inputs(effects: &[Effect]) -> Vec<Input> {
    effects
        .iter()
        .filter_map(|e| {
            if let Effect::Backend(i) | Effect::Reopen(i) = e {
                Some(i.clone())
            } else {
                None
            }
        })
        .collect()
}

const OPENER: &str = "The capital of Australia is Sydney and";

#[test]
fn an_accepted_opener_gets_no_directive() {
    let mut turn = turn(Surface::Revisable);
    assert_eq!(
        inputs(&turn.on(Incoming::Delta {
            offset: 0,
            text: "The sky".into()
        })),
        [Input::Opener("The sky".into())]
    );
    assert_eq!(
        inputs(&commit(&mut turn, "The sky is")),
        [Input::Commit("The sky is".into())]
    );
    let effects = scored(&mut turn, "The sky is", 99);
    assert_eq!(
        (frames(&effects).len(), inputs(&effects)),
        (0, vec![Input::Generate("The sky is".into())])
    );
    let said = frames(&turn.on(Incoming::Backend(Event::Text(" blue".into(), Usage::default()))));
    assert!(matches!(&said[..], [Body::Chunk(c)] if (c.revision, c.offset, c.text.as_str()) == (0, 10, " blue")));
    let end = turn.on(Incoming::Backend(Event::Done(Finish::Stop, Usage::default())));
    assert!(matches!(end[..], [Effect::End(Finish::Stop, _)]) && turn.ended() && !turn.may_be_refused());
}

#[test]
fn a_wrong_word_is_revised_on_a_screen() {
    let mut turn = turn(Surface::Revisable);
    commit(&mut turn, OPENER);
    let effects = scored(&mut turn, OPENER, 5);
    let [Body::Directive(directive)] = &frames(&effects)[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(directive.kind, Some(Kind::Revise(proto::Revise { keep_bytes: 27 })));
    assert_eq!(
        inputs(&effects),
        [Input::Generate("The capital of Australia is".into())]
    );
}

#[test]
fn an_opener_without_a_good_head_is_restarted() {
    let mut turn = turn(Surface::Revisable);
    commit(&mut turn, OPENER);
    let effects = scored(&mut turn, OPENER, 0);
    assert!(matches!(&frames(&effects)[..], [Body::Directive(d)] if d.kind == Some(Kind::Restart(proto::Restart {}))));
    assert_eq!(inputs(&effects), [Input::Generate(String::new())]);
    let said = frames(&turn.on(Incoming::Backend(Event::Text(" Canberra".into(), Usage::default()))));
    assert!(matches!(&said[..], [Body::Chunk(c)] if (c.revision, c.offset, c.text.as_str()) == (1, 0, "Canberra")));
}

#[test]
fn what_was_heard_is_bridged() {
    let mut turn = turn(Surface::AppendOnly);
    turn.on(Incoming::Heard(30));
    commit(&mut turn, OPENER);
    let effects = scored(&mut turn, OPENER, 5);
    let [Body::Directive(directive), Body::Chunk(bridge)] = &frames(&effects)[..] else {
        panic!("{effects:?}")
    };
    assert!(matches!(directive.kind, Some(Kind::Bridge(_))));
    assert_eq!((bridge.revision, bridge.offset as usize), (1, OPENER.len()));
    assert_eq!(inputs(&effects), [Input::Generate(String::new())]);
}

#[test]
fn a_refused_directive_falls_back_to_a_bridge_even_after_the_end() {
    for ended in [false, true] {
        let mut turn = turn(Surface::AppendOnly);
        commit(&mut turn, OPENER);
        assert!(matches!(
            &frames(&scored(&mut turn, OPENER, 5))[..],
            [Body::Directive(_)]
        ));
        turn.on(Incoming::Backend(Event::Text(" Canberra".into(), Usage::default())));
        if ended {
            turn.on(Incoming::Backend(Event::Done(Finish::Stop, Usage::default())));
            assert!(turn.may_be_refused());
        }
        let effects = turn.on(Incoming::Refused(1, 35));
        let [Body::Directive(directive), Body::Chunk(bridge)] = &frames(&effects)[..] else {
            panic!("{effects:?}")
        };
        assert!(matches!(directive.kind, Some(Kind::Bridge(_))) && directive.revision == 2);
        assert_eq!(directive.reason(), DirectiveReason::Refused);
        assert_eq!(bridge.offset as usize, OPENER.len());
        assert_eq!(effects.iter().any(|e| matches!(e, Effect::Reopen(_))), ended);
        // The same refusal again is old news.
        assert_eq!(turn.on(Incoming::Refused(1, 35)), []);
    }
}

#[test]
fn nobody_judges_a_resumed_or_wordless_opener() {
    let mut resumed = turn(Surface::Revisable);
    resumed.on(Incoming::Commit {
        prefix: OPENER.into(),
        resumed: true,
    });
    assert!(frames(&scored(&mut resumed, OPENER, 0)).is_empty());
    for opener in ["", "...", "?!"] {
        let mut turn = turn(Surface::Revisable);
        commit(&mut turn, opener);
        let effects = turn.on(Incoming::Backend(Event::Scored(Vec::new())));
        assert_eq!(
            (frames(&effects).len(), inputs(&effects)),
            (0, vec![Input::Generate(opener.into())])
        );
    }
}

#[test]
fn broken_frames_fail_the_turn_once() {
    let fails = |effects: &[Effect]| effects.iter().any(|e| matches!(e, Effect::Fail { .. }));
    let mut gap = turn(Surface::Revisable);
    assert!(
        fails(&gap.on(Incoming::Delta {
            offset: 3,
            text: "x".into()
        })) && gap.ended()
    );
    let mut long = turn(Surface::Revisable);
    assert!(fails(&commit(&mut long, &"x ".repeat(OPENER_BYTES))));
    let mut growing = turn(Surface::Revisable);
    growing.on(Incoming::Delta {
        offset: 0,
        text: "x".repeat(OPENER_BYTES),
    });
    assert!(fails(&growing.on(Incoming::Delta {
        offset: OPENER_BYTES,
        text: "x".into()
    })));
    let mut twice = turn(Surface::Revisable);
    commit(&mut twice, "a b");
    assert!(fails(&commit(&mut twice, "a b")));
    assert_eq!(
        twice.on(Incoming::Backend(Event::Failed(Failure::Overloaded {
            retry_after: None
        }))),
        []
    );
}

#[derive(Clone, Debug)]
enum Step {
    Heard(usize),
    Deliver,
    Backend(u8, String),
    Scored(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..60usize).prop_map(Step::Heard),
        Just(Step::Deliver),
        (0..6u8, "[a-z ]{0,5}").prop_map(|(kind, text)| Step::Backend(kind, text)),
        (0..8usize).prop_map(Step::Scored),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Frames that are delayed while words are heard: nothing heard is taken back, every chunk joins, and the bridge always comes.
    #[test]
    fn the_edge_and_the_continuator_agree(append_only: bool, steps in prop::collection::vec(step(), 0..40)) {
        let surface = if append_only { Surface::AppendOnly } else { Surface::Revisable };
        let (mut turn, mut log) = (turn(surface), ReplyLog::new(surface));
        log.push_opener(OPENER);
        let mut wire: std::collections::VecDeque<Body> = frames(&commit(&mut turn, OPENER)).into();
        let deliver = |turn: &mut Turn, log: &mut ReplyLog, wire: &mut std::collections::VecDeque<Body>| {
            let heard = log.heard_text().to_owned();
            match wire.pop_front() {
                Some(Body::Chunk(c)) => { log.apply_chunk(c.revision, c.offset as usize, &c.text).map_err(|e| e.to_string())?; }
                Some(Body::Directive(d)) => {
                    match log.apply_directive(d.revision, d.kind.as_ref().unwrap().into()) {
                        Ok(_) => {}
                        Err(segue_shared::reply_log::DirectiveError::AlreadyHeard { heard, .. }) => {
                            wire.extend(frames(&turn.on(Incoming::Refused(d.revision, heard))));
                        }
                        Err(e) => return Err(e.to_string()),
                    }
                }
                _ => {}
            }
            if surface == Surface::AppendOnly && !log.text().starts_with(&heard) {
                return Err(format!("{heard:?} was taken back: {:?}", log.text()));
            }
            Ok::<(), String>(())
        };
        for step in steps {
            match step {
                Step::Heard(bytes) => {
                    let bytes = bytes.min(log.text().len());
                    if log.hear(bytes).is_ok() { wire.extend(frames(&turn.on(Incoming::Heard(log.heard())))); }
                }
                Step::Deliver => deliver(&mut turn, &mut log, &mut wire).map_err(TestCaseError::fail)?,
                Step::Backend(0, _) => wire.extend(frames(&turn.on(Incoming::Backend(Event::Done(Finish::Stop, Usage::default()))))),
                Step::Backend(_, text) => wire.extend(frames(&turn.on(Incoming::Backend(Event::Text(text, Usage::default()))))),
                Step::Scored(bad) => wire.extend(frames(&scored(&mut turn, OPENER, bad))),
            }
        }
        while !wire.is_empty() {
            deliver(&mut turn, &mut log, &mut wire).map_err(TestCaseError::fail)?;
        }
    }
}

fn judging(surface: Surface) -> Turn {
    let judgement = Judgement {
        verifier: verify::Kind::Judge,
        ..Judgement::default()
    };
    Turn::new(1, surface, judgement, proto::Tone::Neutral, Vec::new())
}

fn text(turn: &mut Turn, text: &str) -> Vec<Effect> {
    turn.on(Incoming::Backend(Event::Text(text.into(), Usage::default())))
}

#[test]
fn a_judge_says_the_verdict_and_the_text_in_one_reply() {
    for (control, kept, kind) in [
        ("[accept]", OPENER, None),
        (
            "[revise 5]",
            "The capital of Australia is",
            Some(Kind::Revise(proto::Revise { keep_bytes: 27 })),
        ),
        ("[restart]", "", Some(Kind::Restart(proto::Restart {}))),
    ] {
        let mut turn = judging(Surface::Revisable);
        assert_eq!(inputs(&commit(&mut turn, OPENER)), [Input::Judge(OPENER.into())]);
        let mut effects = text(&mut turn, &control[..4]);
        assert_eq!(effects, []);
        effects.extend(text(&mut turn, &format!("{}\n Canberra", &control[4..])));
        effects.extend(text(&mut turn, "."));
        assert_eq!(inputs(&effects), [], "no second request");
        let mut log = ReplyLog::new(Surface::Revisable);
        log.push_opener(OPENER);
        for frame in frames(&effects) {
            match frame {
                Body::Directive(d) => {
                    assert_eq!((d.kind, d.reason), (kind, DirectiveReason::Judged.into()));
                    log.apply_directive(d.revision, d.kind.as_ref().unwrap().into())
                        .unwrap();
                }
                Body::Chunk(c) => drop(log.apply_chunk(c.revision, c.offset as usize, &c.text).unwrap()),
                other => panic!("{other:?}"),
            }
        }
        let joint = if kept.is_empty() { "Canberra." } else { " Canberra." };
        assert_eq!(log.text(), format!("{kept}{joint}"));
    }
}

#[test]
fn a_judge_whose_wish_is_not_allowed_is_asked_again() {
    let mut turn = judging(Surface::AppendOnly);
    turn.on(Incoming::Heard(30));
    commit(&mut turn, OPENER);
    let effects = text(&mut turn, "[restart]\nThe capital is Canberra.");
    let [Body::Directive(directive), Body::Chunk(_)] = &frames(&effects)[..] else {
        panic!("{effects:?}")
    };
    assert!(matches!(directive.kind, Some(Kind::Bridge(_))));
    assert_eq!(inputs(&effects), [Input::Generate(String::new())]);
}

#[test]
fn a_judge_that_says_nothing_or_garbage_loses_no_turn() {
    for (reply, said) in [
        ("", ""),
        ("[banana]\n Canberra", " Canberra"),
        (" which is wrong", " which is wrong"),
        ("accept", ""),
    ] {
        let mut turn = judging(Surface::Revisable);
        commit(&mut turn, OPENER);
        let mut effects = text(&mut turn, reply);
        effects.extend(turn.on(Incoming::Backend(Event::Done(Finish::Stop, Usage::default()))));
        let chunks: String = frames(&effects)
            .into_iter()
            .filter_map(|f| if let Body::Chunk(c) = f { Some(c.text) } else { None })
            .collect();
        assert_eq!(chunks, said, "{reply:?}");
        assert!(matches!(effects.last(), Some(Effect::End(..))), "{effects:?}");
        assert_eq!(inputs(&effects), []);
    }
}

#[test]
fn events_of_a_replaced_generation_are_not_taken_for_the_new_one() {
    let of = |generation| Usage {
        generation,
        ..Usage::default()
    };
    let mut turn = turn(Surface::AppendOnly);
    commit(&mut turn, OPENER);
    scored(&mut turn, OPENER, 5);
    turn.on(Incoming::Refused(1, 35));
    // Text of the refused revision that was on its way is dropped; if that generation had ended already, the answer is asked for anew.
    assert_eq!(turn.on(Incoming::Backend(Event::Text(" Canberra".into(), of(0)))), []);
    assert_eq!(
        turn.on(Incoming::Backend(Event::Done(Finish::Stop, of(0)))),
        [Effect::Reopen(Input::Generate(String::new()))]
    );
    let said = frames(&turn.on(Incoming::Backend(Event::Text("Canberra.".into(), of(0)))));
    assert!(
        matches!(&said[..], [Body::Chunk(c)] if (c.revision, c.text.as_str()) == (2, " Canberra.")),
        "{said:?}"
    );
    assert!(matches!(
        turn.on(Incoming::Backend(Event::Done(Finish::Stop, of(0)))).last(),
        Some(Effect::End(..))
    ));
}

#[test]
fn a_judge_that_ends_with_its_verdict_is_asked_again_elsewhere() {
    let mut turn = judging(Surface::AppendOnly);
    turn.on(Incoming::Heard(30));
    commit(&mut turn, OPENER);
    assert_eq!(text(&mut turn, "restart"), []);
    let effects = turn.on(Incoming::Backend(Event::Done(Finish::Stop, Usage::default())));
    assert!(
        matches!(effects.last(), Some(Effect::Reopen(Input::Generate(_)))),
        "{effects:?}"
    );
    assert!(!turn.ended());
}
