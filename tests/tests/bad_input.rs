//! What was wrong and what to do, a non-zero exit, no panic, no hang.

use std::{fs, os::unix::ffi::OsStrExt, path::PathBuf};

use segue_tests::programs::{Continuator, Finished, ask, command, finish, root};

const NOBODY: &str = "http://127.0.0.1:9";

fn edge(args: &[&str]) -> Finished {
    let mut edge = command("edge-agent");
    edge.args(args);
    finish(edge, b"")
}

#[track_caller]
fn refused(done: &Finished, code: i32, says: &[&str]) {
    assert_eq!(done.code, code, "{done:?}");
    for say in says {
        assert!(done.err.contains(say), "{say:?} is not in {:?}", done.err);
    }
    assert!(!done.err.contains("panicked"), "{}", done.err);
}

/// A folder of the test's own, removed with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("segue-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A copy of the shipped model, for damaging.
    fn model(name: &str) -> Self {
        let folder = Self::new(name);
        for file in ["config.json", "tokenizer.json", "model.safetensors"] {
            fs::copy(root().join("edge-agent/model").join(file), folder.0.join(file)).unwrap();
        }
        folder
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn usage() {
    refused(
        &edge(&["ask", "", "--server", NOBODY]),
        64,
        &["empty", "edge-agent ask"],
    );
    refused(&edge(&["ask", " \n", "--server", NOBODY]), 64, &["empty"]);
    refused(
        &edge(&["ask", "why?", "--opener-words", "9"]),
        64,
        &["opener-words", "4..=8"],
    );
    refused(
        &edge(&["ask", "why?", "--surface", "paper"]),
        64,
        &["paper", "revisable", "append-only"],
    );
    refused(&edge(&["ask", "why?", "--what"]), 64, &["--what"]);
    refused(&edge(&["ask"]), 64, &["<QUESTION>"]);
    let mut odd = command("edge-agent");
    odd.args(["ask".as_ref(), std::ffi::OsStr::from_bytes(b"wh\xff?")]);
    refused(&finish(odd, b""), 64, &["UTF-8"]);
    let mut odd = command("cloud-continuator");
    odd.args(["serve", "--context", "1"]);
    refused(&finish(odd, b""), 64, &["--context"]);
    assert_eq!(edge(&["--help"]).code, 0);
}

#[test]
fn nobody_there() {
    refused(
        &ask(NOBODY, &["--offline=never", "why?"]),
        69,
        &[
            "no continuator answers at http://127.0.0.1:9",
            "refused",
            "cloud-continuator serve",
        ],
    );
    refused(&ask("ftp://somewhere", &["why?"]), 64, &["ftp://somewhere", "http://"]);
    refused(&ask("no url", &["why?"]), 64, &["no url", "http://"]);
    let mut check = command("cloud-continuator");
    check.args(["check", NOBODY]);
    refused(&finish(check, b""), 69, &["no continuator answers"]);
}

#[test]
fn model_folders() {
    let continuator = Continuator::start(&[]);
    let with = |folder: &str| ask(&continuator.url, &["--model", folder, "why?"]);
    refused(&with("/nowhere"), 64, &["/nowhere", "config.json", "--model"]);

    let folder = Folder::model("foreign");
    let config = fs::read_to_string(folder.0.join("config.json")).unwrap();
    fs::write(folder.0.join("config.json"), config.replace("\"llama\"", "\"gpt2\"")).unwrap();
    refused(&with(folder.path()), 64, &["gpt2", "Llama family"]);
    fs::write(folder.0.join("config.json"), config.replace("1536", "1024")).unwrap();
    refused(&with(folder.path()), 64, &["gate_proj", "[1536, 576]", "[1024, 576]"]);
    fs::write(
        folder.0.join("config.json"),
        config.replace("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 7"),
    )
    .unwrap();
    refused(&with(folder.path()), 64, &["model.layers.6.", "missing"]);
    fs::write(folder.0.join("config.json"), &config).unwrap();

    let weights = fs::read(folder.0.join("model.safetensors")).unwrap();
    fs::write(folder.0.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    refused(&with(folder.path()), 64, &["model.safetensors", "cut off"]);
    fs::write(folder.0.join("model.safetensors"), b"PK\x03\x04 pickled").unwrap();
    refused(&with(folder.path()), 64, &["pickle"]);
    fs::rename(folder.0.join("model.safetensors"), folder.0.join("pytorch_model.bin")).unwrap();
    refused(&with(folder.path()), 64, &["pytorch_model.bin", "safetensors"]);

    let mut broken = weights;
    let length = broken.len();
    broken[length - 2..].copy_from_slice(&[0xc0, 0x7f]); // a bfloat16 NaN
    fs::write(folder.0.join("model.safetensors"), &broken).unwrap();
    refused(&with(folder.path()), 64, &["not finite", "model."]);
}

#[test]
fn large_models() {
    let serve = |model: &str| {
        let mut serve = command("cloud-continuator");
        serve.args(["serve", "--listen", "127.0.0.1:0", "--model", model]);
        finish(serve, b"")
    };
    refused(&serve("/nowhere.gguf"), 64, &["/nowhere.gguf", "make setup"]);
    refused(&serve("README.md"), 64, &["README.md", "GGUF"]);
    let folder = Folder::new("gguf");
    let cut = folder.0.join("cut.gguf");
    let whole = fs::read(root().join(".segue/models/SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap();
    for length in [4, 100, 1 << 20] {
        fs::write(&cut, &whole[..length]).unwrap();
        refused(&serve(cut.to_str().unwrap()), 64, &["cut.gguf", "damaged"]);
    }
}

#[test]
fn a_port_in_use() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut serve = command("cloud-continuator");
    serve.args(["serve", "--listen", &taken.local_addr().unwrap().to_string()]);
    refused(&finish(serve, b""), 64, &["in use", "--listen"]);
}

#[test]
fn an_over_long_question() {
    let continuator = Continuator::start(&[]);
    let long = "why ".repeat(8 << 10);
    refused(&ask(&continuator.url, &[&long]), 64, &["32767 bytes", "16384"]);
    // Long, but allowed: answered.
    let long = "why ".repeat(400);
    assert_eq!(ask(&continuator.url, &[&long]).code, 0);
    // More than the context holds: a typed failure, and the next turn is served.
    let small = Continuator::start(&["--context=512"]);
    refused(&ask(&small.url, &[&long]), 64, &["tokens of context", "512"]);
    assert_eq!(ask(&small.url, &["why?"]).code, 0);
}

#[test]
fn malformed_telemetry_settings() {
    let mut edge = command("edge-agent");
    edge.args(["ask", "why?", "--server", NOBODY])
        .env("SEGUE_LOG", "edge_agent=loud=very");
    refused(&finish(edge, b""), 64, &["SEGUE_LOG"]);
}
