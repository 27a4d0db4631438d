use super::*;

const EXAMPLE: &str = include_str!("../../deploy/continuator.toml");

fn parse(text: &str) -> Result<Settings, String> {
    let settings: Settings = toml::from_str(text).map_err(|e| e.to_string())?;
    settings.check().map_err(|e| e.to_string())?;
    Ok(settings)
}

/// Settings with every optional one filled in.
fn full() -> Settings {
    Settings {
        system_prompt: Some("Be brief.".into()),
        hedge_after: Some(Duration::from_secs(2)),
        backend: vec![
            Backend::OpenAi(Box::new(OpenAi {
                base_url: "http://127.0.0.1:8000/v1".into(),
                model: "m".into(),
                api_key_file: Some("key".into()),
                api_key_env: Some("KEY".into()),
                proxy: Some("http://proxy:3128".into()),
                ca_file: Some("ca.pem".into()),
                ..OpenAi::default()
            })),
            Backend::Embedded(Embedded {
                layout: Some(Layout::Chat),
                threads: Some(2),
                ..Embedded::default()
            }),
        ],
        metrics_listen: Some(([127, 0, 0, 1], 9464).into()),
        transport: Transport {
            cert_file: Some("cert.pem".into()),
            key_file: Some("key.pem".into()),
            client_ca_file: Some("ca.pem".into()),
            allow_plaintext: false,
        },
        auth: Auth {
            tokens_file: Some("tokens.toml".into()),
        },
        ..Settings::default()
    }
}

/// Dotted names of all settings in a table; backends by their kind.
fn names(value: &toml::Value, path: &str, found: &mut std::collections::BTreeSet<String>) {
    match value {
        toml::Value::Table(table) if !path.ends_with("extra_body") => {
            let kind = table.get("kind").and_then(|k| k.as_str()).unwrap_or_default();
            for (key, value) in table {
                let dot = if path.is_empty() { "" } else { "." };
                names(value, &format!("{path}{kind}{dot}{key}"), found);
            }
        }
        toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
            for item in items {
                names(item, path, found);
            }
        }
        _ => {
            found.insert(path.to_owned());
        }
    }
}

#[test]
fn the_example_is_what_is_in_force_without_it() {
    assert_eq!(parse(EXAMPLE).unwrap(), Settings::default());
}

#[test]
fn the_example_shows_every_setting() {
    // Settings that are off by default stand behind "#: ".
    let all: String = EXAMPLE
        .lines()
        .map(|line| format!("{}\n", line.strip_prefix("#: ").unwrap_or(line)))
        .collect();
    let shown: toml::Value = toml::from_str(&all).expect("the example is TOML with everything switched on, too");
    let known = toml::Value::try_from(full()).unwrap();
    let (mut in_example, mut in_code) = Default::default();
    names(&shown, "", &mut in_example);
    names(&known, "", &mut in_code);
    assert_eq!(in_example, in_code);
    let _: Settings = toml::from_str(&all).expect("every value has the right type");
}

#[test]
fn what_is_shown_can_be_read() {
    for settings in [Settings::default(), full()] {
        let text = toml::to_string(&settings).unwrap();
        assert_eq!(toml::from_str::<Settings>(&text).unwrap(), settings);
    }
}

#[test]
fn faults_are_named() {
    let upstream = "kind = \"openai\"\nbase_url = \"http://x/v1\"\nmodel = \"m\"\n";
    let two = |a: &str, b: &str| format!("[[backend]]\n{upstream}{a}\n[[backend]]\n{upstream}{b}");
    for (text, says) in [
        ("lissten = 1".to_owned(), "lissten"),
        ("[[backend]]\nkind = \"openia\"".into(), "openia"),
        ("[[backend]]\nkind = \"openai\"\nbase_ulr = \"x\"".into(), "base_ulr"),
        (
            "[[backend]]\nkind = \"openai\"\nmodel = \"m\"".into(),
            "base_url is missing",
        ),
        (
            "[[backend]]\nkind = \"openai\"\nbase_url = \"http://x/v1\"".into(),
            "model is missing",
        ),
        ("backend = []".into(), "no backend"),
        ("hedge_after = \"1s\"".into(), "hedge_after"),
        ("hedge_after = 1".into(), "hedge_after"),
        (two("", ""), "called \"openai\""),
        (
            two("name = \"a\"", "api_key_file = \"x\"\napi_key_env = \"Y\""),
            "both set",
        ),
        (
            two("name = \"a\"", "mode = \"prompt\"\nprefill_style = \"prefix\""),
            "prefill_style",
        ),
        (two("name = \"a\"", "stall_timeout = \"0s\""), "stall_timeout"),
        (
            "[[backend]]\nkind = \"embedded\"\n[[backend]]\nkind = \"embedded\"\nname = \"b\"".into(),
            "one embedded",
        ),
        ("[[backend]]\nkind = \"embedded\"\nslots = 64".into(), "slots"),
        (
            "[[backend]]
kind = \"embedded\"
context = 100"
                .into(),
            "context is 100",
        ),
        (
            "[[backend]]\nkind = \"embedded\"\nprefill_share = nan".into(),
            "prefill_share",
        ),
        (
            format!("[directives]\nverifier = \"likelihood\"\n[[backend]]\n{upstream}"),
            "no backend scores",
        ),
        ("[directives]\nword_threshold = 1.0".into(), "-100 to 0"),
        ("[limits]\nidle = \"0s\"".into(), "limits.idle"),
        ("[limits]\nframe_bytes = 100".into(), "frame_bytes"),
        ("[limits]\nframe_bytes = 5000000000".into(), "frame_bytes"),
        (format!("[[backend]]\n{upstream}omit = [\"messages\"]"), "messages"),
        (
            format!("[[backend]]\n{upstream}extra_body = {{ max_tokens = 9 }}"),
            "max_tokens",
        ),
        (
            format!("[[backend]]\n{upstream}max_tokens_field = \"\""),
            "max_tokens_field",
        ),
    ] {
        let error = parse(&text).unwrap_err();
        assert!(error.contains(says), "{text}\n{error}");
    }
}

#[test]
fn keys_are_read_and_not_shown() {
    let folder = std::env::temp_dir().join(format!("segue-key-{}", std::process::id()));
    std::fs::write(&folder, " sk-canary\n").unwrap();
    let with = |key: OpenAi| OpenAi {
        base_url: "http://x/v1".into(),
        model: "m".into(),
        ..key
    };
    let options = with(OpenAi {
        api_key_file: Some(folder.clone()),
        ..OpenAi::default()
    })
    .options(None)
    .unwrap();
    assert!(options.api_key.is_some() && !format!("{options:?}").contains("canary"));
    std::fs::write(&folder, " \n").unwrap();
    for (key, says) in [
        (
            OpenAi {
                api_key_file: Some(folder.clone()),
                ..OpenAi::default()
            },
            "empty",
        ),
        (
            OpenAi {
                api_key_file: Some("/nowhere".into()),
                ..OpenAi::default()
            },
            "/nowhere",
        ),
        (
            OpenAi {
                api_key_env: Some("SEGUE_NO_SUCH_KEY".into()),
                ..OpenAi::default()
            },
            "SEGUE_NO_SUCH_KEY",
        ),
    ] {
        let error = with(key).options(None).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let _ = std::fs::remove_file(folder);
}
