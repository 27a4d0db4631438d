//! How a turn is shown.

pub mod json;
pub mod text;
