//! The handshake: the first frame of either side.

use std::pin::Pin;

use segue_shared::{
    proto::{self, EdgeFrame, edge_frame::Body},
    reply_log::Surface,
};
use tokio::time::Instant;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

use super::Service;
use crate::{admission::StreamPlace, door::Caller, metrics::DeniedReason};

/// What the handshake settled.
pub(super) struct Greeted {
    pub welcome: proto::Welcome,
    pub device: String,
    pub surface: Surface,
}

/// Waits for the edge's Hello; returns what to answer, and who the edge is.
///
/// # Errors
/// The status that ends the stream.
pub(super) async fn greet<S>(
    service: &Service,
    caller: &Caller,
    place: &mut StreamPlace,
    mut frames: Pin<&mut S>,
) -> Result<Greeted, Status>
where
    S: Stream<Item = Result<EdgeFrame, Status>>,
{
    if service.draining.borrow().is_some() {
        return Err(Status::unavailable(
            "this continuator is going away; connect to another",
        ));
    }
    let first = tokio::time::timeout(service.limits.first_frame, frames.next())
        .await
        .map_err(|_| Status::deadline_exceeded(format!("no Hello came within {:?}", service.limits.first_frame)))?
        .transpose()?;
    let Some(Body::Hello(hello)) = first.and_then(|frame| frame.body) else {
        return Err(Status::invalid_argument("the first frame must be Hello"));
    };
    let version = proto::agree(hello.min_protocol_version, hello.max_protocol_version).ok_or_else(|| {
        Status::failed_precondition(format!(
            "the edge speaks protocol versions {} to {}, this continuator {} to {}; update the older of the two",
            hello.min_protocol_version,
            hello.max_protocol_version,
            proto::MIN_PROTOCOL_VERSION,
            proto::MAX_PROTOCOL_VERSION
        ))
    })?;
    if hello.device_id.len() > 128 {
        return Err(Status::invalid_argument("device_id is longer than 128 bytes"));
    }
    if let Err(status) = caller.may_be(&hello.device_id) {
        service.metrics.denied(DeniedReason::other_device);
        tracing::warn!(token = caller.token(), "another device's credentials; not let in");
        return Err(status);
    }
    place.belongs_to(&hello.device_id, Instant::now())?;
    let surface = match hello.surface() {
        proto::Surface::Revisable => Surface::Revisable,
        proto::Surface::AppendOnly | proto::Surface::Unspecified => Surface::AppendOnly,
    };
    tracing::debug!(
        agent = hello.agent_version,
        ulm = hello.ulm_name,
        ?surface,
        "edge connected"
    );
    Ok(Greeted {
        welcome: service.welcome(version),
        device: hello.device_id,
        surface,
    })
}
