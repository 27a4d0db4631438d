//! The gRPC face: service, health and reflection.

use std::{pin::Pin, sync::Arc, time::Duration};

use segue_shared::proto::{
    CloudFrame, EdgeFrame, FILE_DESCRIPTOR_SET,
    continuator_service_server::{ContinuatorService, ContinuatorServiceServer},
};
use tokio::net::TcpListener;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};
use tracing::Instrument;

use crate::session::{self, Service};

/// Frames that may wait for a slow reader; its turns wait when it is full.
const OUTGOING_FRAMES: usize = 64;
/// Frames that are read at least, to be answered, in bytes.
const FRAME_BYTES: usize = 4 << 20;
/// Streams on one connection.
const STREAMS: u32 = 256;

struct Grpc(Arc<Service>);

#[tonic::async_trait]
impl ContinuatorService for Grpc {
    type ConverseStream = Pin<Box<dyn Stream<Item = Result<CloudFrame, Status>> + Send>>;

    async fn converse(&self, request: Request<Streaming<EdgeFrame>>) -> Result<Response<Self::ConverseStream>, Status> {
        let (out, frames) = tokio::sync::mpsc::channel(OUTGOING_FRAMES);
        let edge = request.remote_addr();
        let session = session::converse(self.0.clone(), request.into_inner(), out.clone());
        // The task ends when the edge hangs up: its frames end, or nobody takes ours.
        tokio::spawn(
            async move {
                tokio::select! {
                    () = session => {}
                    () = out.closed() => {}
                }
            }
            .instrument(tracing::debug_span!("edge", ?edge)),
        );
        Ok(Response::new(Box::pin(ReceiverStream::new(frames).map(|frame| *frame))))
    }
}

/// Serves on `listener` until `stop` resolves, then lets open streams end.
///
/// # Errors
/// The transport's.
pub async fn serve(
    service: Arc<Service>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let mut draining = service.draining.clone();
    let mut ready = service.backends.ready();
    // Ready as long as a backend works and nobody has said to stop.
    let health_follows = async move {
        loop {
            if draining.borrow_and_update().is_none() && *ready.borrow_and_update() {
                reporter.set_serving::<ContinuatorServiceServer<Grpc>>().await;
            } else {
                reporter.set_not_serving::<ContinuatorServiceServer<Grpc>>().await;
            }
            let gone = tokio::select! {
                changed = draining.changed() => changed.is_err(),
                changed = ready.changed() => changed.is_err(),
            };
            if gone {
                std::future::pending::<()>().await;
            }
        }
    };
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the embedded descriptors are valid");
    // A frame above the limit gets an answer of its own, unless it is so large that it must not be read at all.
    let limit = service.limits.frame_bytes.saturating_mul(2).max(FRAME_BYTES);
    let server = Server::builder()
        .max_concurrent_streams(STREAMS)
        // A device that lost its network says nothing: ask, so that its turns are freed.
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .add_service(health)
        .add_service(reflection)
        .add_service(ContinuatorServiceServer::new(Grpc(service)).max_decoding_message_size(limit))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stop);
    tokio::select! {
        result = server => result,
        () = health_follows => Ok(()),
    }
}
