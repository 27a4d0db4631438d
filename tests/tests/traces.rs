//! One trace a turn across both processes, received over OTLP; no text of users or models in spans or logs.

use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use segue_tests::programs::{Continuator, command, finish};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

/// What arrived: (service, span).
type Spans = Arc<Mutex<Vec<(String, Span)>>>;

struct Collector(Spans);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().unwrap();
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let service = attributes
                .iter()
                .find(|a| a.key == "service.name")
                .map(|a| format!("{:?}", a.value))
                .unwrap();
            let scoped = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            spans.extend(scoped.map(|span| (service.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn edge_and_continuator_share_one_trace_a_turn() {
    let spans = Spans::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let service = TraceServiceServer::new(Collector(spans.clone()));
    tokio::spawn(
        Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );

    let canary = "Zanzibarquux";
    let (log, err) = {
        let endpoint = endpoint.clone();
        tokio::task::spawn_blocking(move || {
            let continuator = Continuator::start_with(&[], |c| {
                c.env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)
                    .env("SEGUE_LOG", "trace");
            });
            let mut edge = command("edge-agent");
            edge.args([
                "ask",
                "--server",
                &continuator.url,
                "--force-opener",
                "Well, Zanzibarquux is a fine",
            ])
            .arg("What is Zanzibarquux?")
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)
            .env("SEGUE_LOG", "trace");
            let done = finish(edge, b"");
            assert_eq!(done.code, 0, "{}", done.err);
            assert!(done.out.contains(canary));
            continuator.signal(15);
            (continuator.wait().1, done.err)
        })
        .await
        .unwrap()
    };
    let ours = |text: &str| -> Vec<String> {
        // h2 and hyper print frames at trace level; what must be silent is our own code.
        text.lines()
            .filter(|l| !l.contains("frame") && !l.contains("h2"))
            .map(str::to_owned)
            .collect()
    };
    for line in ours(&log).iter().chain(&ours(&err)) {
        assert!(!line.contains(canary), "{line}");
    }

    let spans = spans.lock().unwrap();
    let find = |name: &str| {
        spans
            .iter()
            .find(|(_, s)| s.name == name)
            .unwrap_or_else(|| panic!("no {name}: {spans:#?}"))
    };
    let (turn_service, turn) = find("turn");
    let (cloud_service, continuation) = find("continuation");
    assert!(turn_service.contains("edge-agent") && cloud_service.contains("cloud-continuator"));
    assert!(turn.parent_span_id.is_empty());
    for (name, parent) in [
        ("opener.generate", turn),
        ("handoff", turn),
        ("render", turn),
        ("continuation", turn),
        ("prefill", continuation),
        ("verify", continuation),
        ("generate", continuation),
    ] {
        let span = &find(name).1;
        assert_eq!(span.trace_id, turn.trace_id, "{name}");
        assert_eq!(span.parent_span_id, parent.span_id, "{name}");
        assert!(
            span.start_time_unix_nano >= turn.start_time_unix_nano
                && span.end_time_unix_nano >= span.start_time_unix_nano
        );
    }
    let has = |span: &Span, key: &str| span.attributes.iter().any(|a| a.key == key);
    for key in ["segue.handoff.gap", "segue.opener.words", "segue.opener.first_word"] {
        assert!(has(turn, key), "{key}: {turn:#?}");
    }
    for key in [
        "gen_ai.operation.name",
        "gen_ai.request.model",
        "gen_ai.usage.output_tokens",
        "segue.directive",
    ] {
        assert!(has(continuation, key), "{key}: {continuation:#?}");
    }
    assert!(!format!("{spans:?}").contains(canary), "text in a span");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_not_there_costs_nothing_but_the_spans() {
    tokio::task::spawn_blocking(|| {
        let nowhere = "http://127.0.0.1:9";
        let continuator = Continuator::start_with(&[], |c| {
            c.env("OTEL_EXPORTER_OTLP_ENDPOINT", nowhere);
        });
        let mut edge = command("edge-agent");
        edge.args(["ask", "--server", &continuator.url, "thanks!"])
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", nowhere);
        let done = finish(edge, b"");
        assert_eq!(done.code, 0, "{}", done.err);
    })
    .await
    .unwrap();
}
