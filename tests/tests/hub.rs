//! Models of the Hugging Face hub, from a hub of our own: fetched once, checked, and used without it from then on.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use segue_tests::{
    llama_server,
    programs::{Continuator, command, finish},
};
use sha2::{Digest, Sha256};

/// Serves the default model as `owner/model/sub/model.gguf` the way the hub does; damages it if told to.
struct Hub {
    url: String,
    home: PathBuf,
    damaged: Arc<AtomicBool>,
    requests: Arc<AtomicUsize>,
}

impl Hub {
    fn start(name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let home = std::env::temp_dir().join(format!("segue-hub-{name}-{}", std::process::id()));
        let (damaged, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let model = std::fs::read(llama_server::model()).unwrap();
        let hash: String = Sha256::digest(&model).iter().map(|b| format!("{b:02x}")).collect();
        let (bad, count) = (damaged.clone(), requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                count.fetch_add(1, Ordering::SeqCst);
                let _ = answer(stream, &model, &hash, bad.load(Ordering::SeqCst));
            }
        });
        Self {
            url,
            home,
            damaged,
            requests,
        }
    }

    fn set(&self, command: &mut Command) {
        command
            .env("HF_ENDPOINT", &self.url)
            .env("HF_HOME", &self.home)
            .env_remove("HF_TOKEN");
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.home);
    }
}

fn answer(mut stream: TcpStream, model: &[u8], hash: &str, damaged: bool) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut line, mut range, mut first) = (String::new(), None, String::new());
    while reader.read_line(&mut line)? > 2 {
        if first.is_empty() {
            first.clone_from(&line);
        }
        if let Some(value) = line.to_lowercase().strip_prefix("range: bytes=") {
            let (from, to) = value.trim().split_once('-').unwrap();
            range = Some((from.parse::<usize>().unwrap(), to.parse().unwrap_or(model.len() - 1)));
        }
        line.clear();
    }
    if !first.contains("/owner/model/resolve/main/sub/model.gguf") {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
    let (from, to) = range.unwrap_or((0, model.len() - 1));
    let head = format!(
        "HTTP/1.1 206 Partial\r\nx-repo-commit: 0123456789abcdef\r\netag: \"{hash}\"\r\ncontent-range: bytes {from}-{to}/{}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        model.len(),
        to - from + 1
    );
    stream.write_all(head.as_bytes())?;
    let mut body = model[from..=to].to_vec();
    if damaged && body.len() > 1000 {
        body[999] ^= 1;
    }
    stream.write_all(&body)?;
    let _ = stream.read(&mut [0]);
    Ok(())
}

const NAME: &str = "hf:owner/model/sub/model.gguf";

#[test]
fn a_model_is_fetched_once_and_then_used_without_the_network() {
    let hub = Hub::start("once");
    let first = Continuator::start_with(&["--model", NAME], |c| hub.set(c));
    assert!(
        first.log().contains("percent=100") && first.log().contains("sha256="),
        "{}",
        first.log()
    );
    let asked = hub.requests.load(Ordering::SeqCst);
    drop(first);
    let second = Continuator::start_with(&["--model", NAME], |c| {
        hub.set(c);
        c.env("HF_ENDPOINT", "http://127.0.0.1:9"); // nobody is there
    });
    drop(second);
    assert_eq!(hub.requests.load(Ordering::SeqCst), asked);
}

#[test]
fn what_cannot_be_fetched_is_said() {
    let hub = Hub::start("bad");
    let refused = |name: &str, says: &[&str]| {
        let mut command = command("cloud-continuator");
        command.args(["serve", "--listen", "127.0.0.1:0", "--model", name]);
        hub.set(&mut command);
        let done = finish(command, b"");
        assert_eq!(done.code, 64, "{}", done.err);
        for text in says {
            assert!(done.err.contains(text), "{text}: {}", done.err);
        }
    };
    refused("hf:owner/model", &["hf:OWNER/REPO/FILE.gguf"]);
    refused("hf:owner/model/other.gguf", &["404", "HF_ENDPOINT"]);
    hub.damaged.store(true, Ordering::SeqCst);
    refused(NAME, &["damaged", "SHA-256"]);
    // It is not kept: the next try fetches it anew.
    hub.damaged.store(false, Ordering::SeqCst);
    drop(Continuator::start_with(&["--model", NAME], |c| hub.set(c)));
}
