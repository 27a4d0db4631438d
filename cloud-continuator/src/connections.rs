//! How many connections there may be: each holds a place for as long as it is open.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::Connected;

/// The places.
#[derive(Clone, Debug)]
pub struct Places(Arc<Semaphore>);

impl Places {
    /// `most` places; 0: as many as there can be.
    pub fn new(most: usize) -> Self {
        let most = if most == 0 { Semaphore::MAX_PERMITS } else { most };
        Self(Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))))
    }

    /// The connections that get a place; the others are closed at once, which costs less than letting them wait.
    pub fn hold<T>(self, incoming: impl Stream<Item = io::Result<T>>) -> impl Stream<Item = io::Result<Held<T>>> {
        incoming.filter_map(
            move |connection| match (connection, self.0.clone().try_acquire_owned()) {
                (Ok(io), Ok(place)) => Some(Ok(Held { io, _place: place })),
                (Ok(_), Err(_)) => {
                    tracing::warn!("all places for connections are taken; one more was closed");
                    None
                }
                (Err(error), _) => Some(Err(error)),
            },
        )
    }
}

/// A connection with its place.
#[derive(Debug)]
pub struct Held<T> {
    io: T,
    _place: OwnedSemaphorePermit,
}

impl<T: Connected> Connected for Held<T> {
    type ConnectInfo = T::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.io.connect_info()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Held<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Held<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
