//! Keys: which there are, and the runs that add, remove and exchange them.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use keepd_protocol::model::{DestinationKeys, KeyProfile, KeyStep, Level, RunKind};

use super::{Error, Result, Runs, Work};
use crate::access::By;
use crate::config::{Config, Destination, Encryption};
use crate::crypto::{Key, PrivateKey, Profile, ProfileKey, key_file};
use crate::profile;
use crate::run::archived;
use crate::run::keys::{self, NewKey};
use crate::run::kit::{self, Wanted};
use crate::run::live::LiveRun;

/// A step of a rotation that was started.
#[derive(Debug, Clone, PartialEq)]
pub struct RotationStarted {
    pub run: String,
    pub fingerprint: String,
    /// Whether the configuration in force names the new key.
    pub configured: bool,
}

impl Runs {
    pub(super) fn encryption<'c>(&self, config: &'c Config, name: &str) -> Result<&'c Encryption> {
        config.encryption.get(name).ok_or_else(|| {
            let known = config.encryption.keys().cloned().collect::<Vec<_>>().join(", ");
            let text = format!("there is no encryption profile '{name}'; configured are: {known}");
            Error::NotFound { what: "encryption profile", name: name.into(), text }
        })
    }

    pub(super) fn profile(&self, config: &Config, name: &str) -> Result<Profile> {
        let found = self.encryption(config, name)?;
        profile::load(found).map_err(|(_, e)| Error::Failed(format!("encryption profile {name}: {e}")))
    }

    pub(super) fn destinations_of(config: &Config, profile: &str) -> Vec<Destination> {
        config.destinations.values().filter(|d| d.encryption.as_deref() == Some(profile)).cloned().collect()
    }

    /// The profiles, and the slots of all destinations, or of those named. Blocks as long as the slowest of them.
    pub fn list_keys(&self, named: &[String]) -> Result<(Vec<KeyProfile>, Vec<DestinationKeys>)> {
        let env = self.environment();
        let targets: Vec<&Destination> = match named {
            [] => env.config.destinations.values().collect(),
            named => named.iter().map(|name| self.destination(&env.config, name)).collect::<Result<_>>()?,
        };
        // One that does not answer does not keep the others waiting.
        let listed = std::thread::scope(|scope| {
            let asked: Vec<_> = targets.iter().map(|target| (target, scope.spawn(|| keys::at_destination(&env, target)))).collect();
            let failed = |target: &Destination| DestinationKeys {
                destination: target.name.clone(),
                profile: target.encryption.clone(),
                error: Some("an internal error (a panic, see the log)".into()),
                ..DestinationKeys::default()
            };
            asked.into_iter().map(|(target, thread)| thread.join().unwrap_or_else(|_| failed(target))).collect()
        });
        Ok((keys::profiles(&env.config), listed))
    }

    /// Queues a run that has a further key open a destination: the one given, or that of a configured profile.
    pub fn start_key_add(
        self: &Arc<Self>,
        destination: &str,
        profile: Option<&str>,
        given: Option<(String, Key)>,
        by: &By,
    ) -> Result<(String, Option<String>)> {
        let env = self.environment();
        let target = self.destination(&env.config, destination)?.clone();
        let new = match (profile, given) {
            (Some(name), None) => NewKey { label: name.to_owned(), key: self.profile(&env.config, name)?.key },
            (None, Some((label, key))) => NewKey { label, key: ProfileKey::Key(Arc::new(key)) },
            _ => return Err(Error::Failed("either a profile or a key file is wanted".into())),
        };
        let fingerprint = new.key.fingerprint().map_err(|e| Error::Failed(e.to_string()))?.map(|f| f.to_string());
        let run = self.start(Work::on(RunKind::Key, destination, by), move |live| keys::add(&env, &target, &new, live))?;
        Ok((run, fingerprint))
    }

    /// Queues a run that removes a key slot of a destination, of which the start of the id is given; the run, and the whole id.
    pub fn start_key_remove(self: &Arc<Self>, destination: &str, slot: &str, by: &By) -> Result<(String, String)> {
        let env = self.environment();
        let target = self.destination(&env.config, destination)?.clone();
        let absent = |text: String| Error::NotFound { what: "slot", name: slot.to_owned(), text };
        let slot = keys::find_slot(&env, &target, slot)?.map_err(absent)?;
        let id = slot.clone();
        let run = self.start(Work::on(RunKind::Key, destination, by), move |live| keys::remove(&env, &target, &id, live))?;
        Ok((run, slot))
    }

    /// Queues a step of a rotation. `given`: the key as the caller reads it from `file`; the daemon must read the same there.
    pub fn start_key_rotate(self: &Arc<Self>, name: &str, file: &str, given: Key, step: KeyStep, by: &By) -> Result<RotationStarted> {
        let env = self.environment();
        let profile = self.profile(&env.config, name)?;
        let fingerprint = given.fingerprint();
        let own = key_file::load(Path::new(file))
            .map_err(|e| Error::Failed(format!("keepd must read the key file itself, at the same path, and cannot: {e}")))?;
        if own.fingerprint() != fingerprint {
            return Err(Error::Failed(format!(
                "keepd reads another key at {file} (fingerprint {}) than you do ({fingerprint}): the service has another directory there; put the \
                 file beside its present key",
                own.fingerprint()
            )));
        }
        let present = profile.key.fingerprint().map_err(|e| Error::Failed(e.to_string()))?;
        let configured = present == Some(fingerprint);
        if step == KeyStep::Remove && !configured {
            return Err(Error::Failed(format!(
                "the configuration in force has another key for encryption profile {name} than {file}, so nothing is removed; name that file there \
                 and reload"
            )));
        }
        let (archived, targets): (Vec<Destination>, Vec<Destination>) =
            Self::destinations_of(&env.config, name).into_iter().partition(archived::is);
        let work = Work {
            kind: RunKind::Key,
            job: None,
            destinations: targets.iter().map(|t| t.name.clone()).collect(),
            backup: None,
            by: by.clone(),
            attempt: 1,
            alone: vec![format!("encryption profile {name}")],
        };
        let new = NewKey { label: name.to_owned(), key: ProfileKey::Key(Arc::new(given)) };
        let tell = move |live: &LiveRun| {
            for target in &archived {
                let text =
                    format!("{} keeps archives: those that are there open with the key of before alone, keep it as `retired`", target.name);
                live.message(Level::Warning, text);
            }
        };
        let run = self.start(work, move |live| {
            tell(live);
            match step {
                KeyStep::Add => keys::rotate_add(&env, &profile, &targets, &new, live),
                KeyStep::Remove => keys::rotate_remove(&env, &profile, &targets, live),
            }
        })?;
        Ok(RotationStarted { run, fingerprint: fingerprint.to_string(), configured })
    }

    /// Queues a run that writes the recovery kit of a profile into `out`; the run, and the fingerprint of the key in it.
    pub fn start_kit(
        self: &Arc<Self>,
        name: &str,
        include_secrets: bool,
        private: Option<PrivateKey>,
        out: OwnedFd,
        by: &By,
    ) -> Result<(String, Option<String>)> {
        let env = self.environment();
        let targets = Self::destinations_of(&env.config, name);
        let wanted = Wanted::new(self.profile(&env.config, name)?, targets, include_secrets, private).map_err(Error::Failed)?;
        let fingerprint = wanted.fingerprint();
        // Where a key can be written down nothing is changed at any destination.
        let changed = wanted.targets.iter().filter(|_| wanted.fresh.is_some());
        let work = Work {
            kind: RunKind::Key,
            job: None,
            destinations: changed.map(|t| t.name.clone()).collect(),
            backup: None,
            by: by.clone(),
            attempt: 1,
            alone: Vec::new(),
        };
        let run = self.start(work, move |live| kit::make(&env, &wanted, out, live))?;
        Ok((run, fingerprint))
    }
}
