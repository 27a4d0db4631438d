//! What the edge reads from a model's folder.

use edge_agent::ulm::{config::Config, text::Codec, weights::Weights};
use serde_json::{Value, json};

use super::Target;
use crate::programs::root;

pub(super) fn targets() -> Vec<Target> {
    let real = std::fs::read(root().join("edge-agent/model/config.json")).expect("the model is in the repository");
    let small = small();
    let config = Config::parse(&small.to_string()).expect("it is good");
    let (for_weights, for_tokens) = (config.clone(), config);
    vec![
        Target {
            name: "model_config",
            seeds: vec![real, small.to_string().into_bytes()],
            words: &[
                "null",
                "true",
                "\"swen\"",
                "{}",
                "[",
                "\"rope_scaling\"",
                "9223372036854775807",
                "-9223372036854775808",
            ],
            share: 150,
            run: Box::new(|input| drop(Config::parse(&String::from_utf8_lossy(input)))),
        },
        Target {
            name: "model_weights",
            seeds: vec![weights(&small), b"PK\x03\x04".to_vec(), b"\x80\x02}".to_vec()],
            words: &[
                "F16",
                "BF16",
                "I64",
                "F8_E4M3",
                "[0,0]",
                "[18446744073709551615,2]",
                "__metadata__",
            ],
            share: 50,
            run: Box::new(move |input| drop(Weights::parse(input, &for_weights))),
        },
        Target {
            name: "model_tokenizer",
            seeds: vec![tokenizer().to_string().into_bytes()],
            words: &[
                "null",
                "\"ByteLevel\"",
                "\"Unigram\"",
                "\"WordPiece\"",
                "[]",
                "{}",
                "\"\\ud800\"",
                "true",
            ],
            share: 20,
            run: Box::new(move |input| {
                if let Ok(codec) = Codec::parse(input, &for_tokens) {
                    let tokens = codec.prompt("ab <|im_end|> \u{fffd}東", 16);
                    let _ = codec.decode(&tokens);
                }
            }),
        },
    ]
}

/// A model of a few hundred weights.
fn small() -> Value {
    json!({
        "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": true, "vocab_size": 8, "hidden_size": 4,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": 4,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 1e4, "eos_token_id": 2,
    })
}

/// Its safetensors file.
fn weights(config: &Value) -> Vec<u8> {
    let size = |name: &str| config[name].as_u64().expect("a number");
    let (hidden, head) = (size("hidden_size"), size("head_dim"));
    let (q, kv) = (size("num_attention_heads") * head, size("num_key_value_heads") * head);
    let ffn = size("intermediate_size");
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let tensors = [
        ("model.embed_tokens.weight".to_owned(), vec![size("vocab_size"), hidden]),
        (layer("input_layernorm"), vec![hidden]),
        (layer("self_attn.q_proj"), vec![q, hidden]),
        (layer("self_attn.k_proj"), vec![kv, hidden]),
        (layer("self_attn.v_proj"), vec![kv, hidden]),
        (layer("self_attn.o_proj"), vec![hidden, q]),
        (layer("post_attention_layernorm"), vec![hidden]),
        (layer("mlp.gate_proj"), vec![ffn, hidden]),
        (layer("mlp.up_proj"), vec![ffn, hidden]),
        (layer("mlp.down_proj"), vec![hidden, ffn]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    let (mut header, mut at) = (json!({}), 0);
    for (name, shape) in tensors {
        let end = at + 2 * shape.iter().product::<u64>();
        header[&name] = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] });
        at = end;
    }
    let header = header.to_string();
    let data = (0..at).map(|n| (n % 2 * 0x3f) as u8);
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()]
        .concat()
        .into_iter()
        .chain(data)
        .collect()
}

fn tokenizer() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{ "id": 7, "content": "<|im_start|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true }],
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": { "a": 0, "b": 1, "c": 2, "ab": 3, "Ġ": 4, "Ġa": 5, "abc": 6 }, "merges": [["a", "b"], ["Ġ", "a"], ["ab", "c"]] },
    })
}
