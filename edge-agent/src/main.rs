//! The edge's program: parse, telemetry, load and connect side by side, talk.

use std::{future::pending, io::IsTerminal, process::ExitCode, time::Duration};

use clap::Parser;
use edge_agent::{
    cli::{Cli, Command, OutputArg, Talk},
    conversation::{Conversation, Offline, Outcome, View},
    link::Link,
    turn::Over,
    ulm::{Engine, LoadError},
    view::{
        json::{Json, failure},
        speech::Speech,
        text::{Terminal, Text},
    },
};
use segue_shared::{
    client::ConnectError,
    exit::Exit,
    proto::{self, Hello, TurnError},
    reply_log::Surface,
    telemetry,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    signal::unix,
    sync::{mpsc, oneshot},
};
use tracing::level_filters::LevelFilter;

/// How long the first question waits for news of the link: not so long that a person would notice, and long enough for what is wrong with
/// the command line to be said before the reply begins.
const FIRST_NEWS: Duration = Duration::from_millis(250);

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
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(run(cli));
            // A read from the terminal that is still under way must not keep the program.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err((Exit::Software, format!("the async runtime does not start: {error}"))),
    };
    match outcome {
        Ok(exit) => exit.into(),
        Err((exit, message)) => {
            say(&message);
            exit.into()
        }
    }
}

/// Tells the user; a full disk behind standard error is no reason to fail.
fn say(message: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "edge-agent: {message}");
}

type Failed = (Exit, String);

async fn run(cli: Cli) -> Result<Exit, Failed> {
    let telemetry = telemetry::init("edge-agent", env!("CARGO_PKG_VERSION"), LevelFilter::WARN)
        .map_err(|e| (Exit::Usage, e.to_string()))?;
    let result = match cli.command {
        Command::Ask { question, options } => ask(&question, &options).await,
        Command::Chat { options, barge_in } => chat(&options, barge_in).await,
    };
    telemetry.shutdown().await;
    result
}

async fn ask(question: &str, options: &Talk) -> Result<Exit, Failed> {
    let question = question.trim();
    if question.is_empty() {
        return Err((
            Exit::Usage,
            "the question is empty; ask something, for example: edge-agent ask \"Why is the sky blue?\"".into(),
        ));
    }
    let mut conversation = open(options).await?;
    check_length(question, &conversation)?;
    let mut view = view(options)?;
    let outcome = conversation.turn(question, &mut *view, stop_signal()).await;
    report(&outcome, &conversation)
}

/// Ctrl-C, or a polite request to end.
async fn stop_signal() {
    let Ok(mut terminate) = unix::signal(unix::SignalKind::terminate()) else {
        return pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

async fn chat(options: &Talk, barge_in: bool) -> Result<Exit, Failed> {
    let mut conversation = open(options).await?;
    let mut view = view(options)?;
    let terminal = std::io::stdin().is_terminal();
    let people = terminal && options.output == OutputArg::Text;
    if people && !options.quiet {
        let model = conversation.model().unwrap_or("nobody but the micro language model");
        say(&format!(
            "talking with {model}; an empty line or Ctrl-D ends, Ctrl-C or a new line interrupts a reply"
        ));
    }
    let mut terminate = unix::signal(unix::SignalKind::terminate()).map_err(|e| (Exit::Software, e.to_string()))?;
    let mut lines = lines();
    let mut next = None;
    loop {
        if people {
            prompt();
        }
        let line = match next.take() {
            Some(line) => Some(line),
            None => tokio::select! {
                line = lines.recv() => line,
                _ = tokio::signal::ctrl_c() => return Ok(Exit::Ok),
                _ = terminate.recv() => return Ok(Exit::Ok),
                () = conversation.attend() => None,
            },
        };
        let Some(line) = line else { return Ok(Exit::Ok) };
        let line = line.map_err(|e| (Exit::Io, format!("standard input: {e}")))?;
        let Ok(line) = String::from_utf8(line) else {
            say("that line is no UTF-8 text and was left out");
            continue;
        };
        let line = line.trim();
        if people && line.is_empty() {
            return Ok(Exit::Ok);
        }
        if line.is_empty() {
            continue;
        }
        if let Err((_, message)) = check_length(line, &conversation) {
            say(&message);
            continue;
        }
        let mut ended = false;
        let interrupt = async {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => ended = true,
                // A new question is an interruption; the end of the input is none.
                Some(line) = lines.recv(), if terminal || barge_in => next = Some(line),
            }
        };
        let outcome = conversation.turn(line, &mut *view, interrupt).await;
        if ended {
            return Ok(Exit::Interrupted);
        }
        match &outcome.over {
            Over::Done(_) | Over::Alone(_) | Over::Cancelled => {}
            Over::Failed { .. } => drop(report(&outcome, &conversation).map_err(|(_, message)| say(&message))),
            // The next question may find a continuator again.
            Over::Lost(_) if !conversation.ended() => {
                let _ = report(&outcome, &conversation).map_err(|(_, message)| say(&message));
            }
            Over::Lost(_) | Over::Broken(_) => return report(&outcome, &conversation),
        }
    }
}

/// Lines of standard input, as they come; read by a task of its own, so that a reply does not keep them waiting.
fn lines() -> mpsc::Receiver<std::io::Result<Vec<u8>>> {
    let (send, lines) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut input = BufReader::new(tokio::io::stdin());
        loop {
            let mut bytes = Vec::new();
            let line = match input.read_until(b'\n', &mut bytes).await {
                Ok(0) => return,
                Ok(_) => Ok(bytes),
                Err(error) => Err(error),
            };
            if send.send(line).await.is_err() {
                return;
            }
        }
    });
    lines
}

fn prompt() {
    use std::io::Write;
    let mut out = std::io::stdout();
    let _ = out.write_all(b"> ").and_then(|()| out.flush());
}

/// Loads the model and connects, both at once.
async fn open(options: &Talk) -> Result<Conversation, Failed> {
    let ulm = options.ulm();
    let folder = ulm.folder.display().to_string();
    let (introduce, hello) = oneshot::channel();
    let link = (options.offline != Offline::Always).then(|| Link::start(options.link(), hello));
    // Loading is waited for even when there is nobody to talk to: a program must not end while libtorch computes.
    let engine = tokio::task::spawn_blocking(move || Engine::load(ulm)).await;
    let engine = engine.map_err(|e| (Exit::Software, e.to_string()))?.map_err(|error: LoadError| {
        let hint =
            "name another folder with --model; it needs config.json, model.safetensors and tokenizer.json of a Llama-family model";
        (Exit::Usage, format!("the micro language model in {folder} cannot be used: {error}; {hint}"))
    })?;
    let info = engine.info();
    tracing::debug!(load_ms = info.load_time.as_millis() as u64, precision = ?info.precision, parameters = info.parameters, "model loaded");
    let surface = match options.surface() {
        Surface::Revisable => proto::Surface::Revisable,
        Surface::AppendOnly => proto::Surface::AppendOnly,
    };
    let _ = introduce.send(Hello {
        agent_version: env!("CARGO_PKG_VERSION").into(),
        device_id: options.device_id.clone().unwrap_or_else(device_id),
        ulm_name: info.name.clone(),
        ulm_fingerprint: info.fingerprint.clone(),
        surface: surface.into(),
        ..Hello::default()
    });
    let mut conversation = Conversation::new(engine, link, options.servers.len(), options.options());
    conversation.ready(FIRST_NEWS).await;
    match conversation.failure() {
        Some(error) if conversation.ended() || options.offline == Offline::Never => Err(cannot_connect(error)),
        _ => Ok(conversation),
    }
}

/// The machine's name stands for the device.
fn device_id() -> String {
    let name = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() || name.len() > 128 {
        "edge".into()
    } else {
        name.to_owned()
    }
}

fn cannot_connect(error: &ConnectError) -> Failed {
    let exit = match error {
        ConnectError::Address(_) | ConnectError::Plaintext(_) | ConnectError::File(..) => Exit::Usage,
        ConnectError::Version(..) => Exit::Protocol,
        ConnectError::Denied(..) | ConnectError::Insecure(..) => Exit::NotPermitted,
        ConnectError::Unreachable(..) | ConnectError::Refused(..) | ConnectError::Silent(..) => Exit::Unavailable,
    };
    (exit, format!("{error} (--server)"))
}

fn check_length(question: &str, conversation: &Conversation) -> Result<(), Failed> {
    let most = conversation.question_limit();
    if question.len() > most {
        return Err((
            Exit::Usage,
            format!(
                "the question has {} bytes; the continuator takes at most {most}, so shorten it",
                question.len()
            ),
        ));
    }
    Ok(())
}

fn view(options: &Talk) -> Result<Box<dyn View>, Failed> {
    let out = std::io::stdout();
    let shown: Box<dyn View> = match options.output {
        OutputArg::Jsonl => Box::new(Json(out)),
        OutputArg::Text => {
            let columns = out
                .is_terminal()
                .then(|| terminal_size::terminal_size().map_or(80, |(w, _)| usize::from(w.0)));
            let colour = columns.is_some() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
            Box::new(Text::new(
                out,
                Terminal {
                    columns,
                    colour,
                    quiet: options.quiet,
                },
            ))
        }
    };
    match &options.speak {
        None => Ok(shown),
        Some(_) if options.surface() == Surface::Revisable => Err((
            Exit::Usage,
            "what is spoken cannot be taken back: --speak needs --surface append-only".into(),
        )),
        Some(command) => Ok(Box::new(Speech::start(command, shown).map_err(|e| (Exit::Usage, e))?)),
    }
}

/// The exit code of a turn, and what standard error says about one that failed.
fn report(outcome: &Outcome, conversation: &Conversation) -> Result<Exit, Failed> {
    let exit = match &outcome.over {
        Over::Done(_) | Over::Alone(_) => return Ok(Exit::Ok),
        Over::Cancelled => return Ok(Exit::Interrupted),
        Over::Lost(_) => conversation
            .failure()
            .map_or(Exit::Unavailable, |error| cannot_connect(error).0),
        Over::Broken(_) => Exit::Protocol,
        Over::Failed {
            error: TurnError::InvalidArgument | TurnError::ContextTooSmall,
            ..
        } => Exit::Usage,
        Over::Failed {
            error: TurnError::UnknownTurn | TurnError::UnexpectedFrame,
            ..
        } => Exit::Protocol,
        Over::Failed { .. } => Exit::Unavailable,
    };
    Err((exit, failure(&outcome.over).1))
}
