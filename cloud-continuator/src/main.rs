//! The continuator's program: parse, telemetry, bind, load, serve, drain.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use clap::Parser;
use cloud_continuator::{
    backend::{
        Backend,
        embedded::{self, Embedded},
        openai::OpenAi,
    },
    backends::Backends,
    cli::{Cli, Command, Serve},
    config::{self, Settings},
    grpc, models,
    session::Service,
};
use segue_shared::{client, exit::Exit, proto, telemetry};
use tokio::{net::TcpListener, signal::unix, sync::watch};
use tracing::level_filters::LevelFilter;

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
        Command::Config(options) => show(&options),
        Command::Check { url } => check(&url).await,
    };
    telemetry.shutdown().await;
    outcome
}

async fn serve(options: Serve) -> Outcome {
    let settings = options.settings().map_err(usage)?;
    let listener = TcpListener::bind(settings.listen).await.map_err(|error| {
        usage(format!(
            "cannot listen on {}: {error}; choose another address with --listen",
            settings.listen
        ))
    })?;
    let backends = Arc::new(backends(&settings).await?);
    let (drain, draining) = watch::channel(None);
    let service = Arc::new(Service {
        backends: backends.clone(),
        hedge_after: settings.hedge_after,
        judgement: settings.judgement(),
        limits: settings.limits(),
        draining,
        first_text_micros: AtomicU64::new(0),
        running: AtomicUsize::new(0),
    });
    let address = listener
        .local_addr()
        .map_or_else(|_| settings.listen.to_string(), |a| a.to_string());
    tracing::info!(%address, model = backends.leader().backend.info().model, "serving");
    let running = service.clone();
    let grace = settings.limits.drain;
    let stop = async move {
        stop_signal().await;
        tracing::info!(
            turns = running.running.load(Ordering::Relaxed),
            "stopping: no new turns"
        );
        let _ = drain.send(Some(grace));
        // Streams end by themselves when their turns are done, at the latest after the grace period.
    };
    tokio::select! {
        served = grpc::serve(service, listener, stop) => {
            served.map_err(|e| (Exit::Software, format!("the server failed: {e}")))
        }
        () = backends.keep_checking() => Ok(()),
    }
}

fn usage(error: impl ToString) -> (Exit, String) {
    (Exit::Usage, error.to_string())
}

/// Loads the models, and prepares the upstreams.
async fn backends(settings: &Settings) -> Result<Backends, (Exit, String)> {
    let mut members: Vec<(String, Arc<dyn Backend>)> = Vec::new();
    for backend in &settings.backend {
        let member: Arc<dyn Backend> = match backend {
            config::Backend::OpenAi(upstream) => {
                let options = upstream.options(settings.system_prompt.as_deref()).map_err(usage)?;
                let wrong = |e| usage(format!("backend {:?}: {e}", upstream.name));
                Arc::new(OpenAi::new(options).map_err(wrong)?)
            }
            config::Backend::Embedded(engine) => {
                let (engine, system_prompt) = (engine.clone(), settings.system_prompt.clone());
                let loaded = tokio::task::spawn_blocking(move || load(engine, system_prompt)).await;
                Arc::new(loaded.map_err(|e| (Exit::Software, e.to_string()))??)
            }
        };
        members.push((backend.name().to_owned(), member));
    }
    Ok(Backends::new(members))
}

fn load(engine: config::Embedded, system_prompt: Option<String>) -> Result<Embedded, (Exit, String)> {
    Embedded::load(embedded::Options {
        model: models::resolve(&engine.model).map_err(usage)?,
        layout: engine.layout,
        system_prompt,
        context: engine.context,
        slots: engine.slots,
        waiting: engine.waiting,
        threads: engine.threads.map(usize::from),
        gpu_layers: engine.gpu_layers,
        prefill_share: engine.prefill_share,
    })
    .map_err(usage)
}

fn show(options: &Serve) -> Outcome {
    let settings = options.settings().map_err(usage)?;
    let text = toml::to_string(&settings).map_err(|e| (Exit::Software, e.to_string()))?;
    write(&text)
}

fn write(text: &str) -> Outcome {
    use std::io::Write;
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|e| (Exit::Io, e.to_string()))
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
    write(&format!(
        "{url} serves {} (protocol {})\n",
        conversation.welcome.model, conversation.welcome.protocol_version
    ))
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
