//! Calling a continuator: the connection, who we are, and the handshake.

use std::{
    error::Error as StdError,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
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
/// Silence on a connection after which it is asked whether it still lives, and how long the answer may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));

/// How a continuator is trusted, and how it comes to trust us. Files are read at every connection, so that renewed ones take effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Security")]
pub struct Access {
    /// Certificates (PEM) of the authorities to trust [default: the system's].
    #[arg(long, env = "SEGUE_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Our own certificate chain (PEM), for mutual TLS.
    #[arg(long, env = "SEGUE_CERT", value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// The key (PEM) of our certificate.
    #[arg(long, env = "SEGUE_KEY", value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// File with our token, as `cloud-continuator token new` printed it.
    #[arg(long, env = "SEGUE_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// The name that the continuator's certificate must have [default: the address's].
    #[arg(long, env = "SEGUE_SERVER_NAME", value_name = "NAME")]
    pub server_name: Option<String>,
    /// Talk to other machines without TLS; what is said, and the token, can then be read on the way.
    #[arg(long)]
    pub allow_plaintext: bool,
}

/// Why there is no conversation with a continuator.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The address is no URL that can be called.
    #[error("`{0}` is no address of a continuator; write for example http://127.0.0.1:50051 or https://host:50051")]
    Address(String),
    /// It would have to be called without TLS.
    #[error(
        "{0} is another machine and would be called without TLS; use https://, or say --allow-plaintext if the network is trusted"
    )]
    Plaintext(String),
    /// A file of ours cannot be used.
    #[error("{0} cannot be used: {1}")]
    File(String, String),
    /// Nothing answers there.
    #[error("no continuator answers at {0} ({1}); start one with `cloud-continuator serve`, or name another")]
    Unreachable(String, String),
    /// Its certificate is not trusted, or ours is not.
    #[error("no secure connection to {0}: {1}; check --ca, --server-name, and the certificates of both sides")]
    Insecure(String, String),
    /// Something answers, but not as a continuator of our version.
    #[error(
        "the server at {0} is no Segue continuator that this version can talk to ({1}); update the older of the two"
    )]
    Version(String, String),
    /// The continuator does not let us in.
    #[error(
        "the continuator at {0} does not let this device in: {1}; check --token-file, --device-id, and the certificate"
    )]
    Denied(String, String),
    /// The continuator refused the handshake.
    #[error("the continuator at {0} refused: {1}")]
    Refused(String, String),
    /// It did not answer in time.
    #[error("the continuator at {0} did not answer within {1:?}; it may be overloaded, or no continuator at all")]
    Silent(String, Duration),
}

impl ConnectError {
    /// Whether the same call will fail again until somebody changes something.
    pub fn permanent(&self) -> bool {
        match self {
            Self::Address(_)
            | Self::Plaintext(_)
            | Self::File(..)
            | Self::Insecure(..)
            | Self::Version(..)
            | Self::Denied(..) => true,
            Self::Unreachable(..) | Self::Refused(..) | Self::Silent(..) => false,
        }
    }
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
/// [`ConnectError`], but for what the handshake may say.
pub async fn connect(url: &str, access: &Access) -> Result<Channel, ConnectError> {
    let address = || ConnectError::Address(url.to_owned());
    let mut endpoint = Endpoint::from_shared(url.to_owned()).map_err(|_| address())?;
    let host = endpoint.uri().host().ok_or_else(address)?.to_owned();
    match endpoint.uri().scheme_str() {
        Some("https") => {
            let tls = tls(access)?;
            let bad = |e: tonic::transport::Error| ConnectError::Insecure(url.to_owned(), root_cause(&e).to_string());
            endpoint = endpoint.tls_config(tls).map_err(bad)?;
        }
        Some("http") if access.allow_plaintext || loopback(&host) => {}
        Some("http") => return Err(ConnectError::Plaintext(url.to_owned())),
        _ => return Err(address()),
    }
    endpoint
        .connect_timeout(CONNECT_LIMIT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1)
        .connect()
        .await
        .map_err(|error| broken(url, &error))
}

/// Whether `host` is this machine.
pub fn loopback(host: &str) -> bool {
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
}

fn tls(access: &Access) -> Result<ClientTlsConfig, ConnectError> {
    let mut tls = match &access.ca {
        Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    if let (Some(certificate), Some(key)) = (&access.cert, &access.key) {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    if let Some(name) = &access.server_name {
        tls = tls.domain_name(name);
    }
    Ok(tls)
}

fn read(path: &Path) -> Result<Vec<u8>, ConnectError> {
    std::fs::read(path).map_err(|e| ConnectError::File(path.display().to_string(), e.to_string()))
}

/// What introduces us to the continuator, as the value of the `authorization` header.
fn bearer(access: &Access) -> Result<Option<MetadataValue<Ascii>>, ConnectError> {
    let Some(path) = &access.token_file else {
        return Ok(None);
    };
    let bad = |why: &str| ConnectError::File(path.display().to_string(), why.to_owned());
    let token = String::from_utf8(read(path)?).map_err(|_| bad("it is no text"))?;
    let token = token.trim();
    if token.is_empty() || token.contains(char::is_whitespace) {
        return Err(bad(
            "it must hold one token, as `cloud-continuator token new` prints it",
        ));
    }
    let mut value = MetadataValue::try_from(format!("Bearer {token}")).map_err(|_| bad("it holds no token"))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// Opens a conversation: sends `hello` (its protocol versions are filled in here) and waits for the welcome.
///
/// # Errors
/// [`ConnectError`]
pub async fn converse(
    channel: Channel,
    url: &str,
    access: &Access,
    hello: Hello,
) -> Result<Conversation, ConnectError> {
    let hello = Hello {
        min_protocol_version: MIN_PROTOCOL_VERSION,
        max_protocol_version: MAX_PROTOCOL_VERSION,
        ..hello
    };
    let (outgoing, frames) = mpsc::channel(OUTGOING_FRAMES);
    // The channel is new and has room.
    let _ = outgoing.try_send(hello.into());
    let mut request = Request::new(ReceiverStream::new(frames));
    if let Some(token) = bearer(access)? {
        request.metadata_mut().insert("authorization", token);
    }
    let shake = async {
        let answer = ContinuatorServiceClient::new(channel).converse(request).await;
        let mut incoming = answer.map_err(|status| refused(url, &status))?.into_inner();
        let first = incoming.message().await.map_err(|status| refused(url, &status))?;
        match first.and_then(|frame| frame.body) {
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

fn refused(url: &str, status: &Status) -> ConnectError {
    if status.code() != Code::Unauthenticated && insecure(status) {
        return broken(url, status);
    }
    let (url, message) = (url.to_owned(), status.message().to_owned());
    match status.code() {
        Code::Unimplemented | Code::FailedPrecondition => ConnectError::Version(url, message),
        // A connection that broke has a cause; what a server that speaks no gRPC answers has none.
        Code::Unknown | Code::Internal if status.source().is_some() => {
            ConnectError::Unreachable(url, root_cause(status).to_string())
        }
        Code::Unknown | Code::Internal => ConnectError::Version(url, message),
        Code::Unauthenticated | Code::PermissionDenied => ConnectError::Denied(url, message),
        Code::Unavailable if message.is_empty() => ConnectError::Unreachable(url, "the connection was closed".into()),
        code => ConnectError::Refused(url, format!("{message} ({code:?})")),
    }
}

/// A connection that failed below gRPC.
fn broken(url: &str, error: &(dyn StdError + 'static)) -> ConnectError {
    let why = root_cause(error).to_string();
    if insecure(error) {
        ConnectError::Insecure(url.to_owned(), why)
    } else {
        ConnectError::Unreachable(url.to_owned(), why)
    }
}

/// Whether TLS was why: a certificate that is not trusted, or no TLS at the other end.
fn insecure(error: &(dyn StdError + 'static)) -> bool {
    causes(error).any(|cause| {
        let inner = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        cause.is::<rustls::Error>() || inner.is_some_and(|inner| inner.is::<rustls::Error>())
    })
}

fn causes<'e>(error: &'e (dyn StdError + 'static)) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'e (dyn StdError + 'static)| (*error).source())
}

/// The innermost cause of an error, which says most: "connection refused" and not "transport error".
fn root_cause<'e>(error: &'e (dyn StdError + 'static)) -> &'e (dyn StdError + 'static) {
    causes(error).last().unwrap_or(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_recognised() {
        for host in ["localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]"] {
            assert!(loopback(host), "{host}");
        }
        for host in ["example.org", "10.0.0.1", "0.0.0.0", "localhost.example.org", "[::]"] {
            assert!(!loopback(host), "{host}");
        }
    }

    #[tokio::test]
    async fn other_machines_are_not_called_without_tls() {
        for (url, permanent) in [("http://192.0.2.1:1", true), ("ftp://x", true), ("nonsense", true)] {
            let error = connect(url, &Access::default()).await.expect_err(url);
            assert_eq!(error.permanent(), permanent, "{error}");
        }
    }
}
