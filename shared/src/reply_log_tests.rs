use proptest::prelude::*;

use super::*;

fn log(text: &str, surface: Surface) -> ReplyLog {
    let mut log = ReplyLog::new(surface);
    log.push_opener(text);
    log
}

#[test]
fn only_the_next_chunk_is_appended() {
    let mut log = log("The sky", Surface::Revisable);
    assert_eq!(log.apply_chunk(0, 8, "!"), Err(ChunkError::Gap { offset: 8, len: 7 }));
    assert_eq!(
        log.apply_chunk(0, 6, "y"),
        Err(ChunkError::Repeated { offset: 6, len: 7 })
    );
    assert_eq!(
        log.apply_chunk(1, 7, " is"),
        Err(ChunkError::Future {
            revision: 1,
            current: 0
        })
    );
    assert_eq!(log.apply_chunk(0, 7, " is blue."), Ok(Applied::Appended));
    assert_eq!(log.text(), "The sky is blue.");
}

#[test]
fn older_epochs_are_dropped() {
    let mut log = log("It is Sydney", Surface::Revisable);
    assert_eq!(
        log.apply_directive(1, Correction::Revise { keep: 5 }),
        Ok(" Sydney".into())
    );
    assert_eq!(log.apply_chunk(0, 12, " and"), Ok(Applied::Stale));
    assert_eq!(log.apply_chunk(1, 5, " Canberra"), Ok(Applied::Appended));
    assert_eq!(log.text(), "It is Canberra");
}

#[test]
fn what_was_heard_on_an_append_only_surface_stays() {
    let mut log = log("It is Sydney", Surface::AppendOnly);
    log.hear(8).unwrap();
    assert_eq!(
        log.apply_directive(1, Correction::Revise { keep: 5 }),
        Err(DirectiveError::AlreadyHeard { keep: 5, heard: 8 })
    );
    assert_eq!(log.text(), "It is Sydney");
    // What was sent under the refused directive never reaches the text.
    assert_eq!(log.apply_chunk(1, 5, " Canberra"), Ok(Applied::Stale));
    assert_eq!(log.apply_directive(2, Correction::Bridge), Ok(String::new()));
    assert_eq!(log.apply_chunk(2, 12, ", or rather"), Ok(Applied::Appended));
}

#[test]
fn directives_cut_between_characters_and_come_in_order() {
    let mut log = log("né", Surface::Revisable);
    assert_eq!(
        log.apply_directive(1, Correction::Revise { keep: 2 }),
        Err(DirectiveError::NoBoundary { keep: 2, len: 3 })
    );
    assert_eq!(
        log.apply_directive(2, Correction::Restart),
        Err(DirectiveError::Skipped {
            revision: 2,
            current: 0
        })
    );
    assert_eq!(
        log.apply_directive(0, Correction::Restart),
        Err(DirectiveError::Repeated {
            revision: 0,
            current: 0
        })
    );
    assert_eq!(log.hear(2), Err(HeardError { heard: 2, len: 3 }));
    assert_eq!(log.hear(9), Err(HeardError { heard: 9, len: 3 }));
}

#[derive(Clone, Debug)]
enum Op {
    Chunk(u32, usize, String),
    Directive(u32, Correction),
    Hear(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..4u32, 0..20usize, "[aé✓ ]{0,4}").prop_map(|(r, o, t)| Op::Chunk(r, o, t)),
        1 => (0..4u32, prop_oneof![
            Just(Correction::Bridge),
            (0..20usize).prop_map(|keep| Correction::Revise { keep }),
            Just(Correction::Restart)
        ]).prop_map(|(r, c)| Op::Directive(r, c)),
        1 => (0..20usize).prop_map(Op::Hear),
    ]
}

proptest! {
    /// Whatever arrives: the log never panics, heard text on an append-only surface never changes, revisions never fall.
    #[test]
    fn heard_text_is_never_taken_back(opener in "[aé ]{0,8}", ops in prop::collection::vec(op(), 0..40)) {
        let mut log = log(&opener, Surface::AppendOnly);
        for op in ops {
            let (heard, revision) = (log.heard_text().to_owned(), log.revision());
            match op {
                Op::Chunk(r, o, t) => { let _ = log.apply_chunk(r, o, &t); }
                Op::Directive(r, c) => { let _ = log.apply_directive(r, c); }
                Op::Hear(n) => { let _ = log.hear(n); }
            }
            prop_assert!(log.text().starts_with(&heard));
            prop_assert!(log.heard() >= heard.len());
            prop_assert!(log.revision() >= revision);
        }
    }

    /// A stream of chunks in which each is repeated and some are delayed yields the text exactly once, when what is refused is
    /// sent again.
    #[test]
    fn text_is_delivered_exactly_once(pieces in prop::collection::vec("[a-zé✓ ]{1,5}", 1..20), order in any::<u64>()) {
        let mut log = ReplyLog::new(Surface::Revisable);
        let mut offset = 0;
        let mut waiting: Vec<(usize, String)> = Vec::new();
        for piece in &pieces {
            waiting.push((offset, piece.clone()));
            waiting.push((offset, piece.clone()));
            offset += piece.len();
        }
        let mut state = order;
        while log.text().len() < offset {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (at, text) = &waiting[(state >> 33) as usize % waiting.len()];
            let _ = log.apply_chunk(0, *at, text);
        }
        prop_assert_eq!(log.text(), pieces.concat());
    }
}
