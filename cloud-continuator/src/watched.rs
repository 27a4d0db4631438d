//! Files that are read again when they change, so that certificates and tokens are renewed without a restart.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::watch;

/// How often files are looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// What tells that a file is another one: time of change, length, and number (a secret that is renewed by a link has another).
type Stamp = Vec<Option<(SystemTime, u64, u64)>>;

/// Loads a value from files, and again whenever one of them changes, for as long as somebody holds the receiver. A change that does not
/// load is logged, and the value from before stays in force. Must be called inside a tokio runtime.
///
/// # Errors
/// `load`'s, the first time.
pub fn watch<T, E>(
    what: &'static str,
    paths: Vec<PathBuf>,
    load: impl Fn() -> Result<T, E> + Send + 'static,
) -> Result<watch::Receiver<Arc<T>>, E>
where
    T: Send + Sync + 'static,
    E: std::fmt::Display + Send,
{
    let mut seen = stamp(&paths);
    let (sender, receiver) = watch::channel(Arc::new(load()?));
    tokio::spawn(async move {
        let mut complained = None;
        loop {
            tokio::select! {
                () = sender.closed() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
            let now = stamp(&paths);
            if now == seen {
                continue;
            }
            match load() {
                Ok(value) => {
                    tracing::info!(what, "read again");
                    seen = now;
                    sender.send_replace(Arc::new(value));
                }
                // It is tried again each time: what was wrong may have been nothing about the files.
                Err(error) if complained.as_ref() != Some(&now) => {
                    tracing::error!(what, %error, "cannot be read again; what was there before stays in force");
                    complained = Some(now);
                }
                Err(_) => {}
            }
        }
    });
    Ok(receiver)
}

fn stamp(paths: &[PathBuf]) -> Stamp {
    use std::os::unix::fs::MetadataExt;
    let one = |path: &PathBuf| {
        let data = std::fs::metadata(path).ok()?;
        Some((data.modified().ok()?, data.len(), data.ino()))
    };
    paths.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_change_is_seen_and_a_broken_one_is_not_taken() {
        let path = std::env::temp_dir().join(format!("segue-watched-{}", std::process::id()));
        std::fs::write(&path, "1").unwrap();
        let from = path.clone();
        let load = move || std::fs::read_to_string(&from).unwrap().parse::<u32>();
        let mut value = watch("a number", vec![path.clone()], load).unwrap();
        assert_eq!(**value.borrow_and_update(), 1);
        std::fs::write(&path, "broken").unwrap();
        tokio::time::sleep(PERIOD * 2).await;
        assert_eq!(**value.borrow(), 1);
        std::fs::write(&path, "23").unwrap();
        value.changed().await.unwrap();
        assert_eq!(**value.borrow(), 23);
        std::fs::remove_file(path).unwrap();
    }
}
