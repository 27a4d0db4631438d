//! Broken inputs by the million; see `segue_tests::fuzz`.

use std::process::ExitCode;

use clap::Parser;
use segue_tests::{
    fuzz::{run, targets},
    programs::machine,
};

/// Tries broken inputs at every place that decodes one.
#[derive(Parser)]
struct Options {
    /// Inputs in all.
    #[arg(long, default_value_t = 10_000_000)]
    executions: u64,
    /// Seed of the changes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// This target only.
    #[arg(long)]
    target: Option<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    // Where it panicked, without the way there.
    std::panic::set_hook(Box::new(|info| println!("  {info}")));
    println!("machine: {}; seed {}\n", machine(), options.seed);
    println!("  {:<18} {:>12} {:>8} {:>8}", "target", "executions", "panics", "s");
    let (mut executions, mut panics) = (0, 0);
    for mut target in targets() {
        if options.target.as_ref().is_some_and(|name| name != target.name) {
            continue;
        }
        let share = options.executions * target.share / 1000;
        let result = run(&mut target, share, options.seed);
        println!(
            "  {:<18} {:>12} {:>8} {:>8.1}",
            target.name,
            result.executions,
            result.panics,
            result.time.as_secs_f64()
        );
        executions += result.executions;
        panics += result.panics;
    }
    println!("  {:<18} {executions:>12} {panics:>8}", "all");
    if executions == 0 {
        println!("there is no such target");
    }
    if panics == 0 && executions > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
