//! The ordered list of backends: who is asked first, who next, and who is left alone for a while.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, task::JoinSet, time::Instant};

use crate::backend::{Backend, Failure, breaker::Breaker};

/// How often to see whether a backend that was left alone is due for a trial.
const TICK: Duration = Duration::from_millis(250);
/// How often to check a backend that seems to work: readiness must not wait for a turn to find out.
const CHECK_EVERY: Duration = Duration::from_secs(10);
/// How long a check may take: a probe may be the first thing that a model is asked after it was loaded.
const CHECK_LIMIT: Duration = Duration::from_secs(45);

/// One backend of the list.
pub struct Member {
    /// Its name in the configuration.
    pub name: String,
    /// The backend.
    pub backend: Arc<dyn Backend>,
    breaker: Mutex<Breaker>,
}

/// The list; the first is the best.
pub struct Backends {
    members: Vec<Member>,
    ready: watch::Sender<bool>,
}

impl Backends {
    /// A list of (name, backend).
    ///
    /// # Panics
    /// When it is empty.
    pub fn new(members: Vec<(String, Arc<dyn Backend>)>) -> Self {
        assert!(!members.is_empty(), "there is a backend");
        let member = |(name, backend): (String, Arc<dyn Backend>)| {
            let mut breaker = Breaker::default();
            if backend.info().local {
                breaker.answered();
            }
            Member {
                name,
                backend,
                breaker: Mutex::new(breaker),
            }
        };
        let this = Self {
            members: members.into_iter().map(member).collect(),
            ready: watch::Sender::new(false),
        };
        this.update();
        this
    }

    /// The members, in order.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The member whose name stands for all: the first that works, else the first.
    pub fn leader(&self) -> &Member {
        let works = |m: &&Member| m.with(|b| b.closed());
        self.members.iter().find(works).unwrap_or(&self.members[0])
    }

    /// The first member that works and is none of `tried`.
    pub fn next(&self, tried: &[usize]) -> Option<usize> {
        (0..self.members.len()).find(|n| !tried.contains(n) && self.members[*n].with(|b| b.closed()))
    }

    /// Why no member takes a turn, and when that may change.
    pub fn unavailable(&self) -> Failure {
        let now = Instant::now();
        let soonest = self.members.iter().map(|m| m.with(|b| b.remaining(now))).min();
        Failure::Unavailable(soonest.unwrap_or_default().max(TICK))
    }

    /// A member served a turn, or began to.
    pub fn succeeded(&self, member: usize) {
        self.members[member].with(Breaker::served);
        self.update();
    }

    /// A member failed a turn.
    pub fn failed(&self, member: usize, failure: &Failure) {
        let now = Instant::now();
        let this = &self.members[member];
        match failure {
            // The request's fault, or a bounded queue doing its work.
            Failure::ContextTooSmall { .. } | Failure::Overloaded { retry_after: None } => return,
            Failure::Refused {
                status: 400 | 413 | 422,
                ..
            } => return,
            _ => {}
        }
        let opened = this.with(|breaker| match failure {
            Failure::Overloaded { retry_after } => {
                let closed = breaker.closed();
                breaker.open(now, *retry_after);
                closed
            }
            _ => breaker.failed(now),
        });
        if opened {
            let pause = this.with(|b| b.remaining(now));
            tracing::warn!(
                backend = this.name,
                error = failure.kind(),
                ?pause,
                "backend left alone"
            );
        }
        self.update();
    }

    /// Whether any member works, as it changes.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    fn update(&self) {
        let any = self.members.iter().any(|m| m.with(|b| b.proven()));
        self.ready
            .send_if_modified(|ready| std::mem::replace(ready, any) != any);
    }

    /// Checks the members, at first and from time to time; never ends. (Turns do not wait for that: they find out themselves.)
    pub async fn keep_checking(self: Arc<Self>) {
        let mut checks = JoinSet::new();
        for n in 0..self.members.len() {
            checks.spawn(self.clone().keep_checking_one(n));
        }
        while let Some(ended) = checks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "the checks of a backend ended");
            }
        }
        std::future::pending().await
    }

    async fn keep_checking_one(self: Arc<Self>, n: usize) {
        self.check(n, true).await;
        let mut checked = Instant::now();
        loop {
            tokio::time::sleep(TICK).await;
            let now = Instant::now();
            let due = |b: &mut Breaker| {
                if b.closed() {
                    checked + CHECK_EVERY <= now
                } else {
                    b.due(now)
                }
            };
            if self.members[n].with(due) {
                self.check(n, false).await;
                checked = Instant::now();
            }
        }
    }

    /// Checks a member; one failure is enough to leave it alone if it is the `first` check, or if it cannot come back.
    async fn check(&self, n: usize, first: bool) {
        let member = &self.members[n];
        let result = tokio::time::timeout(CHECK_LIMIT, member.backend.check()).await;
        match result.unwrap_or(Err(Failure::Stalled(CHECK_LIMIT))) {
            Ok(()) => {
                if !member.with(|b| b.closed()) {
                    tracing::info!(backend = member.name, "backend works again");
                }
                member.with(Breaker::answered);
                self.update();
            }
            Err(failure) => {
                // An open one stays open, for longer each time.
                if first || matches!(failure, Failure::Model(_)) || !member.with(|b| b.closed()) {
                    member.with(|b| b.open(Instant::now(), None));
                    self.update();
                } else {
                    self.failed(n, &failure);
                }
                tracing::warn!(
                    backend = member.name,
                    error = failure.kind(),
                    "backend does not answer; it is tried again"
                );
            }
        }
    }
}

impl Member {
    fn with<T>(&self, action: impl FnOnce(&mut Breaker) -> T) -> T {
        // A breaker is whole after every step, so that a poisoned lock is as good as any.
        action(&mut self.breaker.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
