//! A real llama.cpp server with the default large model, from the wheel in `tests/requirements.txt`.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use crate::programs::root;

/// The server; ends when dropped.
pub struct LlamaServer {
    child: Child,
    /// Its API's address.
    pub url: String,
}

/// The name under which the server knows its model.
pub fn model() -> PathBuf {
    root().join(cloud_continuator::config::DEFAULT_MODEL)
}

impl LlamaServer {
    /// Starts one with `slots` turns at a time; `None`, loudly, where the wheel is not installed.
    ///
    /// # Panics
    /// When it does not start.
    #[expect(
        clippy::print_stderr,
        reason = "whoever runs the tests must see that one was skipped"
    )]
    pub fn start(threads: usize, slots: usize, context: usize) -> Option<Self> {
        let python = root().join(".segue/peers/bin/python");
        if !python.exists() {
            eprintln!("\nSKIPPED: llama.cpp's server is not installed; `make peers` does that (`make test` runs it)\n");
            return None;
        }
        let mut child = Command::new(python)
            .arg(root().join("tests/llama_server.py"))
            .arg(model())
            .args([threads, slots, context].map(|n| n.to_string()))
            .env("OMP_WAIT_POLICY", "passive")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python starts");
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let address = lines
            .next()
            .and_then(Result::ok)
            .expect("llama.cpp's server says its address");
        Some(Self {
            child,
            url: format!("{address}/v1"),
        })
    }
}

impl Drop for LlamaServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
