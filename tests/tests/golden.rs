//! Recorded corrections (`tests/golden/`), replayed through the continuator's turn machine and an edge's reply log.

use segue_shared::words;
use segue_tests::{golden::replay, programs::root};
use serde_json::Value;

fn transcripts(directive: &str) -> Vec<Value> {
    let path = root().join(format!("tests/golden/{directive}.jsonl"));
    std::fs::read_to_string(path)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn recorded_corrections_are_made_again() {
    for directive in ["bridge", "revise", "restart"] {
        let transcripts = transcripts(directive);
        assert!(transcripts.len() >= 20, "{directive}");
        for transcript in &transcripts {
            let (frames, reply) = replay(transcript);
            assert_eq!(
                &Value::from(frames.clone()),
                &transcript["frames"],
                "{}",
                transcript["question"]
            );
            assert_eq!(reply, transcript["reply"].as_str().unwrap());
            assert_eq!(frames[0]["directive"], directive);
            let opener = transcript["opener"].as_str().unwrap();
            match directive {
                "bridge" => {
                    let bridge = frames[1]["text"].as_str().unwrap();
                    assert!(reply.starts_with(opener) && words::count(bridge) <= 12, "{reply}");
                }
                "revise" => assert!(
                    reply.starts_with(&opener[..frames[0]["keep"].as_u64().unwrap() as usize]),
                    "{reply}"
                ),
                _ => assert_eq!(frames.get(1).map_or(0, |f| f["offset"].as_u64().unwrap()), 0),
            }
            assert!(!reply.contains("  "), "{reply}");
        }
    }
}
