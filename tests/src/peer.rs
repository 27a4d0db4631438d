//! A scripted continuator, for what a real one never does.

use std::{pin::Pin, sync::Arc};

use segue_shared::proto::{
    CloudFrame, EdgeFrame, Welcome,
    continuator_service_server::{ContinuatorService, ContinuatorServiceServer},
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// What the peer does with a stream: reads frames, sends frames or a status, and ends when it returns.
pub type Script = Arc<
    dyn Fn(Streaming<EdgeFrame>, mpsc::Sender<Result<CloudFrame, Status>>) -> Pin<Box<dyn Future<Output = ()> + Send>>
        + Send
        + Sync,
>;

struct Scripted(Script);

#[tonic::async_trait]
impl ContinuatorService for Scripted {
    type ConverseStream = Pin<Box<dyn Stream<Item = Result<CloudFrame, Status>> + Send>>;

    async fn converse(&self, request: Request<Streaming<EdgeFrame>>) -> Result<Response<Self::ConverseStream>, Status> {
        let (out, frames) = mpsc::channel(16);
        tokio::spawn((self.0)(request.into_inner(), out));
        Ok(Response::new(Box::pin(ReceiverStream::new(frames))))
    }
}

/// A running peer; ends when dropped.
pub struct Peer {
    /// Its address as a URL.
    pub url: String,
    server: JoinHandle<()>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Peer {
    /// Starts a peer that follows `script` on every stream.
    ///
    /// # Panics
    /// When no port is free.
    pub async fn start<F, R>(script: F) -> Self
    where
        F: Fn(Streaming<EdgeFrame>, mpsc::Sender<Result<CloudFrame, Status>>) -> R + Send + Sync + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let url = format!(
            "http://{}",
            listener.local_addr().expect("a bound socket has an address")
        );
        let script: Script = Arc::new(move |frames, out| Box::pin(script(frames, out)));
        let serve = Server::builder()
            .add_service(ContinuatorServiceServer::new(Scripted(script)))
            .serve_with_incoming(TcpListenerStream::new(listener));
        Self {
            url,
            server: tokio::spawn(async move { drop(serve.await) }),
        }
    }
}

/// A welcome that accepts everything.
pub fn welcome(protocol_version: u32) -> Welcome {
    Welcome {
        protocol_version,
        model: "scripted".into(),
        ..Welcome::default()
    }
}

/// Reads frames until one satisfies `wanted`.
pub async fn until(frames: &mut Streaming<EdgeFrame>, wanted: impl Fn(&EdgeFrame) -> bool) -> Option<EdgeFrame> {
    while let Some(Ok(frame)) = frames.next().await {
        if wanted(&frame) {
            return Some(frame);
        }
    }
    None
}
