//! What is counted, for Prometheus.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use segue_shared::proto::TurnError;

use crate::{admission::Admission, tokens::Denied};

/// The counters.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    denied: Family<Reason, Counter>,
    turns: Family<Ended, Counter>,
    resumed: Counter,
    handshakes_failed: Counter,
    streams_active: Gauge,
    turns_active: Gauge,
    tasks: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: DeniedReason,
}

/// Why callers were not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "these are the labels")]
pub enum DeniedReason {
    /// No token came.
    missing,
    /// The token is none of ours.
    unknown,
    /// The token is too old.
    expired,
    /// The token was revoked.
    revoked,
    /// Token or certificate are another device's.
    other_device,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    outcome: Outcome,
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "these are the labels")]
pub enum Outcome {
    /// With a whole reply.
    complete,
    /// The edge cancelled it.
    cancelled,
    /// Its stream ended before it did.
    dropped,
    /// A field had a value that is not allowed, or a frame came that may not.
    invalid,
    /// There was no room.
    overloaded,
    /// It took too long.
    deadline,
    /// All backends failed.
    backend,
}

impl From<TurnError> for Outcome {
    fn from(error: TurnError) -> Self {
        match error {
            TurnError::Overloaded => Self::overloaded,
            TurnError::Deadline => Self::deadline,
            TurnError::Backend => Self::backend,
            TurnError::Unspecified
            | TurnError::InvalidArgument
            | TurnError::UnknownTurn
            | TurnError::UnexpectedFrame
            | TurnError::ContextTooSmall => Self::invalid,
        }
    }
}

impl From<Denied> for DeniedReason {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Missing => Self::missing,
            Denied::Unknown => Self::unknown,
            Denied::Expired => Self::expired,
            Denied::Revoked => Self::revoked,
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("segue");
        let denied = Family::default();
        registry.register("auth_failures", "Calls that were not let in", denied.clone());
        let turns = Family::default();
        registry.register("turns", "Turns that ended", turns.clone());
        let resumed = Counter::<u64, AtomicU64>::default();
        registry.register(
            "turns_resumed",
            "Turns that went on from the reply of an earlier stream",
            resumed.clone(),
        );
        let handshakes_failed = Counter::<u64, AtomicU64>::default();
        let help = "TLS handshakes that failed, for want of a trusted certificate or of TLS";
        registry.register("tls_handshake_failures", help, handshakes_failed.clone());
        let streams_active = Gauge::default();
        registry.register("streams_active", "Streams that are open", streams_active.clone());
        let turns_active = Gauge::default();
        registry.register("turns_active", "Turns that run", turns_active.clone());
        let tasks = Gauge::default();
        registry.register(
            "runtime_tasks",
            "Tasks of the async runtime that have not ended",
            tasks.clone(),
        );
        Self {
            registry,
            denied,
            turns,
            resumed,
            handshakes_failed,
            streams_active,
            turns_active,
            tasks,
        }
    }
}

impl Metrics {
    /// A caller was not let in.
    pub fn denied(&self, reason: impl Into<DeniedReason>) {
        self.denied.get_or_create(&Reason { reason: reason.into() }).inc();
    }

    /// A turn ended.
    pub fn turn(&self, outcome: impl Into<Outcome>) {
        let outcome = outcome.into();
        self.turns.get_or_create(&Ended { outcome }).inc();
    }

    /// A turn goes on from the reply of an earlier stream.
    pub fn resumed(&self) {
        self.resumed.inc();
    }

    /// A TLS handshake failed.
    pub fn handshake_failed(&self) {
        self.handshakes_failed.inc();
    }

    /// All of them in OpenMetrics' text format, which Prometheus reads. Must be called inside a tokio runtime.
    pub fn text(&self, admission: &Admission) -> String {
        let (streams, turns) = admission.in_use();
        self.streams_active.set(streams as i64);
        self.turns_active.set(turns as i64);
        self.tasks
            .set(tokio::runtime::Handle::current().metrics().num_alive_tasks() as i64);
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("a string can be written to");
        text
    }
}
