//! Exit codes of both programs, after `sysexits.h`.

use std::process::ExitCode;

/// What a program's exit code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All went well.
    Ok = 0,
    /// The command line, the configuration or something they name (a model, a question) must be changed.
    Usage = 64,
    /// The continuator could not be reached, or was lost.
    Unavailable = 69,
    /// A fault of Segue itself.
    Software = 70,
    /// Output could not be written.
    Io = 74,
    /// The peer speaks another protocol, or broke it.
    Protocol = 76,
    /// The continuator does not let us in: credentials are missing or wrong.
    NotPermitted = 77,
    /// Interrupted by the user (Ctrl-C).
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}
