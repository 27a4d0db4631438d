//! Small statistics for evaluations.

/// A seeded generator (SplitMix64), so that evaluations can be repeated on any platform.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator for a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `limit`; 0 when `limit` is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit.max(1) as u64) as usize
    }
}

/// Area under the ROC curve: the chance that a positive scores above a negative (ties count half).
pub fn auc(positive: &[f32], negative: &[f32]) -> f64 {
    let wins: f64 = positive
        .iter()
        .flat_map(|p| {
            negative.iter().map(move |n| {
                if p > n {
                    1.0
                } else if p == n {
                    0.5
                } else {
                    0.0
                }
            })
        })
        .sum();
    wins / (positive.len() * negative.len()).max(1) as f64
}

/// The value below which `share` of the times are; sorts them.
pub fn percentile(times: &mut [f64], share: f64) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    let at = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1)) - 1;
    times.get(at).copied().unwrap_or(f64::NAN)
}

/// A process's memory.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Resident set, in bytes.
    pub resident: u64,
}

impl Memory {
    /// Of a process, by its id; zero where it cannot be known.
    pub fn of(id: u32) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let kib: u64 = line
            .and_then(|l| l.split_whitespace().next()?.parse().ok())
            .unwrap_or(0);
        Self { resident: kib * 1024 }
    }
}

/// The share of `true`; 0 of nothing.
pub fn share(values: impl Iterator<Item = bool>) -> f64 {
    let (hits, all) = values.fold((0, 0), |(hits, all), value| (hits + usize::from(value), all + 1));
    hits as f64 / f64::from(all.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auc_of_known_orders() {
        assert_eq!(auc(&[3.0, 4.0], &[1.0, 2.0]), 1.0);
        assert_eq!(auc(&[1.0, 2.0], &[3.0, 4.0]), 0.0);
        assert_eq!(auc(&[1.0, 2.0], &[1.0, 2.0]), 0.5);
    }

    #[test]
    fn the_generator_repeats_itself() {
        let draw = || {
            (0..9)
                .scan(Random::new(7), |r, _| Some(r.below(10)))
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
        assert!(draw().iter().any(|n| *n != draw()[0]));
    }
}
