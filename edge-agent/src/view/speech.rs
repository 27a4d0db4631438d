//! Speech through a local text-to-speech program: words go to its standard input as they are played.

use std::{
    io::Write,
    process::{Child, Command, Stdio},
    sync::mpsc::{SyncSender, sync_channel},
    thread::JoinHandle,
    time::Duration,
};

use crate::conversation::{Happening, Outcome, View};

/// Words that may wait for the program; when it is that far behind, further words are left out rather than holding up the reply.
const WAITING_WORDS: usize = 256;

/// A view that speaks besides showing.
pub struct Speech {
    shown: Box<dyn View>,
    words: Option<SyncSender<String>>,
    thread: Option<JoinHandle<()>>,
}

impl Speech {
    /// Starts `command` (a program and its arguments, separated by white space) and shows through `shown` as well.
    ///
    /// # Errors
    /// Why the program does not start.
    pub fn start(command: &str, shown: Box<dyn View>) -> Result<Self, String> {
        let mut parts = command.split_whitespace();
        let program = parts.next().ok_or("--speak names no program; try --speak espeak-ng")?;
        let mut child = Command::new(program)
            .args(parts)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| {
                format!("`{program}` does not start: {e}; install it, or name another program with --speak")
            })?;
        let (words, waiting) = sync_channel::<String>(WAITING_WORDS);
        let thread = std::thread::spawn(move || {
            speak(&mut child, &waiting);
            // Closing its input lets it finish what it has to say.
            drop(child.stdin.take());
            let _ = child.wait();
        });
        Ok(Self {
            shown,
            words: Some(words),
            thread: Some(thread),
        })
    }
}

fn speak(child: &mut Child, words: &std::sync::mpsc::Receiver<String>) {
    let Some(stdin) = child.stdin.as_mut() else { return };
    for word in words {
        // A line is what such programs speak at once.
        if writeln!(stdin, "{}", word.trim()).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

impl View for Speech {
    fn event(&mut self, at: Duration, event: &Happening<'_>) {
        if let (Happening::Played(piece), Some(words)) = (event, &self.words) {
            let _ = words.try_send(piece.text.clone());
        }
        self.shown.event(at, event);
    }

    fn end(&mut self, at: Duration, outcome: &Outcome) {
        self.shown.end(at, outcome);
    }
}

impl Drop for Speech {
    fn drop(&mut self) {
        self.words = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
