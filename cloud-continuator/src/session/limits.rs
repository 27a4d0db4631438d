//! What one edge may ask for.

use std::time::Duration;

/// What a continuator accepts.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest frame, in bytes.
    pub frame_bytes: usize,
    /// Largest user text, in bytes.
    pub user_text_bytes: usize,
    /// Largest history, in bytes of text.
    pub history_bytes: usize,
    /// Connections at a time; 0: no limit.
    pub connections: usize,
    /// Turns at a time on one stream.
    pub turns: usize,
    /// Largest `max_tokens`.
    pub tokens: u32,
    /// Time for the first frame.
    pub first_frame: Duration,
    /// Longest time without a frame or a running turn.
    pub idle: Duration,
    /// Longest life of a stream.
    pub lifetime: Duration,
    /// Longest time for a turn.
    pub turn: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frame_bytes: 256 << 10,
            user_text_bytes: 16 << 10,
            history_bytes: 128 << 10,
            connections: 8192,
            turns: 8,
            tokens: 1024,
            first_frame: Duration::from_secs(10),
            idle: Duration::from_secs(15 * 60),
            lifetime: Duration::from_secs(24 * 60 * 60),
            turn: Duration::from_secs(120),
        }
    }
}
