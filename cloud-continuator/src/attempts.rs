//! A turn's way through the ordered backends: who serves it, who is next, and who runs along because the first is late.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Sleep;
use tracing::Span;

use crate::{
    backend::{Event, Failure, Input, Request, Turn},
    backends::Backends,
};

/// Backends that one turn may use up, counting one again that served it for a while.
const MOST: usize = 8;

struct Attempt {
    member: usize,
    turn: Turn,
    /// Generations that it was asked for.
    asked: u32,
}

/// What comes of the attempts.
#[derive(Debug)]
pub enum News {
    /// The serving backend's event.
    Event(Event),
    /// The one that ran along was first, or the other has failed: it serves from here on, and has been asked what the other had been
    /// asked. Its first event, if there is one yet.
    Overtaken(Option<Event>),
}

/// The attempts of one turn.
pub struct Attempts {
    backends: Arc<Backends>,
    /// As it is opened next: with what is left of the tokens.
    request: Request,
    /// Most tokens of a whole reply.
    most: u32,
    span: Span,
    current: Attempt,
    /// A second backend that was asked the same, and when to ask one.
    hedge: Option<Attempt>,
    hedge_after: Option<Duration>,
    hedge_at: Option<Pin<Box<Sleep>>>,
    /// What the current backend was asked last.
    asked: Option<Input>,
    /// Members that failed this turn, and those of them that brought it on before: they are tried again when nobody else is left.
    tried: Vec<usize>,
    useful: Vec<usize>,
    opened: usize,
    /// The current one has said something.
    spoke: bool,
    /// The current one is given up because it is late, which is no fault.
    late: bool,
    losers: u32,
}

impl Attempts {
    /// Opens the turn at the first backend that takes it. Spans of backends are children of `span`.
    ///
    /// # Errors
    /// What the last backend said, when none takes it.
    pub fn open(
        backends: &Arc<Backends>,
        request: Request,
        hedge_after: Option<Duration>,
        span: &Span,
    ) -> Result<Self, Failure> {
        let mut tried = Vec::new();
        let current = open(backends, &request, &mut tried, span)?;
        Ok(Self {
            backends: backends.clone(),
            most: request.parameters.max_tokens,
            request,
            span: span.clone(),
            current,
            hedge: None,
            hedge_after,
            hedge_at: None,
            asked: None,
            tried,
            useful: Vec::new(),
            opened: 1,
            spoke: false,
            late: false,
            losers: 0,
        })
    }

    /// The member that serves the turn.
    pub fn member(&self) -> usize {
        self.current.member
    }

    /// How many backends were left behind in a race, since this was asked last: each has read the whole prompt for nothing.
    pub fn take_losers(&mut self) -> u32 {
        std::mem::take(&mut self.losers)
    }

    /// Tells the serving backend something.
    ///
    /// # Errors
    /// See [`Turn::send`].
    pub fn send(&mut self, input: Input) -> Result<(), Failure> {
        self.hedge = None;
        self.hedge_at = None;
        if !matches!(input, Input::Opener(_) | Input::Close) {
            self.hedge_at = self.hedge_after.map(|after| Box::pin(tokio::time::sleep(after)));
            self.asked = Some(input.clone());
        }
        if input.generates() {
            self.current.asked += 1;
            self.spoke = false;
        }
        if matches!(input, Input::Judge(_) | Input::Generate(_)) {
            self.request.parameters.max_tokens = self.most;
        }
        self.current.turn.send(input)
    }

    /// Opens the turn anew at the same backend, whose turn is over.
    ///
    /// # Errors
    /// See [`crate::backend::Backend::open`].
    pub fn reopen(&mut self) -> Result<(), Failure> {
        // It is opened for a reply of its own.
        self.request.parameters.max_tokens = self.most;
        let member = &self.backends.members()[self.current.member];
        self.current.turn = self.span.in_scope(|| member.backend.open(self.request.clone()))?;
        self.current.asked = 0;
        Ok(())
    }

    /// Opens the turn at the next backend; `generated` tokens of it were delivered.
    ///
    /// # Errors
    /// `failure`, when there is none.
    pub fn move_on(&mut self, failure: Failure, generated: u32) -> Result<(), Failure> {
        self.give_up(&failure);
        self.hedge_at = None;
        if self.opened >= MOST {
            return Err(failure);
        }
        self.opened += 1;
        self.request.parameters.max_tokens = self.most.saturating_sub(generated).max(1);
        let opened = open(&self.backends, &self.request, &mut self.tried, &self.span).or_else(|last| {
            let useful = std::mem::take(&mut self.useful);
            self.tried.retain(|member| !useful.contains(member));
            let again = open(&self.backends, &self.request, &mut self.tried, &self.span);
            again.map_err(|_| last)
        });
        match opened {
            Ok(current) => {
                let from = &self.backends.members()[self.current.member].name;
                let to = &self.backends.members()[current.member].name;
                tracing::warn!(parent: &self.span, from, to, error = failure.kind(), "turn moved");
                self.current = current;
                self.spoke = false;
                Ok(())
            }
            Err(Failure::Unavailable(_)) => Err(failure),
            // Of two failures, the one that another try may mend.
            Err(last) => Err(if failure.retryable() { failure } else { last }),
        }
    }

    /// The current backend is done with this turn.
    fn give_up(&mut self, failure: &Failure) {
        let member = self.current.member;
        let late = std::mem::take(&mut self.late);
        if !late {
            self.backends.failed(member, failure);
        }
        self.tried.push(member);
        if self.spoke || late {
            self.useful.push(member);
        }
    }

    /// The next news; `None` when the serving backend has no more to say.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<News>> {
        while let Poll::Ready(event) = self.current.turn.poll_next(context) {
            match event {
                // What is left of a generation that was replaced says nothing about the one that is waited for.
                Some(event @ (Event::Text(_, usage) | Event::Done(_, usage)))
                    if usage.generation + 1 != self.current.asked =>
                {
                    return Poll::Ready(Some(News::Event(event)));
                }
                Some(event @ (Event::Text(..) | Event::Done(..))) => {
                    self.spoke |= matches!(event, Event::Text(..));
                    self.hedge_at = None;
                    if self.hedge.take().is_some() {
                        self.losers += 1;
                    }
                    self.backends.succeeded(self.current.member);
                    return Poll::Ready(Some(News::Event(event)));
                }
                Some(Event::Failed(failure)) if self.hedge.is_some() => {
                    // The one that runs along has been asked the same: it takes the place.
                    self.give_up(&failure);
                    if let Some(hedge) = self.hedge.take() {
                        self.current = hedge;
                        return Poll::Ready(Some(News::Overtaken(None)));
                    }
                }
                event => return Poll::Ready(event.map(News::Event)),
            }
        }
        if let Some(timer) = &mut self.hedge_at
            && timer.as_mut().poll(context).is_ready()
        {
            self.hedge_at = None;
            if !matches!(self.asked, Some(Input::Commit(_))) {
                self.run_along();
            } else if self.another().is_some() {
                // Nothing is being computed for this turn yet but its verdict: it had better be elsewhere.
                let late = Failure::Stalled(self.hedge_after.unwrap_or_default());
                self.late = true;
                return Poll::Ready(Some(News::Event(Event::Failed(late))));
            }
        }
        while let Some(hedge) = &mut self.hedge {
            let Poll::Ready(event) = hedge.turn.poll_next(context) else {
                break;
            };
            match event {
                Some(event @ (Event::Text(..) | Event::Done(..))) => {
                    std::mem::swap(&mut self.current, hedge);
                    self.hedge = None;
                    self.losers += 1;
                    self.spoke = matches!(event, Event::Text(..));
                    self.backends.succeeded(self.current.member);
                    return Poll::Ready(Some(News::Overtaken(Some(event))));
                }
                Some(Event::Failed(failure)) => {
                    self.backends.failed(hedge.member, &failure);
                    self.tried.push(hedge.member);
                    self.hedge = None;
                }
                Some(Event::Prefilled | Event::Scored(_)) => {}
                None => self.hedge = None,
            }
        }
        Poll::Pending
    }

    fn another(&self) -> Option<usize> {
        self.backends.next(&[&self.tried[..], &[self.current.member]].concat())
    }

    /// Asks a second backend the same.
    fn run_along(&mut self) {
        let mut not = [&self.tried[..], &[self.current.member]].concat();
        let Some(asked) = self.asked.clone() else { return };
        if let Ok(hedge) = open(&self.backends, &self.request, &mut not, &self.span)
            && hedge.turn.send(asked).is_ok()
        {
            let hedge = Attempt { asked: 1, ..hedge };
            let name = &self.backends.members()[hedge.member].name;
            tracing::debug!(parent: &self.span, backend = name, "the first token is late: a second backend is asked");
            self.hedge = Some(hedge);
        }
    }
}

/// Opens the turn at the first backend that takes it and was not `tried`.
fn open(backends: &Backends, request: &Request, tried: &mut Vec<usize>, span: &Span) -> Result<Attempt, Failure> {
    let mut last = None;
    while let Some(member) = backends.next(tried) {
        match span.in_scope(|| backends.members()[member].backend.open(request.clone())) {
            Ok(turn) => {
                return Ok(Attempt { member, turn, asked: 0 });
            }
            Err(failure) => {
                backends.failed(member, &failure);
                tried.push(member);
                last = Some(failure);
            }
        }
    }
    Err(last.unwrap_or_else(|| backends.unavailable()))
}
