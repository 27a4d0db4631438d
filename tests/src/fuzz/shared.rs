//! What both programs share: the reply log and the seam.

use segue_shared::{
    reply_log::{Correction, ReplyLog, Surface},
    seam::Seam,
    words,
};

use super::{Target, text_pieces};

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target {
            name: "reply_log",
            seeds: vec![
                b"\x01\x05Hello\x02\x03\x03\x00\x05 you \x04\x01\x00\x01".to_vec(),
                "\u{1}\u{8}It is ü\u{5}\u{1}\u{4}\u{2}\u{3}\u{1}\u{4}"
                    .as_bytes()
                    .to_vec(),
            ],
            words: &["ü", "東京", "\u{3}\u{1}", "\u{5}\u{1}\u{2}", "\u{6}"],
            share: 150,
            run: Box::new(reply_log),
        },
        Target {
            name: "seam",
            seeds: vec![
                "It is\0 blue\0 and 東京\0.".as_bytes().to_vec(),
                "thanks.\0And\0 Met\0am\0orph".as_bytes().to_vec(),
                "👩\u{200d}👩\u{200d}👧\0 don\0't".as_bytes().to_vec(),
            ],
            words: &[
                "\0", " ", "\u{a0}", "\u{200b}", "\u{301}", "'", "…", "।", "\u{200d}", "ß", "ﬁ",
            ],
            share: 100,
            run: Box::new(seam),
        },
    ]
}

/// Bytes as operations on a log; what it promises must hold after each.
fn reply_log(input: &[u8]) {
    let surface = if input.len().is_multiple_of(2) {
        Surface::Revisable
    } else {
        Surface::AppendOnly
    };
    let mut log = ReplyLog::new(surface);
    let mut bytes = input.iter().copied();
    while let Some(op) = bytes.next() {
        let mut number = || usize::from(bytes.next().unwrap_or(0));
        match op % 7 {
            0 => log.resume(),
            1 => {
                let length = number();
                let text: Vec<u8> = bytes.by_ref().take(length % 32).collect();
                log.push_opener(&String::from_utf8_lossy(&text));
            }
            2 => drop(log.hear(number())),
            3 | 4 => {
                let (revision, offset, length) = (number(), number(), number());
                let text: Vec<u8> = bytes.by_ref().take(length % 32).collect();
                let offset = if op % 2 == 0 { offset } else { log.text().len() };
                let _ = log.apply_chunk(revision as u32 % 4, offset, &String::from_utf8_lossy(&text));
            }
            _ => {
                let correction = match number() % 3 {
                    0 => Correction::Bridge,
                    1 => Correction::Restart,
                    _ => Correction::Revise { keep: number() },
                };
                let heard = log.heard_text().to_owned();
                let revision = log.revision() + number() as u32 % 3;
                if log.apply_directive(revision, correction).is_ok() && surface == Surface::AppendOnly {
                    assert!(log.text().starts_with(&heard), "what was heard stays");
                }
            }
        }
        assert!(log.text().is_char_boundary(log.heard()) && log.heard() <= log.text().len());
    }
}

fn seam(input: &[u8]) {
    let mut pieces = text_pieces(input);
    let prefix = pieces.remove(0);
    let mut seam = if input.len().is_multiple_of(5) {
        Seam::within()
    } else {
        Seam::new(&prefix)
    };
    let mut joined = prefix.clone();
    for piece in &pieces {
        joined.push_str(&seam.push(piece));
    }
    joined.push_str(&seam.finish());
    assert!(joined.starts_with(&prefix));
    for range in words::ranges(&joined) {
        assert!(!joined[range].is_empty());
    }
}
