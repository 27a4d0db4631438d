//! What is asked of an OpenAI-compatible server: request bodies, as pure functions.

use serde_json::{Map, Value, json};

use super::Options;
use crate::backend::{Message, Parameters, Request};

/// Stop texts that every server takes; more are applied here only.
const STOPS: usize = 4;

/// How a server is told to go on with the last message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Style {
    /// `add_generation_prompt: false, continue_final_message: true`: vLLM, SGLang, llama.cpp's server; servers that continue a trailing
    /// assistant message anyway (Ollama, LM Studio) ignore the flags.
    #[default]
    Flags,
    /// `"prefix": true` in the last message: Mistral, DeepSeek (base URL `.../beta`).
    Prefix,
    /// Nothing but the trailing assistant message, for servers that refuse fields they do not know.
    Bare,
}

/// How a reply text is continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The reply text is the last message, and the server continues it.
    Prefill(Style),
    /// The server is asked in words to go on.
    Prompt,
}

/// Asks a server that takes no prefill to go on, with the reply text in place of `{}`.
const GO_ON: &str = "\n\n(You have already begun to answer aloud with these words: \"{}\". Go on exactly where they end, so that both \
together are one fluent answer. Write only what follows: do not repeat these words, and do not comment on them.)";

/// The body that has `reply` continued; an empty one is begun.
pub fn continuation(options: &Options, request: &Request, way: Way, reply: &str) -> Value {
    let mut body = chat(options, request, "");
    match way {
        _ if reply.is_empty() => {}
        Way::Prefill(style) => {
            let mut last = json!({"role": "assistant", "content": reply});
            if style == Style::Prefix {
                last["prefix"] = Value::Bool(true);
            }
            messages(&mut body).push(last);
            if style == Style::Flags {
                body["add_generation_prompt"] = Value::Bool(false);
                body["continue_final_message"] = Value::Bool(true);
            }
        }
        Way::Prompt => body = chat(options, request, &GO_ON.replace("{}", reply)),
    }
    finished(options, body, way, &request.parameters)
}

/// The body that has `opener` judged, and gone on with, in one request (see [`crate::judge`]).
pub fn judged(options: &Options, request: &Request, way: Way, opener: &str) -> Value {
    let asked = Request {
        user_text: crate::judge::ask(&request.user_text, opener),
        ..request.clone()
    };
    let body = chat(options, &asked, "");
    finished(options, body, way, &request.parameters)
}

/// The body that has the conversation read, and one token generated.
pub fn warm_up(options: &Options, request: &Request, way: Way) -> Value {
    let body = chat(options, request, "");
    finished(options, body, way, &Parameters::greedy(1))
}

/// The text that a probe has continued, and what a continuation begins with.
pub const PROBE: (&str, &str, &str) = ("Count up from 41, in digits.", "41, 42, 43,", "44");

/// The body that finds out whether a server continues the last message.
pub fn probe(options: &Options, style: Style) -> Value {
    let request = Request {
        history: Vec::new(),
        user_text: PROBE.0.into(),
        parameters: Parameters::greedy(8),
    };
    continuation(options, &request, Way::Prefill(style), PROBE.1)
}

fn messages(body: &mut Value) -> &mut Vec<Value> {
    body["messages"].as_array_mut().expect("chat() makes an array")
}

/// The messages, with `more` after what the user said.
fn chat(options: &Options, request: &Request, more: &str) -> Value {
    let user = Message {
        assistant: false,
        text: format!("{}{more}", request.user_text),
    };
    let mut said: Vec<Message> = Vec::new();
    for message in request
        .history
        .iter()
        .chain([&user])
        .filter(|m| !m.text.trim().is_empty())
    {
        // Many chat templates want the roles to alternate; after a barge-in they do not.
        match said.last_mut().filter(|last| last.assistant == message.assistant) {
            Some(last) => {
                last.text.push_str("\n\n");
                last.text.push_str(&message.text);
            }
            None => said.push(message.clone()),
        }
    }
    let system = (!options.system_prompt.is_empty()).then_some(("system", options.system_prompt.as_str()));
    let said = said
        .iter()
        .map(|m| (if m.assistant { "assistant" } else { "user" }, m.text.as_str()));
    let messages: Vec<Value> = system
        .into_iter()
        .chain(said)
        .map(|(role, text)| json!({"role": role, "content": text}))
        .collect();
    json!({"model": options.model, "messages": messages})
}

fn finished(options: &Options, mut body: Value, way: Way, parameters: &Parameters) -> Value {
    // Servers that take the flags also take arguments for the chat template: thinking would come before the reply text's next word.
    if way == Way::Prefill(Style::Flags) {
        body["chat_template_kwargs"] = json!({"enable_thinking": false});
    }
    body["stream"] = Value::Bool(true);
    body["stream_options"] = json!({"include_usage": true});
    body[&options.max_tokens_field] = parameters.max_tokens.into();
    body["temperature"] = decimal(parameters.temperature);
    if parameters.top_p < 1.0 {
        body["top_p"] = decimal(parameters.top_p);
    }
    if parameters.min_p > 0.0 {
        body["min_p"] = decimal(parameters.min_p);
    }
    if let Some(seed) = parameters.seed {
        // Servers read it as a signed number of 64 bits.
        body["seed"] = (seed & i64::MAX as u64).into();
    }
    if !parameters.stop.is_empty() {
        body["stop"] = parameters.stop.iter().take(STOPS).cloned().collect();
    }
    if let Some(map) = body.as_object_mut() {
        merge(map, &options.extra_body);
        for field in &options.omit {
            map.remove(field);
        }
    }
    body
}

/// 0.7 and not 0.699999988079071.
fn decimal(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

fn merge(map: &mut Map<String, Value>, extra: &Map<String, Value>) {
    for (key, value) in extra {
        match (map.get_mut(key), value) {
            (Some(Value::Object(old)), Value::Object(new)) => merge(old, new),
            _ => {
                map.insert(key.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            model: "m".into(),
            system_prompt: "Be brief.".into(),
            ..Options::default()
        }
    }

    fn message(assistant: bool, text: &str) -> Message {
        Message {
            assistant,
            text: text.into(),
        }
    }

    fn request() -> Request {
        Request {
            history: vec![message(false, "Hi"), message(true, "Hello!")],
            user_text: "Why?".into(),
            parameters: Parameters {
                stop: (0..6).map(|n| n.to_string()).collect(),
                temperature: 0.7,
                seed: Some(u64::MAX),
                ..Parameters::greedy(9)
            },
        }
    }

    fn roles(body: &Value) -> Vec<&str> {
        let messages = body["messages"].as_array().unwrap();
        messages.iter().map(|m| m["role"].as_str().unwrap()).collect()
    }

    #[test]
    fn prefill_ends_with_the_reply_text() {
        let body = continuation(&options(), &request(), Way::Prefill(Style::Flags), "Because it");
        assert_eq!(roles(&body), ["system", "user", "assistant", "user", "assistant"]);
        assert_eq!(
            body["messages"][4],
            json!({"role": "assistant", "content": "Because it"})
        );
        assert_eq!(
            (&body["add_generation_prompt"], &body["continue_final_message"]),
            (&json!(false), &json!(true))
        );
        assert_eq!(body["chat_template_kwargs"]["enable_thinking"], false);
        assert_eq!((&body["temperature"], &body["seed"]), (&json!(0.7), &json!(i64::MAX)));
        assert_eq!(body["stop"].as_array().unwrap().len(), 4, "what every server takes");
        let prefix = continuation(&options(), &request(), Way::Prefill(Style::Prefix), "Because it");
        assert_eq!(prefix["messages"][4]["prefix"], true);
        assert!(prefix.get("continue_final_message").is_none());
        // Without a reply text there is nothing to continue, and the flags would be an error.
        let fresh = continuation(&options(), &request(), Way::Prefill(Style::Flags), "");
        assert_eq!(roles(&fresh).last(), Some(&"user"));
        assert!(fresh.get("continue_final_message").is_none());
    }

    #[test]
    fn a_prompt_quotes_the_reply_text_in_the_last_message() {
        let body = continuation(&options(), &request(), Way::Prompt, "Because it");
        assert_eq!(roles(&body), ["system", "user", "assistant", "user"]);
        let last = body["messages"][3]["content"].as_str().unwrap();
        assert!(
            last.starts_with("Why?\n\n(") && last.contains("\"Because it\""),
            "{last}"
        );
        for refused in [
            "add_generation_prompt",
            "continue_final_message",
            "chat_template_kwargs",
        ] {
            assert!(body.get(refused).is_none(), "{refused}");
        }
    }

    #[test]
    fn roles_alternate_even_after_a_barge_in() {
        let history = vec![
            message(false, "a"),
            message(false, "b"),
            message(true, " "),
            message(true, "c"),
        ];
        let body = warm_up(&options(), &Request { history, ..request() }, Way::Prompt);
        assert_eq!(roles(&body), ["system", "user", "assistant", "user"]);
        assert_eq!(body["messages"][1]["content"], "a\n\nb");
        assert_eq!(body["max_tokens"], 1);
    }

    #[test]
    fn fields_can_be_added_and_left_out() {
        let options = Options {
            max_tokens_field: "max_completion_tokens".into(),
            omit: vec!["temperature".into(), "stream_options".into()],
            extra_body: json!({"chat_template_kwargs": {"x": 1}, "top_k": 3})
                .as_object()
                .unwrap()
                .clone(),
            ..options()
        };
        let body = continuation(&options, &request(), Way::Prefill(Style::Flags), "So");
        assert_eq!(body["chat_template_kwargs"], json!({"enable_thinking": false, "x": 1}));
        assert_eq!((&body["top_k"], &body["max_completion_tokens"]), (&json!(3), &json!(9)));
        assert!(body.get("temperature").is_none() && body.get("max_tokens").is_none());
    }
}
