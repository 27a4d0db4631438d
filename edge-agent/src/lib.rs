//! Segue's edge: a micro language model opens a reply at once, the continuator finishes it.

pub mod cli;
pub mod conversation;
pub mod link;
pub mod opener;
pub mod player;
pub mod turn;
pub mod ulm;
pub mod view;
