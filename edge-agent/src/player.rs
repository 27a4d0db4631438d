//! The surface's clock: when each word of the reply is shown or spoken, and what has been heard.
//!
//! A screen shows text as it comes. Speech takes its time: words are played one after the other at a rate, and what waits to be
//! played can still be taken back.

use std::{collections::VecDeque, time::Duration};

use segue_shared::{reply_log::Surface, words};
use tokio::time::Instant;

/// A piece of text that is being, or will be, played.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The text.
    pub text: String,
    /// Where it ends in the reply text, in bytes.
    pub end: usize,
    /// Whether it belongs to the opener.
    pub opener: bool,
}

/// Plays a reply.
#[derive(Debug)]
pub struct Player {
    /// Time for a word; `None` on a screen.
    word: Option<Duration>,
    waiting: VecDeque<Piece>,
    /// What is being played, and until when.
    playing: Option<(Piece, Instant)>,
    /// Bytes handed over.
    length: usize,
    heard: usize,
    /// A tail of the reply that is not a whole word yet.
    partial: String,
    opener_end: Option<Instant>,
    gap: Option<Duration>,
    first: Option<Instant>,
}

impl Player {
    /// A player for a surface; speech plays `words_per_minute`.
    pub fn new(surface: Surface, words_per_minute: f32) -> Self {
        let word = (surface == Surface::AppendOnly).then(|| Duration::from_secs_f32(60.0 / words_per_minute.max(1.0)));
        Self {
            word,
            waiting: VecDeque::new(),
            playing: None,
            length: 0,
            heard: 0,
            partial: String::new(),
            opener_end: None,
            gap: None,
            first: None,
        }
    }

    /// Hands over more of the reply.
    pub fn push(&mut self, text: &str, opener: bool) {
        if self.word.is_none() || opener {
            self.length += text.len();
            self.waiting.push_back(Piece {
                text: text.to_owned(),
                end: self.length,
                opener,
            });
            return;
        }
        // Speech is played by the word, and a word may come in pieces.
        self.partial.push_str(text);
        let complete = words::ranges(&self.partial);
        if let Some(last) = complete.len().checked_sub(2) {
            self.enqueue_words(complete[last].end);
        }
    }

    /// The reply is complete: what is left of it is played.
    pub fn finish(&mut self) {
        self.enqueue_words(self.partial.len());
    }

    fn enqueue_words(&mut self, until: usize) {
        let rest = self.partial.split_off(until);
        let text = std::mem::replace(&mut self.partial, rest);
        let mut from = 0;
        let ranges = words::ranges(&text);
        for (n, range) in ranges.iter().enumerate() {
            let end = if n + 1 == ranges.len() { text.len() } else { range.end };
            self.length += end - from;
            self.waiting.push_back(Piece {
                text: text[from..end].to_owned(),
                end: self.length,
                opener: false,
            });
            from = end;
        }
        if ranges.is_empty() && !text.is_empty() {
            self.length += text.len();
            self.waiting.push_back(Piece {
                text,
                end: self.length,
                opener: false,
            });
        }
    }

    /// Takes back what stands after byte `keep`; what is being played is played to its end.
    pub fn retract(&mut self, keep: usize) {
        self.partial.clear();
        self.waiting.retain(|piece| piece.end <= keep);
        self.length = keep;
        self.heard = self.heard.min(keep);
        if let Some((piece, _)) = &mut self.playing {
            piece.end = piece.end.min(keep);
        }
    }

    /// The next piece that begins to play at `now`, if any. To be called until it returns `None`.
    pub fn next(&mut self, now: Instant) -> Option<Piece> {
        if let Some((piece, until)) = &self.playing {
            if *until > now {
                return None;
            }
            self.heard = self.heard.max(piece.end);
            if piece.opener {
                self.opener_end = Some(*until);
            }
            self.playing = None;
        }
        let piece = self.waiting.pop_front()?;
        self.first.get_or_insert(now);
        if !piece.opener && self.gap.is_none() {
            self.gap = self.opener_end.map(|end| now.saturating_duration_since(end));
        }
        let time = self
            .word
            .map_or(Duration::ZERO, |word| word * words::count(&piece.text).max(1) as u32);
        // A byte of a word that has begun cannot be taken back.
        self.playing = Some((piece.clone(), now + time));
        Some(piece)
    }

    /// When [`Player::next`] has something to do again.
    pub fn wake(&self) -> Option<Instant> {
        self.playing.as_ref().map(|(_, until)| *until)
    }

    /// Bytes of the reply that were heard, or are being spoken and so cannot be stopped.
    pub fn heard(&self) -> usize {
        self.playing
            .as_ref()
            .map_or(self.heard, |(piece, _)| self.heard.max(piece.end))
    }

    /// Whether everything was played.
    pub fn idle(&self) -> bool {
        self.playing.is_none() && self.waiting.is_empty() && self.partial.is_empty()
    }

    /// Silence between the opener's last word and the continuation's first, on this surface.
    pub fn gap(&self) -> Option<Duration> {
        self.gap
    }

    /// When the first word was played.
    pub fn first(&self) -> Option<Instant> {
        self.first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn play(player: &mut Player, now: Instant) -> Vec<String> {
        std::iter::from_fn(|| player.next(now)).map(|p| p.text).collect()
    }

    #[test]
    fn a_screen_shows_at_once() {
        let (mut player, now) = (Player::new(Surface::Revisable, 183.0), Instant::now());
        player.push("It", true);
        player.push(" is", true);
        assert_eq!(play(&mut player, now), ["It", " is"]);
        let later = now + Duration::from_millis(70);
        player.push(" blu", false);
        assert_eq!(play(&mut player, later), [" blu"]);
        assert_eq!(player.gap(), Some(Duration::from_millis(70)));
        player.push("e.", false);
        assert_eq!(play(&mut player, later), ["e."]);
        player.finish();
        assert_eq!(player.next(later), None);
        assert!(player.idle());
        assert_eq!(player.heard(), "It is blue.".len());
    }

    #[test]
    fn speech_is_paced_and_what_waits_can_be_taken_back() {
        let (mut player, start) = (Player::new(Surface::AppendOnly, 60.0), Instant::now());
        let at = |seconds: f32| start + Duration::from_secs_f32(seconds);
        for word in ["It", " is", " red"] {
            player.push(word, true);
        }
        assert_eq!(play(&mut player, at(0.0)), ["It"]);
        assert_eq!(player.heard(), 2);
        assert_eq!(play(&mut player, at(0.9)), [""; 0]);
        assert_eq!(play(&mut player, at(1.0)), [" is"]);
        player.retract(5);
        player.push(" blue. Ye", false);
        assert_eq!(play(&mut player, at(2.0)), [" blue."]);
        assert_eq!(player.gap(), Some(Duration::ZERO));
        player.push("s", false);
        player.finish();
        assert_eq!(play(&mut player, at(3.0)), [" Yes"]);
        assert_eq!(player.next(at(4.0)), None);
        assert!(player.idle());
        assert_eq!(player.heard(), "It is blue. Yes".len());
    }
}
