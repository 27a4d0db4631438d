//! What Segue's two services mean by the same words: the wire protocol, the reply text and its seam, and telemetry.
//!
//! Everything but [`client`] and [`telemetry`] is pure: no clock, socket or terminal.

pub mod backoff;
pub mod client;
pub mod exit;
pub mod proto;
pub mod reply_log;
pub mod seam;
pub mod telemetry;
pub mod words;
