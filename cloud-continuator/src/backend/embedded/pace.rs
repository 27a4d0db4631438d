//! How many prompt tokens a step may read while other turns generate: pure, fed with measurements.

/// Prompt tokens that may be saved up, and read in one step, after a while without any: a short question is read at once.
const BURST: f64 = 32.0;
/// Weight of a new measurement of a step.
const WEIGHT: f64 = 0.2;
/// What is left of older measurements of reading with every new one: they say little each, so many are kept.
const MEMORY: f64 = 0.97;
/// A measurement counts at most as this many times what was known: a machine that was busy elsewhere says nothing about the model.
const OUTLIER: f64 = 4.0;
/// Turns being read that are granted a share of their own each.
const CROWD: usize = 4;
/// What a prompt token may cost, as a share of what a step costs for each generating turn: it is the same work, done together.
const TOKEN: (f64, f64) = (0.1, 1.0);

/// Shares the steps' time between generating and reading, like a token bucket that fills with time.
///
/// Every step in which turns generate earns `share` of its own time for reading, and reading spends what it took. So the time between
/// two tokens of a running turn grows by `share` at most while a long prompt is read, and a short one finds a full bucket. Where several
/// turns are read, each has a share (up to a bound).
#[derive(Clone, Debug)]
pub struct Pace {
    share: f64,
    /// Seconds of a step that only generates, by the number of generating turns; 0: not known.
    steps: Vec<f64>,
    /// Seconds that reading added to steps, and prompt tokens that were read in them, both fading. Their quotient is a token's cost: a
    /// single step's is mostly noise.
    read: (f64, f64),
    /// Seconds that may be spent on reading.
    credit: f64,
}

impl Pace {
    /// For at most `turns` turns; reading may add `share` of a step's time.
    pub fn new(share: f32, turns: usize) -> Self {
        Self {
            share: f64::from(share),
            steps: vec![0.0; turns + 1],
            read: (0.0, 0.0),
            credit: 0.0,
        }
    }

    /// Prompt tokens that the next step may read.
    pub fn budget(&self) -> usize {
        match self.token() {
            None => BURST as usize, // nothing is known yet
            Some(token) => (self.credit / token).max(0.0) as usize,
        }
    }

    /// A step took `seconds`: `generating` turns got a token each, and `read` prompt tokens were read for some of `readers` turns.
    pub fn step(&mut self, generating: usize, read: usize, readers: usize, seconds: f64) {
        if generating == 0 {
            self.learn_reading(seconds, read);
            self.credit = BURST * self.token().unwrap_or(0.0);
            return;
        }
        if read == 0 {
            learn(&mut self.steps[generating], seconds);
        }
        let alone = self.alone(generating).unwrap_or(seconds);
        if read > 0 {
            let each = alone / generating as f64 * read as f64;
            self.learn_reading((seconds - alone).clamp(-OUTLIER * each, OUTLIER * each), read);
            self.read.0 = self.read.0.clamp(
                self.read.1 * TOKEN.0 * alone / generating as f64,
                self.read.1 * TOKEN.1 * alone / generating as f64,
            );
        }
        let token = self.token().unwrap_or(0.0);
        // Several short questions must not wait for each other as for one long text; and where more turns wait to be read than generate,
        // they weigh more.
        let crowd = (readers as f64 / generating as f64).max(readers.clamp(1, CROWD) as f64);
        self.credit -= read as f64 * token;
        self.credit = (self.credit + self.share * crowd * alone).min(BURST * token);
    }

    /// Seconds that one prompt token adds to a step, where that is known.
    fn token(&self) -> Option<f64> {
        (self.read.1 > 0.0).then(|| self.read.0 / self.read.1)
    }

    fn learn_reading(&mut self, seconds: f64, read: usize) {
        self.read = (self.read.0 * MEMORY + seconds, self.read.1 * MEMORY + read as f64);
    }

    /// Seconds of a step in which only `generating` turns get a token; from the nearest number that is known.
    fn alone(&self, generating: usize) -> Option<f64> {
        let known = self.steps.iter().enumerate().filter(|(_, seconds)| **seconds > 0.0);
        known
            .min_by_key(|(n, _)| n.abs_diff(generating))
            .map(|(_, seconds)| *seconds)
    }
}

fn learn(value: &mut f64, seen: f64) {
    if *value == 0.0 {
        *value = seen;
    } else {
        *value += WEIGHT * (seen.min(OUTLIER * *value) - *value);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A machine that takes `base` for a step, and `more` for every further token in it.
    fn seconds(base: f64, more: f64, tokens: usize) -> f64 {
        base + more * tokens as f64
    }

    /// Reads a prompt of `prompt` tokens among `generating` turns; returns the mean growth of the steps' time and their number.
    fn read(pace: &mut Pace, generating: usize, prompt: usize, base: f64, more: f64) -> (f64, usize) {
        let alone = seconds(base, more, generating);
        let (mut left, mut steps, mut total) = (prompt, 0, 0.0);
        while left > 0 && steps < 1_000_000 {
            let n = pace.budget().min(left);
            left -= n;
            let took = seconds(base, more, generating + n);
            pace.step(generating, n, 1, took);
            (steps, total) = (steps + 1, total + took);
        }
        (total / (alone * steps as f64) - 1.0, steps)
    }

    proptest! {
        #[test]
        fn a_long_prompt_stays_within_its_share(
            generating in 1..32usize, base in 0.001..0.02f64, more in 0.0005..0.01f64, share in 0.1..2.0f32,
        ) {
            let mut pace = Pace::new(share, 32);
            for _ in 0..50 {
                pace.step(generating, 0, 0, seconds(base, more, generating));
            }
            // Once it has learned what a token costs.
            read(&mut pace, generating, 200, base, more);
            let (growth, steps) = read(&mut pace, generating, 2000, base, more);
            prop_assert!(steps < 1_000_000, "it gets on");
            prop_assert!(growth <= f64::from(share) * 1.1 + 0.02, "{growth} > {share}");
            // (Where a whole burst costs less than the share, the burst is the limit.)
            let most = f64::from(share).min(BURST * more / seconds(base, more, generating));
            prop_assert!(growth >= most * 0.5, "the share is used: {growth} < {most}");
        }
    }

    #[test]
    fn a_short_question_is_read_at_once_after_a_while() {
        let mut pace = Pace::new(0.3, 4);
        pace.step(0, 100, 1, 0.4);
        for _ in 0..200 {
            pace.step(2, 0, 0, 0.01);
        }
        assert_eq!(pace.budget(), 32);
    }

    #[test]
    fn readers_that_outnumber_the_generating_weigh_more() {
        let steps = |readers: usize| {
            let mut pace = Pace::new(0.3, 64);
            pace.step(0, 100, 1, 0.4);
            pace.step(1, 0, 0, 0.01);
            let mut read = 0;
            for _ in 0..1000 {
                let n = pace.budget().min(64);
                read += n;
                pace.step(1, n, readers, 0.01 + 0.004 * n as f64);
            }
            read
        };
        assert!(steps(16) > 5 * steps(1), "{} {}", steps(16), steps(1));
    }

    #[test]
    fn one_slow_step_does_not_stop_reading_for_long() {
        let mut pace = Pace::new(0.3, 4);
        pace.step(0, 100, 1, 0.4);
        pace.step(1, 0, 0, 0.01);
        pace.step(1, 1, 1, 0.014);
        pace.step(1, 1, 1, 5.0); // somebody else had the machine
        let waits = (0..).take_while(|_| {
            let waits = pace.budget() == 0;
            pace.step(1, 0, 1, 0.01);
            waits
        });
        assert!(waits.count() < 20);
    }
}
