//! One step: what is sampled, and what is decoded.

use std::time::Instant;

use llama_cpp_2::{DecodeError, token::LlamaToken};

use super::{
    AT_ONCE, BATCH, EVENT_ROOM, Engine, Phase, Slot, is_read, is_scored,
    sampling::{choose, take_characters},
    sequence_id,
};
use crate::backend::{Event, Failure, Finish};

impl Engine<'_> {
    /// Samples, and decodes one batch.
    pub(super) fn advance(&mut self) {
        for n in 0..self.slots.len() {
            self.sample(n);
        }
        self.batch.clear();
        // (place, first token's index, count, first place in the batch)
        let mut parts: Vec<(usize, usize, usize, usize)> = Vec::new();
        let generating = |slot: &Slot| {
            slot.active
                .as_ref()
                .is_some_and(|a| a.phase == Phase::Generating && a.usage.generated > 0)
        };
        // A turn whose reader is slow gets no token, and so needs no consideration.
        let decodes = |slot: &Slot| generating(slot) && !slot.sequence.pending().is_empty();
        let running = self.slots.iter().filter(|slot| decodes(slot)).count();
        let mut budget = if running > 0 { self.pace.budget() } else { BATCH };
        // Running turns first, then readers in the order in which they came, but first the ones whose openers are committed, or being said.
        let commits = |slot: &Slot| slot.active.as_ref().is_some_and(|a| a.phase != Phase::Reading);
        let speaks = |slot: &Slot| slot.active.as_ref().is_some_and(|a| a.opened);
        let mut order: Vec<usize> = (0..self.slots.len())
            .filter(|n| self.slots[*n].active.is_some())
            .collect();
        order.sort_by_key(|n| {
            let slot = &self.slots[*n];
            let id = slot.active.as_ref().map(|a| a.id);
            (!generating(slot), !commits(slot), !speaks(slot), id)
        });
        let (mut decoding, mut readers) = (0, 0);
        for n in order {
            let slot = &self.slots[n];
            let (from, at) = (slot.sequence.cached().len(), self.batch.n_tokens() as usize);
            readers += usize::from(!generating(slot) && !slot.sequence.pending().is_empty());
            let most = match (generating(slot), speaks(slot)) {
                (true, _) => 1,
                // The next of an opener are a few tokens, and somebody waits for them or will soon.
                (false, true) if slot.sequence.pending().len() <= AT_ONCE => AT_ONCE,
                (false, _) => budget,
            };
            let count = slot.sequence.pending().len().min(most).min(BATCH - at);
            for (m, token) in slot.sequence.pending()[..count].iter().enumerate() {
                let logits = slot.sequence.needs_logits(from + m);
                let added = self
                    .batch
                    .add(LlamaToken(*token), (from + m) as i32, &[sequence_id(n)], logits);
                debug_assert!(added.is_ok(), "the batch has room for {BATCH} tokens");
            }
            if count > 0 {
                parts.push((n, from, count, at));
                if generating(slot) {
                    decoding += 1;
                } else {
                    budget = budget.saturating_sub(count);
                }
            }
        }
        if parts.is_empty() {
            return;
        }
        self.step += 1;
        let tokens = self.batch.n_tokens() as usize;
        let started = Instant::now();
        if let Err(error) = self.decode() {
            for (n, ..) in parts {
                self.clear(n);
                self.end(n, Event::Failed(Failure::Model(error.to_string())));
            }
            return;
        }
        for (n, from, count, at) in parts {
            let slot = &mut self.slots[n];
            slot.used = self.step;
            slot.sequence.decoded(count);
            for m in 0..count {
                if slot.sequence.needs_logits(from + m) {
                    slot.sequence
                        .logits(from + m, self.context.get_logits_ith((at + m) as i32));
                }
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        self.pace.step(decoding, tokens - decoding, readers, seconds);
    }

    pub(super) fn decode(&mut self) -> Result<(), DecodeError> {
        match self.context.decode(&mut self.batch) {
            Err(DecodeError::NoKvCacheSlot) => {
                // Cells are counted, so this is fragmentation at worst: give up all idle caches and try once more.
                self.evict(usize::MAX, usize::MAX);
                self.context.decode(&mut self.batch)
            }
            result => result,
        }
    }

    /// Tells turns what they wait for: that the prompt is read, or the opener's scores. Returns whether there were scores.
    pub(super) fn report(&mut self) -> bool {
        let mut scored = false;
        for slot in &mut self.slots {
            scored |= report(slot);
        }
        scored
    }

    /// Chooses the next token of a turn that generates and sends its text at once; the token is decoded with the next batch.
    pub(super) fn sample(&mut self, n: usize) {
        let slot = &mut self.slots[n];
        let Some(active) = &mut slot.active else { return };
        if active.phase != Phase::Generating || active.events.capacity() < EVENT_ROOM {
            return;
        }
        let Some(logits) = slot.sequence.tail() else { return };
        let token = choose(logits, active.sampler.as_mut());
        if self.model.vocab().is_eog(token) {
            let text = active.stop.finish();
            return self.finish(n, text, Finish::Stop);
        }
        active.usage.generated += 1;
        active
            .partial
            .extend(self.model.vocab().token_to_piece(token, false, None));
        let (text, stopped) = active.stop.push(&take_characters(&mut active.partial));
        if stopped {
            return self.finish(n, text, Finish::Stop);
        }
        if active.usage.generated >= active.parameters.max_tokens {
            let text = text + &active.stop.finish();
            return self.finish(n, text, Finish::Length);
        }
        if !text.is_empty() {
            let _ = active.events.try_send(Event::Text(text, active.usage));
        }
        slot.sequence.push(token.0);
    }

    pub(super) fn finish(&mut self, n: usize, text: String, finish: Finish) {
        if let Some(active) = &self.slots[n].active {
            let usage = active.usage;
            if !text.is_empty() {
                let _ = active.events.try_send(Event::Text(text, usage));
            }
            self.end(n, Event::Done(finish, usage));
        }
    }

    pub(super) fn end(&mut self, n: usize, last: Event) {
        if let Some(active) = self.slots[n].active.take() {
            let _ = active.events.try_send(last);
        }
    }
}

fn report(slot: &mut Slot) -> bool {
    let Slot {
        sequence,
        active: Some(active),
        ..
    } = slot
    else {
        return false;
    };
    if is_read(sequence, active) {
        active.prefilled = true;
        let _ = active.events.try_send(Event::Prefilled);
    }
    let scored = is_scored(sequence, active);
    if scored {
        active.phase = Phase::Scored;
        active.usage.opener = sequence.scores().len() as u32;
        let _ = active.events.try_send(Event::Scored(sequence.scores().to_vec()));
    }
    scored
}
