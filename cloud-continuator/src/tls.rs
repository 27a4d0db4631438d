//! Transport security: certificates that can be renewed while serving, and the connections that use them.

use std::{
    collections::VecDeque,
    fmt::Display,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use thiserror::Error;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::AbortHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// The longest that a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes at a time.
const HANDSHAKES: usize = 1024;

/// The files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Certificate chain (PEM).
    pub cert: PathBuf,
    /// Its key (PEM).
    pub key: PathBuf,
    /// Authorities (PEM) whose certificates edges must have.
    pub client_ca: Option<PathBuf>,
}

/// Why the files cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file has not what it should.
    #[error("{0}: {1}")]
    File(String, String),
    /// The files do not belong together.
    #[error("the certificate and the key cannot be used: {0}")]
    Pair(rustls::Error),
}

impl Files {
    /// All of them.
    pub fn paths(&self) -> Vec<PathBuf> {
        [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()]
            .into_iter()
            .flatten()
            .cloned()
            .collect()
    }

    /// Reads them.
    ///
    /// # Errors
    /// [`TlsError`]
    pub fn load(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let chain = certificates(&self.cert)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|e| file(&self.key, e))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Pair)?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let bad = |e: &dyn Display| file(path, e);
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    roots.add(certificate).map_err(|e| bad(&e))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|e| bad(&e))?)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(TlsError::Pair)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|e| file(path, e))?
        .collect();
    match found.map_err(|e| file(path, e))? {
        none if none.is_empty() => Err(file(path, "it holds no certificate")),
        some => Ok(some),
    }
}

fn file(path: &Path, why: impl Display) -> TlsError {
    TlsError::File(path.display().to_string(), why.to_string())
}

/// Accepts connections and shakes hands with each, many at a time: a caller that is slow about it keeps nobody waiting, and when very many
/// are, the slowest is sent away for the next. `failed` is told of each handshake that fails.
pub fn accept(
    listener: TcpListener,
    config: watch::Receiver<Arc<Arc<ServerConfig>>>,
    failed: impl Fn() + Clone + Send + Sync + 'static,
) -> mpsc::Receiver<std::io::Result<TlsStream<TcpStream>>> {
    let (ready, connections) = mpsc::channel(16);
    tokio::spawn(async move {
        let mut shaking = VecDeque::<AbortHandle>::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            let (stream, edge) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: some will be free soon.
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let _ = stream.set_nodelay(true);
            let acceptor = TlsAcceptor::from(config.borrow().as_ref().clone());
            let (ready, tell) = (ready.clone(), failed.clone());
            let handshake = tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => return drop(ready.send(Ok(stream)).await),
                    Ok(Err(error)) => tracing::warn!(%edge, %error, "a TLS handshake failed"),
                    Err(_) => tracing::warn!(%edge, "a TLS handshake took too long"),
                }
                tell();
            });
            shaking.push_back(handshake.abort_handle());
            if shaking.len() > HANDSHAKES {
                shaking.retain(|handshake| !handshake.is_finished());
            }
            if shaking.len() > HANDSHAKES
                && let Some(slowest) = shaking.pop_front()
            {
                slowest.abort();
                tracing::warn!("too many TLS handshakes at a time; the slowest was given up");
                failed();
            }
        }
    });
    connections
}
