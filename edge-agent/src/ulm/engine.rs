//! The thread that owns the model and its tensors, and the handle that others hold.

use std::{
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

use super::{
    LoadError,
    config::Config,
    model::Model,
    precision::Precision,
    sampler::{Sampler, Sampling},
    text::{Codec, Word, WordCutter},
    weights::Weights,
};

/// Positions in the KV cache: a question, and as much of a reply as the μLM ever says.
const CAPACITY: usize = 512;
/// Tokens of the prompt that are read at most; of longer questions the head is left out.
const PROMPT_LIMIT: usize = 320;
/// Jobs that may wait for the thread. A device has one user and so one job at a time; callers wait when it is full.
const WAITING_JOBS: usize = 4;

/// What to load, and how to run it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder with `config.json`, `model.safetensors` and `tokenizer.json`.
    pub folder: PathBuf,
    /// Numbers to compute in; `None` measures which are fastest here.
    pub precision: Option<Precision>,
    /// Threads for matrix products; `None` takes libtorch's default.
    pub threads: Option<usize>,
}

/// What was loaded.
#[derive(Clone, Debug)]
pub struct Info {
    /// The folder's name.
    pub name: String,
    /// Hexadecimal SHA-256 of `model.safetensors`.
    pub fingerprint: String,
    /// Numbers that it computes in.
    pub precision: Precision,
    /// How many weights it has.
    pub parameters: u64,
    /// From the start of loading until the engine was warm.
    pub load_time: Duration,
}

/// One generation.
#[derive(Clone, Debug)]
pub struct Generate {
    /// What the user said.
    pub question: String,
    /// What has been said of the reply; the model goes on from there.
    pub said: String,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens to generate.
    pub max_tokens: usize,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model ended its reply (or its first line).
    Complete,
    /// `max_tokens` or the cache's end was reached.
    Length,
    /// The receiver wanted no more.
    Unwanted,
    /// libtorch failed; the engine stays usable.
    Failed,
}

/// What a generation reports.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A complete word.
    Word(Word),
    /// The last step.
    End {
        /// Why it ended.
        stop: Stop,
        /// Tokens generated.
        tokens: usize,
    },
}

/// Receives a generation's steps on the engine's thread; `Break` ends the generation before the next token.
pub type Sink = Box<dyn FnMut(Step) -> ControlFlow<()> + Send>;

struct Job {
    request: Generate,
    sink: Sink,
}

/// A handle to the engine; clones share it. The thread ends when the last one is dropped, which waits for it: a program must not end
/// while libtorch computes.
#[derive(Clone, Debug)]
pub struct Engine(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// `None` once the last handle is gone.
    jobs: Option<mpsc::SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    info: Info,
    codec: Codec,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Engine {
    /// Loads a model folder and warms it up, on the new thread; blocks until that is done.
    ///
    /// # Errors
    /// [`LoadError`] names the file, the field or the tensor that is wrong.
    pub fn load(options: Options) -> Result<Self, LoadError> {
        let (jobs, queue) = mpsc::sync_channel::<Job>(WAITING_JOBS);
        let (loaded, result) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("ulm".into())
            .spawn(move || {
                let _inference = tch::no_grad_guard();
                let built = catch_unwind(|| Worker::load(&options))
                    .unwrap_or_else(|panic| Err(LoadError::Torch(panic_text(&*panic))));
                match built {
                    Err(error) => drop(loaded.send(Err(error))),
                    Ok((mut worker, info)) => {
                        drop(loaded.send(Ok((info, worker.codec.clone()))));
                        for job in queue {
                            worker.run(job);
                        }
                    }
                }
            })
            .map_err(|e| LoadError::Torch(e.to_string()))?;
        match result
            .recv()
            .unwrap_or_else(|_| Err(LoadError::Torch("its thread ended".into())))
        {
            Ok((info, codec)) => Ok(Self(Arc::new(Shared {
                jobs: Some(jobs),
                thread: Some(thread),
                info,
                codec,
            }))),
            Err(error) => {
                let _ = thread.join();
                Err(error)
            }
        }
    }

    /// What was loaded.
    pub fn info(&self) -> &Info {
        &self.0.info
    }

    /// How many tokens a text has in the model's vocabulary.
    pub fn count(&self, text: &str) -> usize {
        self.0.codec.encode(text).len()
    }

    /// Queues a generation. Its steps go to `sink`, on the engine's thread; the last one is [`Step::End`] unless the sink broke off.
    pub fn generate(&self, request: Generate, sink: Sink) {
        // The thread lives as long as a handle does and survives libtorch's failures, so that the queue cannot be closed.
        if let Some(jobs) = &self.0.jobs {
            let _ = jobs.send(Job { request, sink });
        }
    }
}

struct Worker {
    codec: Codec,
    model: Model,
    /// Tokens in the model's cache; a new prompt's common head is not computed again.
    cached: Vec<u32>,
}

impl Worker {
    fn load(options: &Options) -> Result<(Self, Info), LoadError> {
        let started = Instant::now();
        if let Some(threads) = options.threads {
            tch::set_num_threads(threads.clamp(1, 256) as i32);
        }
        let file = |name: &str| -> Result<Vec<u8>, LoadError> {
            let path = options.folder.join(name);
            std::fs::read(&path).map_err(|e| missing(&options.folder, path, e))
        };
        let json = file("config.json")?;
        let config = Config::parse(&String::from_utf8_lossy(&json))?;
        let bytes = file("model.safetensors")?;
        let fingerprint = {
            // Hashing and parsing read the same bytes; together they take one core's worth of the slower.
            let hash = || format!("{:x}", Sha256::digest(&bytes));
            std::thread::scope(|scope| {
                let hash = scope.spawn(hash);
                let codec = Codec::load(&options.folder.join("tokenizer.json"), &config);
                let weights = Weights::parse(&bytes, &config);
                (hash.join().unwrap_or_default(), codec, weights)
            })
        };
        let (fingerprint, codec, weights) = fingerprint;
        let (codec, weights) = (codec?, weights?);
        let parameters = parameters(&weights, &config);
        let precision = options
            .precision
            .unwrap_or_else(|| Precision::fastest(&weights.layers[0].gate_up));
        let capacity = CAPACITY.min(config.max_positions as usize);
        let mut worker = Self {
            model: Model::new(config, weights, precision, capacity),
            codec,
            cached: Vec::new(),
        };
        worker.warm_up();
        let name = options.folder.canonicalize().unwrap_or_else(|_| options.folder.clone());
        let name = name
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        Ok((
            worker,
            Info {
                name,
                fingerprint,
                precision,
                parameters,
                load_time: started.elapsed(),
            },
        ))
    }

    /// The first passes of each shape are slow (libtorch picks and compiles kernels); a user should not wait for them.
    fn warm_up(&mut self) {
        for words in [3, 12] {
            let request = Generate {
                question: "warm up ".repeat(words),
                said: String::new(),
                sampling: Sampling::default(),
                max_tokens: 3,
            };
            self.run(Job {
                request,
                sink: Box::new(|_| ControlFlow::Continue(())),
            });
        }
    }

    fn run(&mut self, job: Job) {
        let Job { request, mut sink } = job;
        let done = catch_unwind(AssertUnwindSafe(|| self.generate(&request, &mut sink)));
        let end = done.unwrap_or_else(|panic| {
            tracing::error!(error = panic_text(&*panic), "libtorch failed");
            self.cached.clear();
            self.model.truncate(0);
            Step::End {
                stop: Stop::Failed,
                tokens: 0,
            }
        });
        let _ = sink(end);
    }

    fn generate(&mut self, request: &Generate, sink: &mut Sink) -> Step {
        let limit = PROMPT_LIMIT.min(self.model.capacity() * 3 / 4);
        let mut prompt = self.codec.prompt(&request.question, limit);
        let mut reply = self.codec.encode(&request.said);
        // Of a reply that is longer than the rest of the cache, the model sees the end.
        let room = (self.model.capacity() - prompt.len()).saturating_sub(request.max_tokens.min(64));
        reply.drain(..reply.len().saturating_sub(room));
        prompt.extend(&reply);
        let head = reply.len();
        let common = prompt
            .iter()
            .zip(&self.cached)
            .take_while(|(a, b)| a == b)
            .count()
            .min(prompt.len() - 1);
        self.model.truncate(common);
        self.cached.truncate(common);
        let mut sampler = Sampler::new(request.sampling);
        let mut text = self.codec.decode(&reply);
        let mut cutter = WordCutter::after(text.len());
        let mut fed = prompt[common..].to_vec();
        let end = |stop, reply: &[u32]| Step::End {
            stop,
            tokens: reply.len() - head,
        };
        loop {
            let ids: Vec<i64> = fed.iter().map(|t| i64::from(*t)).collect();
            let logits = self.model.forward(&ids);
            self.cached.append(&mut fed);
            let choice = sampler.choose(&logits);
            let complete = self.codec.ends(choice.token);
            if !complete {
                reply.push(choice.token);
                text = self.codec.decode(&reply);
            }
            // The opener is one line.
            let line = text.find('\n').map_or(text.as_str(), |at| &text[..at]);
            let words = if complete || line.len() < text.len() {
                cutter.finish(line)
            } else {
                cutter.push(line, choice.log_probability)
            };
            for word in words {
                if sink(Step::Word(word)).is_break() {
                    return end(Stop::Unwanted, &reply);
                }
            }
            if complete || line.len() < text.len() {
                return end(Stop::Complete, &reply);
            }
            if reply.len() - head >= request.max_tokens || self.model.length() >= self.model.capacity() {
                // A word that is still growing is not said.
                return end(Stop::Length, &reply);
            }
            fed.push(choice.token);
        }
    }
}

fn missing(folder: &Path, path: PathBuf, error: std::io::Error) -> LoadError {
    if path.ends_with("model.safetensors") {
        for (name, hint) in [
            (
                "pytorch_model.bin",
                "the folder has pytorch_model.bin; convert it to safetensors, pickles are never read",
            ),
            (
                "model.safetensors.index.json",
                "the folder's weights are in several files; merge them into one",
            ),
        ] {
            if folder.join(name).exists() {
                return LoadError::Weights(hint.into());
            }
        }
    }
    LoadError::Missing(path, error)
}

fn parameters(weights: &Weights, config: &Config) -> u64 {
    let numel = |t: &tch::Tensor| t.numel() as u64;
    let layers: u64 = weights
        .layers
        .iter()
        .map(|l| {
            [&l.attention_norm, &l.qkv, &l.out, &l.ffn_norm, &l.gate_up, &l.down]
                .into_iter()
                .map(numel)
                .sum::<u64>()
        })
        .sum();
    let output = if config.tied { 0 } else { numel(&weights.output) };
    layers + numel(&weights.embedding) + numel(&weights.norm) + output
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_else(|| "unknown failure".into())
}
