use segue_shared::proto::{Bridge, Chunk, Directive, Restart, Revise, directive::Kind, edge_frame};

use super::*;
use crate::opener::Reason;

fn begin(surface: Surface) -> Turn {
    let start = StartTurn {
        turn_id: 1,
        user_text: "Why?".into(),
        ..StartTurn::default()
    };
    let (turn, effects) = Turn::begin(surface, start);
    assert!(matches!(&effects[..], [Effect::Send(f)] if matches!(f.body, Some(edge_frame::Body::StartTurn(_)))));
    turn
}

fn committed(surface: Surface) -> Turn {
    let mut turn = begin(surface);
    for word in ["It", " is", " Sydney"] {
        turn.on(Event::Word(word.into()));
    }
    turn.on(Event::OpenerDone(decision(3)));
    turn
}

fn decision(words: usize) -> Decision {
    Decision {
        words,
        reason: Reason::Length,
        mean_log_probability: None,
    }
}

fn directive(revision: u32, kind: Kind) -> Event {
    Event::Frame(Body::Directive(Directive {
        turn_id: 1,
        revision,
        kind: Some(kind),
        reason: 0,
    }))
}

fn chunk(revision: u32, offset: u32, text: &str) -> Event {
    Event::Frame(Body::Chunk(Chunk {
        turn_id: 1,
        revision,
        offset,
        text: text.into(),
    }))
}

fn end() -> Event {
    Event::Frame(Body::EndTurn(EndTurn {
        turn_id: 1,
        finish_reason: FinishReason::Stop.into(),
        ..EndTurn::default()
    }))
}

fn sent(effects: &[Effect]) -> Vec<edge_frame::Body> {
    effects
        .iter()
        .filter_map(|e| if let Effect::Send(f) = e { f.body.clone() } else { None })
        .collect()
}

#[test]
fn words_are_shown_and_sent_as_they_come() {
    let mut turn = begin(Surface::Revisable);
    let effects = turn.on(Event::Word("It".into()));
    assert_eq!(effects[0], Effect::Show(Show::OpenerWord("It".into())));
    let effects = turn.on(Event::Word(" is".into()));
    assert!(
        matches!(&sent(&effects)[..], [edge_frame::Body::OpenerDelta(d)] if (d.offset, d.text.as_str()) == (2, " is"))
    );
    let effects = turn.on(Event::OpenerDone(decision(2)));
    let [edge_frame::Body::CommitOpener(commit)] = &sent(&effects)[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(commit.opening, Some(Opening::CommittedPrefix("It is".into())));
    assert_eq!(turn.on(Event::Word(" late".into())), []);
}

#[test]
fn silence_is_committed_as_no_opener() {
    let mut turn = begin(Surface::Revisable);
    let effects = turn.on(Event::OpenerDone(decision(0)));
    assert!(
        matches!(&sent(&effects)[..], [edge_frame::Body::CommitOpener(c)] if matches!(c.opening, Some(Opening::NoOpener(_))))
    );
}

#[test]
fn the_three_directives() {
    for (kind, kept, text) in [
        (Kind::Bridge(Bridge { tone: 1 }), 12, "It is Sydney — or rather"),
        (Kind::Revise(Revise { keep_bytes: 5 }), 5, "It is — or rather"),
        (Kind::Restart(Restart {}), 0, " — or rather"),
    ] {
        let mut turn = committed(Surface::Revisable);
        let effects = turn.on(directive(1, kind));
        assert!(
            matches!(&effects[..], [Effect::Show(Show::Directive { keep, .. })] if *keep == kept),
            "{effects:?}"
        );
        turn.on(chunk(1, kept as u32, " — or rather"));
        assert_eq!(turn.log().text(), text);
        assert!(matches!(&turn.on(end())[..], [Effect::Over(Over::Done(_))]));
    }
}

#[test]
fn a_directive_that_comes_too_late_is_refused_until_the_bridge_comes() {
    let mut turn = committed(Surface::AppendOnly);
    turn.on(Event::Heard(12));
    let effects = turn.on(directive(1, Kind::Revise(Revise { keep_bytes: 5 })));
    assert!(
        matches!(&sent(&effects)[..], [edge_frame::Body::RefuseDirective(r)] if (r.revision, r.heard_bytes) == (1, 12))
    );
    // What belongs to the refused revision, its end included, is passed over.
    assert_eq!(turn.on(chunk(1, 5, " Canberra")), []);
    assert_eq!(turn.on(end()), []);
    turn.on(directive(2, Kind::Bridge(Bridge { tone: 1 })));
    turn.on(chunk(2, 12, " — or rather"));
    assert_eq!(turn.log().text(), "It is Sydney — or rather");
    assert!(matches!(&turn.on(end())[..], [Effect::Over(Over::Done(_))]));
}

#[test]
fn an_interruption_keeps_what_was_heard() {
    let mut turn = committed(Surface::AppendOnly);
    turn.on(Event::Heard(5));
    let effects = turn.on(Event::Cancel);
    assert!(matches!(&sent(&effects)[..], [edge_frame::Body::CancelTurn(c)] if c.heard_bytes == 5));
    assert_eq!(turn.log().heard_text(), "It is");
    assert_eq!(turn.on(chunk(0, 12, " x")), []);
}

#[test]
fn an_answer_before_the_commit_breaks_the_protocol() {
    let mut turn = begin(Surface::Revisable);
    assert!(matches!(
        &turn.on(chunk(0, 0, "x"))[..],
        [Effect::Over(Over::Broken(_))]
    ));
}
