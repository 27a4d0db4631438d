//! A scripted edge: sends frames one by one to a real continuator.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use segue_shared::{
    client::{self, Access, ConnectError},
    proto::{
        self, CloudFrame, CommitOpener, EdgeFrame, Hello, OpenerDelta, StartTurn, cloud_frame::Body,
        commit_opener::Opening,
    },
};

use crate::programs::PATIENCE;

/// An open conversation.
pub struct Edge {
    link: client::Conversation,
}

impl Edge {
    /// Connects and shakes hands.
    ///
    /// # Panics
    /// When that fails.
    pub async fn connect(url: &str, surface: proto::Surface) -> Self {
        // Each is a device of its own.
        static DEVICES: AtomicUsize = AtomicUsize::new(0);
        let device = format!("test-{}", DEVICES.fetch_add(1, Ordering::Relaxed));
        Self::try_connect(url, &Access::default(), &device, surface)
            .await
            .expect("the continuator welcomes")
    }

    /// Connects as `device`.
    ///
    /// # Errors
    /// Why the continuator does not welcome it.
    pub async fn try_connect(
        url: &str,
        access: &Access,
        device: &str,
        surface: proto::Surface,
    ) -> Result<Self, ConnectError> {
        let channel = client::connect(url, access).await?;
        let hello = Hello {
            device_id: device.into(),
            surface: surface.into(),
            ..Hello::default()
        };
        let link = client::converse(channel, url, access, hello).await?;
        Ok(Self { link })
    }

    /// The continuator's first frame.
    pub fn welcome(&self) -> &proto::Welcome {
        &self.link.welcome
    }

    /// Sends a frame.
    ///
    /// # Panics
    /// When the stream is closed.
    pub async fn send(&self, frame: impl Into<EdgeFrame>) {
        self.link.outgoing.send(frame.into()).await.expect("the stream is open");
    }

    /// Begins a turn.
    pub async fn start(&self, turn_id: u64, text: &str) {
        self.send(StartTurn {
            turn_id,
            user_text: text.into(),
            ..StartTurn::default()
        })
        .await;
    }

    /// Says a part of the opener.
    pub async fn delta(&self, turn_id: u64, offset: u32, text: &str) {
        self.send(OpenerDelta {
            turn_id,
            offset,
            text: text.into(),
        })
        .await;
    }

    /// Commits an opener; an empty one is none.
    pub async fn commit(&self, turn_id: u64, prefix: &str) {
        self.send(commit(turn_id, prefix)).await;
    }

    /// The next frame.
    ///
    /// # Panics
    /// When none comes in time, or the stream ends.
    pub async fn next(&mut self) -> Body {
        self.try_next()
            .await
            .expect("the stream goes on")
            .and_then(|frame| frame.body)
            .expect("a frame has a body")
    }

    /// The next frame, the stream's end or its status.
    ///
    /// # Errors
    /// The stream's status.
    ///
    /// # Panics
    /// When nothing comes in time.
    pub async fn try_next(&mut self) -> Result<Option<CloudFrame>, tonic::Status> {
        tokio::time::timeout(PATIENCE, self.link.incoming.message())
            .await
            .expect("a frame comes in time")
    }

    /// Frames until the turn's last one, which is included.
    pub async fn rest(&mut self, turn_id: u64) -> Vec<Body> {
        let mut frames = Vec::new();
        loop {
            let body = self.next().await;
            let last = match &body {
                Body::EndTurn(f) => f.turn_id == turn_id,
                Body::TurnFailed(f) => f.turn_id == turn_id,
                _ => false,
            };
            frames.push(body);
            if last {
                return frames;
            }
        }
    }

    /// Asserts that no frame comes for a while.
    ///
    /// # Panics
    /// When one does.
    pub async fn silence(&mut self) {
        self.silence_of(Duration::from_millis(300)).await;
    }

    /// Asserts that no frame comes for `time`, and that the stream has not ended.
    ///
    /// # Panics
    /// When one does, or it has.
    pub async fn silence_of(&mut self, time: Duration) {
        let frame = tokio::time::timeout(time, self.link.incoming.message()).await;
        assert!(frame.is_err(), "{frame:?}");
    }
}

/// A commit of `prefix`; an empty one is none.
pub fn commit(turn_id: u64, prefix: &str) -> CommitOpener {
    let opening = match prefix {
        "" => Opening::NoOpener(proto::NoOpener {}),
        text => Opening::CommittedPrefix(text.into()),
    };
    CommitOpener {
        turn_id,
        opening: Some(opening),
        ..CommitOpener::default()
    }
}

/// The reply text that frames build on `prefix`; every chunk must be the next one.
///
/// # Panics
/// When one is not.
pub fn reply(prefix: &str, frames: &[Body], surface: segue_shared::reply_log::Surface) -> String {
    use segue_shared::reply_log::ReplyLog;
    let mut log = ReplyLog::new(surface);
    log.push_opener(prefix);
    for frame in frames {
        match frame {
            Body::Chunk(chunk) => {
                log.apply_chunk(chunk.revision, chunk.offset as usize, &chunk.text)
                    .expect("chunks join");
            }
            Body::Directive(directive) => {
                let kind = directive.kind.as_ref().expect("a directive has a kind");
                log.apply_directive(directive.revision, kind.into())
                    .expect("a directive can be carried out");
            }
            _ => {}
        }
    }
    log.text().to_owned()
}
