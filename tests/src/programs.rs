//! Running the two programs.

use std::{
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use serde_json::Value;

/// The longest that any program may take for one test.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the root")
        .to_owned()
}

/// A program of this build.
///
/// # Panics
/// When it was not built.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let folder = test
        .ancestors()
        .find(|p| p.file_name().is_some_and(|n| n == "release" || n == "debug"));
    let path = folder.expect("tests run from cargo's target folder").join(name);
    assert!(
        path.exists(),
        "{} is missing: run `cargo build --release` (or `make test`) first",
        path.display()
    );
    path
}

/// A command for a program of this build, run from the repository's root like a user's.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(program(name));
    // Tests share few cores: waiting threads must not spin.
    command.current_dir(root()).env("OMP_WAIT_POLICY", "passive");
    for variable in [
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "NO_COLOR",
    ] {
        command.env_remove(variable);
    }
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("SEGUE_") {
            command.env_remove(variable);
        }
    }
    command
}

/// The same command on one core only.
pub fn on_core(core: usize, command: &Command) -> Command {
    let mut pinned = Command::new("taskset");
    pinned
        .args(["-c", &core.to_string()])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => pinned.env(name, value),
            None => pinned.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        pinned.current_dir(folder);
    }
    pinned
}

/// Whether programs can be given cores of their own.
pub fn two_cores() -> bool {
    let two = std::thread::available_parallelism().is_ok_and(|n| n.get() >= 2);
    two && on_core(1, &Command::new("true")).status().is_ok_and(|s| s.success())
}

/// The processor, for tables of measurements.
pub fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("unknown", |l| l.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{name}, {cores} cores")
}

/// CPU seconds that a process has taken, by its id; zero where it cannot be known.
pub fn cpu(id: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|t| t.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0 // Linux's USER_HZ
}

/// A running continuator; killed when dropped.
pub struct Continuator {
    child: Child,
    /// Its address as a URL.
    pub url: String,
    log: Arc<Mutex<String>>,
}

impl Continuator {
    /// Starts one on a free port and waits until it serves.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start(args: &[&str]) -> Self {
        Self::start_with(args, |_| {})
    }

    /// The same, with a changed environment.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start_with(args: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let mut command = command("cloud-continuator");
        command.arg("serve").args(args);
        if !args.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        change(&mut command);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the continuator starts");
        let log = Arc::new(Mutex::new(String::new()));
        let (serving, address) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let kept = log.clone();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if let Some((_, rest)) = line.split_once("serving address=") {
                    let _ = serving.send(rest.split_whitespace().next().unwrap_or_default().to_owned());
                }
                let mut log = kept.lock().expect("no panic while logging");
                log.push_str(&line);
                log.push('\n');
            }
        });
        let address = address.recv_timeout(PATIENCE);
        let mut this = Self {
            child,
            url: String::new(),
            log,
        };
        match address {
            Ok(address) => this.url = format!("http://{address}"),
            Err(_) => panic!("the continuator does not serve:\n{}", this.log()),
        }
        this
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// CPU seconds that it has taken.
    pub fn cpu(&self) -> f64 {
        cpu(self.id())
    }

    /// What it has logged so far.
    ///
    /// # Panics
    /// When the logging thread panicked.
    pub fn log(&self) -> String {
        self.log.lock().expect("no panic while logging").clone()
    }

    /// Sends a signal by number.
    pub fn signal(&self, number: i32) {
        let _ = Command::new("kill")
            .args([format!("-{number}"), self.child.id().to_string()])
            .status();
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it takes longer than [`PATIENCE`].
    pub fn wait(mut self) -> (ExitStatus, String) {
        let status = wait(&mut self.child);
        (status, self.log())
    }
}

impl Drop for Continuator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(child: &mut Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return status;
        }
        if started.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("a program hangs: not done after {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a finished program left.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; -1 for a signal.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Finished {
    /// The events of `--output jsonl`.
    ///
    /// # Panics
    /// When a line is no JSON.
    pub fn events(&self) -> Vec<Value> {
        self.out
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }
}

/// Runs a command with `input` to its end; a program that hangs fails the test.
///
/// # Panics
/// When it cannot be started, or hangs.
pub fn finish(mut command: Command, input: &[u8]) -> Finished {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a program starts");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let _ = stdin.write_all(input);
    drop(stdin);
    let read = |stream: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = BufReader::new(stream).read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = read(Box::new(child.stdout.take().expect("stdout is piped")));
    let err = read(Box::new(child.stderr.take().expect("stderr is piped")));
    let code = wait(&mut child).code().unwrap_or(-1);
    Finished {
        code,
        out: out.join().unwrap_or_default(),
        err: err.join().unwrap_or_default(),
    }
}

/// `edge-agent ask --server url --output jsonl ...`.
///
/// # Panics
/// When it cannot be started, or hangs.
pub fn ask(url: &str, args: &[&str]) -> Finished {
    let mut command = command("edge-agent");
    command.args(["ask", "--server", url, "--output", "jsonl"]).args(args);
    finish(command, b"")
}
