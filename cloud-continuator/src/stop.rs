//! Stop texts in a stream of pieces.

/// Lets text through up to the first stop text; holds back what may be the beginning of one.
#[derive(Clone, Debug)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    /// A filter for `stops`; empty ones are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|s| !s.is_empty()).collect(),
            held: String::new(),
        }
    }

    /// Takes a piece; returns what can be shown and whether a stop text was reached, after which nothing more may be pushed.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        // Of several, the one that is complete first (of these, the longest): so that it does not matter how the text was cut.
        let found = self
            .stops
            .iter()
            .filter_map(|s| self.held.find(s.as_str()).map(|at| (at + s.len(), at)));
        if let Some((_, at)) = found.min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // The longest tail that begins a stop text stays.
        let keep = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|at| self.stops.iter().any(|s| s.starts_with(&self.held[*at..])))
            .unwrap_or(self.held.len());
        let tail = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, tail), false)
    }

    /// The text ended without a stop text: returns what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn cuts_where_the_whole_text_would_be_cut(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{0,3}", 0..3),
        ) {
            let whole = pieces.concat();
            let cuts = stops.iter().filter(|s| !s.is_empty()).filter_map(|s| whole.find(s.as_str()).map(|at| (at + s.len(), at)));
            let cut = cuts.min().map(|(_, at)| at);
            let mut filter = StopFilter::new(stops);
            let (mut shown, mut stopped) = (String::new(), false);
            for piece in &pieces {
                let (text, stop) = filter.push(piece);
                shown.push_str(&text);
                stopped = stop;
                if stop { break; }
            }
            if !stopped {
                shown.push_str(&filter.finish());
            }
            prop_assert_eq!(stopped, cut.is_some());
            prop_assert_eq!(shown, &whole[..cut.unwrap_or(whole.len())]);
        }
    }
}
