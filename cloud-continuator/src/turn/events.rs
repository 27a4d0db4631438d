//! What happens to a turn, and what is to be done about it.

use std::time::Duration;

use segue_shared::{
    proto::{self, CloudFrame, TurnError},
    reply_log::Correction,
};

use crate::{
    backend::{Event, Failure, Finish, Input, Usage},
    verify::Verdict,
};

/// How long an overloaded continuator should be left alone where nothing better is known.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// What happens to a turn.
#[derive(Clone, Debug)]
pub enum Incoming {
    /// The opener grew at byte `offset`.
    Delta {
        /// Where the text stands.
        offset: usize,
        /// The words.
        text: String,
    },
    /// The opener is final (empty: none).
    Commit {
        /// The committed prefix.
        prefix: String,
        /// It was judged in an earlier attempt.
        resumed: bool,
    },
    /// The user has had this many bytes of the reply.
    Heard(usize),
    /// The edge could not carry out the directive of this revision; this much was heard.
    Refused(u32, usize),
    /// The backend's news.
    Backend(Event),
    /// The backend failed, or was late, and another one has opened the turn.
    Moved,
}

/// What is to be done about it.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Tell the backend.
    Backend(Input),
    /// The backend's turn is over; begin it anew and tell it this.
    Reopen(Input),
    /// Send a frame to the edge.
    Send(CloudFrame),
    /// Something worth a mark on the trace happened.
    Mark(Mark),
    /// The turn is complete.
    End(Finish, Usage),
    /// The turn failed.
    Fail {
        /// What went wrong.
        error: TurnError,
        /// One sentence about it.
        message: String,
        /// Whether another try may help.
        retryable: bool,
        /// After how long, where that is known.
        retry_after: Option<Duration>,
    },
}

/// Moments of a turn.
#[derive(Clone, Debug, PartialEq)]
pub enum Mark {
    /// The conversation is in the cache.
    Prefilled,
    /// The opener was committed.
    Committed,
    /// The verdict, and what was decided.
    Verified(Option<Verdict>, Option<Correction>),
    /// The first text was sent.
    FirstText,
}

pub(super) fn unexpected(message: &str) -> Vec<Effect> {
    vec![Effect::Fail {
        error: TurnError::UnexpectedFrame,
        message: message.into(),
        retryable: false,
        retry_after: None,
    }]
}

pub(super) fn too_long(most: usize) -> Vec<Effect> {
    invalid(format!("the opener is longer than {most} bytes"))
}

pub(super) fn too_much_heard(heard: usize, length: usize) -> Vec<Effect> {
    invalid(format!(
        "{heard} bytes were reported as heard, but the reply has {length}"
    ))
}

pub(super) fn invalid(message: String) -> Vec<Effect> {
    vec![Effect::Fail {
        error: TurnError::InvalidArgument,
        message,
        retryable: false,
        retry_after: None,
    }]
}

/// How a backend's failure is told to the edge.
pub fn failed(failure: &Failure) -> Effect {
    let (error, retry_after) = match failure {
        Failure::ContextTooSmall { .. } => (TurnError::ContextTooSmall, None),
        Failure::Overloaded { retry_after } => (TurnError::Overloaded, *retry_after),
        Failure::Unavailable(time) => (TurnError::Backend, Some(*time)),
        _ => (TurnError::Backend, None),
    };
    Effect::Fail {
        error,
        message: failure.to_string(),
        retryable: failure.retryable(),
        retry_after,
    }
}

/// The frame that reports a failed turn.
pub fn turn_failed(
    turn_id: u64,
    error: TurnError,
    message: String,
    retryable: bool,
    retry_after: Option<Duration>,
) -> proto::TurnFailed {
    let overloaded = error == TurnError::Overloaded;
    proto::TurnFailed {
        turn_id,
        error: error.into(),
        message,
        retryable,
        retry_after: retry_after.or(overloaded.then_some(RETRY_AFTER)).map(proto::duration),
    }
}
