//! Who may listen in and who is let in: TLS, mutual TLS and tokens, with real certificates.

use std::{path::PathBuf, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use segue_shared::{
    client::{Access, ConnectError},
    proto::Surface,
};
use segue_tests::{
    edge::Edge,
    programs::{Continuator, PATIENCE, ask, command, finish},
    upstream::{self, Step, Upstream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A folder of certificates; removed with the value.
struct Files(PathBuf);

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate for these names, and its key.
    fn issue(&self, names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

impl Files {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("segue-security-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// A certificate and its key, under a name.
    fn pair(&self, name: &str, (certificate, key): (String, String)) {
        self.write(&format!("{name}.crt"), &certificate);
        self.write(&format!("{name}.key"), &key);
    }

    /// `cloud-continuator token ...` on `tokens.toml`; what it printed.
    fn token(&self, args: &[&str]) -> String {
        let mut command = command("cloud-continuator");
        command
            .arg("token")
            .args(args)
            .args(["--tokens", &self.text("tokens.toml")]);
        let done = finish(command, b"");
        assert_eq!(done.code, 0, "{done:?}");
        done.out.trim().to_owned()
    }

    fn access(&self) -> Access {
        Access {
            ca: Some(self.path("ca.crt")),
            ..Access::default()
        }
    }

    fn with_token(&self, token: &str) -> Access {
        self.write("token", token);
        Access {
            token_file: Some(self.path("token")),
            ..Access::default()
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn upstream() -> Upstream {
    Upstream::start(|_, _| vec![Step::Send(upstream::reply(&[" is Canberra."]))]).await
}

fn continuator(upstream: &Upstream, args: &[&str]) -> Continuator {
    let up = upstream::args(&upstream.url, "prefill");
    Continuator::start(&[&up[..], &["--no-verify", "--metrics-listen", "127.0.0.1:0"], args].concat())
}

fn https(continuator: &Continuator) -> String {
    continuator.url.replace("http://127.0.0.1", "https://localhost")
}

async fn turn(edge: &mut Edge) {
    edge.start(1, "What is the capital of Australia?").await;
    edge.commit(1, "The capital of Australia").await;
    edge.rest(1).await;
}

async fn connect(url: &str, access: &Access, device: &str) -> Result<Edge, ConnectError> {
    Edge::try_connect(url, access, device, Surface::Revisable).await
}

async fn denied(url: &str, access: &Access, device: &str, says: &str) {
    match connect(url, access, device).await {
        Err(error @ ConnectError::Denied(..)) => assert!(error.to_string().contains(says), "{error}"),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("{device} was let in"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_needs_a_certificate_of_a_trusted_authority_and_the_right_name() {
    let (files, upstream, authority) = (Files::new("tls"), upstream().await, Authority::new());
    files.write("ca.crt", &authority.0.pem());
    files.write("other.crt", &Authority::new().0.pem());
    files.pair("server", authority.issue(&["localhost"]));
    let (cert, key) = (files.text("server.crt"), files.text("server.key"));
    let continuator = continuator(&upstream, &["--tls-cert", &cert, "--tls-key", &key]);
    let url = https(&continuator);
    turn(&mut connect(&url, &files.access(), "kitchen").await.unwrap()).await;
    let other = Access {
        ca: Some(files.path("other.crt")),
        ..Access::default()
    };
    let renamed = Access {
        server_name: Some("elsewhere".into()),
        ..files.access()
    };
    for (url, access) in [(&url, &other), (&url, &Access::default()), (&url, &renamed)] {
        let error = connect(url, access, "kitchen").await.err().expect("it is not trusted");
        assert!(
            matches!(error, ConnectError::Insecure(..)) && error.permanent(),
            "{error:?}"
        );
    }
    // In the clear, nobody gets anywhere.
    assert!(connect(&continuator.url, &Access::default(), "kitchen").await.is_err());
    let ca = files.text("ca.crt");
    tokio::task::block_in_place(|| {
        let question = "What is the capital of Australia?";
        let done = ask(
            &url,
            &["--ca", &ca, "--force-opener=The capital of Australia", question],
        );
        assert_eq!(done.code, 0, "{done:?}");
        let done = ask(&url, &["--ca", &ca, "--server-name=elsewhere", question]);
        assert_eq!(done.code, 77, "{done:?}");
        assert!(done.err.contains("--server-name"), "{}", done.err);
    });
    let log = continuator.log();
    assert!(log.contains("tls=true"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_used_without_a_restart() {
    let (files, upstream, old, new) = (
        Files::new("renewed"),
        upstream().await,
        Authority::new(),
        Authority::new(),
    );
    files.pair("server", old.issue(&["localhost"]));
    let (cert, key) = (files.text("server.crt"), files.text("server.key"));
    let continuator = continuator(&upstream, &["--tls-cert", &cert, "--tls-key", &key]);
    let url = https(&continuator);
    files.write("ca.crt", &old.0.pem());
    let mut before = connect(&url, &files.access(), "a").await.unwrap();
    // A broken renewal changes nothing.
    files.write("server.crt", "nonsense");
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(connect(&url, &files.access(), "a").await.is_ok());
    assert!(continuator.log().contains("stays in force"), "{}", continuator.log());
    files.pair("server", new.issue(&["localhost"]));
    files.write("ca.crt", &new.0.pem());
    let started = std::time::Instant::now();
    while connect(&url, &files.access(), "a").await.is_err() {
        assert!(started.elapsed() < PATIENCE, "the new certificate is never used");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // What was connected before goes on.
    turn(&mut before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_mutual_tls_the_certificate_names_the_device() {
    let (files, upstream, authority) = (Files::new("mutual"), upstream().await, Authority::new());
    files.write("ca.crt", &authority.0.pem());
    files.pair("server", authority.issue(&["localhost"]));
    files.pair("kitchen", authority.issue(&["kitchen"]));
    files.pair("stranger", Authority::new().issue(&["kitchen"]));
    let (cert, key, ca) = (files.text("server.crt"), files.text("server.key"), files.text("ca.crt"));
    let continuator = continuator(&upstream, &["--tls-cert", &cert, "--tls-key", &key, "--client-ca", &ca]);
    let url = https(&continuator);
    let with = |name: &str| Access {
        cert: Some(files.path(&format!("{name}.crt"))),
        key: Some(files.path(&format!("{name}.key"))),
        ..files.access()
    };
    turn(&mut connect(&url, &with("kitchen"), "kitchen").await.unwrap()).await;
    denied(&url, &with("kitchen"), "hall", "another device").await;
    for access in [files.access(), with("stranger")] {
        let error = connect(&url, &access, "kitchen").await.err().expect("it is not let in");
        assert!(
            matches!(error, ConnectError::Insecure(..) | ConnectError::Unreachable(..)),
            "{error:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_open_for_their_device_until_they_are_revoked() {
    let (files, upstream) = (Files::new("tokens"), upstream().await);
    let token = files.token(&["new", "kitchen"]);
    let brief = files.token(&["new", "kitchen", "--expires", "1s"]);
    let tokens = files.text("tokens.toml");
    let continuator = continuator(&upstream, &["--tokens", &tokens]);
    let url = &continuator.url;
    let mut edge = connect(url, &files.with_token(&format!("{token}\n")), "kitchen")
        .await
        .unwrap();
    turn(&mut edge).await;
    denied(url, &Access::default(), "kitchen", "token is required").await;
    denied(url, &files.with_token(&token), "hall", "another device").await;
    denied(url, &files.with_token(&format!("{token}0")), "kitchen", "not known").await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    denied(url, &files.with_token(&brief), "kitchen", "expired").await;
    // A token made later is known soon.
    let later = files.token(&["new", "hall"]);
    let started = std::time::Instant::now();
    while connect(url, &files.with_token(&later), "hall").await.is_err() {
        assert!(started.elapsed() < PATIENCE, "the new token is never known");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Revoking ends the streams that use it.
    let id = token.split('_').nth(1).unwrap();
    files.token(&["revoke", id]);
    let status = edge.try_next().await.expect_err("the stream ends");
    assert_eq!(status.code(), tonic::Code::Unauthenticated, "{status:?}");
    denied(url, &files.with_token(&token), "kitchen", "revoked").await;
    let list = files.token(&["list"]);
    for says in [id, "kitchen", "hall", "revoked", "expired", "valid"] {
        assert!(list.contains(says), "{list}");
    }
    // Counted, and logged without the secret.
    let log = continuator.log();
    let metrics = metrics(&log).await;
    for (reason, times) in [
        ("missing", 1),
        ("unknown", 1),
        ("expired", 1),
        ("revoked", 1),
        ("other_device", 1),
    ] {
        let line = format!("segue_auth_failures_total{{reason=\"{reason}\"}} ");
        let found = metrics
            .lines()
            .find_map(|l| l.strip_prefix(&line))
            .and_then(|n| n.parse::<u64>().ok());
        assert!(found >= Some(times), "{reason}: {metrics}");
    }
    for token in [&token, &brief, &later] {
        let secret = token.rsplit('_').next().unwrap();
        assert!(!log.contains(secret) && !list.contains(secret) && !metrics.contains(secret));
        assert!(!std::fs::read_to_string(&tokens).unwrap().contains(secret));
    }
    tokio::task::block_in_place(|| {
        let file = files.text("token");
        files.write("token", &token);
        let done = ask(url, &["--token-file", &file, "--device-id=kitchen", "Why?"]);
        assert_eq!(done.code, 77, "{done:?}");
        assert!(done.err.contains("revoked"), "{}", done.err);
        files.write("token", &later);
        let done = ask(
            url,
            &[
                "--token-file",
                &file,
                "--device-id=hall",
                "--force-opener=The capital",
                "Why?",
            ],
        );
        assert_eq!(done.code, 0, "{done:?}");
    });
}

/// Asks for `/metrics`, as Prometheus does.
async fn metrics(log: &str) -> String {
    let address = log
        .split("metrics=")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .expect("it is logged");
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[test]
fn other_machines_are_neither_served_nor_called_in_the_clear() {
    let mut serve = command("cloud-continuator");
    serve.args(["serve", "--listen", "0.0.0.0:0"]);
    let done = finish(serve, b"");
    assert_eq!(done.code, 64, "{done:?}");
    assert!(
        done.err.contains("--tls-cert") && done.err.contains("--allow-plaintext"),
        "{}",
        done.err
    );
    let done = ask("http://192.0.2.1:50051", &["Why?"]);
    assert_eq!(done.code, 64, "{done:?}");
    assert!(
        done.err.contains("https://") && done.err.contains("--allow-plaintext"),
        "{}",
        done.err
    );
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let (files, authority) = (Files::new("files"), Authority::new());
    files.pair("a", authority.issue(&["localhost"]));
    files.pair("b", authority.issue(&["localhost"]));
    files.write("empty", "");
    files.write("tokens.toml", "nonsense");
    let (a, b, empty) = (files.text("a.crt"), files.text("b.key"), files.text("empty"));
    for (args, says) in [
        (vec!["--tls-cert", &a, "--tls-key", &b], "certificate and the key"),
        (vec!["--tls-cert", &empty, "--tls-key", &b], "no certificate"),
        (vec!["--tls-cert", "/nowhere", "--tls-key", &b], "/nowhere"),
        (vec!["--tls-cert", &a], "--tls-key"),
        (vec!["--tokens", &files.text("tokens.toml")], "tokens.toml"),
        (vec!["--tokens", "/nowhere"], "/nowhere"),
    ] {
        let mut serve = command("cloud-continuator");
        serve.args(["serve", "--listen", "127.0.0.1:0"]).args(&args);
        let done = finish(serve, b"");
        assert_eq!(done.code, 64, "{args:?}: {done:?}");
        assert!(done.err.contains(says), "{args:?}: {}", done.err);
    }
    for (args, says) in [
        (vec!["revoke", "none"], "none"),
        (vec!["new", "two words"], "spaces"),
        (vec!["list"], "tokens"),
    ] {
        let mut token = command("cloud-continuator");
        let path = if args[0] == "list" {
            "/nowhere".to_owned()
        } else {
            files.text("fresh.toml")
        };
        token.arg("token").args(&args).args(["--tokens", &path]);
        let done = finish(token, b"");
        assert_eq!(done.code, 64, "{args:?}: {done:?}");
        assert!(done.err.contains(says), "{args:?}: {}", done.err);
    }
}
