//! `keepd`'s command line.

/// Parses and hands over.
pub fn run() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
