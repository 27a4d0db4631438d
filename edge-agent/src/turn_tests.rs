use segue_shared::proto::{Bridge, Chunk, Directive, Restart, Revise, directive::Kind, edge_frame};

use super::*;
use crate::opener::Reason;

fn begin(surface: Surface) -> Turn {
    let start = StartTurn {
        turn_id: 1,
        user_text: "Why?".into(),
        ..StartTurn::default()
    };
    let mut turn = Turn::new(surface, start);
    let effects = turn.on(Event::Connected(1));
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
        generated_tokens: 7,
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

fn failed(retryable: bool) -> Event {
    Event::Frame(Body::TurnFailed(TurnFailed {
        turn_id: 1,
        error: proto::TurnError::Backend.into(),
        message: "no".into(),
        retryable,
        retry_after: None,
    }))
}

fn give_up(alone: bool) -> Event {
    Event::GiveUp {
        why: "nobody".into(),
        alone,
    }
}

fn commit_of(effects: &[Effect]) -> CommitOpener {
    let commit = sent(effects).into_iter().find_map(|body| match body {
        edge_frame::Body::CommitOpener(commit) => Some(commit),
        _ => None,
    });
    commit.expect("the reply is committed")
}

#[test]
fn a_cut_off_reply_goes_on_from_its_text() {
    let mut turn = committed(Surface::AppendOnly);
    turn.on(chunk(0, 12, " is n"));
    turn.on(Event::Heard(5));
    assert_eq!(
        turn.on(Event::Lost("cut".into())),
        [Effect::Show(Show::Lost("cut".into()))]
    );
    // Nothing is sent, and nothing of the old stream taken, while there is no continuator.
    assert_eq!(turn.on(Event::Heard(12)), []);
    assert_eq!(turn.on(chunk(0, 17, "ot")), []);
    let effects = turn.on(Event::Connected(1));
    let commit = commit_of(&effects);
    assert!(commit.resumed);
    assert_eq!(
        commit.opening,
        Some(Opening::CommittedPrefix("It is Sydney is n".into()))
    );
    assert!(
        matches!(&sent(&effects)[..], [edge_frame::Body::StartTurn(s), edge_frame::Body::Heard(h), _]
            if s.generated_tokens == 7 && h.bytes == 12)
    );
    turn.on(chunk(0, 17, "ot it"));
    assert_eq!(turn.log().text(), "It is Sydney is not it");
    assert!(matches!(&turn.on(end())[..], [Effect::Over(Over::Done(_))]));
    assert_eq!(turn.resumed(), 1);
}

#[test]
fn an_opener_that_nobody_has_judged_is_judged_after_a_reconnection() {
    for meanwhile in [None, Some(directive(1, Kind::Bridge(Bridge { tone: 1 })))] {
        let mut turn = committed(Surface::Revisable);
        turn.on(meanwhile.unwrap_or(Event::Heard(0)));
        turn.on(Event::Lost("cut".into()));
        assert!(!commit_of(&turn.on(Event::Connected(2))).resumed);
        // Epochs are counted anew.
        turn.on(directive(1, Kind::Revise(Revise { keep_bytes: 5 })));
        turn.on(chunk(1, 5, " Canberra"));
        assert_eq!(turn.log().text(), "It is Canberra");
        turn.on(Event::Lost("cut".into()));
        assert!(commit_of(&turn.on(Event::Connected(3))).resumed);
    }
}

#[test]
fn an_opener_that_is_being_said_is_told_again() {
    let mut turn = begin(Surface::Revisable);
    turn.on(Event::Word("It".into()));
    turn.on(Event::Lost("cut".into()));
    turn.on(Event::Word(" is".into()));
    let effects = turn.on(Event::Connected(1));
    assert!(
        matches!(&sent(&effects)[..], [_, edge_frame::Body::OpenerDelta(d)] if (d.offset, d.text.as_str()) == (0, "It is"))
    );
    assert!(
        matches!(&sent(&turn.on(Event::Word(" red".into())))[..], [edge_frame::Body::OpenerDelta(d)] if d.offset == 5)
    );
}

#[test]
fn what_may_help_is_tried_again_and_what_may_not_ends_the_turn() {
    let mut turn = committed(Surface::Revisable);
    assert!(matches!(
        &turn.on(failed(true))[..],
        [Effect::Show(Show::Lost(_)), Effect::Retry(None)]
    ));
    assert_eq!(turn.on(chunk(0, 12, " x")), []);
    let effects = turn.on(Event::Connected(2));
    assert_eq!(commit_of(&effects).turn_id, 2);
    assert!(matches!(
        &turn.on(failed(false))[..],
        [Effect::Over(Over::Failed { retryable: false, .. })]
    ));
}

#[test]
fn alone_the_ulm_finishes_what_nobody_else_has_touched() {
    let mut turn = committed(Surface::Revisable);
    turn.on(Event::Lost("cut".into()));
    assert_eq!(
        turn.on(give_up(true)),
        [Effect::Show(Show::Alone("nobody".into())), Effect::GoOnAlone]
    );
    assert_eq!(turn.on(Event::Connected(2)), []);
    turn.on(Event::Word(" maybe.".into()));
    assert_eq!(turn.log().text(), "It is Sydney maybe.");
    assert_eq!(turn.on(Event::AloneDone), [Effect::Over(Over::Alone("nobody".into()))]);

    let mut turn = committed(Surface::Revisable);
    turn.on(chunk(0, 12, " not"));
    turn.on(Event::Lost("cut".into()));
    assert_eq!(turn.on(give_up(true)), [Effect::Over(Over::Lost("nobody".into()))]);
    assert_eq!(turn.log().text(), "It is Sydney not");

    let mut turn = committed(Surface::Revisable);
    turn.on(failed(true));
    assert!(matches!(
        &turn.on(give_up(false))[..],
        [Effect::Over(Over::Failed { retryable: true, .. })]
    ));
}
