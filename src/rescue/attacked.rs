//! What a rescue finds and restores of a repository or of archives that somebody attacked, without a process of its own for each attack. Tests use it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use keepd_writer::Options;
use tokio_util::sync::CancellationToken;

use super::arguments::{Of, Place};
use super::opened::{Leavings, Opened};
use super::{look, restore};

/// What was seen.
#[derive(Debug)]
pub struct Seen {
    /// By backup: what was left out of its restore, or why nothing came.
    pub restored: BTreeMap<String, Result<Vec<String>, String>>,
    /// What the check of all data said, of objects and of backups; an error where it did not end.
    pub check: Result<Vec<String>, String>,
}

/// Restores every backup of `destination` to a directory of its id in `to`, and checks all data. The error is that it does not open. `cache`: for the index, as with `--cache`.
pub fn look_at(destination: &Path, keys: &[PathBuf], cache: &Path, to: &Path) -> Result<Seen, String> {
    let place = Place {
        destination: format!("fs:{}", destination.display()).into(),
        name: None,
        key: keys.to_vec(),
        passphrase_file: None,
        pkcs11_module: None,
        token: None,
        token_key: None,
        pin_file: None,
        cache: Some(cache.to_owned()),
        json: false,
        no_progress: true,
        quiet: true,
    };
    let opened = Opened::open_with(&place, CancellationToken::new(), Leavings::default()).map_err(|f| f.text)?;
    let mut seen = Seen { restored: BTreeMap::new(), check: Ok(Vec::new()) };
    for backup in opened.backups(None).map_err(|f| f.text)? {
        let of = Of { backup: backup.id.clone(), job: None };
        let restored = opened.find(&of).and_then(|(_, manifest)| {
            let options = Options { overwrite: false, numeric_owner: true, memory: None };
            restore::write(&opened, &manifest, &[], &to.join(&backup.id), options, &|_| ())
        });
        let restored = restored.map(|(mut poured, mut written)| {
            poured.hurt.append(&mut written.lost);
            poured.hurt
        });
        seen.restored.insert(backup.id, restored.map_err(|f| f.text));
    }
    let report = match &opened.archives {
        Some(archives) => look::of_archives(&opened, archives, 100),
        None => look::of_packs(&opened, &place, 100),
    };
    let told = |(id, paths): (String, Vec<String>)| format!("backup {id}: {}", paths.join(", "));
    seen.check = report.map(|r| r.problems.into_iter().chain(r.hurt.into_iter().map(told)).collect()).map_err(|f| f.text);
    Ok(seen)
}
