//! How a turn is shown.

pub mod json;
pub mod speech;
pub mod text;
