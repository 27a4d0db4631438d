//! The connection to a continuator: kept open, moved and opened again by a task of its own, which outlives any one server.

use std::time::Duration;

use segue_shared::{
    backoff::Backoff,
    client::{self, Access, ConnectError},
    proto::{CloudFrame, EdgeFrame, Hello, Welcome, cloud_frame::Body},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tonic::{Code, Status};

/// First and longest wait between rounds of attempts.
const WAITS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A connection that lasted this long, or carried a reply, was a good one: after it the waits begin anew.
const GOOD: Duration = Duration::from_secs(5);
/// Rounds in which we may be turned away, after we were let in once, until there is no hope: some ten seconds.
const DENIED: u32 = 7;
/// News that may wait for the conversation; the link reads no further frames while it is full.
const WAITING_NEWS: usize = 64;

/// Which continuators to call, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Their addresses, best first; at least one.
    pub servers: Vec<String>,
    /// Trust and credentials.
    pub access: Access,
}

/// What happens to the link.
#[derive(Debug)]
pub enum News {
    /// A continuator welcomed us.
    Connected {
        /// Which connection of the link this is, for [`Link::leave`].
        number: u64,
        /// What it said.
        welcome: Box<Welcome>,
        /// Frames to it.
        outgoing: mpsc::Sender<EdgeFrame>,
    },
    /// A frame from it.
    Frame(CloudFrame),
    /// It is gone; why, in a sentence. The link looks for another.
    Lost(String),
    /// No server could be reached.
    Failed {
        /// Why, of the server that is likeliest to come back.
        error: ConnectError,
        /// The link has ended: trying again would not help. Else it goes on trying.
        ended: bool,
    },
}

#[derive(Debug, PartialEq, Eq)]
enum Order {
    /// Leave this connection, and go to the next server.
    Leave(u64),
    /// Somebody waits: try now.
    Hurry,
    /// A turn needs a continuator, as soon as the waits between attempts allow.
    Want,
}

/// A handle to the link; dropping it ends the link.
#[derive(Debug)]
pub struct Link {
    news: mpsc::Receiver<News>,
    orders: mpsc::Sender<Order>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Starts to connect; the handshake waits for `hello`.
    ///
    /// # Panics
    /// Outside a tokio runtime, or without servers.
    pub fn start(options: Options, hello: oneshot::Receiver<Hello>) -> Self {
        assert!(!options.servers.is_empty(), "a link needs servers");
        let (tell, news) = mpsc::channel(WAITING_NEWS);
        let (orders, ordered) = mpsc::channel(4);
        let runner = Runner {
            options,
            at: 0,
            number: 0,
            denied: 0,
            wanted: false,
            news: tell,
            orders: ordered,
            backoff: Backoff::new(WAITS.0, WAITS.1),
        };
        Self {
            news,
            orders,
            task: tokio::spawn(async move {
                // An edge without a conversation needs no continuator.
                if let Some(End::Failed(error)) = runner.run(hello).await {
                    tracing::debug!(%error, "the link has ended");
                }
            }),
        }
    }

    /// What happens next; `None` when nothing will. Nothing is lost when it is not waited for.
    pub async fn next(&mut self) -> Option<News> {
        self.news.recv().await
    }

    /// What has happened already.
    pub fn try_next(&mut self) -> Option<News> {
        self.news.try_recv().ok()
    }

    /// Leaves a connection, if it still is the present one, for the next server (the same, if there is only one).
    pub fn leave(&self, number: u64) {
        let _ = self.orders.try_send(Order::Leave(number));
    }

    /// A turn has lost its continuator: even a server that ends idle streams is called again.
    pub fn want(&self) {
        let _ = self.orders.try_send(Order::Want);
    }

    /// Somebody waits: an attempt that was put off is made now.
    pub fn hurry(&self) {
        let _ = self.orders.try_send(Order::Hurry);
    }
}

enum End {
    /// Nobody listens any more.
    Unwanted,
    /// There is nobody to talk to, and will not be.
    Failed(String),
}

struct Runner {
    options: Options,
    /// The server to try first.
    at: usize,
    /// Connections so far.
    number: u64,
    /// Rounds since then in which we were not let in.
    denied: u32,
    /// Somebody has asked for a connection since the last one.
    wanted: bool,
    news: mpsc::Sender<News>,
    orders: mpsc::Receiver<Order>,
    backoff: Backoff,
}

impl Runner {
    async fn run(mut self, hello: oneshot::Receiver<Hello>) -> Option<End> {
        // Connecting and loading the model go on side by side; only the handshake needs both.
        let first = self.options.servers[0].clone();
        let (channel, hello) = tokio::join!(client::connect(&first, &self.options.access), hello);
        let hello = hello.ok()?;
        let mut ready = Some(channel);
        loop {
            match self.connect(&hello, ready.take()).await {
                Ok(conversation) => {
                    let since = Instant::now();
                    let (good, idle) = match self.carry(conversation).await {
                        Ok(carried) => carried,
                        Err(end) => return Some(end),
                    };
                    if good || since.elapsed() >= GOOD {
                        self.backoff.reset();
                    } else if self.wait().await.is_err() {
                        return Some(End::Unwanted);
                    }
                    // A server that ends idle streams wants them ended: the next turn connects.
                    while idle && !self.wanted {
                        match self.orders.recv().await {
                            None => return Some(End::Unwanted),
                            Some(order) => self.wanted = !matches!(order, Order::Leave(_)),
                        }
                    }
                }
                Err(error) => {
                    // What worked before may be about to work again: a certificate or a token is being renewed, a server updated.
                    self.denied += u32::from(matches!(error, ConnectError::Denied(..)));
                    let ended = error.permanent() && (self.number == 0 || self.denied > DENIED);
                    let text = error.to_string();
                    if self.news.send(News::Failed { error, ended }).await.is_err() {
                        return Some(End::Unwanted);
                    }
                    if ended {
                        return Some(End::Failed(text));
                    }
                    if self.wait().await.is_err() {
                        return Some(End::Unwanted);
                    }
                }
            }
        }
    }

    /// One round over the servers, from the one that is to be tried first.
    async fn connect(
        &mut self,
        hello: &Hello,
        mut ready: Option<Result<tonic::transport::Channel, ConnectError>>,
    ) -> Result<client::Conversation, ConnectError> {
        let Options { servers, access } = &self.options;
        let mut worst: Option<ConnectError> = None;
        for n in 0..servers.len() {
            let at = (self.at + n) % servers.len();
            let url = &servers[at];
            let channel = match ready.take() {
                Some(channel) => channel,
                None => client::connect(url, access).await,
            };
            let talk = async { client::converse(channel?, url, access, hello.clone()).await };
            match talk.await {
                Ok(conversation) => {
                    self.at = at;
                    return Ok(conversation);
                }
                Err(error) => {
                    tracing::debug!(%error, "no conversation");
                    // As long as one of them may come back, trying again is worth it.
                    if worst.as_ref().is_none_or(ConnectError::permanent) {
                        worst = Some(error);
                    }
                }
            }
        }
        Err(worst.expect("there is a server"))
    }

    /// Carries frames until the stream ends or is left; says whether it was of use, and whether it ended because nobody used it.
    async fn carry(&mut self, conversation: client::Conversation) -> Result<(bool, bool), End> {
        let client::Conversation {
            welcome,
            outgoing,
            mut incoming,
        } = conversation;
        let welcome = Box::new(welcome);
        self.number += 1;
        (self.wanted, self.denied) = (false, 0);
        let number = self.number;
        self.tell(News::Connected {
            number,
            welcome,
            outgoing,
        })
        .await?;
        let mut good = false;
        loop {
            let next = tokio::select! {
                frame = incoming.message() => frame,
                order = self.orders.recv() => match order {
                    None => return Err(End::Unwanted),
                    Some(Order::Leave(left)) if left == number => {
                        self.at = (self.at + 1) % self.options.servers.len();
                        self.tell(News::Lost("the continuator was left for another".into())).await?;
                        return Ok((good, false));
                    }
                    Some(Order::Hurry | Order::Want | Order::Leave(_)) => continue,
                },
            };
            match next {
                Ok(Some(frame)) => {
                    good |= matches!(frame.body, Some(Body::Chunk(_) | Body::EndTurn(_)));
                    self.tell(News::Frame(frame)).await?;
                }
                Ok(None) => {
                    self.tell(News::Lost("the continuator closed the connection".into()))
                        .await?;
                    return Ok((good, false));
                }
                Err(status) => {
                    self.tell(News::Lost(lost(&status))).await?;
                    return Ok((good, status.code() == Code::DeadlineExceeded));
                }
            }
        }
    }

    async fn tell(&self, news: News) -> Result<(), End> {
        self.news.send(news).await.map_err(|_| End::Unwanted)
    }

    /// Waits for the next attempt, or until somebody is in a hurry.
    async fn wait(&mut self) -> Result<(), End> {
        let until = Instant::now() + self.backoff.next(rand::random());
        loop {
            tokio::select! {
                () = sleep_until(until) => return Ok(()),
                order = self.orders.recv() => match order {
                    None => return Err(End::Unwanted),
                    Some(Order::Hurry) => {
                        self.wanted = true;
                        return Ok(());
                    }
                    Some(Order::Want) => self.wanted = true,
                    Some(Order::Leave(_)) => {}
                },
            }
        }
    }
}

fn lost(status: &Status) -> String {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Unauthenticated
            if !status.message().is_empty() =>
        {
            format!("the continuator ended the conversation: {}", status.message())
        }
        _ => "the connection to the continuator broke".into(),
    }
}
