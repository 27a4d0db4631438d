//! Choosing the next token.

use rand::{Rng, SeedableRng, rngs::SmallRng};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token; larger values flatten the distribution.
    pub temperature: f32,
    /// Share of the probability to sample from (nucleus sampling, arXiv 1904.09751), in (0, 1].
    pub top_p: f32,
    /// Seed of the generator; `None` draws one.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            seed: None,
        }
    }
}

/// A token and how sure the model was of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability at temperature 1.
    pub log_probability: f32,
}

/// Draws tokens from logits.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: SmallRng,
}

impl Sampler {
    /// A sampler; its draws are the same for the same seed.
    pub fn new(sampling: Sampling) -> Self {
        let random = sampling
            .seed
            .map_or_else(SmallRng::from_os_rng, SmallRng::seed_from_u64);
        Self { sampling, random }
    }

    /// Chooses a token from `logits`, one per token.
    pub fn choose(&mut self, logits: &[f32]) -> Choice {
        let (best, &top) = logits
            .iter()
            .enumerate()
            .max_by(|a, b| a.1.total_cmp(b.1))
            .expect("a vocabulary is not empty");
        let log_sum = top + logits.iter().map(|l| (l - top).exp()).sum::<f32>().ln();
        let token = if self.sampling.temperature > 0.0 {
            self.draw(logits, top)
        } else {
            best
        };
        Choice {
            token: token as u32,
            log_probability: logits[token] - log_sum,
        }
    }

    fn draw(&mut self, logits: &[f32], top: f32) -> usize {
        let mut weights: Vec<(usize, f32)> = logits
            .iter()
            .map(|l| ((l - top) / self.sampling.temperature).exp())
            .enumerate()
            .collect();
        weights.sort_unstable_by(|a, b| b.1.total_cmp(&a.1));
        let total: f32 = weights.iter().map(|w| w.1).sum();
        let mut kept = 0.0;
        let nucleus = weights
            .iter()
            .take_while(|w| {
                let inside = kept < self.sampling.top_p * total;
                kept += w.1;
                inside
            })
            .count()
            .max(1);
        let nucleus = &weights[..nucleus];
        let mut left = self.random.random::<f32>() * nucleus.iter().map(|w| w.1).sum::<f32>();
        for (token, weight) in nucleus {
            left -= weight;
            if left <= 0.0 {
                return *token;
            }
        }
        nucleus[nucleus.len() - 1].0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, -50.0];

    #[test]
    fn greedy_takes_the_likeliest() {
        let choice = Sampler::new(Sampling::default()).choose(&LOGITS);
        assert_eq!(choice.token, 1);
        let expected = 3.0 - LOGITS.iter().map(|l: &f32| l.exp()).sum::<f32>().ln();
        assert!((choice.log_probability - expected).abs() < 1e-5);
    }

    #[test]
    fn a_small_nucleus_is_greedy() {
        let mut sampler = Sampler::new(Sampling {
            temperature: 5.0,
            top_p: 1e-6,
            seed: Some(1),
        });
        assert!((0..50).all(|_| sampler.choose(&LOGITS).token == 1));
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling {
                temperature: 1.0,
                top_p: 1.0,
                seed: Some(seed),
            });
            (0..4000).map(|_| sampler.choose(&LOGITS).token).collect::<Vec<_>>()
        };
        let drawn = draw(7);
        assert_eq!(drawn, draw(7));
        let share = |token| drawn.iter().filter(|t| **t == token).count() as f32 / drawn.len() as f32;
        // softmax(1, 3, 2) is 0.09, 0.67, 0.24
        assert!((share(1) - 0.665).abs() < 0.04 && (share(2) - 0.245).abs() < 0.04 && share(3) == 0.0);
    }
}
