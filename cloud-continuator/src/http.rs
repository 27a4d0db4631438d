//! The operators' face, over HTTP: metrics, and whether the process lives and serves.

use std::sync::Arc;

use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    routing::get,
};
use tokio::net::TcpListener;

use crate::session::Service;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves `/metrics`, `/healthz` (the process lives) and `/readyz` (it takes new turns) until it is dropped.
///
/// # Errors
/// The listener's.
pub async fn serve(service: Arc<Service>, listener: TcpListener) -> std::io::Result<()> {
    let metrics = service.clone();
    let routes = Router::new()
        .route(
            "/metrics",
            get(move || async move { ([(CONTENT_TYPE, OPEN_METRICS)], metrics.metrics.text(&metrics.admission)) }),
        )
        .route("/healthz", get(|| async { "alive\n" }))
        .route(
            "/readyz",
            get(move || async move {
                if service.draining.borrow().is_some() {
                    (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
                } else if *service.backends.ready().borrow() {
                    (StatusCode::OK, "ready\n")
                } else {
                    (StatusCode::SERVICE_UNAVAILABLE, "no backend works\n")
                }
            }),
        );
    axum::serve(listener, routes).await
}
