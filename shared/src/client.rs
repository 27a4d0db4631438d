//! Calling a continuator: the connection and the handshake.

use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::proto::{
    CloudFrame, EdgeFrame, Hello, MAX_PROTOCOL_VERSION, MIN_PROTOCOL_VERSION, Welcome, cloud_frame,
    continuator_service_client::ContinuatorServiceClient,
};

/// The longest that connecting may take.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// The longest that the handshake may take once connected.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Frames that may wait for the network; a sender waits when it is full. Frames are small and a turn sends about ten.
const OUTGOING_FRAMES: usize = 64;

/// Why there is no conversation with a continuator.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The address is no URL that can be called.
    #[error("`{0}` is no address of a continuator; write for example http://127.0.0.1:50051")]
    Address(String),
    /// Nothing answers there.
    #[error("no continuator answers at {0} ({1}); start one with `cloud-continuator serve`, or name another")]
    Unreachable(String, String),
    /// Something answers, but not as a continuator of our version.
    #[error(
        "the server at {0} is no Segue continuator that this version can talk to ({1}); update the older of the two"
    )]
    Version(String, String),
    /// The continuator refused the handshake.
    #[error("the continuator at {0} refused: {1}")]
    Refused(String, String),
    /// It did not answer in time.
    #[error("the continuator at {0} did not answer within {1:?}; it may be overloaded, or no continuator at all")]
    Silent(String, Duration),
}

/// An open conversation.
#[derive(Debug)]
pub struct Conversation {
    /// What the continuator said first.
    pub welcome: Welcome,
    /// Frames to it. Dropping the sender ends the conversation once running turns are done.
    pub outgoing: mpsc::Sender<EdgeFrame>,
    /// Frames from it.
    pub incoming: Streaming<CloudFrame>,
}

/// Connects to the continuator at `url`.
///
/// # Errors
/// [`ConnectError::Address`], [`ConnectError::Unreachable`] or [`ConnectError::Silent`].
pub async fn connect(url: &str) -> Result<Channel, ConnectError> {
    let address = || ConnectError::Address(url.to_owned());
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|_| address())?;
    if endpoint.uri().scheme_str() != Some("http") || endpoint.uri().host().is_none() {
        return Err(address());
    }
    endpoint
        .connect_timeout(CONNECT_LIMIT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .connect()
        .await
        .map_err(|error| ConnectError::Unreachable(url.to_owned(), root_cause(&error)))
}

/// Opens a conversation: sends `hello` (its protocol versions are filled in here) and waits for the welcome.
///
/// # Errors
/// [`ConnectError::Version`], [`ConnectError::Refused`], [`ConnectError::Unreachable`] or [`ConnectError::Silent`].
pub async fn converse(channel: Channel, url: &str, hello: Hello) -> Result<Conversation, ConnectError> {
    let hello = Hello {
        min_protocol_version: MIN_PROTOCOL_VERSION,
        max_protocol_version: MAX_PROTOCOL_VERSION,
        ..hello
    };
    let (outgoing, frames) = mpsc::channel(OUTGOING_FRAMES);
    // The channel is new and has room.
    let _ = outgoing.try_send(hello.into());
    let shake = async {
        let answer = ContinuatorServiceClient::new(channel)
            .converse(ReceiverStream::new(frames))
            .await;
        let mut incoming = answer.map_err(|status| refused(url, status))?.into_inner();
        match incoming
            .message()
            .await
            .map_err(|status| refused(url, status))?
            .and_then(|frame| frame.body)
        {
            Some(cloud_frame::Body::Welcome(welcome)) => {
                let version = welcome.protocol_version;
                if !(MIN_PROTOCOL_VERSION..=MAX_PROTOCOL_VERSION).contains(&version) {
                    return Err(ConnectError::Version(
                        url.to_owned(),
                        format!("it chose protocol version {version}"),
                    ));
                }
                Ok(Conversation {
                    welcome,
                    outgoing,
                    incoming,
                })
            }
            _ => Err(ConnectError::Version(
                url.to_owned(),
                "its first frame is no welcome".into(),
            )),
        }
    };
    tokio::time::timeout(HANDSHAKE_LIMIT, shake)
        .await
        .unwrap_or_else(|_| Err(ConnectError::Silent(url.to_owned(), HANDSHAKE_LIMIT)))
}

fn refused(url: &str, status: Status) -> ConnectError {
    let (url, message) = (url.to_owned(), status.message().to_owned());
    match status.code() {
        Code::Unimplemented | Code::FailedPrecondition => ConnectError::Version(url, message),
        // What tonic makes of a server that speaks no gRPC.
        Code::Unknown | Code::Internal => ConnectError::Version(url, message),
        Code::Unavailable if message.is_empty() => ConnectError::Unreachable(url, "the connection was closed".into()),
        code => ConnectError::Refused(url, format!("{message} ({code:?})")),
    }
}

/// The innermost cause of an error, which says most: "connection refused" and not "transport error".
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
