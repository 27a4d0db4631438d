//! Who gets which sequence, and when caches of finished conversations are dropped for it.

use super::{Active, Engine, OPENER_ROOM, Phase, Slot, Waiting, sequence_id};
use crate::{
    backend::{Usage, embedded::sequence::Sequence},
    stop::StopFilter,
};

impl Engine<'_> {
    /// Frees the places of turns that nobody listens to any more.
    pub(super) fn reap(&mut self) {
        for slot in &mut self.slots {
            if slot.active.as_ref().is_some_and(|active| active.events.is_closed()) {
                slot.active = None;
            }
        }
        self.waiting.retain(|waiting| !waiting.events.is_closed());
    }

    /// Gives waiting turns places, in order, as long as there are places and cells.
    pub(super) fn admit(&mut self) {
        while let Some(next) = self.waiting.front() {
            let room = next.prompt.len() + OPENER_ROOM + next.request.parameters.max_tokens as usize;
            let free = |slot: &&(usize, &Slot)| slot.1.active.is_none();
            // The place whose cache has most of this prompt, or else the one that was not used longest.
            let shared = |slot: &Slot| slot.sequence.common(&next.prompt);
            let best = self
                .slots
                .iter()
                .enumerate()
                .filter(|s| free(&s))
                .max_by_key(|(_, slot)| {
                    let common = shared(slot);
                    (if common > self.head.len() { common } else { 0 }, u64::MAX - slot.used)
                });
            let Some((n, _)) = best else { return };
            let common = shared(&self.slots[n]);
            if common <= self.head.len() {
                self.clear(n);
                let _ = self.context.copy_kv_cache_seq(0, sequence_id(n), None, None);
                let head = self.head.clone();
                self.slots[n].sequence.seed(&head);
            }
            let others: usize = self.reserved(n);
            let own = room.saturating_sub(self.head.len());
            if self.head.len() + others + own > self.cells
                && !self.evict(self.head.len() + others + own - self.cells, n)
            {
                return;
            }
            let Some(Waiting {
                id,
                request,
                prompt,
                events,
                input,
                replaced,
            }) = self.waiting.pop_front()
            else {
                return;
            };
            self.step += 1;
            let cached = self.slots[n]
                .sequence
                .common(&prompt)
                .min(prompt.len().saturating_sub(1));
            let usage = Usage {
                prompt: prompt.len() as u32,
                cached: cached as u32,
                ..Usage::default()
            };
            let slot = &mut self.slots[n];
            slot.used = self.step;
            let keep = slot.sequence.retarget(&prompt, &[]);
            slot.active = Some(Active {
                id,
                events,
                history: request.history,
                user_text: request.user_text,
                parameters: request.parameters,
                prompt,
                phase: Phase::Reading,
                opened: false,
                prefilled: false,
                room,
                sampler: None,
                stop: StopFilter::new([]),
                partial: Vec::new(),
                usage,
                generations: replaced,
            });
            self.cut(n, keep);
            if let Some(input) = input {
                self.input(n, input);
            }
        }
    }

    /// Cells that places other than `but` hold or may come to hold, beyond the shared head.
    fn reserved(&self, but: usize) -> usize {
        let cells = |slot: &Slot| {
            slot.active
                .as_ref()
                .map_or(slot.sequence.cached().len(), |active| active.room)
        };
        let others = self.slots.iter().enumerate().filter(|(n, _)| *n != but);
        others
            .map(|(_, slot)| cells(slot).saturating_sub(self.head.len()))
            .sum()
    }

    /// Whether everything that is reserved fits, if need be after dropping caches.
    pub(super) fn make_room(&mut self) -> bool {
        let used = self.head.len() + self.reserved(usize::MAX);
        used <= self.cells || self.evict(used - self.cells, usize::MAX)
    }

    /// Drops caches of finished conversations, oldest first, until `cells` are free.
    pub(super) fn evict(&mut self, cells: usize, but: usize) -> bool {
        let mut freed = 0;
        while freed < cells {
            let oldest = self
                .slots
                .iter()
                .enumerate()
                .filter(|(n, slot)| {
                    *n != but && slot.active.is_none() && slot.sequence.cached().len() > self.head.len()
                })
                .min_by_key(|(_, slot)| slot.used);
            let Some((n, slot)) = oldest else { return false };
            freed += slot.sequence.cached().len() - self.head.len();
            self.clear(n);
        }
        true
    }

    pub(super) fn clear(&mut self, n: usize) {
        let _ = self.context.clear_kv_cache_seq(Some(sequence_id(n) as u32), None, None);
        self.slots[n].sequence = Sequence::default();
    }

    /// Cuts a sequence's cells back to `keep` tokens; a model whose state cannot be cut starts over.
    pub(super) fn cut(&mut self, n: usize, keep: usize) {
        let id = sequence_id(n) as u32;
        if !self
            .context
            .clear_kv_cache_seq(Some(id), Some(keep as u32), None)
            .unwrap_or(false)
        {
            let _ = self.context.clear_kv_cache_seq(Some(id), None, None);
            self.slots[n].sequence.forget();
        }
    }
}
