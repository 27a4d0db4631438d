//! A short run of `make fuzz`, and all that it has found before.

use segue_tests::fuzz::{run, targets};

#[test]
fn no_broken_input_makes_a_decoder_panic() {
    let corpus = std::fs::read_dir(segue_tests::programs::root().join("tests/corpus"));
    assert!(
        corpus.is_ok_and(|found| found.count() > 0),
        "what was found before is there"
    );
    let mut shares = 0;
    for mut target in targets() {
        shares += target.share;
        let result = run(&mut target, 2_000, 7);
        assert_eq!(result.panics, 0, "{}: see tests/corpus/{}", target.name, target.name);
    }
    assert_eq!(shares, 1000, "the targets' shares make a whole");
}
