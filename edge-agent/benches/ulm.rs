//! The μLM engine alone: first word, four words, eight words, tokens per second and load time, per precision.
//!
//! `cargo bench -p edge-agent --bench ulm` (part of `make bench`). Words are timed as the engine completes them, after start-up.

use std::{
    ops::ControlFlow,
    path::Path,
    sync::mpsc,
    time::{Duration, Instant},
};

use edge_agent::ulm::{Engine, Generate, Options, Step, precision::Precision, sampler::Sampling};

const QUESTIONS: [&str; 8] = [
    "Who painted the Mona Lisa?",
    "How do I make a cup of tea with milk and sugar?",
    "set an alarm for seven tomorrow morning please",
    "what is the capital of australia",
    "why is the sky blue during the day and red in the evening",
    "tell me something interesting about the history of the bicycle",
    "how many people live in new york city",
    "can you remind me to buy bread on the way home",
];
const ROUNDS: usize = 5;

fn percentile(times: &mut [Duration], share: f64) -> f64 {
    times.sort_unstable();
    let at = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len()) - 1;
    times[at].as_secs_f64() * 1e3
}

fn main() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
    println!(
        "{:<10} {:>21} {:>21} {:>21} {:>9} {:>9}",
        "μLM (ms)", "first word p50/p95", "4 words p50/p95", "8 words p50/p95", "tokens/s", "load"
    );
    for precision in [Some(Precision::F32), Some(Precision::Bf16), Some(Precision::Int8), None] {
        let options = Options {
            folder: folder.clone(),
            precision,
            threads: None,
        };
        let engine = match Engine::load(options) {
            Ok(engine) => engine,
            Err(error) => {
                println!("the model cannot be loaded: {error}");
                std::process::exit(1);
            }
        };
        let (mut first, mut four, mut eight) = (Vec::new(), Vec::new(), Vec::new());
        let (mut tokens_made, mut spent) = (0, Duration::ZERO);
        for question in QUESTIONS.repeat(ROUNDS) {
            let (report, steps) = mpsc::channel();
            let started = Instant::now();
            let request = Generate {
                said: String::new(),
                question: question.into(),
                sampling: Sampling::default(),
                max_tokens: 24,
            };
            engine.generate(
                request,
                Box::new(move |step| {
                    let _ = report.send((started.elapsed(), step));
                    ControlFlow::Continue(())
                }),
            );
            let mut words = Vec::new();
            for (at, step) in steps {
                match step {
                    Step::Word(_) => words.push(at),
                    Step::End { tokens, .. } => {
                        tokens_made += tokens;
                        spent += at;
                    }
                }
            }
            first.extend(words.first());
            four.extend(words.get(3));
            eight.extend(words.get(7));
        }
        let name = precision.map_or(format!("auto={:?}", engine.info().precision), |p| format!("{p:?}"));
        let cell = |times: &mut Vec<Duration>| {
            if times.is_empty() {
                return "-".to_owned();
            }
            format!("{:.1} / {:.1}", percentile(times, 0.5), percentile(times, 0.95))
        };
        println!(
            "{name:<10} {:>21} {:>21} {:>21} {:>9.0} {:>9.0}",
            cell(&mut first),
            cell(&mut four),
            cell(&mut eight),
            tokens_made as f64 / spent.as_secs_f64(),
            engine.info().load_time.as_secs_f64() * 1e3
        );
    }
}
