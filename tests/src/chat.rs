//! A real edge that talks: `edge-agent chat --output jsonl`, question by question.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::programs::{PATIENCE, command};

/// A running chat; killed when dropped.
pub struct Chat {
    child: Child,
    input: Option<ChildStdin>,
    events: Receiver<Value>,
    errors: Receiver<String>,
}

impl Chat {
    /// Starts one.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(servers: &str, args: &[&str]) -> Self {
        Self::start_with(servers, args, |_| {})
    }

    /// The same, with a changed environment, or another place for standard error.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_with(servers: &str, args: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let mut command = command("edge-agent");
        command
            .args(["chat", "--server", servers, "--output", "jsonl"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().expect("the edge starts");
        let (out, err) = (child.stdout.take().expect("piped"), child.stderr.take());
        let ((event, events), (error, errors)) = (channel(), channel());
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
                if event.send(value).is_err() {
                    return;
                }
            }
        });
        std::thread::spawn(move || {
            for line in err
                .into_iter()
                .flat_map(|err| BufReader::new(err).lines().map_while(Result::ok))
            {
                let _ = error.send(line);
            }
        });
        Self {
            input: child.stdin.take(),
            child,
            events,
            errors,
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks a question.
    ///
    /// # Panics
    /// When the edge has gone.
    pub fn say(&mut self, question: &str) {
        let input = self.input.as_mut().expect("the input is open");
        writeln!(input, "{question}").expect("the edge reads");
    }

    /// Whether it has not ended.
    pub fn lives(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_none())
    }

    /// Ends the input.
    pub fn no_more_questions(&mut self) {
        self.input = None;
    }

    /// The next event.
    ///
    /// # Panics
    /// When none comes in time.
    pub fn next(&self) -> Value {
        self.events
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|e| panic!("no event: {e}; {:?}", self.errors.try_iter().collect::<Vec<_>>()))
    }

    /// Events up to the first of this kind, which is the last of them; an `end` or `error` before it is an error.
    ///
    /// # Panics
    /// When it does not come.
    pub fn until(&self, kind: &str) -> Vec<Value> {
        let mut events = Vec::new();
        loop {
            let event = self.next();
            let name = event["event"].as_str().unwrap_or_default().to_owned();
            events.push(event);
            if name == kind {
                return events;
            }
            assert!(name != "end" && name != "error", "{kind} does not come: {events:?}");
        }
    }

    /// Events up to the end of the reply, good or bad.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn reply(&self) -> Vec<Value> {
        let started = Instant::now();
        let mut events = Vec::new();
        loop {
            let event = self.next();
            let last = event["event"] == "end" || event["event"] == "error";
            events.push(event);
            if last {
                return events;
            }
            assert!(started.elapsed() < PATIENCE, "the reply does not end: {events:?}");
        }
    }

    /// The last event of the reply, if it comes within `limit`.
    pub fn end_within(&self, limit: Duration) -> Option<Value> {
        let started = Instant::now();
        loop {
            let left = limit.saturating_sub(started.elapsed());
            let event = self.events.recv_timeout(left).ok()?;
            if event["event"] == "end" || event["event"] == "error" {
                return Some(event);
            }
        }
    }

    /// Sends a signal by number.
    pub fn signal(&self, number: i32) {
        let _ = std::process::Command::new("kill")
            .args([format!("-{number}"), self.child.id().to_string()])
            .status();
    }

    /// Ends the input and waits for the end; what it said on standard error comes with it.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn end(mut self) -> (ExitStatus, Vec<String>) {
        self.input = None;
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                std::thread::sleep(Duration::from_millis(50));
                return (status, self.errors.try_iter().collect());
            }
            assert!(started.elapsed() < PATIENCE, "the edge does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Chat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
