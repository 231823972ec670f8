//! `keepd rescue bootstrap`: a machine on which nothing is yet becomes the one that is gone, as far as keepd goes.
//!
//! In: a destination, the keys of a recovery kit, and the configuration that was stored beside the backups. Out: that configuration with its
//! secrets, and a state directory in which the destinations' backups and the jobs' schedules are known. What was stored is proven to be from
//! somebody who had the key before anything of it counts; all of it is written, or nothing.

mod choose;
mod fill;
mod make;
mod report;

use std::collections::BTreeSet;
use std::path::Path;

use jiff::Timestamp;
use keepd_protocol::configuration::{Allow, ItemAction, PlannedItem};
use serde_json::json;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use self::report::Report;
use super::arguments::{Beginning, Place};
use super::opened::{self, Leavings};
use super::{Exit, Failure, Result, keys, place};
use crate::config::{self, Destination, ItemKind, Texts};
use crate::crypto::{Lent, ProfileKey};
use crate::ledger::Ledger;
use crate::meta::apply::{self, Prepared};
use crate::meta::plan::Options;
use crate::portable::envelope::Envelope;
use crate::storage::Storage;

/// The configuration that `make install` puts there for people to change.
const SAMPLE: &str = include_str!("../../../config/keepd.toml");

/// What the command line gives.
struct Given {
    destination: Destination,
    storage: Storage,
    keys: Vec<ProfileKey>,
    lent: Lent,
    runtime: Handle,
    cancel: CancellationToken,
    leavings: Leavings,
}

/// Writes the configuration that was stored, and takes up what its destinations have.
pub fn bootstrap(place: &Place, how: &Beginning) -> Result<Exit> {
    if place.cache.is_some() {
        return Err(Failure::usage("bootstrap keeps no cache: what it reads goes into the state directory; leave --cache out"));
    }
    if place::archive(&place.destination).is_some() {
        return Err(Failure::usage("one archive has no configuration beside it; name the directory that it lies in"));
    }
    let main = how.config.clone().unwrap_or_else(config::default_path);
    let main = std::path::absolute(&main).unwrap_or(main);
    is_empty(&main)?;
    let destination = place::destination(&place.destination, place.name.as_deref())?;
    let root = destination.directory().map(Path::new).map(opened::resolved);
    opened::outside(root.as_deref(), &main, "the configuration (--config FILE)")?;
    let (cancel, leavings) = (CancellationToken::new(), Leavings::default());
    opened::cancel_by_signals(&cancel, leavings.clone())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| Failure::failed(format!("cannot start the async runtime: {e}")))?;
    let storage = Storage::open(&destination, runtime.handle().clone()).map_err(Failure::failed)?;
    let (keys, lent) = keys::given(place)?;
    let mut given = Given { destination, storage, keys, lent, runtime: runtime.handle().clone(), cancel, leavings };

    let mut chosen = choose::choose(&mut given, how)?;
    owes_nothing(&mut chosen.envelope);
    fill::from_keys(&mut chosen.envelope, &chosen.sealed_for, &given);
    // Where the destinations are is known when the tables were read; what was given for one of them is a part of what is planned then.
    let first = plan(&main, &chosen.envelope)?;
    fill::from_destination(&mut chosen.envelope, &config_of(&first)?, &given);
    let mut report = Report::of(place, &main, &chosen, how);
    report.asked_elsewhere = fill::variables(&chosen.envelope, main.parent().unwrap_or(Path::new("/")));
    let planned = plan(&main, &chosen.envelope)?;
    let config = config_of(&planned)?;
    if let obstacles @ [_, ..] = planned.obstacles().as_slice() {
        return Err(Failure::failed(format!("the stored configuration cannot be used, and nothing was written: {}", obstacles.join("; "))));
    }
    if let Some(root) = &root {
        opened::outside(Some(root), &config.daemon.state_dir, "the state directory (daemon.state_dir)")?;
    }
    report.planned(&planned, &config);
    report.tell_warnings();
    report.show_what_comes()?;
    if how.dry_run {
        return report.end();
    }
    make::make(&main, &chosen.envelope, &given, how.take_over, &mut report)?;
    report.end()
}

/// Refuses a machine that has a configuration already. The sample that was installed with keepd is none.
fn is_empty(main: &Path) -> Result<()> {
    let directory = main.parent().unwrap_or(Path::new("/"));
    let refused = |path: &Path, what: &str| {
        Err(Failure::failed(format!(
            "{} {what}: bootstrap begins anew where there is no configuration, and writes over none. If that machine shall begin anew, move it away; \
             'keepctl config import' brings single things into a configuration that is there",
            path.display()
        )))
    };
    if main.symlink_metadata().is_ok() && !is_sample(main) {
        return refused(main, "exists");
    }
    let journal = directory.join(".keepd-change.json");
    if journal.symlink_metadata().is_ok() {
        return refused(&journal, "holds a change of a configuration that was begun");
    }
    let drop_ins = directory.join("conf.d");
    let entries = match std::fs::read_dir(&drop_ins) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Failure::failed(format!("{} cannot be listed: {e}", drop_ins.display()))),
    };
    for entry in entries {
        let path = entry.map_err(|e| Failure::failed(format!("{} cannot be listed: {e}", drop_ins.display())))?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !is_hidden && path.extension().is_some_and(|extension| extension == "toml") {
            return refused(&path, "is part of a configuration");
        }
    }
    Ok(())
}

fn is_sample(main: &Path) -> bool {
    main.symlink_metadata().is_ok_and(|found| found.is_file() && found.len() == SAMPLE.len() as u64)
        && std::fs::read(main).is_ok_and(|bytes| bytes == SAMPLE.as_bytes())
}

/// What was missed while there was no machine is not made up for: the first run would find nothing of what it is to back up.
fn owes_nothing(envelope: &mut Envelope) {
    let now = Timestamp::now();
    for item in envelope.items.iter_mut().filter(|item| item.kind() == Some(ItemKind::Schedule)) {
        let Some(state) = item.value.as_object_mut() else { continue };
        let due = state.get("last_due").and_then(|due| due.as_str()?.parse::<Timestamp>().ok());
        if due.is_some_and(|due| due < now) {
            state.insert("last_due".into(), json!(now));
        }
    }
}

/// The import into nothing. All of it is allowed: it opened with the kit's key, or somebody said that it may be open.
fn plan(main: &Path, envelope: &Envelope) -> Result<Prepared> {
    let directory = tempfile::Builder::new().prefix("keepd-rescue-").tempdir();
    let directory =
        directory.map_err(|e| Failure::failed(format!("cannot make a temporary directory ({e}); TMPDIR names another place for it")))?;
    let ledger = Ledger::open(directory.path()).map_err(Failure::failed)?;
    prepare(main, &ledger, envelope)
}

fn prepare(main: &Path, ledger: &Ledger, envelope: &Envelope) -> Result<Prepared> {
    let all = [Allow::WeakerEncryption, Allow::Commands, Allow::Admins, Allow::KeyChange];
    let options = Options { allow: BTreeSet::from(all), ..Options::default() };
    let nothing = Texts { main: main.to_owned(), files: Vec::new() };
    apply::prepare(nothing, ledger, envelope, &options).map_err(Failure::failed)
}

/// The configuration that it becomes.
fn config_of(prepared: &Prepared) -> Result<config::Config> {
    prepared
        .after()
        .load()
        .map_err(|problems| Failure::failed(format!("the stored configuration is wrong, and nothing was written: {problems}")))
}

/// Programs that come along, one line each.
fn programs(items: &[PlannedItem]) -> Vec<String> {
    let word = format!("{}: ", Allow::Commands.as_str());
    let of = |item: &PlannedItem| {
        item.notes.iter().filter_map(|note| Some(format!("{}: {}", item.item, note.strip_prefix(&word)?))).collect::<Vec<_>>()
    };
    items.iter().filter(|item| item.action == ItemAction::Add).flat_map(of).collect()
}
