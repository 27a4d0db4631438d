//! `make eval`: how well the likelihood verifier finds wrong openers, and how good the μLM's are. No network.
//!
//! Detection: for every question of `tests/data/questions.txt` the large model's own opener (its first eight words, greedy) is the good one;
//! `tests/data/openers.txt` has some more that were written by hand. Wrong ones are made from it by a seeded script: *moved* (another question's opener), *swapped* (one content word replaced by one of another
//! opener) and *negated* ("not" or "never" put behind the first verb that takes it).
//!
//! Opener quality: the μLM's openers through both programs, judged by the continuator.

use std::{fs, path::PathBuf, sync::Arc};

use clap::Parser;
use cloud_continuator::{
    backend::{Backend, Event, Input, Parameters, Request, TokenScore, embedded},
    policy,
    verify::{self, Thresholds, Verdict},
};
use segue_shared::{
    reply_log::{Correction, Surface},
    words,
};
use segue_tests::{
    golden::scores,
    metrics::{Random, auc, share},
    programs::{Continuator, ask, root},
};
use serde_json::{Value, json};

/// Evaluates the verifier and the openers.
#[derive(Parser)]
struct Options {
    /// Large model to evaluate with.
    #[arg(long, default_value = cloud_continuator::config::DEFAULT_MODEL)]
    model: PathBuf,
    /// Seed of the script that makes wrong openers.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print what other thresholds would do, for whoever has to choose them.
    #[arg(long)]
    grid: bool,
    /// Leave out the part that runs both programs.
    #[arg(long)]
    detection_only: bool,
    /// Where the figures go, as JSON.
    #[arg(long, default_value = "target/eval.json")]
    out: PathBuf,
}

/// An opener with its scores.
struct Case {
    kind: &'static str,
    text: String,
    scores: Vec<TokenScore>,
    /// The word at which it was made wrong.
    wrong_at: Option<usize>,
}

impl Case {
    fn worst(&self) -> f32 {
        self.scores.iter().map(|s| s.log_probability).fold(0.0, f32::min)
    }

    fn mean(&self) -> f32 {
        self.scores.iter().map(|s| s.log_probability).sum::<f32>() / self.scores.len().max(1) as f32
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let options = Options::parse();
    let text = fs::read_to_string(root().join("tests/data/questions.txt")).expect("the questions are there");
    let questions: Vec<&str> = text
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with(['#', '[']))
        .collect();
    let backend = embedded::Embedded::load(embedded::Options {
        context: 4096,
        slots: 4,
        waiting: 16,
        ..embedded::Options::new(root().join(&options.model))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let backend: Arc<dyn Backend> = Arc::new(backend);
    println!(
        "model {}, {} questions, seed {}\n",
        backend.info().model,
        questions.len(),
        options.seed
    );
    let detection = detection(&*backend, &questions, &options).await;
    drop(backend);
    let quality = if options.detection_only {
        Value::Null
    } else {
        quality(&options.model, &questions)
    };
    let report = json!({ "model": options.model, "seed": options.seed, "detection": detection, "openers": quality });
    let out = root().join(&options.out);
    fs::write(&out, serde_json::to_string_pretty(&report).expect("figures are JSON"))
        .expect("the figures can be written");
    println!("\nwritten to {}", options.out.display());
}

fn request(question: &str, max_tokens: u32) -> Request {
    Request {
        history: Vec::new(),
        user_text: question.to_owned(),
        parameters: Parameters::greedy(max_tokens),
    }
}

async fn event(turn: &mut cloud_continuator::backend::Turn) -> Event {
    std::future::poll_fn(|context| turn.poll_next(context))
        .await
        .expect("the engine answers")
}

/// The large model's own first eight words.
async fn own_opener(backend: &dyn Backend, question: &str) -> String {
    let mut turn = backend.open(request(question, 20)).expect("there is room");
    turn.send(Input::Commit(String::new())).expect("there is room");
    turn.send(Input::Generate(String::new())).expect("there is room");
    let mut text = String::new();
    loop {
        match event(&mut turn).await {
            Event::Text(more, _) => text.push_str(&more),
            Event::Done(..) => break,
            Event::Failed(failure) => panic!("{failure}"),
            _ => {}
        }
    }
    let text = text.trim();
    let ranges = words::ranges(text);
    ranges
        .get(7)
        .or(ranges.last())
        .map_or(String::new(), |last| text[..last.end].to_owned())
}

async fn detection(backend: &dyn Backend, questions: &[&str], options: &Options) -> Value {
    let mut random = Random::new(options.seed);
    let mut openers = Vec::new();
    for question in questions {
        openers.push(own_opener(backend, question).await);
    }
    let pool: Vec<String> = openers.iter().flat_map(|o| content_words(o)).map(|(_, w)| w).collect();
    let mut cases = Vec::new();
    for (n, question) in questions.iter().enumerate() {
        let own = &openers[n];
        let mut made = vec![("good", own.clone(), None)];
        let other = &openers[(n + 1 + random.below(questions.len() - 1)) % questions.len()];
        if other != own {
            made.push(("moved", other.clone(), Some(0)));
        }
        made.extend(swapped(own, &pool, &mut random).map(|(text, at)| ("swapped", text, Some(at))));
        made.extend(negated(own, &mut random).map(|(text, at)| ("negated", text, Some(at))));
        for (kind, text, wrong_at) in made {
            let scores = scores(backend, question, &text).await;
            cases.push(Case {
                kind,
                text,
                scores,
                wrong_at,
            });
        }
    }
    let written = fs::read_to_string(root().join("tests/data/openers.txt")).expect("the openers are there");
    for (question, opener) in written.lines().filter_map(|line| line.split_once('\t')) {
        let scores = scores(backend, question, opener).await;
        cases.push(Case {
            kind: "written",
            text: opener.to_owned(),
            scores,
            wrong_at: None,
        });
    }
    if options.grid {
        grid(&cases);
    }
    report(&cases)
}

/// Words that carry meaning, with their place.
fn content_words(text: &str) -> Vec<(usize, String)> {
    const FUNCTION: &[&str] = &[
        "this", "that", "with", "have", "from", "your", "you're", "there", "their", "they", "what", "when", "which",
        "will", "would", "could", "should", "about", "some", "i'll", "i'm", "it's", "let's", "sure", "into", "been",
        "were", "here", "then", "than", "very", "also",
    ];
    let clean = |w: &str| w.trim_matches(|c: char| !c.is_alphanumeric()).to_owned();
    let words = words::ranges(text).into_iter().map(|r| clean(&text[r])).enumerate();
    words
        .filter(|(_, w)| w.chars().count() >= 4 && !FUNCTION.contains(&w.to_lowercase().as_str()))
        .collect()
}

fn replace_word(text: &str, at: usize, with: &str) -> String {
    let range = words::ranges(text)[at].clone();
    let word = &text[range.clone()];
    let tail = &word[word.trim_end_matches(|c: char| !c.is_alphanumeric()).len()..];
    format!("{}{with}{tail}{}", &text[..range.start], &text[range.end..])
}

fn swapped(text: &str, pool: &[String], random: &mut Random) -> Option<(String, usize)> {
    let content = content_words(text);
    let (at, word) = content.get(random.below(content.len().max(1)))?;
    let capital = |w: &str| w.chars().next().is_some_and(char::is_uppercase);
    let alike: Vec<&String> = pool
        .iter()
        .filter(|w| w.to_lowercase() != word.to_lowercase() && (*at == 0 || capital(w) == capital(word)))
        .collect();
    let with = alike.get(random.below(alike.len().max(1)))?;
    Some((replace_word(text, *at, with), *at))
}

fn negated(text: &str, random: &mut Random) -> Option<(String, usize)> {
    const VERBS: &[&str] = &[
        "is", "are", "was", "were", "can", "will", "would", "should", "could", "has", "have",
    ];
    let ranges = words::ranges(text);
    // The word behind the verb is the first that is wrong.
    let verb = ranges[..ranges.len().saturating_sub(1)]
        .iter()
        .position(|r| VERBS.contains(&&text[r.clone()]))?;
    let end = ranges[verb].end;
    let not = ["not", "never"][random.below(2)];
    Some((format!("{} {not}{}", &text[..end], &text[end..]), verb + 1))
}

fn report(cases: &[Case]) -> Value {
    let thresholds = Thresholds::default();
    let settings = policy::Settings::default();
    let of = |kind: &str| cases.iter().filter(move |c| c.kind == kind).collect::<Vec<_>>();
    let verdict = |case: &Case| verify::likelihood(&case.text, &case.scores, &thresholds);
    let flagged = |cases: &[&Case]| share(cases.iter().map(|c| verdict(c) != Verdict::Accept));
    let good = of("good");
    println!(
        "{:<10} {:>5} {:>12} {:>12} {:>9} {:>9} {:>9}   directives on a screen (revise/restart/bridge)",
        "detection", "n", "AUC (worst)", "AUC (mean)", "flagged", "located", "within 1"
    );
    let mut rows = Vec::new();
    for kind in ["good", "written", "moved", "swapped", "negated"] {
        let these = of(kind);
        let score = |f: &dyn Fn(&Case) -> f32| {
            let (bad, fine): (Vec<f32>, Vec<f32>) = (
                these.iter().map(|c| -f(c)).collect(),
                good.iter().map(|c| -f(c)).collect(),
            );
            auc(&bad, &fine)
        };
        let (worst, mean) = (score(&Case::worst), score(&Case::mean));
        let located = |slack: usize| {
            let found = these.iter().filter_map(|c| match (verdict(c), c.wrong_at) {
                (Verdict::Wrong { good_words, .. }, Some(at)) => Some(good_words.abs_diff(at) <= slack),
                _ => None,
            });
            share(found)
        };
        let directives: Vec<Option<Correction>> = these
            .iter()
            .map(|c| policy::directive(verdict(c), Surface::Revisable, 0, &settings))
            .collect();
        let by = |f: &dyn Fn(&Correction) -> bool| share(directives.iter().map(|d| d.as_ref().is_some_and(f)));
        let kinds = [
            by(&|d| matches!(d, Correction::Revise { .. })),
            by(&|d| *d == Correction::Restart),
            by(&|d| *d == Correction::Bridge),
        ];
        println!(
            "{kind:<10} {:>5} {:>12.3} {:>12.3} {:>8.1}% {:>8.1}% {:>8.1}%   {:.1}% / {:.1}% / {:.1}%",
            these.len(),
            worst,
            mean,
            flagged(&these) * 100.0,
            located(0) * 100.0,
            located(1) * 100.0,
            kinds[0] * 100.0,
            kinds[1] * 100.0,
            kinds[2] * 100.0
        );
        rows.push(json!({
            "kind": kind, "n": these.len(), "auc_worst_token": worst, "auc_mean": mean, "flagged": flagged(&these), "located": located(0),
            "located_within_one": located(1), "revise": kinds[0], "restart": kinds[1], "bridge": kinds[2],
        }));
    }
    let wrong: Vec<&Case> = cases.iter().filter(|c| c.wrong_at.is_some()).collect();
    let (hits, alarms) = (flagged(&wrong) * wrong.len() as f64, flagged(&good) * good.len() as f64);
    let (precision, recall) = (hits / (hits + alarms).max(1.0), flagged(&wrong));
    println!(
        "\nat word {} and mean {}: precision {:.3}, recall {:.3}, false alarms {:.1}% of good openers",
        thresholds.word,
        thresholds.mean,
        precision,
        recall,
        flagged(&good) * 100.0
    );
    // What other thresholds would do, for whoever has to choose them.
    let mut worst: Vec<f32> = good.iter().map(|c| c.worst()).collect();
    worst.sort_by(f32::total_cmp);
    let mut means: Vec<f32> = good.iter().map(|c| c.mean()).collect();
    means.sort_by(f32::total_cmp);
    let at = |values: &[f32], share: f64| values[((values.len() as f64 * share) as usize).min(values.len() - 1)];
    let quantiles: Vec<Value> = [0.01, 0.02, 0.03, 0.05, 0.1]
        .iter()
        .map(|q| json!({ "share_of_good": q, "worst_token_below": at(&worst, *q), "mean_below": at(&means, *q) }))
        .collect();
    println!(
        "good openers: 1 / 2 / 3 / 5 / 10 % have a worst token below {:.2} / {:.2} / {:.2} / {:.2} / {:.2}, a mean below {:.2} / {:.2} / {:.2} / {:.2} / {:.2}",
        at(&worst, 0.01),
        at(&worst, 0.02),
        at(&worst, 0.03),
        at(&worst, 0.05),
        at(&worst, 0.1),
        at(&means, 0.01),
        at(&means, 0.02),
        at(&means, 0.03),
        at(&means, 0.05),
        at(&means, 0.1)
    );
    let by_hand = of("written");
    let mut hand: Vec<f32> = by_hand.iter().map(|c| c.worst()).collect();
    hand.sort_by(f32::total_cmp);
    let mut hand_means: Vec<f32> = by_hand.iter().map(|c| c.mean()).collect();
    hand_means.sort_by(f32::total_cmp);
    println!(
        "written openers: 5 / 10 % have a worst token below {:.2} / {:.2}, a mean below {:.2} / {:.2}",
        at(&hand, 0.05),
        at(&hand, 0.1),
        at(&hand_means, 0.05),
        at(&hand_means, 0.1)
    );
    json!({
        "rows": rows, "precision": precision, "recall": recall, "false_alarms": flagged(&good),
        "thresholds": { "word": thresholds.word, "mean": thresholds.mean }, "good_quantiles": quantiles,
    })
}

/// The share of each kind that is flagged at a range of thresholds.
fn grid(cases: &[Case]) {
    println!(
        "{:>6} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "word", "mean", "good", "written", "moved", "swapped", "negated"
    );
    for word in [-5.0, -5.5, -6.0, -6.5, -7.0, -7.5, -8.0] {
        for mean in [-2.0, -2.4, -2.8, -3.2] {
            let thresholds = Thresholds { word, mean };
            let flagged = |kind: &str| {
                let of = cases.iter().filter(|c| c.kind == kind);
                100.0 * share(of.map(|c| verify::likelihood(&c.text, &c.scores, &thresholds) != Verdict::Accept))
            };
            let [a, b, c, d, e] = ["good", "written", "moved", "swapped", "negated"].map(flagged);
            println!("{word:>6} {mean:>6} {a:>7.1}% {b:>7.1}% {c:>7.1}% {d:>7.1}% {e:>7.1}%");
        }
    }
    println!();
}

/// The μLM's openers through both programs.
fn quality(model: &std::path::Path, questions: &[&str]) -> Value {
    let model = model.display().to_string();
    let continuator = Continuator::start(&["--model", &model]);
    let mut openers: Vec<(String, String, Option<String>)> = Vec::new();
    for question in questions {
        let done = ask(&continuator.url, &[question]);
        assert_eq!(done.code, 0, "{}", done.err);
        let events = done.events();
        let committed = events
            .iter()
            .find(|e| e["event"] == "opener_committed")
            .expect("every turn commits");
        let directive = events.iter().find(|e| e["event"] == "directive");
        openers.push((
            committed["text"].as_str().unwrap_or_default().to_owned(),
            committed["reason"].as_str().unwrap_or_default().to_owned(),
            directive.and_then(|d| d["kind"].as_str()).map(str::to_owned),
        ));
    }
    let said: Vec<_> = openers.iter().filter(|o| !o.0.is_empty()).collect();
    let accepted = share(said.iter().map(|o| o.2.is_none()));
    let words = said.iter().map(|o| words::count(&o.0)).sum::<usize>() as f64 / said.len().max(1) as f64;
    let reason = |name: &str| share(openers.iter().map(|o| o.1 == name));
    let distinct: std::collections::HashSet<&str> = said.iter().map(|o| o.0.as_str()).collect();
    let repeated = 1.0 - distinct.len() as f64 / said.len().max(1) as f64;
    let kind = |name: &str| share(openers.iter().map(|o| o.2.as_deref() == Some(name)));
    println!(
        "\nopeners of the μLM: accepted {:.1}% of those said, {words:.1} words, silent {:.1}%, cut where unsure {:.1}%, at a clause {:.1}%, repeated {:.1}%",
        accepted * 100.0,
        reason("silent") * 100.0,
        reason("unsure") * 100.0,
        reason("clause") * 100.0,
        repeated * 100.0
    );
    println!(
        "directives: revise {:.1}%, restart {:.1}%, bridge {:.1}%",
        kind("revise") * 100.0,
        kind("restart") * 100.0,
        kind("bridge") * 100.0
    );
    json!({
        "accepted": accepted, "mean_words": words, "silent": reason("silent"), "unsure": reason("unsure"), "clause": reason("clause"),
        "length": reason("length"), "complete": reason("complete"), "repeated": repeated, "revise": kind("revise"),
        "restart": kind("restart"), "bridge": kind("bridge"),
    })
}
