//! The gRPC face: service, health and reflection.

use std::{pin::Pin, sync::Arc, time::Duration};

use rustls::ServerConfig;
use segue_shared::proto::{
    CloudFrame, EdgeFrame, FILE_DESCRIPTOR_SET,
    continuator_service_server::{ContinuatorService, ContinuatorServiceServer, SERVICE_NAME},
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{
        Server,
        server::{TcpConnectInfo, TcpIncoming, TlsConnectInfo},
    },
};
use tonic_health::ServingStatus;
use tracing::Instrument;

use crate::{
    connections::Places,
    door::Door,
    session::{self, Service},
    tls,
};

/// Frames that may wait for a slow reader; its turns wait when it is full.
const OUTGOING_FRAMES: usize = 64;
/// Frames that are read at least, to be answered, in bytes.
const FRAME_BYTES: usize = 4 << 20;
/// Streams on one connection.
const STREAMS: u32 = 256;

struct Grpc {
    service: Arc<Service>,
    door: Door,
}

#[tonic::async_trait]
impl ContinuatorService for Grpc {
    type ConverseStream = Pin<Box<dyn Stream<Item = Result<CloudFrame, Status>> + Send>>;

    /// Errors before the handshake: `UNAUTHENTICATED` (no credentials, or wrong, expired or revoked ones), `PERMISSION_DENIED` (another
    /// device's), `RESOURCE_EXHAUSTED` (too many streams), and those of the protocol's description.
    async fn converse(&self, request: Request<Streaming<EdgeFrame>>) -> Result<Response<Self::ConverseStream>, Status> {
        let edge = request.remote_addr();
        let certificate = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
        let certificate = certificate.and_then(|tls| Some(tls.peer_certs()?.first()?.clone()));
        let authorization = request.metadata().get("authorization");
        let caller = self.door.enter(authorization, certificate).inspect_err(|denied| {
            self.service.metrics.denied(*denied);
            tracing::warn!(?edge, reason = ?denied, "not let in");
        })?;
        let place = self.service.admission.stream()?;
        let (out, frames) = mpsc::channel(OUTGOING_FRAMES);
        let (end, ended) = oneshot::channel();
        let session = session::converse(self.service.clone(), caller, place, request.into_inner(), out.clone());
        // The task ends when the edge hangs up: its frames end, or nobody takes ours.
        tokio::spawn(
            async move {
                tokio::select! {
                    served = session => drop(served.map_err(|status| end.send(status))),
                    () = out.closed() => {}
                }
            }
            .instrument(tracing::debug_span!("edge", ?edge)),
        );
        // What the stream ends with comes after all frames, and waits for no place among them.
        let last = async { ended.await.ok().map(Err) };
        let last = tokio_stream::once(last).then(|last| last).filter_map(|last| last);
        let frames = ReceiverStream::new(frames).map(|frame| Ok(*frame));
        Ok(Response::new(Box::pin(frames.chain(last))))
    }
}

/// How the continuator is reached: in the clear, or over TLS.
pub enum Transport {
    /// Without TLS.
    Plain(TcpListener),
    /// With TLS and these certificates, which may change.
    Tls(TcpListener, watch::Receiver<Arc<Arc<ServerConfig>>>),
}

/// Serves until `stop` resolves, then lets open streams end.
///
/// # Errors
/// The transport's.
pub async fn serve(
    service: Arc<Service>,
    door: Door,
    transport: Transport,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let mut draining = service.draining.clone();
    let mut ready = service.backends.ready();
    // Ready as long as a backend works and nobody has said to stop; and known before the first caller can ask.
    let report = async |serves: bool| {
        let status = if serves {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        // The empty name stands for the whole server, which most probes ask for.
        for name in ["", SERVICE_NAME] {
            reporter.set_service_status(name, status).await;
        }
    };
    report(draining.borrow_and_update().is_none() && *ready.borrow_and_update()).await;
    let health_follows = async {
        loop {
            let gone = tokio::select! {
                changed = draining.changed() => changed.is_err(),
                changed = ready.changed() => changed.is_err(),
            };
            if gone {
                std::future::pending::<()>().await;
            }
            report(draining.borrow_and_update().is_none() && *ready.borrow_and_update()).await;
        }
    };
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the embedded descriptors are valid");
    // A frame above the limit gets an answer of its own, unless it is so large that it must not be read at all.
    let limit = service.limits.frame_bytes.saturating_mul(2).max(FRAME_BYTES);
    let (counted, lifetime) = (service.clone(), service.limits.lifetime);
    let server = Server::builder()
        // A connection may be as old as a stream: then certificates are looked at again.
        .max_connection_age(lifetime)
        .max_concurrent_streams(STREAMS)
        // A device that lost its network says nothing: ask, so that its turns are freed.
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .add_service(health)
        .add_service(reflection)
        .add_service(ContinuatorServiceServer::new(Grpc { service, door }).max_decoding_message_size(limit));
    let places = Places::new(counted.limits.connections);
    let failed = move || counted.metrics.handshake_failed();
    let server = async {
        match transport {
            Transport::Plain(listener) => {
                let incoming = places.hold(TcpIncoming::from(listener).with_nodelay(Some(true)));
                server.serve_with_incoming_shutdown(incoming, stop).await
            }
            Transport::Tls(listener, certificates) => {
                let incoming = places.hold(ReceiverStream::new(tls::accept(listener, certificates, failed)));
                server.serve_with_incoming_shutdown(incoming, stop).await
            }
        }
    };
    tokio::select! {
        result = server => result,
        () = health_follows => Ok(()),
    }
}
