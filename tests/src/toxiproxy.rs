//! Toxiproxy, a TCP proxy that spoils connections: `tests/bring_toxiproxy.sh` builds it.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::programs::{PATIENCE, root};

/// A running server; killed when dropped.
pub struct Toxiproxy {
    child: Child,
    api: String,
}

/// A proxy before one address. Its toxics hold for connections that are open and those to come.
pub struct Proxy {
    server: Arc<Toxiproxy>,
    name: String,
    /// Where it listens, as host and port.
    pub address: String,
}

impl Toxiproxy {
    /// Starts one, if it was built.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start() -> Option<Arc<Self>> {
        let program = root().join(".segue/peers/bin/toxiproxy-server");
        if !program.exists() {
            return None;
        }
        let port = free_port();
        let child = Command::new(program)
            .args(["-host", "127.0.0.1", "-port", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("toxiproxy starts");
        let this = Self {
            child,
            api: format!("127.0.0.1:{port}"),
        };
        let started = Instant::now();
        while TcpStream::connect(&this.api).is_err() {
            assert!(started.elapsed() < PATIENCE, "toxiproxy does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(Arc::new(this))
    }

    /// A proxy before `upstream` (host and port).
    ///
    /// # Panics
    /// When it is refused.
    pub fn proxy(self: &Arc<Self>, name: &str, upstream: &str) -> Proxy {
        let body = json!({ "name": name, "listen": "127.0.0.1:0", "upstream": upstream, "enabled": true });
        let made = self.call("POST", "/proxies", &body);
        Proxy {
            server: self.clone(),
            name: name.to_owned(),
            address: made["listen"].as_str().expect("it listens").to_owned(),
        }
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = body.to_string();
        let (status, answer) = http(&self.api, method, path, &body);
        assert!(
            status < 300,
            "toxiproxy refuses {method} {path} {body}: {status} {answer}"
        );
        serde_json::from_str(&answer).unwrap_or(Value::Null)
    }
}

impl Drop for Toxiproxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    /// Adds a toxic to what flows `upstream` or `downstream`.
    pub fn spoil(&self, toxic: &str, stream: &str, attributes: &Value) {
        let name = format!("{toxic}_{stream}");
        let body = json!({ "name": name, "type": toxic, "stream": stream, "attributes": attributes });
        self.server
            .call("POST", &format!("/proxies/{}/toxics", self.name), &body);
    }

    /// Closes its connections and takes none, or takes them again.
    pub fn enable(&self, enabled: bool) {
        let body = json!({ "enabled": enabled });
        self.server.call("POST", &format!("/proxies/{}", self.name), &body);
    }

    /// Takes all toxics away.
    pub fn heal(&self) {
        let toxics = self
            .server
            .call("GET", &format!("/proxies/{}/toxics", self.name), &Value::Null);
        for toxic in toxics.as_array().into_iter().flatten() {
            let name = toxic["name"].as_str().unwrap_or_default();
            self.server
                .call("DELETE", &format!("/proxies/{}/toxics/{name}", self.name), &Value::Null);
        }
    }
}

/// A port that was free a moment ago.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound").port()
}

/// A plain HTTP call; status and body.
///
/// # Panics
/// When nobody answers.
pub fn http(address: &str, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap_or_else(|e| panic!("{address}: {e}"));
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let length = body.len();
    let request = format!("{method} {path} HTTP/1.0\r\nhost: {address}\r\ncontent-length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).expect("the request is taken");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer comes");
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .expect("an HTTP status");
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, body.to_owned())
}
