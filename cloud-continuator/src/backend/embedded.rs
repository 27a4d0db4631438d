//! The embedded backend: llama.cpp on a thread of its own, GGUF weights.

mod engine;
mod pace;
mod sequence;

use std::{
    fs::File,
    io::Read,
    num::NonZeroU32,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc::{self, SyncSender, TrySendError},
    },
    thread::JoinHandle,
};

use llama_cpp_2::{
    LogOptions,
    context::params::LlamaContextParams,
    llama_backend::LlamaBackend,
    model::{LlamaChatMessage, LlamaModel, params::LlamaModelParams},
    send_logs_to_tracing,
};
use thiserror::Error;
use tokio_stream::wrappers::ReceiverStream;

use self::engine::{BATCH, Command, Engine};
use super::{Backend, Event, Failure, Info, Request, Turn};
use crate::layout::Layout;

/// Commands that may wait for the engine; a caller whose command finds the queue full is overloaded.
const WAITING_COMMANDS: usize = 1024;
/// Events that may wait for a turn; the engine generates nothing for it while they fill up.
const WAITING_EVENTS: usize = 64;

/// What to load, and how to run it.
#[derive(Clone, Debug)]
pub struct Options {
    /// A GGUF file.
    pub model: PathBuf,
    /// Prompt layout; `None` chooses by the model.
    pub layout: Option<Layout>,
    /// What the model is told first; `None`: the layout's own.
    pub system_prompt: Option<String>,
    /// KV cells for all turns together, in tokens.
    pub context: u32,
    /// Turns that run at a time.
    pub slots: u32,
    /// Turns that may wait for a place.
    pub waiting: usize,
    /// Threads; `None` takes one per core.
    pub threads: Option<usize>,
    /// Layers to offload to a GPU, where the build supports one.
    pub gpu_layers: u32,
    /// How much longer a step may take for reading prompts while others generate, as a share of the step.
    pub prefill_share: f32,
}

impl Options {
    /// The defaults, for a model.
    pub fn new(model: PathBuf) -> Self {
        Self {
            model,
            layout: None,
            system_prompt: None,
            context: 8192,
            slots: 16,
            waiting: 64,
            threads: None,
            gpu_layers: 0,
            prefill_share: 0.3,
        }
    }
}

/// Why a model cannot be served.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error(
        "the model {0} cannot be read: {1}; name a GGUF file with --model, or run `make setup` for the default one"
    )]
    Unreadable(String, std::io::Error),
    /// It is something else.
    #[error("{0} is no GGUF model (it begins with {1:?}); name a GGUF file with --model")]
    Foreign(String, String),
    /// llama.cpp refused it.
    #[error("llama.cpp cannot load {0}: {1}; the file may be damaged, no language model, or too new for this build")]
    Refused(String, String),
    /// The settings do not fit it.
    #[error("{0}")]
    Settings(String),
}

/// A handle to the engine's thread.
#[derive(Debug)]
pub struct Embedded {
    info: Info,
    commands: SyncSender<Command>,
    next: AtomicU64,
    thread: JoinHandle<()>,
}

impl Embedded {
    /// Loads the model and reads the prompt's shared head; blocks until both are done.
    ///
    /// # Errors
    /// [`LoadError`] says which file or setting is wrong.
    pub fn load(options: Options) -> Result<Self, LoadError> {
        if options.gpu_layers > 0 && !cfg!(any(feature = "cuda", feature = "vulkan")) {
            return Err(LoadError::Settings(
                "gpu_layers is above 0, but this build has no GPU support: build with --features cuda or vulkan".into(),
            ));
        }
        check_file(&options.model)?;
        let (commands, queue) = mpsc::sync_channel(WAITING_COMMANDS);
        let (loaded, result) = mpsc::channel();
        let settings = |e: String| LoadError::Settings(e);
        let thread = std::thread::Builder::new()
            .name("llama".into())
            .spawn(move || {
                // Model and context borrow from each other: they live on this thread's stack.
                let serve = || -> Result<(), LoadError> {
                    send_logs_to_tracing(LogOptions::default().with_logs_enabled(false));
                    let backend = LlamaBackend::init().map_err(|e| settings(e.to_string()))?;
                    let refused = |e: String| LoadError::Refused(options.model.display().to_string(), e);
                    let params = LlamaModelParams::default().with_n_gpu_layers(options.gpu_layers);
                    let model = LlamaModel::load_from_file(&backend, &options.model, &params)
                        .map_err(|e| refused(e.to_string()))?;
                    let layout = options
                        .layout
                        .unwrap_or_else(|| Layout::choose(model.n_params(), model.chat_template(None).is_ok()));
                    let context = model
                        .new_context(&backend, context_params(&options))
                        .map_err(|e| refused(format!("no context of {} tokens ({e})", options.context)))?;
                    let engine = Engine::new(&model, context, layout, &options).map_err(settings)?;
                    tracing::info!(
                        parameters = model.n_params(),
                        ?layout,
                        context = options.context,
                        "model loaded"
                    );
                    let _ = loaded.send(Ok(name_of(&model, &options.model)));
                    engine.run(&queue);
                    Ok(())
                };
                if let Err(error) = serve() {
                    let _ = loaded.send(Err(error));
                }
            })
            .map_err(|e| settings(e.to_string()))?;
        let model = result
            .recv()
            .unwrap_or_else(|_| Err(settings("the engine's thread ended".into())))?;
        Ok(Self {
            info: Info {
                model,
                provider: "llama_cpp",
                scores: true,
                local: true,
            },
            commands,
            next: AtomicU64::new(1),
            thread,
        })
    }
}

impl Backend for Embedded {
    fn info(&self) -> &Info {
        &self.info
    }

    fn open(&self, request: Request) -> Result<Turn, Failure> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (events, receiver) = tokio::sync::mpsc::channel::<Event>(WAITING_EVENTS);
        let refused = |error: TrySendError<Command>| match error {
            TrySendError::Full(_) => Failure::Overloaded { retry_after: None },
            TrySendError::Disconnected(_) => Failure::stopped(),
        };
        self.commands
            .try_send(Command::Open(id, Box::new(request), events))
            .map_err(refused)?;
        let commands = self.commands.clone();
        Ok(Turn::new(
            move |input| commands.try_send(Command::Input(id, input)).map_err(refused),
            ReceiverStream::new(receiver),
        ))
    }

    fn check(&self) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + '_>> {
        let result = if self.thread.is_finished() {
            Err(Failure::stopped())
        } else {
            Ok(())
        };
        Box::pin(std::future::ready(result))
    }
}

fn context_params(options: &Options) -> LlamaContextParams {
    let threads = options
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)) as i32;
    LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(options.context))
        .with_n_batch(BATCH as u32)
        .with_n_ubatch(BATCH as u32)
        .with_n_seq_max(options.slots + 1)
        .with_kv_unified(true)
        .with_n_threads(threads)
        .with_n_threads_batch(threads)
}

fn check_file(path: &Path) -> Result<(), LoadError> {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    match read {
        Err(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => {
            Err(LoadError::Unreadable(path.display().to_string(), error))
        }
        _ if &magic == b"GGUF" => Ok(()),
        _ => Err(LoadError::Foreign(
            path.display().to_string(),
            String::from_utf8_lossy(&magic).into_owned(),
        )),
    }
}

fn name_of(model: &LlamaModel, path: &Path) -> String {
    let stem = || {
        path.file_stem()
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    model
        .meta_val_str("general.name")
        .ok()
        .filter(|name| !name.trim().is_empty())
        .unwrap_or_else(stem)
}

/// Renders the model's own chat template.
fn render(model: &LlamaModel, messages: &[(&str, String)]) -> Result<String, String> {
    let template = model
        .chat_template(None)
        .map_err(|e| format!("the model has no chat template ({e}); use --layout dialogue"))?;
    let chat: Result<Vec<_>, _> = messages
        .iter()
        .map(|(role, text)| LlamaChatMessage::new((*role).to_owned(), text.clone()))
        .collect();
    let chat = chat.map_err(|e| e.to_string())?;
    model
        .apply_chat_template(&template, &chat, true)
        .map_err(|e| format!("the model's chat template: {e}"))
}
