//! Who may come in: tokens and client certificates, and the device that they belong to.

use std::{
    future::pending,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tonic::{
    Status,
    metadata::{Ascii, MetadataValue},
};

use crate::tokens::{Denied, Grant, Tokens};

/// What callers must show.
#[derive(Clone, Debug, Default)]
pub struct Door {
    /// The tokens that are accepted; `None`: no token is asked for.
    pub tokens: Option<watch::Receiver<Arc<Tokens>>>,
    /// Whether TLS asks for a certificate of an authority of ours.
    pub certificates: bool,
}

/// What a caller has shown.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    grant: Option<Grant>,
    certificate: Option<CertificateDer<'static>>,
    /// Whether a certificate is asked for.
    certificates: bool,
    tokens: Option<watch::Receiver<Arc<Tokens>>>,
}

impl Door {
    /// Looks at what came with a call. TLS has checked the certificate already.
    ///
    /// # Errors
    /// [`Denied`]
    pub fn enter(
        &self,
        authorization: Option<&MetadataValue<Ascii>>,
        certificate: Option<CertificateDer<'static>>,
    ) -> Result<Caller, Denied> {
        let grant = match &self.tokens {
            None => None,
            Some(tokens) => {
                let header = authorization
                    .ok_or(Denied::Missing)?
                    .to_str()
                    .map_err(|_| Denied::Unknown)?;
                let (scheme, token) = header.split_once(' ').ok_or(Denied::Missing)?;
                if !scheme.eq_ignore_ascii_case("bearer") {
                    return Err(Denied::Missing);
                }
                Some(tokens.borrow().check(token.trim(), SystemTime::now())?)
            }
        };
        Ok(Caller {
            grant,
            certificate,
            certificates: self.certificates,
            tokens: self.tokens.clone(),
        })
    }
}

impl Caller {
    /// The token's id, for logs.
    pub fn token(&self) -> Option<&str> {
        self.grant.as_ref().map(|grant| grant.id.as_str())
    }

    /// Checks that the caller is the device that it says it is.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` when token or certificate belong to another device.
    pub fn may_be(&self, device: &str) -> Result<(), Status> {
        if self.grant.as_ref().is_some_and(|grant| grant.device != device) {
            return Err(Status::permission_denied(
                "the token belongs to another device; use --device-id as it was given to `token new`",
            ));
        }
        if self.certificates {
            // Its names as they are written, so that a device has one name only.
            let certificate = self
                .certificate
                .as_ref()
                .and_then(|der| webpki::EndEntityCert::try_from(der).ok());
            if !certificate.is_some_and(|certificate| certificate.valid_dns_names().any(|name| name == device)) {
                return Err(Status::permission_denied(
                    "the certificate belongs to another device: --device-id must be one of its subject alternative names (DNS)",
                ));
            }
        }
        Ok(())
    }

    /// Resolves when the caller's token is not valid any more.
    pub async fn denied(&self) -> Denied {
        let (Some(grant), Some(tokens)) = (&self.grant, &self.tokens) else {
            return pending().await;
        };
        let mut tokens = tokens.clone();
        loop {
            if let Err(denied) = tokens.borrow_and_update().recheck(grant, SystemTime::now()) {
                return denied;
            }
            let expired = async {
                match grant
                    .expires
                    .map(|at| at.duration_since(SystemTime::now()).unwrap_or_default())
                {
                    // Clocks jump: it is looked at once an hour at least.
                    Some(left) => {
                        tokio::time::sleep(left.min(Duration::from_secs(3600)) + Duration::from_millis(10)).await
                    }
                    None => pending().await,
                }
            };
            tokio::select! {
                changed = tokens.changed() => if changed.is_err() { return pending().await },
                () = expired => {}
            }
        }
    }
}

impl From<Denied> for Status {
    fn from(denied: Denied) -> Self {
        Status::unauthenticated(denied.to_string())
    }
}
