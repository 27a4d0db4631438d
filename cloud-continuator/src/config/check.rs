//! Values that cannot be, and settings that contradict each other.

use std::{collections::HashSet, time::Duration};

use super::{Backend, ConfigError, Embedded, OpenAi, Settings, log_probability};
use crate::{
    backend::openai::{Mode, body::Style},
    verify,
};

/// Longest limit of a time.
const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// Bytes of a frame that are no text.
const FRAME_OVERHEAD: usize = 4096;
/// Largest limit of a frame's bytes.
const MOST_FRAME_BYTES: usize = 64 << 20;

impl Settings {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] names the setting and what it may be.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.faults().map_or(Ok(()), |fault| Err(ConfigError::Invalid(fault)))
    }

    fn faults(&self) -> Option<String> {
        let d = &self.directives;
        for (name, value) in [
            ("word_threshold", d.word_threshold),
            ("mean_threshold", d.mean_threshold),
        ] {
            if let Err(fault) = log_probability(value) {
                return Some(format!("directives.{name} is {value}: {fault}"));
            }
        }
        let l = &self.limits;
        let numbers = [
            ("frame_bytes", l.frame_bytes),
            ("user_text_bytes", l.user_text_bytes),
            ("turns_per_stream", l.turns_per_stream),
            ("tokens", l.tokens as usize),
        ];
        let times = [
            ("first_frame", l.first_frame),
            ("idle", l.idle),
            ("lifetime", l.lifetime),
            ("turn", l.turn),
        ];
        let zero = numbers.iter().filter(|n| n.1 == 0).map(|n| n.0);
        let no_time = times.iter().filter(|t| t.1.is_zero()).map(|t| t.0);
        if let Some(name) = zero.chain(no_time).next() {
            return Some(format!("limits.{name} is 0: nothing could ever be served"));
        }
        let times = times.into_iter().chain([("drain", l.drain)]);
        if let Some((name, _)) = times.into_iter().find(|(_, time)| *time > YEAR) {
            return Some(format!("limits.{name} is more than a year"));
        }
        let texts = l.user_text_bytes.saturating_add(l.history_bytes);
        if l.frame_bytes > MOST_FRAME_BYTES {
            return Some(format!(
                "limits.frame_bytes is {}: at most {MOST_FRAME_BYTES} can be",
                l.frame_bytes
            ));
        }
        if l.frame_bytes < texts.saturating_add(FRAME_OVERHEAD) {
            return Some(format!(
                "limits.frame_bytes ({}) must be {FRAME_OVERHEAD} larger than user_text_bytes and history_bytes together ({texts}): raise it, or lower them",
                l.frame_bytes,
            ));
        }
        self.transport_fault().or_else(|| self.backend_faults())
    }

    fn transport_fault(&self) -> Option<String> {
        let t = &self.transport;
        if t.cert_file.is_some() != t.key_file.is_some() {
            return Some("transport.cert_file and transport.key_file (--tls-cert, --tls-key) belong together: give both or neither".into());
        }
        if t.client_ca_file.is_some() && t.cert_file.is_none() {
            return Some("transport.client_ca_file (--client-ca) asks edges for certificates, which needs TLS: give a certificate and a key too".into());
        }
        if t.cert_file.is_none() && !self.listen.ip().is_loopback() && !t.allow_plaintext {
            return Some(format!(
                "{} can be reached from other machines, and there is no TLS: give --tls-cert and --tls-key, listen on 127.0.0.1, or say --allow-plaintext if the network is trusted or something before this program does TLS",
                self.listen
            ));
        }
        None
    }

    fn backend_faults(&self) -> Option<String> {
        let mut names = HashSet::new();
        let mut embedded = 0;
        for backend in &self.backend {
            if !names.insert(backend.name()) {
                return Some(format!(
                    "two backends are called {:?}: give each a name of its own",
                    backend.name()
                ));
            }
            let fault = match backend {
                Backend::Embedded(settings) => {
                    embedded += 1;
                    settings.fault()
                }
                Backend::OpenAi(settings) => settings.fault(),
            };
            if let Some(fault) = fault {
                return Some(format!("backend {:?}: {fault}", backend.name()));
            }
        }
        match self.backend.len() {
            0 => {
                return Some(
                    "there is no backend: leave [[backend]] out for the embedded engine, or describe one".into(),
                );
            }
            1 if self.hedge_after.is_some() => {
                return Some("hedge_after needs a second backend to ask: describe one, or leave it out".into());
            }
            _ => {}
        }
        if embedded > 1 {
            return Some("there can be one embedded backend only: run more models in servers of their own".into());
        }
        if embedded == 0 && self.directives.verify && self.directives.verifier == verify::Kind::Likelihood {
            return Some(
                "directives.verifier is \"likelihood\", but no backend scores openers: use \"judge\" or \"auto\""
                    .into(),
            );
        }
        None
    }
}

impl Embedded {
    fn fault(&self) -> Option<String> {
        if !(256..=1 << 22).contains(&self.context) {
            return Some(format!(
                "context is {}: it must be 256 to {} tokens",
                self.context,
                1 << 22
            ));
        }
        if !(1..=63).contains(&self.slots) {
            return Some(format!("slots is {}: it must be 1 to 63", self.slots));
        }
        if !(0.0..=10.0).contains(&self.prefill_share) || self.prefill_share == 0.0 {
            return Some(format!(
                "prefill_share is {}: it must be above 0 and at most 10",
                self.prefill_share
            ));
        }
        if self.threads == Some(0) {
            return Some("threads is 0: leave it out for one per core".into());
        }
        None
    }
}

impl OpenAi {
    fn fault(&self) -> Option<String> {
        if self.base_url.is_empty() {
            return Some("base_url is missing: the API's address, like http://127.0.0.1:8000/v1".into());
        }
        if self.model.trim().is_empty() {
            return Some("model is missing: the model's name at the server".into());
        }
        if self.api_key_file.is_some() && self.api_key_env.is_some() {
            return Some("api_key_file and api_key_env are both set: keep one".into());
        }
        if self.max_tokens_field.is_empty() {
            return Some("max_tokens_field is empty: it is the name of a field".into());
        }
        let ours = ["model", "messages", "stream", self.max_tokens_field.as_str()];
        let touched = |field: &&&str| self.omit.iter().any(|o| o == **field) || self.extra_body.contains_key(**field);
        if let Some(field) = ours.iter().find(touched) {
            return Some(format!(
                "extra_body and omit cannot be about {field:?}: it is set for every request"
            ));
        }
        if self.mode == Mode::Prompt && self.prefill_style != Style::Flags {
            return Some("prefill_style means nothing with mode = \"prompt\": leave one of them out".into());
        }
        let times = [
            ("connect_timeout", self.connect_timeout),
            ("first_token_timeout", self.first_token_timeout),
            ("stall_timeout", self.stall_timeout),
        ];
        times
            .iter()
            .find(|t| t.1.is_zero())
            .map(|t| format!("{} is 0: no answer could be in time", t.0))
    }
}
