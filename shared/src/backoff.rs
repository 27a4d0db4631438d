//! Waiting between attempts: exponential, capped, with jitter.

use std::time::Duration;

/// Doubles the wait with every attempt in a row, up to a cap.
///
/// A wait lies between half of its step and the whole of it ("equal jitter"), so that many devices that lost the same server do not come
/// back in one moment, and none hammers it.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    attempts: u32,
}

impl Backoff {
    /// Waits that begin at `first` and never exceed `cap`.
    pub fn new(first: Duration, cap: Duration) -> Self {
        Self {
            first,
            cap,
            attempts: 0,
        }
    }

    /// The next wait; `random` is uniform in [0, 1).
    pub fn next(&mut self, random: f64) -> Duration {
        let step = self
            .first
            .saturating_mul(1u32.checked_shl(self.attempts).unwrap_or(u32::MAX));
        self.attempts = self.attempts.saturating_add(1).min(31);
        step.min(self.cap).mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
    }

    /// It worked: the next wait is the first again.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn waits_grow_to_the_cap_and_not_past_it(
            first in 1u64..10_000, times in 1u64..1000, random in prop::collection::vec(0.0f64..1.0, 1..80),
        ) {
            let (first, cap) = (Duration::from_millis(first), Duration::from_millis(first * times));
            let mut backoff = Backoff::new(first, cap);
            let mut step = first;
            for random in random {
                let wait = backoff.next(random);
                prop_assert!(wait <= step && wait + Duration::from_nanos(1) >= step / 2, "{wait:?} of {step:?}");
                prop_assert!(wait <= cap);
                step = (step * 2).min(cap);
            }
            backoff.reset();
            prop_assert!(backoff.next(0.999) <= first);
        }
    }
}
