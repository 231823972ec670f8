//! The configuration itself, for those who ask at the control socket: shown, checked, exported, imported, brought back.
//!
//! One change at a time. What was changed is in force when the daemon has read it again, which whoever asked sees to.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use keepd_protocol::configuration::{Allow, ConfigFileInfo, ConfigItem, ConfigPlan, ImportMode, ItemConflict};
use keepd_protocol::methods::{export_config, import_config};
use keepd_protocol::model::escape;
use rustix::fs::FileType;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::{Error, Result, Runs, lock};
use crate::access::{By, Need, Of, Right, wanted_by_change};
use crate::config::{self, Draft, ItemKind, ItemName, Problems, Texts};
use crate::crypto::{Key, PrivateKey, key_file};
use crate::machine;
use crate::meta::plan::{Items, Options};
use crate::meta::{apply, collect};
use crate::portable::envelope::{self, MAX_BYTES};
use crate::portable::seal;
use crate::run::destination;
use crate::run::export::packing;
use crate::run::import::keys::Keys;
use crate::run::patient::{PATIENCE, PatientWriter};

/// What an undo would do, or did.
pub struct Undone {
    pub diff: String,
    pub base: String,
    pub is_applied: bool,
}

/// What an import would do, or did.
pub struct Imported {
    pub file: ConfigFileInfo,
    pub plan: ConfigPlan,
    pub is_applied: bool,
}

/// What is wrong with the configuration on disk, for people.
pub struct Checked {
    pub errors: Vec<String>,
    pub warnings: Vec<String>,
    pub jobs: usize,
    pub destinations: usize,
}

fn told(problems: Problems) -> Error {
    Error::Failed(problems.to_string())
}

/// The tables as they are written.
fn items(texts: &Texts) -> Result<Items> {
    texts.values().map_err(told)
}

/// The kinds that are named; None: all.
fn kinds(words: &[String]) -> Result<Option<BTreeSet<ItemKind>>> {
    let kind = |word: &String| {
        ItemKind::from_word(word).ok_or_else(|| {
            let known = ItemKind::ALL.map(|(_, word)| word).join(", ");
            Error::Failed(format!("there is nothing of type '{}' in a configuration; there are: {known}", escape(word)))
        })
    };
    if words.is_empty() { Ok(None) } else { words.iter().map(kind).collect::<Result<_>>().map(Some) }
}

impl Runs {
    /// The main file.
    fn config_path(&self) -> Result<PathBuf> {
        let config = self.config.get();
        config.files.first().cloned().ok_or_else(|| Error::Failed("this keepd runs without a configuration file".into()))
    }

    pub(super) fn texts(&self) -> Result<Texts> {
        Texts::read(&self.config_path()?).map_err(told)
    }

    /// Where the configuration from before the last change is kept.
    pub(super) fn previous(&self) -> PathBuf {
        config::previous(&self.config.get().daemon.state_dir)
    }

    /// The tables as they stand in the files; those of `items` (`job.shop`, or `job` for all jobs), or all.
    pub fn show_config(&self, items: &[String]) -> Result<Vec<ConfigItem>> {
        let texts = self.texts()?;
        let mut found = collect::preview(&texts, None, None)?;
        let order = |item: &ConfigItem| texts.files.iter().position(|(path, _)| path.display().to_string() == item.file);
        found.sort_by_key(order);
        for wanted in items {
            let is_kind = ItemKind::from_word(wanted).is_some();
            if !is_kind && !found.iter().any(|item| item.item == *wanted) {
                let name = wanted.parse::<ItemName>().map_err(Error::Failed)?;
                let names = found.iter().map(|i| i.item.as_str()).collect::<Vec<_>>().join(", ");
                let text = format!("there is no {name} in the configuration; there are: {names}");
                return Err(Error::NotFound { what: "item", name: wanted.clone(), text });
            }
        }
        let is_wanted = |item: &ConfigItem| {
            let kind = item.item.split_once('.').map_or("", |(kind, _)| kind);
            items.is_empty()
                || items.iter().any(|wanted| *wanted == item.item || ItemKind::from_word(wanted).is_some_and(|k| k.word() == kind))
        };
        found.retain(is_wanted);
        Ok(found)
    }

    /// Everything that `keepd --check` finds.
    pub fn check_config(&self) -> Result<Checked> {
        let config = match self.texts().map(|texts| texts.load()) {
            Ok(Ok(config)) => config,
            Ok(Err(problems)) => {
                let errors = problems.0.iter().map(ToString::to_string).collect();
                return Ok(Checked { errors, warnings: Vec::new(), jobs: 0, destinations: 0 });
            }
            Err(e) => return Err(e),
        };
        let (jobs, destinations) = (config.jobs.len(), config.destinations.len());
        let found = machine::check(config);
        let text = |problems: &[config::Problem]| problems.iter().map(ToString::to_string).collect();
        Ok(Checked { errors: text(&found.errors), warnings: text(&found.warnings), jobs, destinations })
    }

    /// What an export of these kinds would hold, and the profiles that it could be sealed for.
    pub fn preview_config(&self, types: &[String]) -> Result<(Vec<ConfigItem>, Vec<String>)> {
        let texts = self.texts()?;
        let items = collect::preview(&texts, Some(&self.ledger), kinds(types)?.as_ref())?;
        Ok((items, self.config.get().encryption.keys().cloned().collect()))
    }

    /// Writes the configuration as it stands in its files into `out`.
    pub fn export_config(&self, request: &export_config::In, out: OwnedFd) -> Result<export_config::Out> {
        if request.include_secrets && request.profile.is_none() {
            return Err(Error::Failed(
                "a configuration with its secrets leaves only sealed: name an encryption profile (nothing was written)".into(),
            ));
        }
        let config = self.config.get();
        let profile = request.profile.as_ref().map(|name| destination::profile_named(&config, name)).transpose()?;
        let envelope = collect::collect(&self.texts()?, Some(&self.ledger), kinds(&request.types)?.as_ref(), request.include_secrets)?;
        let bytes = envelope::write(&envelope, Vec::new(), packing(request.compression), profile.as_ref())
            .map_err(|e| Error::Failed(format!("the configuration cannot be exported: {e}")))?;
        let given = |secret: &&envelope::Secret| !secret.value.is_empty() && secret.kind != envelope::SecretKind::PublicKey;
        let secrets = envelope.items.iter().flat_map(|i| &i.secrets).filter(given).count();
        let sha256 = data_encoding::HEXLOWER.encode(&Sha256::digest(&bytes));
        into(out, &bytes)?;
        Ok(export_config::Out { items: envelope.items.len() as u64, secrets: secrets as u64, bytes: bytes.len() as u64, sha256 })
    }

    /// Plans an import of `file`, and carries it out where nothing stands against it and `dry_run` does not say otherwise.
    pub fn import_config(&self, request: &import_config::In, file: File, keys: Vec<File>, by: &By) -> Result<Imported> {
        let bytes = read_config(file)?;
        let opened = self.open_config(&bytes, keys)?;
        let envelope = &opened.envelope;
        let info = envelope.info(opened.sealed, opened.opened_with.clone());
        let options = match request.validate {
            // Whatever conflicts or must be allowed is shown, and no reason to refuse it.
            true => Options {
                mode: ImportMode::Merge,
                on_conflict: ItemConflict::Overwrite,
                allow: Allow::ALL.iter().copied().collect(),
                ..Options::default()
            },
            false => Options {
                mode: request.mode,
                only: request.only.clone(),
                on_conflict: request.on_conflict,
                answers: request.answers.clone(),
                strict: request.strict,
                allow: request.allow.iter().copied().collect(),
            },
        };
        // Until all of it is done: what was planned must be what is changed.
        let _alone = lock(&self.config_changes);
        let texts = self.texts()?;
        let before = items(&texts)?;
        let prepared = apply::prepare(texts, &self.ledger, envelope, &options).map_err(Error::Failed)?;
        let mut plan = prepared.plan().clone();
        plan.base = shown_as(&plan.base, &bytes, request)?;
        if let Some(base) = request.base.as_ref().filter(|base| **base != plan.base) {
            tracing::debug!(base, now = plan.base, "this is not what was shown");
            return Err(Error::Busy(
                "the configuration was changed since it was shown, or the file or what was asked for; nothing was imported, look at it again".into(),
            ));
        }
        let is_applied = !request.dry_run && !request.validate && plan.problems.is_empty() && plan.needs.is_empty();
        if is_applied {
            // It may have waited, and what is in the file was not known before.
            by.ask_again()?;
            wanted_by_change(by, Right::ConfigImport, &before, &items(prepared.after())?)?;
            prepared.apply(&self.previous(), &self.ledger).map_err(|e| Error::Failed(format!("nothing was imported: {e}")))?;
        } else if by.may(&[Need::new(Right::ConfigExport, Of::Whole, "")]).is_err() {
            // What stands here is shown beside what would be: as much of it as may be changed.
            wanted_by_change(by, Right::ConfigImport, &before, &items(prepared.after())?)?;
        }
        Ok(Imported { file: info, plan, is_applied })
    }

    fn open_config(&self, bytes: &[u8], keys: Vec<File>) -> Result<envelope::Opened> {
        let (mut given, mut private): (Vec<Key>, Vec<PrivateKey>) = Default::default();
        for mut key in keys {
            let _ = key.rewind();
            let (keys, privates) = key_file::load_all(Path::new("the key file"), &key).map_err(|e| Error::Failed(e.to_string()))?;
            given.extend(keys);
            private.extend(privates);
        }
        let gathered = Keys::of(given, private, &self.config.get());
        let keys = seal::Keys { keys: gathered.keys, private: gathered.private_keys, cancel: CancellationToken::new() };
        envelope::read(bytes, &keys).map_err(|e| {
            let problems = gathered.problems.iter().map(|p| format!("; {p}")).collect::<String>();
            Error::Failed(format!("the configuration cannot be read: {e}{problems}"))
        })
    }

    /// Goes back to the configuration from before the last change.
    pub fn undo_config(&self, dry_run: bool, base: Option<&str>, by: &By) -> Result<Undone> {
        let _alone = lock(&self.config_changes);
        let (main, previous) = (self.config_path()?, self.previous());
        let now = self.texts()?.digest();
        if base.is_some_and(|base| base != now) {
            return Err(Error::Busy("the configuration was changed since it was shown; nothing was changed back, look at it again".into()));
        }
        let draft: Draft = config::undo(&main, &previous).map_err(Error::Failed)?;
        let diff = draft.diff();
        if dry_run {
            return Ok(Undone { diff, base: now, is_applied: false });
        }
        let config = draft.after().load().map_err(told)?;
        let errors: Vec<String> = machine::check(config).errors.iter().map(ToString::to_string).collect();
        if !errors.is_empty() {
            return Err(Error::Failed(format!(
                "the configuration from before would be refused, so nothing was changed: {}",
                errors.join("; ")
            )));
        }
        by.ask_again()?;
        wanted_by_change(by, Right::ConfigImport, &items(draft.before())?, &items(draft.after())?)?;
        // Known before: nothing may fail once it counts.
        let base = draft.after().digest();
        draft.commit(&previous).map_err(Error::Failed)?;
        Ok(Undone { diff, base, is_applied: true })
    }

    /// Writes a stored configuration, as it is stored, into `out`; its name, and how many bytes it has.
    pub fn write_config_backup(&self, destination: Option<&str>, name: Option<&str>, out: OwnedFd) -> Result<(String, u64)> {
        let (name, bytes) = self.fetch_config_backup(destination, name)?;
        into(out, &bytes)?;
        Ok((name, bytes.len() as u64))
    }
}

/// The file to import, whole, so that what is looked at is what is imported.
fn read_config(mut file: File) -> Result<Vec<u8>> {
    let failed = |e: &dyn std::fmt::Display| Error::Failed(format!("the file to import cannot be read: {e}"));
    let too_long = || failed(&format!("it is longer than {} MiB, so it can hardly be a configuration", MAX_BYTES >> 20));
    // A pipe could keep its reader waiting.
    let found = rustix::fs::fstat(&file).map_err(|e| failed(&e))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Err(failed(&"it is not a regular file"));
    }
    if u64::try_from(found.st_size).unwrap_or(0) > MAX_BYTES {
        return Err(too_long());
    }
    // keepctl passes the same descriptor more than once.
    file.rewind().map_err(|e| failed(&e))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| failed(&e))?;
    if bytes.len() as u64 > MAX_BYTES { Err(too_long()) } else { Ok(bytes) }
}

/// Names all that a plan was made from: the configuration, the file and what was asked for.
fn shown_as(configuration: &str, file: &[u8], request: &import_config::In) -> Result<String> {
    let asked = import_config::In { dry_run: false, base: None, ..request.clone() };
    let asked = serde_json::to_vec(&asked).map_err(|e| Error::Failed(format!("what was asked for cannot be written down: {e}")))?;
    let all = [configuration.as_bytes(), Sha256::digest(file).as_slice(), &asked].concat();
    Ok(data_encoding::HEXLOWER.encode(&Sha256::digest(all)))
}

/// All of it into a client's descriptor, durable where that is a file.
fn into(out: OwnedFd, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let failed = |e: &dyn std::fmt::Display| Error::Failed(format!("the configuration cannot be written to where it was asked for: {e}"));
    let to_sync = File::from(out.try_clone().map_err(|e| failed(&e))?);
    let mut out = PatientWriter::new(out, PATIENCE, CancellationToken::new())?;
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| failed(&e))?;
    if to_sync.metadata().is_ok_and(|m| m.is_file()) {
        to_sync.sync_all().map_err(|e| failed(&e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_shown_is_the_configuration_the_file_and_what_was_asked() {
        let shown = |configuration: &str, file: &[u8], asked: &import_config::In| shown_as(configuration, file, asked).unwrap();
        let asked = import_config::In { dry_run: true, ..import_config::In::default() };
        let base = shown("a", b"file", &asked);
        let done = import_config::In { dry_run: false, base: Some(base.clone()), ..asked.clone() };
        assert_eq!(shown("a", b"file", &done), base);
        let answered = import_config::In { answers: [("job.shop".to_owned(), ItemConflict::Overwrite)].into(), ..asked.clone() };
        let allowed = import_config::In { allow: vec![Allow::Commands], ..asked.clone() };
        for other in
            [shown("b", b"file", &asked), shown("a", b"fild", &asked), shown("a", b"file", &answered), shown("a", b"file", &allowed)]
        {
            assert_ne!(other, base);
        }
    }

    #[test]
    fn only_a_regular_file_is_read() {
        assert!(read_config(File::open("/dev/zero").unwrap()).is_err());
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"x").unwrap();
        assert_eq!(read_config(file).unwrap(), b"x");
    }
}
