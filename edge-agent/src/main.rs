//! The edge's program: parse, telemetry, load and connect side by side, talk.

use std::{io::IsTerminal, process::ExitCode};

use clap::Parser;
use edge_agent::{
    cli::{Cli, Command, OutputArg, Talk},
    conversation::{Conversation, Outcome, View},
    turn::Over,
    ulm::{Engine, LoadError},
    view::{
        json::{Json, failure},
        speech::Speech,
        text::{Terminal, Text},
    },
};
use segue_shared::{
    client::{self, ConnectError},
    exit::Exit,
    proto::{self, Hello, TurnError},
    reply_log::Surface,
    telemetry,
};
use tokio::io::{AsyncBufReadExt, BufReader};
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

#[expect(clippy::print_stderr, reason = "a program's words to its user")]
fn say(message: &str) {
    eprintln!("edge-agent: {message}");
}

type Failed = (Exit, String);

async fn run(cli: Cli) -> Result<Exit, Failed> {
    let telemetry = telemetry::init("edge-agent", env!("CARGO_PKG_VERSION"), LevelFilter::WARN)
        .map_err(|e| (Exit::Usage, e.to_string()))?;
    let result = match cli.command {
        Command::Ask { question, options } => ask(&question, &options).await,
        Command::Chat { options } => chat(&options).await,
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
    let interrupt = async { drop(tokio::signal::ctrl_c().await) };
    let outcome = conversation.turn(question, &mut *view, interrupt).await;
    report(&outcome)
}

async fn chat(options: &Talk) -> Result<Exit, Failed> {
    let mut conversation = open(options).await?;
    let mut view = view(options)?;
    let people = std::io::stdin().is_terminal() && options.output == OutputArg::Text;
    if people && !options.quiet {
        say(&format!(
            "talking with {}; an empty line or Ctrl-D ends, Ctrl-C interrupts a reply",
            conversation.model()
        ));
    }
    let mut input = BufReader::new(tokio::io::stdin());
    let mut bytes = Vec::new();
    loop {
        if people {
            prompt();
        }
        bytes.clear();
        let read = tokio::select! {
            read = input.read_until(b'\n', &mut bytes) => read.map_err(|e| (Exit::Io, format!("standard input: {e}")))?,
            _ = tokio::signal::ctrl_c() => return Ok(Exit::Ok),
        };
        let Ok(line) = std::str::from_utf8(&bytes) else {
            say("that line is no UTF-8 text and was left out");
            continue;
        };
        let line = line.trim();
        if read == 0 || (people && line.is_empty()) {
            return Ok(Exit::Ok);
        }
        if line.is_empty() {
            continue;
        }
        if let Err((_, message)) = check_length(line, &conversation) {
            say(&message);
            continue;
        }
        let interrupt = async { drop(tokio::signal::ctrl_c().await) };
        let outcome = conversation.turn(line, &mut *view, interrupt).await;
        match &outcome.over {
            Over::Done(_) | Over::Cancelled => {}
            Over::Failed { .. } => drop(report(&outcome).map_err(|(_, message)| say(&message))),
            Over::Lost(_) | Over::Broken(_) => return report(&outcome),
        }
    }
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
    let engine = tokio::task::spawn_blocking(move || Engine::load(ulm));
    // The handshake names the model, so it waits for it; the connection does not. Loading is waited for even when there is nobody to
    // talk to: a program must not end while libtorch computes.
    let (channel, engine) = tokio::join!(client::connect(&options.server), engine);
    let channel = channel.map_err(cannot_connect)?;
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
    let hello = Hello {
        agent_version: env!("CARGO_PKG_VERSION").into(),
        device_id: device_id(),
        ulm_name: info.name.clone(),
        ulm_fingerprint: info.fingerprint.clone(),
        surface: surface.into(),
        ..Hello::default()
    };
    let link = client::converse(channel, &options.server, hello)
        .await
        .map_err(cannot_connect)?;
    Ok(Conversation::new(engine, link, options.options()))
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

fn cannot_connect(error: ConnectError) -> Failed {
    let exit = match error {
        ConnectError::Address(_) => Exit::Usage,
        ConnectError::Version(..) => Exit::Protocol,
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
fn report(outcome: &Outcome) -> Result<Exit, Failed> {
    let exit = match &outcome.over {
        Over::Done(_) => return Ok(Exit::Ok),
        Over::Cancelled => return Ok(Exit::Interrupted),
        Over::Lost(_) => Exit::Unavailable,
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
