//! How much each device, and all together, may ask for.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tonic::Status;

/// Devices that are remembered after they have left; when there are more, those whose allowance is full are forgotten.
const REMEMBERED: usize = 4096;

/// The limits; 0 means none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Streams at a time.
    pub streams: usize,
    /// Streams of one device at a time.
    pub streams_per_device: usize,
    /// Turns that run at a time.
    pub turns: usize,
    /// Turns that a device may begin in a minute.
    pub turns_per_minute: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams: 4096,
            streams_per_device: 16,
            turns: 4096,
            turns_per_minute: 600,
        }
    }
}

/// Counts what is in use.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    streams: usize,
    turns: usize,
    devices: HashMap<String, Device>,
}

#[derive(Debug)]
struct Device {
    streams: usize,
    /// Turns that it may begin at once.
    allowance: f64,
    filled: Instant,
}

/// Why a turn is turned away.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused {
    /// For a person.
    pub message: String,
    /// When to try again.
    pub retry_after: Duration,
}

/// A stream's place; given back when dropped.
#[derive(Debug)]
pub struct StreamPlace {
    admission: Arc<Admission>,
    device: Option<String>,
}

/// A turn's place; given back when dropped.
#[derive(Debug)]
pub struct TurnPlace(Arc<Admission>);

impl Admission {
    /// Nothing is in use.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counters are never left half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Streams and turns in use.
    pub fn in_use(&self) -> (usize, usize) {
        let state = self.state();
        (state.streams, state.turns)
    }

    /// A place for a stream, before it is known whose it is.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED`
    pub fn stream(self: &Arc<Self>) -> Result<StreamPlace, Status> {
        let mut state = self.state();
        if full(state.streams, self.limits.streams) {
            return Err(Status::resource_exhausted(format!(
                "{} streams are open, which is the limit here; try another continuator, or later",
                state.streams
            )));
        }
        state.streams += 1;
        Ok(StreamPlace {
            admission: self.clone(),
            device: None,
        })
    }

    /// A place for a turn of `device` at `now`.
    ///
    /// # Errors
    /// [`Refused`] says when to try again.
    pub fn turn(self: &Arc<Self>, device: &str, now: Instant) -> Result<TurnPlace, Refused> {
        let mut state = self.state();
        if full(state.turns, self.limits.turns) {
            return Err(Refused {
                message: format!("{} turns are running here, which is the limit", state.turns),
                retry_after: Duration::from_secs(1),
            });
        }
        let most = f64::from(self.limits.turns_per_minute);
        if let Some(device) = state.devices.get_mut(device).filter(|_| most > 0.0) {
            device.fill(most, now);
            if device.allowance < 1.0 {
                return Err(Refused {
                    message: format!("this device may begin {most} turns a minute"),
                    retry_after: Duration::from_secs_f64((1.0 - device.allowance) * 60.0 / most),
                });
            }
            device.allowance -= 1.0;
        }
        state.turns += 1;
        Ok(TurnPlace(self.clone()))
    }
}

impl StreamPlace {
    /// The stream is `device`'s.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` when it has too many.
    pub fn belongs_to(&mut self, device: &str, now: Instant) -> Result<(), Status> {
        let limits = &self.admission.limits;
        let most = f64::from(limits.turns_per_minute);
        let mut state = self.admission.state();
        if state.devices.len() >= REMEMBERED {
            state.devices.retain(|_, device| {
                device.fill(most, now);
                device.streams > 0 || device.allowance < most
            });
        }
        let entry = state.devices.entry(device.to_owned()).or_insert(Device {
            streams: 0,
            allowance: most,
            filled: now,
        });
        if full(entry.streams, limits.streams_per_device) {
            return Err(Status::resource_exhausted(format!(
                "this device has {} streams open, which is the limit; close some first",
                entry.streams
            )));
        }
        entry.streams += 1;
        drop(state);
        self.device = Some(device.to_owned());
        Ok(())
    }
}

impl Device {
    fn fill(&mut self, most: f64, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.allowance = (self.allowance + passed * most / 60.0).min(most);
        self.filled = now;
    }
}

fn full(used: usize, limit: usize) -> bool {
    limit > 0 && used >= limit
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        let mut state = self.admission.state();
        state.streams -= 1;
        if let Some(device) = self.device.as_ref().and_then(|device| state.devices.get_mut(device)) {
            device.streams -= 1;
        }
    }
}

impl Drop for TurnPlace {
    fn drop(&mut self) {
        self.0.state().turns -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            streams: 3,
            streams_per_device: 2,
            turns: 2,
            turns_per_minute: 60,
        }
    }

    #[test]
    fn places_are_counted_and_given_back() {
        let (admission, now) = (Admission::new(limits()), Instant::now());
        let mut places: Vec<_> = (0..3).map(|_| admission.stream().unwrap()).collect();
        assert_eq!(admission.stream().unwrap_err().code(), tonic::Code::ResourceExhausted);
        places[0].belongs_to("a", now).unwrap();
        places[1].belongs_to("a", now).unwrap();
        assert!(places[2].belongs_to("a", now).is_err());
        places[2].belongs_to("b", now).unwrap();
        places.remove(0);
        assert_eq!(admission.in_use(), (2, 0));
        let mut again = admission.stream().unwrap();
        again.belongs_to("a", now).unwrap();
        drop((places, again));
        assert_eq!(admission.in_use(), (0, 0));
    }

    #[test]
    fn turns_are_limited_together_and_by_rate() {
        let (admission, now) = (Admission::new(limits()), Instant::now());
        let mut place = admission.stream().unwrap();
        place.belongs_to("a", now).unwrap();
        let turns = (admission.turn("a", now).unwrap(), admission.turn("a", now).unwrap());
        assert!(admission.turn("b", now).unwrap_err().message.contains("limit"));
        drop(turns);
        for _ in 0..58 {
            admission.turn("a", now).unwrap();
        }
        let refused = admission.turn("a", now).unwrap_err();
        assert_eq!(refused.retry_after, Duration::from_secs(1));
        assert!(admission.turn("a", now + refused.retry_after).is_ok());
        assert!(admission.turn("a", now + refused.retry_after).is_err());
        // Leaving and coming back does not help.
        drop(place);
        let mut place = admission.stream().unwrap();
        place.belongs_to("a", now).unwrap();
        assert!(admission.turn("a", now + Duration::from_secs(1)).is_err());
    }

    #[test]
    fn without_limits_everybody_comes_in() {
        let none = Limits {
            streams: 0,
            streams_per_device: 0,
            turns: 0,
            turns_per_minute: 0,
        };
        let (admission, now) = (Admission::new(none), Instant::now());
        let places: Vec<_> = (0..100)
            .map(|_| {
                let mut place = admission.stream().unwrap();
                place.belongs_to("a", now).unwrap();
                (place, admission.turn("a", now).unwrap())
            })
            .collect();
        assert_eq!(admission.in_use(), (100, 100));
        drop(places);
    }
}
