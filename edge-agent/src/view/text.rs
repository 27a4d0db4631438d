//! The reply as a person reads it: the opener in its own colour, retracted words struck out in place.

use std::{io::Write, time::Duration};

use anstyle::{AnsiColor, Effects, Style};
use unicode_width::UnicodeWidthChar;

use super::json::failure;
use crate::{
    conversation::{Happening, Outcome, View},
    player::Piece,
    turn::{Over, Show},
};

const OPENER: Style = AnsiColor::Cyan.on_default().effects(Effects::BOLD);
const REPLY: Style = Style::new();
const STRUCK: Style = AnsiColor::BrightBlack.on_default().effects(Effects::STRIKETHROUGH);
const FAINT: Style = AnsiColor::BrightBlack.on_default();

/// What the output can do.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    /// Columns of a terminal; `None` when the output is a file or a pipe.
    pub columns: Option<usize>,
    /// Whether to use colours (a terminal without `NO_COLOR`).
    pub colour: bool,
    /// Leave out the line with the timings.
    pub quiet: bool,
}

/// Writes a reply to a terminal, or plainly to anything else.
pub struct Text<W> {
    out: W,
    terminal: Terminal,
    /// The reply as it stands.
    reply: String,
    /// What the screen shows since the reply's first character, struck-out words included.
    screen: String,
    /// Where each piece stands: in the reply, and on the screen.
    places: Vec<(usize, usize)>,
    /// The next piece needs a space before it: the words before it are struck out.
    spaced: bool,
}

impl<W: Write + Send> Text<W> {
    /// A view that writes to `out`.
    pub fn new(out: W, terminal: Terminal) -> Self {
        Self {
            out,
            terminal,
            reply: String::new(),
            screen: String::new(),
            places: Vec::new(),
            spaced: false,
        }
    }

    fn styled(&mut self, style: Style, text: &str) -> String {
        if self.terminal.colour {
            format!("{style}{text}{style:#}")
        } else {
            text.to_owned()
        }
    }

    /// Writes in one go, so that a terminal shows no step in between.
    fn write(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes());
        let _ = self.out.flush();
    }

    fn play(&mut self, piece: &Piece) {
        let mut text = piece.text.clone();
        if std::mem::take(&mut self.spaced) && !text.starts_with(char::is_whitespace) {
            text.insert(0, ' ');
        }
        self.places
            .push((self.reply.len(), self.screen.len() + text.len() - piece.text.len()));
        self.reply.push_str(&piece.text);
        self.screen.push_str(&text);
        let line = self.styled(if piece.opener { OPENER } else { REPLY }, &text);
        self.write(&line);
    }

    /// Takes back what was shown after byte `keep` of the reply.
    fn retract(&mut self, keep: usize) {
        if keep >= self.reply.len() {
            return; // it was not shown yet
        }
        self.reply.truncate(keep);
        let start = self
            .places
            .iter()
            .rev()
            .find(|(reply, _)| *reply <= keep)
            .map_or(0, |(reply, screen)| screen + keep - reply);
        self.places.retain(|(reply, _)| *reply < keep);
        let Some(columns) = self.terminal.columns else {
            // A file cannot take anything back: the corrected reply gets a line of its own.
            let again = format!("\n{}", self.reply);
            return self.write(&again);
        };
        let removed = self.screen[start..].to_owned();
        let (row, column) = cursor(&self.screen[..start], columns);
        let (end_row, _) = cursor(&self.screen, columns);
        let mut line = String::from("\r");
        if end_row > row {
            line.push_str(&format!("\x1b[{}A", end_row - row));
        }
        if column > 0 {
            line.push_str(&format!("\x1b[{column}C"));
        }
        if self.terminal.colour {
            let shown = removed.trim_start();
            line.push_str(&removed[..removed.len() - shown.len()]);
            line.push_str(&self.styled(STRUCK, shown));
            self.spaced = true;
        } else {
            line.push_str("\x1b[J");
            self.screen.truncate(start);
        }
        self.write(&line);
    }
}

/// Row and column of the cursor after `text`, on a terminal of `columns`.
fn cursor(text: &str, columns: usize) -> (usize, usize) {
    let (mut row, mut column) = (0, 0);
    for c in text.chars() {
        let width = c.width().unwrap_or(0);
        if c == '\n' {
            (row, column) = (row + 1, 0);
        } else if column + width > columns {
            (row, column) = (row + 1, width);
        } else {
            column += width;
        }
    }
    (row, column)
}

impl<W: Write + Send> View for Text<W> {
    fn event(&mut self, _at: Duration, event: &Happening<'_>) {
        match event {
            Happening::Played(piece) => self.play(piece),
            Happening::Produced(Show::Directive { keep, .. }) => self.retract(*keep),
            Happening::Produced(_) | Happening::Heard(_) => {}
        }
    }

    fn end(&mut self, _at: Duration, outcome: &Outcome) {
        let mut line = String::from("\n");
        match &outcome.over {
            Over::Done(_) => {}
            Over::Alone(why) => {
                let note = format!("(offline: the micro language model answered alone; {why})");
                line.push_str(&(self.styled(FAINT, &note) + "\n"));
            }
            Over::Cancelled => line.push_str(&(self.styled(FAINT, "(interrupted)") + "\n")),
            over => {
                let note = format!("({}: {})", "the reply is not complete", failure(over).1);
                line.push_str(&(self.styled(FAINT, &note) + "\n"));
            }
        }
        if !self.terminal.quiet {
            let timings = &outcome.timings;
            let millis =
                |time: Option<Duration>| time.map_or("-".into(), |t| format!("{:.0} ms", t.as_secs_f64() * 1e3));
            let stats = format!(
                "[first word {} · handoff gap {} · total {}]",
                millis(timings.first_word),
                millis(timings.handoff_gap),
                millis(Some(timings.total))
            );
            line.push_str(&(self.styled(FAINT, &stats) + "\n"));
        }
        self.write(&line);
        (self.reply, self.screen, self.spaced) = (String::new(), String::new(), false);
        self.places.clear();
    }
}

#[cfg(test)]
mod tests {
    use segue_shared::{proto::DirectiveReason, reply_log::Correction};

    use super::*;

    fn piece(text: &str, opener: bool) -> Piece {
        Piece {
            text: text.into(),
            end: 0,
            opener,
        }
    }

    fn shown(terminal: Terminal, keep: usize) -> String {
        let mut out = Vec::new();
        let mut view = Text::new(&mut out, terminal);
        for word in ["It", " is", " Sydney"] {
            view.event(Duration::ZERO, &Happening::Played(&piece(word, true)));
        }
        let directive = Show::Directive {
            correction: Correction::Revise { keep },
            keep,
            reason: DirectiveReason::UnlikelyWord,
            revision: 1,
            removed: String::new(),
        };
        view.event(Duration::ZERO, &Happening::Produced(&directive));
        view.event(
            Duration::ZERO,
            &Happening::Played(&piece(if keep == 0 { "Canberra." } else { " Canberra." }, false)),
        );
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn retracted_words_are_struck_out_in_place() {
        let screen = shown(
            Terminal {
                columns: Some(80),
                colour: true,
                quiet: true,
            },
            5,
        );
        assert!(
            screen.ends_with(&format!("\r\x1b[5C {STRUCK}Sydney{STRUCK:#}{REPLY} Canberra.{REPLY:#}")),
            "{screen:?}"
        );
    }

    #[test]
    fn on_several_lines_the_cursor_goes_up() {
        let screen = shown(
            Terminal {
                columns: Some(6),
                colour: true,
                quiet: true,
            },
            0,
        );
        assert!(
            screen.contains(&format!("\r\x1b[2A{STRUCK}It is Sydney")) || screen.contains("\r\x1b[1A"),
            "{screen:?}"
        );
    }

    #[test]
    fn without_colour_they_are_erased_and_files_get_a_new_line() {
        let screen = shown(
            Terminal {
                columns: Some(80),
                colour: false,
                quiet: true,
            },
            5,
        );
        assert_eq!(screen, "It is Sydney\r\x1b[5C\x1b[J Canberra.");
        assert_eq!(
            shown(
                Terminal {
                    columns: None,
                    colour: false,
                    quiet: true
                },
                5
            ),
            "It is Sydney\nIt is Canberra."
        );
    }

    #[test]
    fn a_second_retraction_finds_its_place_among_struck_out_words() {
        let mut out = Vec::new();
        let mut view = Text::new(
            &mut out,
            Terminal {
                columns: Some(80),
                colour: true,
                quiet: true,
            },
        );
        for word in ["It", " is", " Zürich"] {
            view.event(Duration::ZERO, &Happening::Played(&piece(word, true)));
        }
        for keep in [5, 0] {
            view.retract(keep);
        }
        assert_eq!(view.reply, "");
        let screen = String::from_utf8(out).unwrap();
        assert!(
            screen.ends_with(&format!("\r{STRUCK}It is Zürich{STRUCK:#}")),
            "{screen:?}"
        );
    }

    #[test]
    fn the_cursor_wraps() {
        assert_eq!(cursor("abcdef", 6), (0, 6));
        assert_eq!(cursor("abcdefg", 6), (1, 1));
        assert_eq!(cursor("ab\nc", 6), (1, 1));
        assert_eq!(cursor("你好世界", 6), (1, 2));
    }
}
