//! One turn at an upstream: a future that takes inputs and makes requests, one at a time.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{sync::mpsc, time::Instant};
use tokio_stream::Stream;
use tracing::{Instrument, Span};

use super::{
    Upstream,
    body::{self, Way},
    stream::{Answer, Piece},
    text::{Dots, Rejoin, Thoughts},
};
use crate::{
    backend::{Event, Failure, Finish, Input, Request, Usage},
    names,
    stop::StopFilter,
};

/// Events that may wait; while they do, nothing is read from the upstream.
const EVENTS: usize = 8;

/// A future together with the events that it makes: the turn's task is whoever reads them, and ends with its interest.
pub struct Driven {
    work: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    events: mpsc::Receiver<Event>,
}

impl Driven {
    /// Serves a turn.
    pub fn new(upstream: Arc<Upstream>, request: Request, inputs: mpsc::Receiver<Input>) -> Self {
        let (sender, events) = mpsc::channel(EVENTS);
        let turn = Serving {
            upstream,
            request,
            events: sender,
            usage: Usage::default(),
            generations: 0,
            span: Span::current(),
        };
        Self {
            work: Some(Box::pin(turn.serve(inputs))),
            events,
        }
    }
}

impl Stream for Driven {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        loop {
            if let Ok(event) = self.events.try_recv() {
                return Poll::Ready(Some(event));
            }
            let Some(work) = &mut self.work else {
                return self.events.poll_recv(context);
            };
            let done = work.as_mut().poll(context).is_ready();
            if done {
                self.work = None;
            }
            if !done && self.events.is_empty() {
                return Poll::Pending;
            }
        }
    }
}

/// What is asked for.
enum Asked {
    Judge(String),
    Continue(String),
    Resume(String),
}

struct Serving {
    upstream: Arc<Upstream>,
    request: Request,
    events: mpsc::Sender<Event>,
    usage: Usage,
    generations: u32,
    span: Span,
}

impl Serving {
    async fn serve(mut self, mut inputs: mpsc::Receiver<Input>) {
        let upstream = self.upstream.clone();
        let request = self.request.clone();
        let mut warm_up = upstream
            .options
            .warm_up
            .then(|| Box::pin(async move { upstream.warm_up(&request).await }));
        let mut next = None;
        loop {
            let input = match next.take() {
                Some(input) => Some(input),
                None => tokio::select! {
                    biased;
                    input = inputs.recv() => input,
                    tokens = async { match &mut warm_up { Some(warm_up) => warm_up.await, None => std::future::pending().await } } => {
                        warm_up = None;
                        // A warm-up that failed is no reason to fail: the turn itself will tell.
                        if let Ok(counted) = tokens {
                            self.usage.prompt = counted.prompt;
                            self.usage.wasted = self.usage.wasted.saturating_add(counted.completion.max(1));
                            self.send(Event::Prefilled).await;
                        }
                        continue;
                    }
                },
            };
            let asked = match input {
                None | Some(Input::Close) => return,
                // The upstream's cache takes whole requests: the words will be read with the commit.
                Some(Input::Opener(_)) => continue,
                Some(Input::Commit(_)) => {
                    self.send(Event::Scored(Vec::new())).await;
                    continue;
                }
                Some(Input::Judge(opener)) => Asked::Judge(opener),
                Some(Input::Generate(reply)) => Asked::Continue(reply),
                Some(Input::Resume(reply)) => Asked::Resume(reply),
            };
            // Whether the warm-up is through or not: what it has read is in the upstream's cache, and its place is needed.
            warm_up = None;
            self.usage.generated = 0;
            self.usage.generation = self.generations;
            self.generations += 1;
            let span = self.upstream.client_span(&self.span);
            tokio::select! {
                biased;
                input = inputs.recv() => {
                    // Something else is wanted: dropping the request cancelled it.
                    self.usage.wasted = self.usage.wasted.saturating_add(self.usage.generated);
                    next = Some(input.unwrap_or(Input::Close));
                }
                result = self.generate(&asked, &span) => {
                    span.record(names::INPUT_TOKENS, self.usage.prompt);
                    span.record(names::CACHED_TOKENS, self.usage.cached);
                    span.record(names::OUTPUT_TOKENS, self.usage.generated);
                    match result {
                        Ok(finish) => self.send(Event::Done(finish, self.usage)).await,
                        Err(failure) => {
                            span.record(names::ERROR_TYPE, failure.kind());
                            span.record("otel.status_code", "ERROR");
                            self.send(Event::Failed(failure)).await;
                        }
                    }
                }
            }
        }
    }

    async fn send(&self, event: Event) {
        // A turn that nobody reads any more is dropped, and this with it.
        let _ = self.events.send(event).await;
    }

    async fn generate(&mut self, asked: &Asked, span: &Span) -> Result<Finish, Failure> {
        let way = self.upstream.way().await?;
        match self.attempt(asked, way, span).await {
            // The model behind the name may have changed to one that takes no prefill: find out.
            Err(refused @ Failure::Refused { status: 400 | 422, .. })
                if self.usage.generated == 0 && self.upstream.options.mode == super::Mode::Auto =>
            {
                match self.upstream.probed(Some(way)).await? {
                    now if now == way => Err(refused),
                    now => self.attempt(asked, now, span).await,
                }
            }
            result => result,
        }
    }

    async fn attempt(&mut self, asked: &Asked, way: Way, span: &Span) -> Result<Finish, Failure> {
        let options = &self.upstream.options;
        let mut rejoin = None;
        let body = match asked {
            Asked::Judge(opener) => body::judged(options, &self.request, way, opener),
            Asked::Continue(reply) => body::continuation(options, &self.request, way, reply),
            Asked::Resume(reply) if way == Way::Prompt => {
                let (head, again) = Rejoin::again(reply);
                rejoin = Some(again);
                body::continuation(options, &self.request, way, &head)
            }
            Asked::Resume(reply) => {
                rejoin = Some(Rejoin::follow(reply));
                body::continuation(options, &self.request, way, reply)
            }
        };
        let asked_in_words = way == Way::Prompt && !matches!(asked, Asked::Judge(_));
        let mut shown = Shown {
            thoughts: Thoughts::default(),
            dots: asked_in_words.then(Dots::default),
            rejoin,
        };
        let mut stop = StopFilter::new(self.request.parameters.stop.iter().cloned());
        let mut finish = None;
        // (Entering the span for every token would cost as much as parsing it.)
        let mut answer = self.upstream.ask(&body).instrument(span.clone()).await?;
        while let Some(piece) = answer.next().await? {
            match piece {
                Piece::Text(text) => {
                    if self.usage.generated >= self.request.parameters.max_tokens {
                        // A server that has not understood the limit.
                        self.last_text(&mut shown, &mut stop).await;
                        return Ok(Finish::Length);
                    }
                    self.usage.generated += 1;
                    let (text, stopped) = stop.push(&shown.push(text));
                    self.text(text).await;
                    if stopped {
                        return Ok(Finish::Stop);
                    }
                }
                Piece::Life => {}
                Piece::Finish(reason) => {
                    finish = Some(reason);
                    self.last_text(&mut shown, &mut stop).await;
                }
                Piece::Usage(counted) => {
                    self.usage.prompt = counted.prompt;
                    self.usage.cached = counted.cached;
                    if counted.completion > 0 {
                        self.usage.generated = counted.completion;
                    }
                }
            }
        }
        finish.ok_or(Failure::CutOff)
    }

    /// Sends what is held back at the end of a reply.
    async fn last_text(&self, shown: &mut Shown, stop: &mut StopFilter) {
        let (rest, stopped) = stop.push(&shown.finish());
        let held = if stopped { String::new() } else { stop.finish() };
        self.text(rest + &held).await;
    }

    async fn text(&self, text: String) {
        if !text.is_empty() {
            self.send(Event::Text(text, self.usage)).await;
        }
    }
}

/// What of a reply's text is shown.
struct Shown {
    thoughts: Thoughts,
    dots: Option<Dots>,
    rejoin: Option<Rejoin>,
}

impl Shown {
    fn push(&mut self, text: String) -> String {
        let text = self.thoughts.push(text);
        self.after_thoughts(text)
    }

    fn after_thoughts(&mut self, text: String) -> String {
        let text = match &mut self.dots {
            Some(dots) => dots.push(text),
            None => text,
        };
        match &mut self.rejoin {
            Some(rejoin) => rejoin.push(text),
            None => text,
        }
    }

    fn finish(&mut self) -> String {
        let rest = self.thoughts.finish();
        let mut rest = self.after_thoughts(rest);
        let held = self.dots.as_mut().map(Dots::finish).unwrap_or_default();
        match &mut self.rejoin {
            Some(rejoin) => rest + &rejoin.push(held) + &rejoin.finish(),
            None => {
                rest.push_str(&held);
                rest
            }
        }
    }
}

impl Upstream {
    /// Sends a request and waits for the head of its answer.
    ///
    /// # Errors
    /// [`Failure`] of the connection or of the upstream.
    pub(super) async fn ask(&self, body: &serde_json::Value) -> Result<Answer, Failure> {
        let first = Instant::now() + self.options.first_token;
        let sent = tokio::time::timeout_at(first, self.post(body)).await;
        let response = sent.map_err(|_| Failure::Stalled(self.options.first_token))??;
        Answer::read(response, first, self.options.stall).await
    }
}
