//! The wire protocol `segue.v1`, generated from `proto/`, with what makes its types pleasant to use.

#![allow(clippy::all, reason = "generated code")]
#![allow(missing_docs, reason = "tonic's generated service modules have none")]

use crate::reply_log::Correction;

tonic::include_proto!("segue.v1");

/// The encoded `FileDescriptorSet` of the protocol, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/segue.v1.bin"));

/// Lowest protocol version that this build speaks.
pub const MIN_PROTOCOL_VERSION: u32 = 1;
/// Highest protocol version that this build speaks.
pub const MAX_PROTOCOL_VERSION: u32 = 1;

/// The version to speak with a peer that speaks `min..=max`, or `None` when there is no common one.
pub fn agree(min: u32, max: u32) -> Option<u32> {
    let version = max.min(MAX_PROTOCOL_VERSION);
    (min <= max && version >= min.max(MIN_PROTOCOL_VERSION)).then_some(version)
}

macro_rules! envelopes {
    ($($frame:ident, $module:ident: $($body:ident),+;)+) => {$($(
        impl From<$body> for $frame {
            fn from(body: $body) -> Self {
                $frame { body: Some($module::Body::$body(body)) }
            }
        }
    )+)+};
}

envelopes! {
    EdgeFrame, edge_frame: Hello, StartTurn, OpenerDelta, CommitOpener, Heard, CancelTurn, RefuseDirective;
    CloudFrame, cloud_frame: Welcome, Directive, Chunk, EndTurn, TurnFailed, Drain;
}

impl From<&directive::Kind> for Correction {
    fn from(kind: &directive::Kind) -> Self {
        match kind {
            directive::Kind::Bridge(_) => Correction::Bridge,
            directive::Kind::Revise(revise) => Correction::Revise {
                keep: revise.keep_bytes as usize,
            },
            directive::Kind::Restart(_) => Correction::Restart,
        }
    }
}

/// A protobuf duration from a standard one (saturating).
pub fn duration(value: std::time::Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(value).unwrap_or(prost_types::Duration {
        seconds: i64::MAX,
        nanos: 0,
    })
}

/// The longest duration that a peer is taken at its word for: a day.
const LONGEST: std::time::Duration = std::time::Duration::from_secs(24 * 60 * 60);

/// A standard duration from a protobuf one, of at most a day (so that it can be added to any time); `None` when it is absent or negative.
pub fn std_duration(value: Option<prost_types::Duration>) -> Option<std::time::Duration> {
    value
        .and_then(|value| std::time::Duration::try_from(value).ok())
        .map(|value| value.min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_needs_an_overlap() {
        assert_eq!(agree(1, 1), Some(1));
        assert_eq!(agree(1, 9), Some(MAX_PROTOCOL_VERSION));
        assert_eq!(agree(MAX_PROTOCOL_VERSION + 1, 9), None);
        assert_eq!(agree(0, 0), None);
        assert_eq!(agree(2, 1), None);
    }
}
