//! Makes `tests/golden/*.jsonl`: transcripts of corrected turns, recorded against the real continuator and its real model.
//!
//! `cargo run --release -p segue-tests --bin golden`. A transcript holds what was asked and said, the seed, and what the backend reported and
//! the continuator sent; `tests/tests/golden.rs` replays it through both turn machines.

use std::{fs, io::Write};

use segue_shared::{proto::Tone, reply_log::Surface};
use segue_tests::{
    golden::{Setting, record},
    metrics::Random,
    programs::root,
};

/// Transcripts of each directive.
const WANTED: usize = 24;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let read = |name: &str| fs::read_to_string(root().join("tests/data").join(name)).expect("the data is there");
    let written = read("openers.txt");
    let pairs: Vec<(&str, &str)> = written.lines().filter_map(|line| line.split_once('\t')).collect();
    let backend = segue_tests::golden::backend();
    let mut random = Random::new(1);
    for directive in ["bridge", "revise", "restart"] {
        let mut out = Vec::new();
        let mut found = 0;
        let mut seed = 0;
        while found < WANTED {
            seed += 1;
            assert!(seed < 2000, "no more {directive} transcripts can be made");
            let (question, opener) = pairs[random.below(pairs.len())];
            let other = pairs[random.below(pairs.len())].1;
            let words: Vec<&str> = opener.split(' ').collect();
            let opener = match directive {
                // The head is kept and what follows comes from another opener; or all of it does.
                "restart" => other.to_owned(),
                _ => {
                    let keep = words.len().saturating_sub(1 + random.below(2)).max(2).min(words.len());
                    let tail = other.split(' ').next_back().unwrap_or_default();
                    format!("{} {tail}", words[..keep].join(" "))
                }
            };
            let surface = if directive == "bridge" {
                Surface::AppendOnly
            } else {
                Surface::Revisable
            };
            let tone = [Tone::Neutral, Tone::Apologetic, Tone::Playful][random.below(3)];
            let heard = if directive == "bridge" { opener.len() } else { 0 };
            let setting = Setting {
                question: question.into(),
                opener,
                surface,
                tone,
                heard,
                seed,
            };
            let transcript = record(&*backend, setting).await;
            if transcript["directive"] == directive {
                found += 1;
                out.push(transcript);
            }
        }
        let path = root().join(format!("tests/golden/{directive}.jsonl"));
        let mut file = fs::File::create(&path).expect("the folder is there");
        for transcript in &out {
            writeln!(file, "{transcript}").expect("the file can be written");
        }
        println!("{} transcripts in {}", out.len(), path.display());
        for transcript in out.iter().take(6) {
            println!(
                "  {} | {} => {}",
                transcript["question"], transcript["opener"], transcript["reply"]
            );
        }
    }
}
