//! A table of the configuration in the caller's editor: its text with its comments, looked at when it comes back, and never lost.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use keepd_protocol::configuration::{ConfigEdit, EditKind};
use keepd_protocol::methods::*;
use keepd_protocol::model::escape;
use tempfile::NamedTempFile;

use crate::change::{self, Changing};
use crate::commands::Context;
use crate::{Exit, Failure, signals};

type Result<T> = std::result::Result<T, Failure>;

/// No table is longer, in bytes.
const LONGEST: u64 = 1 << 20;
/// Nobody has read and closed a text in so short a time.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The text while it is edited.
struct Draft {
    file: NamedTempFile,
}

impl Draft {
    /// Mode 0600, in the directory for temporary files.
    fn new(item: &str, text: &str) -> Result<Self> {
        let prefix = format!("keepctl-{item}.");
        let file = tempfile::Builder::new().prefix(&prefix).suffix(".toml").tempfile();
        let mut file =
            file.map_err(|e| Failure::failed(format!("no file to edit can be made in {}: {e}", std::env::temp_dir().display())))?;
        file.write_all(text.as_bytes())?;
        Ok(Self { file })
    }

    /// What stands there now; editors often make a new file of that name.
    fn read(&self) -> Result<String> {
        let failed = |why: String| Failure::failed(format!("what was edited cannot be read: {}: {why}", self.file.path().display()));
        let found = std::fs::metadata(self.file.path()).map_err(|e| failed(e.to_string()))?;
        if found.len() > LONGEST {
            return Err(failed(format!("it is longer than {} KiB", LONGEST >> 10)));
        }
        std::fs::read_to_string(self.file.path()).map_err(|e| failed(e.to_string()))
    }

    /// Leaves it where it is, and says so.
    fn keep(self) -> Result<()> {
        let path = self.file.path().to_owned();
        self.file.into_temp_path().keep().map_err(|e| Failure::failed(format!("your text could not be kept: {e}")))?;
        eprintln!("keepctl: your text is kept in {}", escape(&path.to_string_lossy()));
        Ok(())
    }

    /// A failure that tells where the text is.
    fn kept(self, failure: Failure) -> Failure {
        let path = self.file.path().to_owned();
        match self.file.into_temp_path().keep() {
            Ok(_) => Failure::new(failure.exit, format!("{}\nkeepctl: your text is kept in {}", failure.text, path.display())),
            Err(e) => Failure::new(failure.exit, format!("{}\nkeepctl: your text could not be kept: {e}", failure.text)),
        }
    }
}

/// Has an item edited.
pub fn edit(context: &Context<'_>, item: &str, how: &Changing) -> Result<Exit> {
    change::can_ask(how)?;
    let shown = context.client()?.call::<ShowItemText>(&show_item_text::In { item: item.to_owned() })?;
    let draft = Draft::new(item, &shown.text)?;
    loop {
        let since = Instant::now();
        if let Err(failure) = run_editor(draft.file.path()) {
            let is_touched = draft.read().is_ok_and(|text| text != shown.text);
            return Err(if is_touched { draft.kept(failure) } else { failure });
        }
        let text = match draft.read() {
            Ok(text) => text,
            Err(failure) => return Err(draft.kept(failure)),
        };
        if text == shown.text {
            if since.elapsed() < AT_ONCE {
                eprintln!("keepctl: the editor ended at once; one that opens a window has to be told to wait (code --wait, gvim -f)");
            }
            return context.done(&serde_json::json!({ "applied": false }), "nothing was edited, and nothing is changed");
        }
        if text.trim().is_empty() {
            return Err(Failure::failed("the text is empty: nothing was changed"));
        }
        let edits = vec![ConfigEdit { item: item.to_owned(), change: EditKind::Text, text: Some(text), ..ConfigEdit::default() }];
        let planned = match change::plan(context, edits, Some(shown.base.clone())) {
            Ok(planned) => planned,
            Err(failure) => {
                // Of what somebody else changed meanwhile, this text knows nothing.
                if failure.exit != Exit::Failed || is_changed(context, item, &shown.base) || !io::stdin().is_terminal() {
                    return Err(draft.kept(failure));
                }
                eprintln!("keepctl: {}", failure.text);
                if !again()? {
                    return Err(draft.kept(Failure::failed("nothing was changed")));
                }
                continue;
            }
        };
        return match change::make(context, planned, how, None, "change the configuration so?") {
            // What was typed may be wanted for the change itself.
            Ok(_) if how.dry_run => draft.keep().map(|()| Exit::Good),
            Ok(_) => Ok(Exit::Good),
            Err(failure) => Err(draft.kept(failure)),
        };
    }
}

fn is_changed(context: &Context<'_>, item: &str, base: &str) -> bool {
    let now = context.client().and_then(|mut client| client.call::<ShowItemText>(&show_item_text::In { item: item.to_owned() }));
    now.map_or(true, |now| now.base != base)
}

fn again() -> Result<bool> {
    eprint!("edit again? [Y/n] ");
    let mut answer = String::new();
    if io::stdin().read_line(&mut answer)? == 0 {
        return Ok(false);
    }
    Ok(matches!(answer.trim(), "" | "y" | "Y" | "yes"))
}

/// `$VISUAL`, `$EDITOR`, or vi; a line for the shell, as in git.
fn run_editor(path: &Path) -> Result<()> {
    let named = ["VISUAL", "EDITOR"].into_iter().filter_map(std::env::var_os).find(|value| !value.is_empty());
    let editor = named.unwrap_or_else(|| "vi".into());
    let shown = escape(&editor.to_string_lossy());
    // The shell waits, whatever a terminal sends to the editor, too.
    let mut line = OsString::from("trap : INT QUIT; ");
    line.push(&editor);
    line.push(" \"$@\"");
    // They are the editor's.
    let held = [signals::Held::interrupt(), signals::Held::quit()];
    let status = Command::new("/bin/sh").arg("-c").arg(line).arg(&editor).arg(PathBuf::from(path)).status();
    drop(held);
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::failed(format!(
            "the editor '{shown}' ended with {status}; nothing was changed ($VISUAL or $EDITOR names another)"
        ))),
        Err(e) => Err(Failure::failed(format!("the editor '{shown}' cannot be started: {e}; nothing was changed"))),
    }
}
