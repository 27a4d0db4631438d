//! The continuator's program: parse, telemetry, bind, load, serve, drain.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use clap::Parser;
use cloud_continuator::{
    backend::embedded::{self, Embedded, LoadError},
    cli::{Cli, Command, Serve},
    grpc,
    session::{Limits, Service},
};
use segue_shared::{client, exit::Exit, proto, telemetry};
use tokio::{net::TcpListener, signal::unix, sync::watch};
use tracing::level_filters::LevelFilter;

/// How long running turns may take once the continuator was told to stop.
const GRACE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors.
            let code = if error.use_stderr() { Exit::Usage } else { Exit::Ok };
            let _ = error.print();
            return code.into();
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(run(cli)),
        Err(error) => Err((Exit::Software, format!("the async runtime does not start: {error}"))),
    };
    match outcome {
        Ok(()) => Exit::Ok.into(),
        Err((exit, message)) => {
            say(&message);
            exit.into()
        }
    }
}

#[expect(clippy::print_stderr, reason = "a program's last words to its user")]
fn say(message: &str) {
    eprintln!("cloud-continuator: {message}");
}

type Outcome = Result<(), (Exit, String)>;

async fn run(cli: Cli) -> Outcome {
    let level = if matches!(cli.command, Command::Serve(_)) {
        LevelFilter::INFO
    } else {
        LevelFilter::WARN
    };
    let telemetry = telemetry::init("cloud-continuator", env!("CARGO_PKG_VERSION"), level)
        .map_err(|e| (Exit::Usage, e.to_string()))?;
    let outcome = match cli.command {
        Command::Serve(options) => serve(*options).await,
        Command::Check { url } => check(&url).await,
    };
    telemetry.shutdown().await;
    outcome
}

async fn serve(options: Serve) -> Outcome {
    let listener = TcpListener::bind(options.listen).await.map_err(|error| {
        (
            Exit::Usage,
            format!(
                "cannot listen on {}: {error}; choose another address with --listen",
                options.listen
            ),
        )
    })?;
    let judgement = options.judgement.judgement();
    let load = embedded::Options {
        model: options.model,
        layout: options.layout,
        context: options.context,
        slots: options.slots,
        waiting: options.waiting,
        threads: options.threads.map(usize::from),
        gpu_layers: options.gpu_layers,
    };
    let loaded = tokio::task::spawn_blocking(move || Embedded::load(load)).await;
    let backend = loaded
        .map_err(|e| (Exit::Software, e.to_string()))?
        .map_err(|error: LoadError| (Exit::Usage, error.to_string()))?;
    let (drain, draining) = watch::channel(None);
    let service = Arc::new(Service {
        backend: Arc::new(backend),
        judgement,
        limits: Limits::default(),
        draining,
        first_text_micros: AtomicU64::new(0),
        running: AtomicUsize::new(0),
    });
    let address = listener
        .local_addr()
        .map_or_else(|_| options.listen.to_string(), |a| a.to_string());
    tracing::info!(%address, model = service.backend.info().model, "serving");
    let running = service.clone();
    let stop = async move {
        stop_signal().await;
        tracing::info!(
            turns = running.running.load(Ordering::Relaxed),
            "stopping: no new turns"
        );
        let _ = drain.send(Some(GRACE));
        // Streams end by themselves when their turns are done, at the latest after the grace period.
    };
    grpc::serve(service, listener, stop)
        .await
        .map_err(|e| (Exit::Software, format!("the server failed: {e}")))
}

async fn stop_signal() {
    let Ok(mut terminate) = unix::signal(unix::SignalKind::terminate()) else {
        return;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

async fn check(url: &str) -> Outcome {
    let failed = |e: client::ConnectError| (exit_of(&e), e.to_string());
    let channel = client::connect(url).await.map_err(failed)?;
    let hello = proto::Hello {
        agent_version: env!("CARGO_PKG_VERSION").into(),
        device_id: "check".into(),
        ..Default::default()
    };
    let conversation = client::converse(channel, url, hello).await.map_err(failed)?;
    use std::io::Write;
    let line = format!(
        "{url} serves {} (protocol {})\n",
        conversation.welcome.model, conversation.welcome.protocol_version
    );
    std::io::stdout()
        .write_all(line.as_bytes())
        .map_err(|e| (Exit::Io, e.to_string()))
}

fn exit_of(error: &client::ConnectError) -> Exit {
    match error {
        client::ConnectError::Address(_) => Exit::Usage,
        client::ConnectError::Version(..) => Exit::Protocol,
        client::ConnectError::Unreachable(..)
        | client::ConnectError::Refused(..)
        | client::ConnectError::Silent(..) => Exit::Unavailable,
    }
}
