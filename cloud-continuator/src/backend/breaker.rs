//! A circuit breaker: keeps turns away from a backend that fails, and lets it come back. Pure: time is passed in.

use std::time::Duration;

use tokio::time::Instant;

/// Failures in a row after which a backend is left alone.
const FAILURES: u32 = 3;
/// How long it is left alone: at first, and at most. The time doubles with every failed trial.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// The state of one backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breaker {
    failures: u32,
    /// Until when no turn goes there; `None` when closed.
    open_until: Option<Instant>,
    pause: Duration,
    proven: bool,
}

impl Breaker {
    /// Whether turns may go there.
    pub fn closed(&self) -> bool {
        self.open_until.is_none()
    }

    /// Whether it is time for a trial.
    pub fn due(&self, now: Instant) -> bool {
        self.open_until.is_some_and(|until| until <= now)
    }

    /// How long it stays open; zero when closed or due.
    pub fn remaining(&self, now: Instant) -> Duration {
        self.open_until.map_or(Duration::ZERO, |until| until - now)
    }

    /// Whether it has been seen to work, and no failure has opened it since.
    pub fn proven(&self) -> bool {
        self.proven && self.closed()
    }

    /// The backend served a turn. (One that began before the backend was left alone does not end that.)
    pub fn served(&mut self) {
        if self.closed() {
            *self = Self {
                proven: true,
                ..Self::default()
            };
        }
    }

    /// The backend answered a check: it may be tried, but the next failed turn opens it again, and for longer.
    pub fn answered(&mut self) {
        self.proven = true;
        if self.open_until.take().is_some() {
            self.failures = FAILURES - 1;
        }
    }

    /// The backend failed; returns whether that opened it.
    pub fn failed(&mut self, now: Instant) -> bool {
        if !self.closed() {
            return false; // a turn from before it opened: that is known
        }
        self.failures += 1;
        if self.failures >= FAILURES {
            self.open(now, None);
        }
        !self.closed()
    }

    /// Opens it at once, for as long as the backend asked for, if it did.
    pub fn open(&mut self, now: Instant, retry_after: Option<Duration>) {
        self.failures = FAILURES;
        self.pause = (self.pause * 2).clamp(PAUSES.0, PAUSES.1);
        self.open_until = Some(now + retry_after.unwrap_or(self.pause).min(10 * PAUSES.1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn opens_after_failures_in_a_row_and_waits_longer_each_time() {
        let mut now = Instant::now();
        let mut breaker = Breaker::default();
        breaker.failed(now);
        breaker.failed(now);
        breaker.answered();
        breaker.served();
        assert!(!breaker.failed(now) && !breaker.failed(now) && breaker.closed());
        assert!(breaker.failed(now) && !breaker.closed());
        let mut pause = PAUSES.0;
        for _ in 0..8 {
            assert_eq!(breaker.remaining(now), pause);
            assert!(!breaker.due(now + pause - MS));
            now += pause;
            assert!(breaker.due(now) && !breaker.closed());
            assert!(
                !breaker.failed(now),
                "it was open already, and stays so no longer for that"
            );
            breaker.open(now, None);
            pause = (pause * 2).min(PAUSES.1);
        }
        breaker.served();
        assert!(!breaker.proven(), "a turn from before is no sign");
        breaker.answered();
        assert!(breaker.proven() && !breaker.due(now));
        assert!(breaker.failed(now), "checks do not make up for turns");
        assert_eq!(breaker.remaining(now), PAUSES.1, "and it has not forgotten");
        breaker.answered();
        breaker.served();
        assert!(!breaker.failed(now), "a turn does");
    }

    #[tokio::test]
    async fn a_backend_that_names_a_time_is_left_alone_for_it() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        breaker.open(now, Some(7 * PAUSES.0));
        assert_eq!(breaker.remaining(now), 7 * PAUSES.0);
    }
}
