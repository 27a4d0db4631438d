//! A conversation with one edge, over any stream of frames: the handshake, then turns until the edge leaves.

mod handshake;
mod limits;

use std::{
    collections::BTreeMap,
    future::{pending, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use prost::Message as _;
use segue_shared::{
    proto::{self, CloudFrame, EdgeFrame, TurnError, edge_frame::Body},
    reply_log::Surface,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

pub use self::limits::Limits;
use crate::{
    admission::{Admission, StreamPlace},
    attempts::News,
    backends::Backends,
    door::Caller,
    metrics::Metrics,
    request,
    running::Running,
    turn::{Incoming, Judgement, turn_failed},
};

/// How long an edge may take no frame while some wait for it.
const SLOW_READER: Duration = Duration::from_secs(20);

/// What all conversations share.
pub struct Service {
    /// Continue the replies.
    pub backends: Arc<Backends>,
    /// When a second backend is asked because the first one's first token is late; `None`: never.
    pub hedge_after: Option<Duration>,
    /// How openers are judged.
    pub judgement: Judgement,
    /// What is accepted.
    pub limits: Limits,
    /// Set to the grace period when the continuator is going away.
    pub draining: watch::Receiver<Option<Duration>>,
    /// Moving average of prefill and time from commit to first text together, in microseconds; 0 before the first.
    pub first_text_micros: AtomicU64,
    /// How much may be asked for.
    pub admission: Arc<Admission>,
    /// What is counted.
    pub metrics: Metrics,
}

impl Service {
    /// The current estimate of the time to the first text of a turn without an opener.
    pub fn first_text_estimate(&self) -> Option<Duration> {
        Some(self.first_text_micros.load(Ordering::Relaxed))
            .filter(|micros| *micros > 0)
            .map(Duration::from_micros)
    }

    /// Takes a measurement into the estimate (an exponential moving average; a lost update of a race does no harm).
    pub fn measured(&self, first_text: Duration) {
        let new = first_text.as_micros().clamp(1, u128::from(u32::MAX)) as u64;
        let old = self.first_text_micros.load(Ordering::Relaxed);
        let next = if old == 0 { new } else { (old * 4 + new) / 5 };
        self.first_text_micros.store(next.max(1), Ordering::Relaxed);
    }

    fn welcome(&self, protocol_version: u32) -> proto::Welcome {
        let limits = &self.limits;
        proto::Welcome {
            protocol_version,
            server_version: env!("CARGO_PKG_VERSION").into(),
            model: self.backends.leader().backend.info().model.clone(),
            limits: Some(proto::Limits {
                max_frame_bytes: limits.frame_bytes as u32,
                max_user_text_bytes: limits.user_text_bytes as u32,
                max_history_bytes: limits.history_bytes as u32,
                max_turns: limits.turns as u32,
                max_tokens: limits.tokens,
                idle: Some(proto::duration(limits.idle)),
                lifetime: Some(proto::duration(limits.lifetime)),
            }),
            first_token_estimate: self.first_text_estimate().map(proto::duration),
        }
    }
}

/// Where frames to the edge go. It is bounded: a stream whose reader is slow waits, and with it only its own turns.
///
/// (Frames are boxed because a channel sets room for 32 of its items aside, for every stream.)
pub type Outgoing = mpsc::Sender<Box<CloudFrame>>;

/// Serves one stream of `caller` until it ends.
///
/// # Errors
/// The status that the stream ends with, after the frames that were sent.
pub async fn converse<S>(
    service: Arc<Service>,
    caller: Caller,
    mut place: StreamPlace,
    frames: S,
    out: Outgoing,
) -> Result<(), Status>
where
    S: Stream<Item = Result<EdgeFrame, Status>> + Send,
{
    let mut frames = pin!(frames);
    let greeted = handshake::greet(&service, &caller, &mut place, frames.as_mut()).await?;
    if out.send(Box::new(greeted.welcome.into())).await.is_err() {
        return Ok(());
    }
    let session = Session {
        service,
        out,
        device: greeted.device,
        surface: greeted.surface,
        turns: BTreeMap::new(),
        last_turn: 0,
    };
    // Boxed, like the handling of frames below: what a stream rarely needs should not take room in each all the time.
    let denied = caller.token().is_some().then(|| Box::pin(caller.denied()));
    let denied = async {
        match denied {
            Some(denied) => denied.await,
            None => pending().await,
        }
    };
    let served = tokio::select! {
        served = session.run(frames) => served,
        denied = denied => Err(End::Status(denied.into())),
    };
    match served {
        Err(End::Status(status)) => Err(status),
        Ok(()) | Err(End::Gone) => Ok(()),
    }
}

enum End {
    /// The edge is gone.
    Gone,
    /// The stream ends with this.
    Status(Status),
}

struct Session {
    service: Arc<Service>,
    out: Outgoing,
    device: String,
    surface: Surface,
    turns: BTreeMap<u64, Running>,
    last_turn: u64,
}

enum Next {
    Frame(Option<Result<EdgeFrame, Status>>),
    Backend(u64, News),
    Deadline,
    Drain(Duration),
}

impl Session {
    async fn run<S>(mut self, mut frames: std::pin::Pin<&mut S>) -> Result<(), End>
    where
        S: Stream<Item = Result<EdgeFrame, Status>>,
    {
        let limits = self.service.limits;
        let born = Instant::now();
        let mut last_frame = born;
        let mut draining = self.service.draining.clone();
        // Once for all: what is made and dropped for every token costs more than the token.
        let mut drain = pin!(async move { draining.wait_for(Option::is_some).await.ok().and_then(|grace| *grace) });
        let mut drained = None;
        let mut leaving = false;
        let mut timer = pin!(sleep_until(born));
        loop {
            if (leaving || drained.is_some()) && self.turns.values().all(Running::ended) {
                return Ok(());
            }
            let busy = self.turns.values().any(|t| !t.ended());
            let idle_end = if busy {
                born + limits.lifetime
            } else {
                last_frame + limits.idle
            };
            let stream_end = idle_end.min(born + limits.lifetime).min(drained.unwrap_or(idle_end));
            let deadline = self
                .turns
                .values()
                .filter(|t| !t.ended())
                .map(Running::deadline)
                .min()
                .unwrap_or(stream_end)
                .min(stream_end);
            // Set anew only when it changes: a timer costs more than the rest of a token's way through here.
            if timer.deadline() != deadline {
                timer.as_mut().reset(deadline);
            }
            let turns = &mut self.turns;
            let events = poll_fn(|context| {
                for (id, turn) in turns.iter_mut().filter(|(_, turn)| !turn.ended()) {
                    if let Poll::Ready(news) = turn.poll_news(context) {
                        return Poll::Ready((*id, news));
                    }
                }
                Poll::Pending
            });
            let next = tokio::select! {
                (id, news) = events => Next::Backend(id, news),
                frame = frames.next(), if !leaving => Next::Frame(frame),
                () = timer.as_mut() => Next::Deadline,
                grace = drain.as_mut(), if drained.is_none() => Next::Drain(grace.unwrap_or_default()),
            };
            match next {
                Next::Backend(id, news) => {
                    let frames = self.turns.get_mut(&id).map(|turn| turn.news(news));
                    self.turn_sends(id, frames.unwrap_or_default()).await?;
                }
                Next::Frame(Some(Ok(frame))) => {
                    last_frame = Instant::now();
                    Box::pin(self.frame(frame)).await?;
                }
                // The edge sends no more: its running turns are finished, then the stream ends.
                Next::Frame(None) => leaving = true,
                // The edge is gone, or has sent what is no frame: it is told, if it is still there.
                Next::Frame(Some(Err(status))) => {
                    tracing::debug!(code = ?status.code(), "the edge's stream broke");
                    return Err(End::Status(status));
                }
                Next::Deadline => {
                    let now = Instant::now();
                    let late: Vec<u64> = self
                        .turns
                        .iter()
                        .filter(|(_, t)| !t.ended() && t.deadline() <= now)
                        .map(|(id, _)| *id)
                        .collect();
                    for id in late {
                        self.fail(
                            id,
                            TurnError::Deadline,
                            "the turn took longer than its deadline".into(),
                            true,
                        )
                        .await?;
                    }
                    if now >= stream_end {
                        let why = match (drained, now >= born + limits.lifetime) {
                            (Some(_), _) => {
                                return Err(End::Status(Status::unavailable(
                                    "this continuator is going away; connect to another",
                                )));
                            }
                            (None, true) => format!("the stream is older than {:?}; connect again", limits.lifetime),
                            (None, false) => format!("no frame came for {:?}; connect again", limits.idle),
                        };
                        return Err(End::Status(Status::deadline_exceeded(why)));
                    }
                }
                Next::Drain(grace) => {
                    drained = Some(Instant::now() + grace);
                    // Running turns go on, and so their frames are read; new ones are turned away.
                    self.send(
                        proto::Drain {
                            grace: Some(proto::duration(grace)),
                        }
                        .into(),
                    )
                    .await?;
                }
            }
        }
    }

    async fn frame(&mut self, frame: EdgeFrame) -> Result<(), End> {
        let (bytes, most) = (frame.encoded_len(), self.service.limits.frame_bytes);
        if bytes > most {
            let message = format!("the frame has {bytes} bytes; at most {most} are allowed");
            let turn = match &frame.body {
                // A repeated id may be that of a running turn, which this must not end.
                Some(Body::StartTurn(f)) if f.turn_id <= self.last_turn => 0,
                Some(Body::StartTurn(f)) => {
                    self.last_turn = f.turn_id;
                    f.turn_id
                }
                _ => turn_of(&frame),
            };
            return self.fail(turn, TurnError::InvalidArgument, message, false).await;
        }
        match frame.body {
            Some(Body::StartTurn(start)) => self.start(start).await,
            Some(Body::OpenerDelta(f)) => {
                self.incoming(
                    f.turn_id,
                    Incoming::Delta {
                        offset: f.offset as usize,
                        text: f.text,
                    },
                )
                .await
            }
            Some(Body::CommitOpener(f)) => {
                let prefix = match f.opening {
                    Some(proto::commit_opener::Opening::CommittedPrefix(prefix)) => prefix,
                    Some(proto::commit_opener::Opening::NoOpener(_)) => String::new(),
                    None => {
                        let message = "CommitOpener says neither a prefix nor that there is none";
                        return self
                            .fail(f.turn_id, TurnError::InvalidArgument, message.into(), false)
                            .await;
                    }
                };
                self.incoming(
                    f.turn_id,
                    Incoming::Commit {
                        prefix,
                        resumed: f.resumed,
                    },
                )
                .await
            }
            Some(Body::Heard(f)) => self.incoming(f.turn_id, Incoming::Heard(f.bytes as usize)).await,
            Some(Body::RefuseDirective(f)) => {
                self.incoming(f.turn_id, Incoming::Refused(f.revision, f.heard_bytes as usize))
                    .await
            }
            Some(Body::CancelTurn(f)) => self.cancel(f.turn_id).await,
            Some(Body::Hello(_)) => {
                self.fail(0, TurnError::UnexpectedFrame, "Hello came twice".into(), false)
                    .await
            }
            None => {
                let message = "a frame without a body that this version knows";
                self.fail(0, TurnError::InvalidArgument, message.into(), false).await
            }
        }
    }

    async fn start(&mut self, start: proto::StartTurn) -> Result<(), End> {
        let id = start.turn_id;
        if id <= self.last_turn {
            let message = format!("turn ids must grow, but {id} came after {}", self.last_turn);
            // A repeated id may be that of a running turn, which this must not end.
            let frame = turn_failed(0, TurnError::InvalidArgument, message, false, None);
            return self.send(frame.into()).await;
        }
        self.last_turn = id;
        if self.service.draining.borrow().is_some() {
            let message = "this continuator is going away; start the turn at another";
            return self.turn_away(id, TurnError::Overloaded, message.into(), None).await;
        }
        // An ended turn is kept only as long as its directive may be refused: until the next turn.
        self.turns.retain(|_, turn| !turn.ended());
        if self.turns.len() >= self.service.limits.turns {
            let message = format!(
                "{} turns are running on this stream, which is the limit",
                self.turns.len()
            );
            return self.turn_away(id, TurnError::Overloaded, message, None).await;
        }
        let request = match request::check(&start, &self.service.limits) {
            Ok(request) => request,
            Err(message) => return self.turn_away(id, TurnError::InvalidArgument, message, None).await,
        };
        let place = match self.service.admission.turn(&self.device, Instant::now()) {
            Ok(place) => place,
            Err(refused) => {
                let after = Some(refused.retry_after);
                return self.turn_away(id, TurnError::Overloaded, refused.message, after).await;
            }
        };
        match Running::open(&self.service, self.surface, &start, request, &self.device, place) {
            Ok(turn) => {
                self.turns.insert(id, turn);
                Ok(())
            }
            Err(failed) => self.send(failed.into()).await,
        }
    }

    /// Says that a turn is not begun, and why.
    async fn turn_away(
        &mut self,
        id: u64,
        error: TurnError,
        message: String,
        retry_after: Option<Duration>,
    ) -> Result<(), End> {
        self.service.metrics.turn(error);
        let retryable = error == TurnError::Overloaded;
        self.send(turn_failed(id, error, message, retryable, retry_after).into())
            .await
    }

    async fn incoming(&mut self, id: u64, incoming: Incoming) -> Result<(), End> {
        let Some(turn) = self.turns.get_mut(&id) else {
            // News of a turn that has just ended cross its end on the way.
            let late = id > 0 && id <= self.last_turn && matches!(incoming, Incoming::Heard(_) | Incoming::Refused(..));
            if late {
                return Ok(());
            }
            return self
                .fail(
                    id,
                    TurnError::UnknownTurn,
                    format!("turn {id} does not run on this stream"),
                    false,
                )
                .await;
        };
        let frames = turn.on(incoming);
        self.turn_sends(id, frames).await
    }

    /// Sends a turn's frames, and forgets the turn if they end it.
    async fn turn_sends(&mut self, id: u64, frames: Vec<CloudFrame>) -> Result<(), End> {
        for frame in frames {
            self.send(frame).await?;
        }
        if self.turns.get(&id).is_some_and(|turn| turn.ended() && !turn.kept()) {
            self.turns.remove(&id);
        }
        Ok(())
    }

    async fn cancel(&mut self, id: u64) -> Result<(), End> {
        match self.turns.remove(&id) {
            Some(turn) if !turn.ended() => {
                let end = turn.cancelled();
                self.send(end.into()).await
            }
            // It ended while the frame was on its way.
            Some(_) => Ok(()),
            None if id > 0 && id <= self.last_turn => Ok(()),
            None => {
                self.fail(
                    id,
                    TurnError::UnknownTurn,
                    format!("turn {id} does not run on this stream"),
                    false,
                )
                .await
            }
        }
    }

    async fn fail(&mut self, id: u64, error: TurnError, message: String, retryable: bool) -> Result<(), End> {
        if let Some(turn) = self.turns.remove(&id) {
            turn.failed(error);
        }
        self.send(turn_failed(id, error, message, retryable, None).into()).await
    }

    /// Sends a frame. A reader that takes none for a while is given up: its turns would hold their places for nothing.
    async fn send(&mut self, frame: CloudFrame) -> Result<(), End> {
        let frame = match self.out.try_send(Box::new(frame)) {
            Ok(()) => return Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(End::Gone),
            Err(mpsc::error::TrySendError::Full(frame)) => frame,
        };
        match tokio::time::timeout(SLOW_READER, self.out.send(frame)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Gone),
            Err(_) => {
                tracing::warn!("an edge took no frame for {SLOW_READER:?}; its stream is ended");
                Err(End::Status(Status::resource_exhausted(format!(
                    "no frame was taken for {SLOW_READER:?}; read faster, and connect again"
                ))))
            }
        }
    }
}

/// The turn that a frame is about; 0: none.
fn turn_of(frame: &EdgeFrame) -> u64 {
    match &frame.body {
        Some(Body::StartTurn(f)) => f.turn_id,
        Some(Body::OpenerDelta(f)) => f.turn_id,
        Some(Body::CommitOpener(f)) => f.turn_id,
        Some(Body::Heard(f)) => f.turn_id,
        Some(Body::CancelTurn(f)) => f.turn_id,
        Some(Body::RefuseDirective(f)) => f.turn_id,
        Some(Body::Hello(_)) | None => 0,
    }
}
