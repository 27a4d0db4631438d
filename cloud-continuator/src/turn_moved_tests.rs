//! Turns that go on at another backend.

use super::*;

fn text_with(turn: &mut Turn, text: &str, usage: Usage) -> Vec<Effect> {
    turn.on(Incoming::Backend(Event::Text(text.into(), usage)))
}

#[test]
fn a_turn_that_moves_goes_on_from_what_was_said() {
    let mut turn = turn(Surface::AppendOnly);
    commit(&mut turn, "The sky is");
    // Nothing was judged yet: the next backend is asked the same.
    assert_eq!(inputs(&turn.on(Incoming::Moved)), [Input::Commit("The sky is".into())]);
    scored(&mut turn, "The sky is", 99);
    assert_eq!(
        inputs(&turn.on(Incoming::Moved)),
        [Input::Generate("The sky is".into())]
    );
    let usage = |generated| Usage {
        generated,
        prompt: 9,
        ..Usage::default()
    };
    text_with(&mut turn, " blue and", usage(2));
    text_with(&mut turn, " wi", usage(3));
    assert_eq!(
        inputs(&turn.on(Incoming::Moved)),
        [Input::Resume("The sky is blue and wi".into())]
    );
    // It may move again before anything was said.
    assert_eq!(
        inputs(&turn.on(Incoming::Moved)),
        [Input::Resume("The sky is blue and wi".into())]
    );
    let chunks = frames(&text_with(&mut turn, "de", usage(1)));
    let [Body::Chunk(chunk)] = &chunks[..] else {
        panic!("{chunks:?}")
    };
    assert_eq!(
        (chunk.offset, chunk.text.as_str()),
        (22, "de"),
        "the joint is inside a word"
    );
    let end = turn.on(Incoming::Backend(Event::Done(Finish::Stop, usage(1))));
    let [.., Effect::End(_, total)] = &end[..] else {
        panic!("{end:?}")
    };
    assert_eq!(
        (total.generated, total.wasted, total.prompt),
        (4, 0, 9),
        "all that was said was generated once"
    );
    assert_eq!(turn.on(Incoming::Moved), []);
}

#[test]
fn what_a_backend_generated_and_nobody_saw_is_wasted() {
    let mut turn = turn(Surface::Revisable);
    turn.served_by(false);
    commit(&mut turn, "The sky is");
    text_with(
        &mut turn,
        "[acc",
        Usage {
            generated: 2,
            ..Usage::default()
        },
    );
    assert_eq!(
        inputs(&turn.on(Incoming::Moved)),
        [Input::Judge("The sky is".into())],
        "judged anew"
    );
    text_with(
        &mut turn,
        "[accept]\n blue",
        Usage {
            generated: 5,
            ..Usage::default()
        },
    );
    let end = turn.on(Incoming::Backend(Event::Done(
        Finish::Stop,
        Usage {
            generated: 5,
            ..Usage::default()
        },
    )));
    let [.., Effect::End(_, total)] = &end[..] else {
        panic!("{end:?}")
    };
    assert_eq!((total.generated, total.wasted), (5, 2));
}

#[test]
fn who_judges_depends_on_who_serves() {
    let mut turn = turn(Surface::Revisable);
    turn.served_by(true);
    assert_eq!(
        inputs(&commit(&mut turn, "The sky is")),
        [Input::Commit("The sky is".into())]
    );
    turn.served_by(false);
    assert_eq!(inputs(&turn.on(Incoming::Moved)), [Input::Judge("The sky is".into())]);
}

#[test]
fn whoever_overtakes_answers_the_question_that_was_asked() {
    let mut turn = turn(Surface::Revisable);
    turn.served_by(false);
    commit(&mut turn, "The sky is");
    turn.on(Incoming::Moved); // the other one has been asked already
    turn.served_by(true);
    let usage = Usage {
        generated: 3,
        ..Usage::default()
    };
    let said = frames(&text_with(&mut turn, "[accept]\n blue", usage));
    assert!(
        matches!(&said[..], [Body::Chunk(chunk)] if chunk.text == " blue"),
        "{said:?}"
    );
}
