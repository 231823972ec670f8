//! The daemon's entry: parses the command line and hands over.

fn main() -> std::process::ExitCode {
    keepd::daemon::command_line::run()
}
