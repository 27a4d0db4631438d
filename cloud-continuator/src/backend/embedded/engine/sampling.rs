//! Choosing tokens, and characters out of their bytes.

use llama_cpp_2::{
    sampling::LlamaSampler,
    token::{LlamaToken, data::LlamaTokenData, data_array::LlamaTokenDataArray},
};

use crate::backend::Parameters;

/// `None` is greedy.
pub(super) fn sampler(parameters: &Parameters) -> Option<LlamaSampler> {
    (parameters.temperature > 0.0).then(|| {
        // A seed of the full width is folded; without one, llama.cpp draws its own for u32::MAX.
        let seed = parameters.seed.map_or(u32::MAX, |seed| (seed ^ (seed >> 32)) as u32);
        LlamaSampler::chain_simple([
            LlamaSampler::top_p(parameters.top_p, 1),
            LlamaSampler::min_p(parameters.min_p, 1),
            LlamaSampler::temp(parameters.temperature),
            LlamaSampler::dist(seed),
        ])
    })
}

pub(super) fn choose(logits: &[f32], sampler: Option<&mut LlamaSampler>) -> LlamaToken {
    let likeliest = || LlamaToken(highest(logits) as i32);
    let Some(sampler) = sampler else { return likeliest() };
    let candidates = logits
        .iter()
        .enumerate()
        .map(|(n, l)| LlamaTokenData::new(LlamaToken(n as i32), *l, 0.0));
    let mut candidates = LlamaTokenDataArray::from_iter(candidates, false);
    candidates.apply_sampler(sampler);
    candidates.selected_token().unwrap_or_else(likeliest)
}

/// Where the highest value is (the first of equals); in lanes, which the compiler makes vectors of.
fn highest(values: &[f32]) -> usize {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = values.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            if value > lane {
                *lane = *value;
            }
        }
    }
    let top = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    values.iter().position(|value| *value == top).unwrap_or(0)
}

/// Takes the whole characters off the front of `bytes`; what can never become a character turns into U+FFFD.
pub(super) fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[..valid]));
                match error.error_len() {
                    None => {
                        bytes.drain(..valid);
                        return text;
                    }
                    Some(bad) => {
                        text.push('\u{fffd}');
                        bytes.drain(..valid + bad);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_is_found_anywhere() {
        for at in 0..50 {
            let mut values = vec![-1.0; 50];
            values[at] = 2.0;
            assert_eq!(highest(&values), at);
            values[49] = 2.0;
            assert_eq!(highest(&values), at, "the first of equals");
        }
        assert_eq!(highest(&[f32::NAN, 1.0, f32::NAN]), 1);
        assert_eq!(highest(&[f32::NAN; 20]), 0);
    }

    #[test]
    fn characters_come_whole() {
        let mut bytes = "né".as_bytes()[..2].to_vec();
        assert_eq!(take_characters(&mut bytes), "n");
        bytes.extend(&"é!".as_bytes()[1..]);
        assert_eq!(take_characters(&mut bytes), "é!");
        bytes = vec![b'a', 0xff, b'b', 0xe2];
        assert_eq!(take_characters(&mut bytes), "a\u{fffd}b");
        assert_eq!(bytes, [0xe2]);
    }
}
