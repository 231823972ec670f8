//! What of an archive is wanted, as the archive calls it.

use std::collections::BTreeMap;

use keepd_protocol::methods::initiate_import;
use keepd_protocol::model::EntryKind;

use super::work::failed;
use crate::portable::Head;
use crate::run::live::Failure;
use crate::run::selection::is_at_or_below;

/// What of an archive's sources is wanted: paths below each in the archive's terms, empty for all of it.
pub struct Wanted {
    pub sources: BTreeMap<String, Vec<Path>>,
    /// Nothing was chosen.
    pub everything: bool,
}

pub struct Path {
    pub below: Vec<u8>,
    pub found: bool,
}

pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().position(|b| *b == b'/') {
        None => (path, &[]),
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
    }
}

pub fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

impl Wanted {
    pub fn new(request: &initiate_import::In, head: &Head) -> Result<Self, Failure> {
        let known = || head.sources.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ");
        let is_known = |name: &str| match head.sources.iter().any(|s| s.name == name) {
            true => Ok(()),
            false => Err(failed(format!("the archive has no source '{name}'; it has {}", known()))),
        };
        request.rename_sources.keys().try_for_each(|name| is_known(name))?;
        let mut sources: BTreeMap<String, Vec<Path>> = BTreeMap::new();
        let everything = request.sources.is_empty() && request.paths.is_empty();
        let all: Vec<String> = if everything { head.sources.iter().map(|s| s.name.clone()).collect() } else { request.sources.clone() };
        for name in all {
            is_known(&name)?;
            sources.entry(name).or_default().push(Path { below: Vec::new(), found: true });
        }
        for path in &request.paths {
            let bytes = path.to_bytes().map_err(failed)?;
            let trimmed: Vec<&[u8]> = bytes.split(|b| *b == b'/').filter(|part| !part.is_empty()).collect();
            let joined = trimmed.join(&b'/');
            let (name, below) = split(&joined);
            let name = lossy(name);
            is_known(&name)?;
            sources.entry(name).or_default().push(Path { below: below.to_vec(), found: below.is_empty() });
        }
        Ok(Self { sources, everything })
    }

    /// In words, for the backup's messages.
    pub fn told(&self) -> String {
        let path = |name: &String, p: &Path| if p.below.is_empty() { name.clone() } else { format!("{name}/{}", lossy(&p.below)) };
        self.sources.iter().flat_map(|(name, paths)| paths.iter().map(move |p| path(name, p))).collect::<Vec<_>>().join(", ")
    }
}

/// Whether an entry is wanted: it is at or below a path, or a directory on the way to one.
pub fn takes(paths: &mut [Path], below: &[u8], kind: EntryKind) -> bool {
    let mut taken = false;
    for path in paths {
        if is_at_or_below(below, &path.below) {
            (path.found, taken) = (true, true);
        } else if kind == EntryKind::Directory && is_at_or_below(&path.below, below) {
            taken = true;
        }
    }
    taken
}
