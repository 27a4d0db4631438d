//! The reply text as a log of bytes with truncation epochs.
//!
//! Every piece of text names the byte where it stands and the epoch (`revision`) it belongs to, so that duplicates, gaps and
//! late arrivals are detectable and each byte is delivered exactly once.

use thiserror::Error;

/// Where a reply is shown, and so what may be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Surface {
    /// A screen: shown text can be taken back.
    Revisable,
    /// Speech: what was heard stays heard.
    AppendOnly,
}

/// What a directive does to the reply text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Correction {
    /// Every word stays.
    Bridge,
    /// The first `keep` bytes stay.
    Revise {
        /// Bytes kept; on a character boundary.
        keep: usize,
    },
    /// Nothing stays.
    Restart,
}

impl Correction {
    /// Its name in events and spans.
    pub fn name(self) -> &'static str {
        match self {
            Correction::Bridge => "bridge",
            Correction::Revise { .. } => "revise",
            Correction::Restart => "restart",
        }
    }

    /// Bytes that stay of a text of `len` bytes.
    pub fn kept(self, len: usize) -> usize {
        match self {
            Correction::Bridge => len,
            Correction::Revise { keep } => keep,
            Correction::Restart => 0,
        }
    }
}

/// What became of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It was appended.
    Appended,
    /// It belonged to an older revision and was dropped.
    Stale,
}

/// Why a chunk was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChunkError {
    /// The chunk stands past the end: something is missing.
    #[error("a chunk for byte {offset} came while the reply has {len} bytes: text is missing")]
    Gap {
        /// Where the chunk stands.
        offset: usize,
        /// Bytes of the reply text.
        len: usize,
    },
    /// The chunk stands before the end: it was delivered before.
    #[error("a chunk for byte {offset} came while the reply has {len} bytes: it repeats text")]
    Repeated {
        /// Where the chunk stands.
        offset: usize,
        /// Bytes of the reply text.
        len: usize,
    },
    /// The chunk belongs to an epoch whose directive has not been seen.
    #[error("a chunk of revision {revision} came while the reply is at revision {current}")]
    Future {
        /// The chunk's revision.
        revision: u32,
        /// The log's revision.
        current: u32,
    },
}

/// Why a directive was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DirectiveError {
    /// The user has heard what it would take back; the answer is `RefuseDirective`.
    #[error("the directive keeps {keep} bytes, but {heard} were already heard and cannot be taken back")]
    AlreadyHeard {
        /// Bytes that would stay.
        keep: usize,
        /// Bytes heard.
        heard: usize,
    },
    /// It repeats a directive that was seen before; ignored.
    #[error("directive of revision {revision} came again at revision {current}")]
    Repeated {
        /// The directive's revision.
        revision: u32,
        /// The log's revision.
        current: u32,
    },
    /// It skips a revision.
    #[error("directive of revision {revision} came at revision {current}: one is missing")]
    Skipped {
        /// The directive's revision.
        revision: u32,
        /// The log's revision.
        current: u32,
    },
    /// It keeps more than there is, or cuts a character in two.
    #[error("the directive keeps {keep} of {len} bytes, which is no place to cut")]
    NoBoundary {
        /// Bytes that would stay.
        keep: usize,
        /// Bytes of the reply text.
        len: usize,
    },
}

/// The user cannot have heard text that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{heard} bytes were reported as heard, but the reply has {len}, or they end inside a character")]
pub struct HeardError {
    /// Bytes reported.
    pub heard: usize,
    /// Bytes of the reply text.
    pub len: usize,
}

/// One turn's reply text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyLog {
    text: String,
    revision: u32,
    heard: usize,
    surface: Surface,
    /// The directive that began this epoch was refused: its chunks continue a text that does not exist.
    refused: bool,
}

impl ReplyLog {
    /// An empty reply for a surface, at revision 0.
    pub fn new(surface: Surface) -> Self {
        Self {
            text: String::new(),
            revision: 0,
            heard: 0,
            surface,
            refused: false,
        }
    }

    /// The reply text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The current epoch.
    pub fn revision(&self) -> u32 {
        self.revision
    }

    /// Bytes of the reply text that the user has had.
    pub fn heard(&self) -> usize {
        self.heard
    }

    /// The text that the user has had.
    pub fn heard_text(&self) -> &str {
        &self.text[..self.heard]
    }

    /// Appends words of the opener.
    pub fn push_opener(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Notes that the user has had the first `bytes` bytes; a smaller value than before changes nothing.
    ///
    /// # Errors
    /// [`HeardError`] when the text has no such boundary.
    pub fn hear(&mut self, bytes: usize) -> Result<(), HeardError> {
        if !self.text.is_char_boundary(bytes) {
            return Err(HeardError {
                heard: bytes,
                len: self.text.len(),
            });
        }
        self.heard = self.heard.max(bytes);
        Ok(())
    }

    /// Appends a chunk that stands at byte `offset` in epoch `revision`. A chunk of an older epoch, or of one whose directive was
    /// refused, is dropped.
    ///
    /// # Errors
    /// [`ChunkError`] when the chunk is not the next one.
    pub fn apply_chunk(&mut self, revision: u32, offset: usize, text: &str) -> Result<Applied, ChunkError> {
        if revision < self.revision || (revision == self.revision && self.refused) {
            return Ok(Applied::Stale);
        }
        if revision > self.revision {
            return Err(ChunkError::Future {
                revision,
                current: self.revision,
            });
        }
        let len = self.text.len();
        match offset.cmp(&len) {
            std::cmp::Ordering::Less => Err(ChunkError::Repeated { offset, len }),
            std::cmp::Ordering::Greater => Err(ChunkError::Gap { offset, len }),
            std::cmp::Ordering::Equal => {
                self.text.push_str(text);
                Ok(Applied::Appended)
            }
        }
    }

    /// The turn goes on at another stream, which continues the text as it stands and counts epochs anew.
    pub fn resume(&mut self) {
        self.revision = 0;
        self.refused = false;
    }

    /// Carries out a directive that begins epoch `revision`; returns the text that was taken back.
    ///
    /// # Errors
    /// [`DirectiveError`]; the text is unchanged. After [`DirectiveError::AlreadyHeard`] the epoch has begun all the same, but
    /// nothing is appended in it: the continuator, once told, continues the whole text in the next one.
    pub fn apply_directive(&mut self, revision: u32, correction: Correction) -> Result<String, DirectiveError> {
        if revision <= self.revision {
            return Err(DirectiveError::Repeated {
                revision,
                current: self.revision,
            });
        }
        if revision != self.revision + 1 {
            return Err(DirectiveError::Skipped {
                revision,
                current: self.revision,
            });
        }
        let (keep, len) = (correction.kept(self.text.len()), self.text.len());
        if !self.text.is_char_boundary(keep) {
            return Err(DirectiveError::NoBoundary { keep, len });
        }
        self.revision = revision;
        self.refused = self.surface == Surface::AppendOnly && keep < self.heard;
        if self.refused {
            return Err(DirectiveError::AlreadyHeard {
                keep,
                heard: self.heard,
            });
        }
        self.heard = self.heard.min(keep);
        Ok(self.text.split_off(keep))
    }
}

#[cfg(test)]
#[path = "reply_log_tests.rs"]
mod tests;
