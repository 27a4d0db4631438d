//! Logs and traces of both programs.
//!
//! Logs go to standard error. Spans are exported over OTLP/gRPC when `OTEL_EXPORTER_OTLP_ENDPOINT` (or its `_TRACES_` form) is set,
//! and nowhere otherwise. Text of users and models is never put into either.

use std::{io::IsTerminal, time::Duration};

use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::{TraceContextExt, TracerProvider},
};
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use thiserror::Error;
use tracing::{Span, level_filters::LevelFilter};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// Environment variable with log directives (`warn`, `cloud_continuator=debug`, ...).
pub const LOG_VARIABLE: &str = "SEGUE_LOG";
/// The longest that unsent spans may delay a program's end.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Telemetry could not be set up.
#[derive(Debug, Error)]
pub enum TelemetryError {
    /// The log directives are malformed.
    #[error("{LOG_VARIABLE} is malformed: {0}; write for example `info` or `warn,cloud_continuator=debug`")]
    Filter(String),
    /// The OTLP exporter refused its settings.
    #[error("traces cannot be exported: {0}; check OTEL_EXPORTER_OTLP_ENDPOINT (for example http://localhost:4317)")]
    Exporter(String),
}

/// Keeps the exporter alive; [`Telemetry::shutdown`] sends what is left.
#[derive(Debug)]
pub struct Telemetry(Option<SdkTracerProvider>);

/// Starts logging at `level` (or as [`LOG_VARIABLE`] says) and, when an OTLP endpoint is set, exporting spans as `service`.
/// Must be called inside a tokio runtime, which carries the exporter's connection.
///
/// # Errors
/// [`TelemetryError`] when a setting is malformed. An unreachable collector is no error.
pub fn init(service: &'static str, version: &'static str, level: LevelFilter) -> Result<Telemetry, TelemetryError> {
    let filter = match std::env::var(LOG_VARIABLE) {
        Ok(directives) => EnvFilter::builder()
            .parse(directives)
            .map_err(|e| TelemetryError::Filter(e.to_string()))?,
        Err(_) => EnvFilter::builder()
            .with_default_directive(level.into())
            .parse_lossy(""),
    };
    let logs = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        // When they cannot be written there is nobody to tell.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .with_filter(filter);
    let provider = exporting().then(|| provider(service, version)).transpose()?;
    let spans = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer(service))
            .with_location(false)
            .with_threads(false)
            // Our own spans only: the transport's would be children without a story.
            .with_filter(EnvFilter::new(
                "off,edge_agent=info,cloud_continuator=info,segue_shared=info",
            ))
    });
    tracing_subscriber::registry().with(logs).with(spans).init();
    Ok(Telemetry(provider))
}

fn exporting() -> bool {
    ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
        .iter()
        .any(|name| std::env::var(name).is_ok_and(|value| !value.is_empty()))
}

fn provider(service: &'static str, version: &'static str) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .build()
        .map_err(|e| TelemetryError::Exporter(e.to_string()))?;
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(service);
    }
    let resource = resource
        .with_attribute(opentelemetry::KeyValue::new("service.version", version))
        .build();
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .build())
}

impl Telemetry {
    /// Sends what is left, within two seconds.
    pub async fn shutdown(self) {
        if let Some(provider) = self.0 {
            let flushed = off_the_runtime(move || provider.shutdown_with_timeout(FLUSH_LIMIT));
            if let Err(error) = flushed.await {
                tracing::debug!(%error, "the last spans were not sent");
            }
        }
    }
}

/// Runs a blocking call on a thread of its own, so that the exporter's connection, which lives on the async runtime, can go on.
async fn off_the_runtime<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, waiting) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || done.send(call()));
    waiting.await.expect("the thread sends its result before it ends")
}

/// W3C Trace Context of a turn, as it travels in `StartTurn`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceContext {
    /// `traceparent`; empty when there is none.
    pub traceparent: String,
    /// `tracestate`; usually empty.
    pub tracestate: String,
}

impl TraceContext {
    /// The context of `span`; empty when spans are not exported.
    pub fn of(span: &Span) -> Self {
        let mut this = Self::default();
        TraceContextPropagator::new().inject_context(&span.context(), &mut this);
        this
    }

    /// Makes `span` a child of this context; a malformed or empty context changes nothing.
    pub fn adopt(&self, span: &Span) {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), self);
        if parent.span().span_context().is_valid() {
            // It fails only where spans are not exported, and there is nothing to link there.
            let _ = span.set_parent(parent);
        }
    }
}

impl Injector for TraceContext {
    fn set(&mut self, key: &str, value: String) {
        match key {
            "traceparent" => self.traceparent = value,
            "tracestate" => self.tracestate = value,
            _ => {}
        }
    }
}

impl Extractor for TraceContext {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => Some(&self.traceparent),
            "tracestate" => Some(&self.tracestate),
            _ => None,
        }
        .map(String::as_str)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_context_is_ignored() {
        for traceparent in ["", "garbage", "00-00000000000000000000000000000000-0000000000000000-01"] {
            let context = TraceContext {
                traceparent: traceparent.into(),
                tracestate: "x=y".into(),
            };
            context.adopt(&tracing::info_span!("turn"));
        }
    }
}
