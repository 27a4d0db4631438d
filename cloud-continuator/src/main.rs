//! The continuator's program: parse, telemetry, bind, load, serve, drain.

use std::{
    future::pending,
    process::ExitCode,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, SystemTime},
};

use clap::Parser;
use cloud_continuator::{
    admission::Admission,
    backend::{
        Backend,
        embedded::{self, Embedded},
        openai::OpenAi,
    },
    backends::Backends,
    cli::{Cli, Command, Serve, TokenCommand},
    config::{self, Settings},
    door::Door,
    grpc::{self, Transport},
    http,
    metrics::Metrics,
    models,
    session::Service,
    tokens::Tokens,
    watched,
};
use segue_shared::{client, exit::Exit, proto, telemetry};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
    signal::unix,
    sync::watch,
};
use tracing::level_filters::LevelFilter;

/// What a connection may take past the grace period of its turns.
const CUT_OFF: Duration = Duration::from_secs(5);

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
    let outcome = match runtime() {
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

/// A thread per core; where there is one core only, without what several threads need to share their work, which a proxy would feel.
fn runtime() -> std::io::Result<Runtime> {
    let one = std::thread::available_parallelism().is_ok_and(|cores| cores.get() == 1);
    let mut builder = if one {
        Builder::new_current_thread()
    } else {
        Builder::new_multi_thread()
    };
    builder.enable_all().build()
}

/// Tells the user; a full disk behind standard error is no reason to fail.
fn say(message: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "cloud-continuator: {message}");
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
        Command::Check { url, access, device_id } => check(&url, &access, device_id).await,
        Command::Token(command) => token(command),
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
    let operators = match settings.metrics_listen {
        None => None,
        Some(address) => Some(TcpListener::bind(address).await.map_err(|error| {
            usage(format!(
                "cannot listen on {address}: {error}; choose another address with --metrics-listen"
            ))
        })?),
    };
    let certificates = match settings.tls() {
        None => None,
        Some(files) => {
            let paths = files.paths();
            Some(watched::watch("certificates", paths, move || files.load()).map_err(usage)?)
        }
    };
    let tokens = match settings.auth.tokens_file.clone() {
        None => None,
        Some(path) => Some(watched::watch("tokens", vec![path.clone()], move || Tokens::read(&path)).map_err(usage)?),
    };
    let door = Door {
        tokens,
        certificates: settings.transport.client_ca_file.is_some(),
    };
    if !settings.listen.ip().is_loopback() && door.tokens.is_none() && !door.certificates {
        tracing::warn!(
            "everybody who reaches this address is let in: ask for tokens (--tokens) or certificates (--client-ca)"
        );
    }
    let backends = Arc::new(backends(&settings).await?);
    let (drain, draining) = watch::channel(None);
    let service = Arc::new(Service {
        backends: backends.clone(),
        hedge_after: settings.hedge_after,
        judgement: settings.judgement(),
        limits: settings.limits(),
        draining,
        first_text_micros: AtomicU64::new(0),
        admission: Admission::new(settings.admission()),
        metrics: Metrics::default(),
    });
    let address = listener
        .local_addr()
        .map_or_else(|_| settings.listen.to_string(), |a| a.to_string());
    let tls = certificates.is_some();
    let metrics = operators.as_ref().and_then(|listener| listener.local_addr().ok());
    tracing::info!(%address, metrics = metrics.map(tracing::field::display), model = backends.leader().backend.info().model, tls, "serving");
    let transport = match certificates {
        None => Transport::Plain(listener),
        Some(certificates) => Transport::Tls(listener, certificates),
    };
    let grace = settings.limits.drain;
    let (draining, running) = (service.draining.clone(), service.clone());
    let stop = async move {
        stop_signal().await;
        let (streams, turns) = running.admission.in_use();
        tracing::info!(streams, turns, "stopping: no new turns");
        let _ = drain.send(Some(grace));
        // Streams end by themselves when their turns are done, at the latest after the grace period.
    };
    let probes = service.clone();
    let probes = async move {
        match operators {
            Some(listener) => http::serve(probes, listener).await,
            None => pending().await,
        }
    };
    tokio::select! {
        served = grpc::serve(service, door, transport, stop) => {
            served.map_err(|e| (Exit::Software, format!("the server failed: {e}")))
        }
        served = probes => served.map_err(|e| (Exit::Software, format!("metrics: {e}"))),
        () = backends.keep_checking() => Ok(()),
        () = impatience(draining, grace) => Ok(()),
    }
}

/// Resolves when what drains must not be waited for any longer: after its grace, or when somebody asks again.
async fn impatience(mut draining: watch::Receiver<Option<Duration>>, grace: Duration) {
    if draining.wait_for(Option::is_some).await.is_err() {
        return pending().await;
    }
    tokio::select! {
        () = tokio::time::sleep(grace + CUT_OFF) => tracing::warn!("connections that would not end are cut off"),
        () = stop_signal() => tracing::warn!("told to stop again: running turns are cut off"),
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

async fn check(url: &str, access: &client::Access, device_id: String) -> Outcome {
    let failed = |e: client::ConnectError| (exit_of(&e), e.to_string());
    let channel = client::connect(url, access).await.map_err(failed)?;
    let hello = proto::Hello {
        agent_version: env!("CARGO_PKG_VERSION").into(),
        device_id,
        ..Default::default()
    };
    let conversation = client::converse(channel, url, access, hello).await.map_err(failed)?;
    write(&format!(
        "{url} serves {} (protocol {})\n",
        conversation.welcome.model, conversation.welcome.protocol_version
    ))
}

fn token(command: TokenCommand) -> Outcome {
    let now = SystemTime::now();
    match command {
        TokenCommand::New { device, expires, file } => {
            let token = Tokens::change(&file.path, |tokens| tokens.issue(&device, now, expires)).map_err(usage)?;
            write(&format!("{token}\n"))
        }
        TokenCommand::Revoke { id, file } => {
            Tokens::change(&file.path, |tokens| tokens.revoke(&id, now)).map_err(usage)
        }
        TokenCommand::List { file } => {
            let tokens = Tokens::read(&file.path).map_err(usage)?;
            let mut table = format!("{:<10} {:<24} {:<22} {}\n", "ID", "DEVICE", "CREATED", "STATE");
            for entry in &tokens.token {
                table.push_str(&format!(
                    "{:<10} {:<24} {:<22} {}\n",
                    entry.id,
                    entry.device,
                    humantime::format_rfc3339_seconds(entry.created),
                    entry.state(now)
                ));
            }
            write(&table)
        }
    }
}

fn exit_of(error: &client::ConnectError) -> Exit {
    match error {
        client::ConnectError::Address(_) | client::ConnectError::Plaintext(_) | client::ConnectError::File(..) => {
            Exit::Usage
        }
        client::ConnectError::Version(..) => Exit::Protocol,
        client::ConnectError::Denied(..) | client::ConnectError::Insecure(..) => Exit::NotPermitted,
        client::ConnectError::Unreachable(..)
        | client::ConnectError::Refused(..)
        | client::ConnectError::Silent(..) => Exit::Unavailable,
    }
}
