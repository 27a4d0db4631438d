//! Our forward pass against Hugging Face transformers' (see fixtures/reference_logits.py).

use std::path::Path;

use edge_agent::ulm::{config::Config, model::Model, precision::Precision, weights::Weights};
use safetensors::SafeTensors;

const REFERENCE: &[u8] = include_bytes!("fixtures/reference_logits.safetensors");

fn model(precision: Precision) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
    let config = Config::parse(&std::fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    let weights = Weights::parse(&std::fs::read(folder.join("model.safetensors")).unwrap(), &config).unwrap();
    Model::new(config, weights, precision, 128)
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    file.tensor(name)
        .unwrap()
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

fn ints(file: &SafeTensors<'_>, name: &str) -> Vec<i64> {
    file.tensor(name)
        .unwrap()
        .data()
        .chunks_exact(8)
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

fn top(logits: &[f32]) -> i64 {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as i64
}

/// Runs every prompt, cut into `cut` first tokens and then the rest, and compares all logits.
fn compare(cut: Option<usize>) {
    let _guard = tch::no_grad_guard();
    let mut model = model(Precision::F32);
    let file = SafeTensors::deserialize(REFERENCE).unwrap();
    let vocab = model.config().vocab as usize;
    for n in 0..4 {
        let tokens = ints(&file, &format!("tokens.{n}"));
        let (columns, last, best) = (
            floats(&file, &format!("columns.{n}")),
            floats(&file, &format!("last.{n}")),
            ints(&file, &format!("top.{n}")),
        );
        model.truncate(0);
        let (head, tail) = tokens.split_at(cut.unwrap_or(0).min(tokens.len() - 1));
        let mut logits = if head.is_empty() {
            Vec::new()
        } else {
            model.forward_all(head)
        };
        logits.extend(model.forward_all(tail));
        assert_eq!(logits.len(), tokens.len() * vocab);
        let width = columns.len() / tokens.len();
        for (position, ours) in logits.chunks(vocab).enumerate() {
            assert_eq!(top(ours), best[position], "prompt {n}, position {position}");
            for column in 0..width {
                let (a, b) = (ours[column * 24], columns[position * width + column]);
                assert!(
                    (a - b).abs() < 1e-3,
                    "prompt {n}, position {position}, token {}: {a} and {b}",
                    column * 24
                );
            }
        }
        let difference = logits[logits.len() - vocab..]
            .iter()
            .zip(&last)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(difference < 1e-3, "prompt {n}: {difference}");
    }
}

#[test]
fn logits_equal_those_of_transformers() {
    compare(None);
}

#[test]
fn logits_are_the_same_through_the_cache() {
    for cut in [1, 2, 7] {
        compare(Some(cut));
    }
}

#[test]
fn smaller_precisions_stay_close() {
    let _guard = tch::no_grad_guard();
    let file = SafeTensors::deserialize(REFERENCE).unwrap();
    for precision in [Precision::Bf16, Precision::Int8] {
        let mut model = model(precision);
        for n in 0..2 {
            let (ours, theirs) = (
                model.forward(&ints(&file, &format!("tokens.{n}"))),
                floats(&file, &format!("last.{n}")),
            );
            // Relative to the spread of the logits: what rounding may cost without changing what the model says.
            let count = theirs.len() as f64;
            let mean = theirs.iter().map(|l| f64::from(*l)).sum::<f64>() / count;
            let spread = (theirs.iter().map(|l| (f64::from(*l) - mean).powi(2)).sum::<f64>() / count).sqrt();
            let off = ours
                .iter()
                .zip(&theirs)
                .map(|(a, b)| f64::from((a - b).abs()))
                .sum::<f64>()
                / count;
            assert!(off < 0.1 * spread, "{precision:?}, prompt {n}: {off} of {spread}");
            assert_eq!(top(&ours), top(&theirs), "{precision:?}, prompt {n}");
            model.truncate(0);
        }
    }
}
