//! Segue's continuator: continues the opener of a micro language model with a large one.

pub mod admission;
pub mod attempts;
pub mod backend;
pub mod backends;
pub mod cli;
pub mod config;
pub mod connections;
pub mod door;
pub mod grpc;
pub mod http;
pub mod judge;
pub mod layout;
pub mod metrics;
pub mod models;
pub mod names;
pub mod policy;
pub mod request;
pub mod running;
pub mod session;
pub mod stop;
pub mod tls;
pub mod tokens;
pub mod turn;
pub mod verify;
pub mod watched;
