//! The end-to-end tests' harness: real programs on free ports, and scripted peers for what a well-behaved one never does.

pub mod chat;
pub mod edge;
pub mod fuzz;
pub mod golden;
pub mod llama_server;
pub mod metrics;
pub mod peer;
pub mod programs;
pub mod toxiproxy;
pub mod upstream;
