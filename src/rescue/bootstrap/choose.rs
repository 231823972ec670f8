//! Which configuration it is: the newest at the destination or another one, opened, and whether it can be believed.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use zeroize::Zeroizing;

use super::Given;
use crate::crypto::ProfileKey;
use crate::crypto::slot::{METHOD_PASSPHRASE, Slot};
use crate::meta::stored::{self, Stored};
use crate::portable::envelope::{self, Envelope};
use crate::portable::seal::{self, Keys, METHOD_PUBLIC_KEY};
use crate::rescue::arguments::Beginning;
use crate::rescue::{Failure, Result};

/// Between what a name says of its time and what was sealed, at most: it was collected, sealed and written in this time.
const APART: SignedDuration = SignedDuration::from_mins(10);

/// A stored configuration that was opened.
pub struct Chosen {
    /// Its name at the destination, or the file that was named.
    pub name: String,
    /// At the destination; None: it is a file that was named.
    pub among: Option<Among>,
    pub envelope: Envelope,
    pub sealed: bool,
    /// What opened it, in words.
    pub opened_with: Option<String>,
    /// The name and the slots that it is sealed with.
    pub sealed_for: ([u8; 16], Vec<Slot>),
    pub warnings: Vec<String>,
}

/// How many there are beside it.
pub struct Among {
    pub newer: usize,
    pub older: usize,
}

/// Finds and opens it.
pub fn choose(given: &mut Given, how: &Beginning) -> Result<Chosen> {
    let location = given.storage.location().to_owned();
    let (name, bytes, found) = match &how.from {
        Some(from) if Path::new(from).is_file() => {
            let path = Path::new(from);
            let size = path.metadata().map(|found| found.len()).unwrap_or(0);
            if size > envelope::MAX_BYTES {
                return Err(Failure::failed(format!("{} is no configuration: it is longer than any", path.display())));
            }
            let bytes = std::fs::read(path).map_err(|e| Failure::failed(format!("{} cannot be read: {e}", path.display())))?;
            (path.display().to_string(), Bytes::from(bytes), None)
        }
        from => {
            let (stored, among) = look(given, from.as_ref().map(|from| from.to_string_lossy()).as_deref())?;
            let bytes = stored::fetch(&given.storage, &stored.name).map_err(Failure::failed)?;
            (stored.name.clone(), bytes, Some((stored, among)))
        }
    };
    let sealed = seal::is_sealed(&bytes);
    let sealed_for = if sealed { seal::slots(&bytes).unwrap_or_default() } else { Default::default() };
    if !sealed && !how.allow_unsealed {
        return Err(Failure::failed(format!(
            "{name} is not sealed: anybody who can write to {location} could have made it, and with it hooks that run on this machine. See what is in it with \
             --allow-unsealed --dry-run, and leave --dry-run out if all of it is yours"
        )));
    }
    ask_for_passphrase(given, &sealed_for.1, &name)?;
    let keys = Keys { keys: given.keys.clone(), private: given.lent.keys().to_vec(), cancel: given.cancel.clone() };
    let opened = envelope::read(&*bytes, &keys).map_err(|e| {
        let others = found.as_ref().is_some_and(|(_, among)| among.newer + among.older > 0);
        let hint = if others { "; there are others, 'keepd rescue bootstrap --from NAME' takes one of them" } else { "" };
        let names = found.as_ref().map(|(stored, _)| beside(given, stored)).unwrap_or_default();
        Failure::failed(format!("{name} at {location} cannot be used: {e}{hint}{names}"))
    })?;
    let mut warnings = Vec::new();
    if let Some((stored, _)) = &found {
        let apart = opened.envelope.exported_at.duration_since(stored.time).abs();
        if sealed && apart > APART {
            let text = format!(
                "{name} is of {} by its name, and what is in it was made {}: somebody gave it another's name, or a clock was wrong",
                stored.time, opened.envelope.exported_at
            );
            if how.from.is_none() {
                let names = beside(given, stored);
                return Err(Failure::failed(format!("{text}. Name the one that you want with --from NAME{names}")));
            }
            warnings.push(text);
        }
    }
    if opened.envelope.exported_at > Timestamp::now() {
        warnings.push(format!(
            "it was made {}, which is yet to come; this machine's clock is wrong, or that one's was",
            opened.envelope.exported_at
        ));
    }
    if !sealed {
        warnings.push(format!("{name} is not sealed: nothing shows who made it, so look at all that comes with it"));
    } else if sealed_for.1.iter().any(|slot| slot.method == METHOD_PUBLIC_KEY) {
        warnings.push(format!(
            "{name} is sealed for a public key, which others than keepd may have: whoever has it, and can write to {location}, could have made this configuration. \
             Look at all that comes with it"
        ));
    }
    let among = found.map(|(_, among)| among);
    Ok(Chosen { name, among, envelope: opened.envelope, sealed, opened_with: opened.opened_with, sealed_for, warnings })
}

/// The newest, or the one that is named.
fn look(given: &Given, from: Option<&str>) -> Result<(Stored, Among)> {
    let location = given.storage.location();
    let there = stored::look(&given.storage).map_err(Failure::failed)?;
    let all = there.stored.len();
    if all == 0 && from.is_none() {
        return Err(Failure::failed(format!(
            "no configuration is stored at {location} (keepd stores it where [config_backup] names a destination). If another destination has one, name that. \
             Else write /etc/keepd/keepd.toml by hand, beginning with the destination's lines in the recovery kit (sed -n 's/^#1: //p' kit.py), start keepd, and \
             'keepctl list' shows the backups; 'keepd rescue restore' needs no configuration at all"
        )));
    }
    let is_it = |s: &&(usize, &Stored)| from.is_none_or(|from| s.1.name == from || s.1.name.strip_prefix(stored::DIRECTORY) == Some(from));
    let numbered: Vec<(usize, &Stored)> = there.stored.iter().enumerate().collect();
    match numbered.iter().rev().find(is_it) {
        Some((n, stored)) => Ok(((*stored).clone(), Among { newer: all - n - 1, older: *n })),
        None => Err(Failure::failed(format!(
            "there is no '{}' at {location}, and no such file here{}",
            from.unwrap_or_default().escape_debug(),
            names(&there.stored)
        ))),
    }
}

/// The others, for a message.
fn beside(given: &Given, but: &Stored) -> String {
    let others: Vec<Stored> = stored::list(&given.storage).unwrap_or_default().into_iter().filter(|s| s.name != but.name).collect();
    names(&others)
}

/// The newest few.
fn names(all: &[Stored]) -> String {
    let some: Vec<&str> = all.iter().rev().take(5).map(|s| s.name.as_str()).collect();
    match some.is_empty() {
        true => String::new(),
        false => format!(" (there are: {}{})", some.join(", "), if all.len() > some.len() { ", …" } else { "" }),
    }
}

fn ask_for_passphrase(given: &mut Given, slots: &[Slot], name: &str) -> Result<()> {
    let wants = slots.iter().find(|slot| slot.method == METHOD_PASSPHRASE);
    let Some(slot) = wants.filter(|_| given.keys.is_empty() && std::io::stdin().is_terminal()) else { return Ok(()) };
    let asked = rpassword::prompt_password(format!("Passphrase of profile '{}', for {name}: ", slot.profile.escape_debug()));
    let passphrase = asked.map_err(|e| Failure::failed(format!("the passphrase cannot be read: {e}")))?;
    given.keys.push(ProfileKey::Passphrase(Arc::new(Zeroizing::new(passphrase))));
    Ok(())
}
