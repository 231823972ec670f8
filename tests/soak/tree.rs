//! A directory that lives: random changes of it, and a picture of it to the last attribute that a backup keeps.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::dice::Dice;

/// More entries, or more bytes, than that make deletions likelier than anything else.
const ENTRIES: usize = 260;
const BYTES: u64 = 16 << 20;

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Mode, owner, time, attributes.
    pub described: String,
    /// Kind and contents.
    pub holds: String,
    /// The first name of the same file, where it has several.
    pub first_name: Option<Vec<u8>>,
}

/// By path below the directory, which itself is the empty path.
pub type Picture = BTreeMap<Vec<u8>, Node>;

pub fn picture(root: &Path) -> Picture {
    let mut found = Picture::new();
    let mut names = BTreeMap::new();
    for path in all_below(root) {
        let meta = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        let holds = if meta.is_dir() {
            "directory".to_owned()
        } else if meta.is_symlink() {
            format!("link to {:?}", fs::read_link(&path).unwrap())
        } else {
            let mut hash = blake3::Hasher::new();
            hash.update_reader(fs::File::open(&path).unwrap()).unwrap();
            format!("file of {} bytes, {}", meta.len(), hash.finalize().to_hex())
        };
        let several = meta.is_file() && meta.nlink() > 1;
        let first_name = several.then(|| names.entry((meta.dev(), meta.ino())).or_insert_with(|| name.clone()).clone());
        let mode = if meta.is_symlink() { 0 } else { meta.mode() & 0o7777 };
        let described = format!(
            "{mode:o} {}:{} {}.{:09} {}",
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            if meta.is_symlink() { String::new() } else { attributes(&path) }
        );
        found.insert(name, Node { described, holds, first_name });
    }
    found
}

/// What differs, the first of it, with both sides; `at_the_top`: the directory itself, too.
pub fn difference(wanted: &Picture, found: &Picture, at_the_top: bool) -> Option<String> {
    let names: std::collections::BTreeSet<_> = wanted.keys().chain(found.keys()).collect();
    let differ: Vec<_> = names.into_iter().filter(|n| (at_the_top || !n.is_empty()) && wanted.get(*n) != found.get(*n)).collect();
    let show = |n: &Vec<u8>| format!("{}\n   wanted {:?}\n   found  {:?}", String::from_utf8_lossy(n), wanted.get(n), found.get(n));
    (!differ.is_empty())
        .then(|| format!("{} paths differ:\n{}", differ.len(), differ.iter().take(8).map(|n| show(n)).collect::<Vec<_>>().join("\n")))
}

/// The picture of one path and what is below it. That a file has further names elsewhere is not to be seen there.
pub fn part(whole: &Picture, path: &[u8]) -> Picture {
    let below = [path, b"/"].concat();
    let of = |(name, node): (&Vec<u8>, &Node)| (name.clone(), Node { first_name: None, ..node.clone() });
    whole.iter().filter(|(n, _)| n.as_slice() == path || n.starts_with(&below)).map(of).collect()
}

/// The directory and everything in it, parents first, in the order of names.
fn all_below(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.to_owned()];
    let mut at = 0;
    while at < found.len() {
        if fs::symlink_metadata(&found[at]).unwrap().is_dir() {
            let mut names: Vec<_> = fs::read_dir(&found[at]).unwrap().map(|e| e.unwrap().path()).collect();
            names.sort();
            found.extend(names);
        }
        at += 1;
    }
    // Which name of a file is the first does not depend on how deep it lies.
    found.sort();
    found
}

fn attributes(path: &Path) -> String {
    let mut names = [0u8; 4096];
    let Ok(len) = rustix::fs::llistxattr(path, &mut names[..]) else { return String::new() };
    let mut all: Vec<String> = Vec::new();
    for name in names[..len].split(|b| *b == 0).filter(|n| n.starts_with(b"user.")) {
        let mut value = [0u8; 4096];
        let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
        all.push(format!("{}={:?}", String::from_utf8_lossy(name), &value[..len]));
    }
    all.sort();
    all.join(" ")
}

/// So many random changes.
pub fn change(root: &Path, dice: &mut Dice, times: usize) {
    for _ in 0..times {
        change_once(root, dice);
    }
}

fn change_once(root: &Path, dice: &mut Dice) {
    let all = all_below(root);
    let meta = |p: &PathBuf| fs::symlink_metadata(p).unwrap();
    let bytes: u64 = all.iter().map(|p| meta(p).blocks() * 512).sum();
    let directories: Vec<PathBuf> = all.iter().filter(|p| meta(p).is_dir()).cloned().collect();
    let files: Vec<PathBuf> = all.iter().filter(|p| meta(p).is_file()).cloned().collect();
    let others: Vec<PathBuf> = all.iter().filter(|p| p.as_path() != root).cloned().collect();
    let within = dice.pick(&directories).clone();
    let name = fresh_name(dice);
    let new = within.join(&name);
    let file = if files.is_empty() { root.join("first") } else { dice.pick(&files).clone() };
    let full = others.len() > ENTRIES || bytes > BYTES;
    match if full { 20 + dice.below(4) } else { dice.below(24) } {
        0..=4 => write(&new, &contents(dice)),
        5 | 6 => append(&file, &dice_bytes(dice, 5000)),
        7 => overwrite(&file, dice),
        8 => {
            let size = fs::metadata(&file).map_or(0, |m| m.len());
            if let Ok(open) = fs::File::options().write(true).open(&file) {
                open.set_len(size / 2).unwrap();
            }
        }
        9 => {
            let _ = fs::create_dir(&new);
        }
        10 => {
            let target = if dice.percent(50) { PathBuf::from("nowhere/at all") } else { file };
            let _ = symlink(target, &new);
        }
        11 => {
            let _ = fs::hard_link(&file, &new);
        }
        12 => sparse(&new, dice),
        13 => {
            let name = format!("user.soak-{}", dice.below(3));
            let value = dice_bytes(dice, 60);
            if file.exists() {
                let _ = rustix::fs::setxattr(&file, name, &value, rustix::fs::XattrFlags::empty());
            }
        }
        14 => describe(&others, dice),
        15 => aged(&others, dice),
        16 if !others.is_empty() => {
            let from = dice.pick(&others).clone();
            if !new.starts_with(&from) {
                let _ = fs::rename(from, new);
            }
        }
        17 => {
            // As an editor saves: another file under the old name.
            let beside = file.with_file_name(&name);
            write(&beside, &contents(dice));
            let _ = fs::rename(beside, file);
        }
        18 => {
            let _ = fs::create_dir(&new);
            for n in 0..dice.below(40) {
                write(&new.join(format!("small-{n}")), &dice_bytes(dice, 300));
            }
        }
        19 => touched_not_told(&file, dice),
        _ if others.len() > 12 => {
            let path = dice.pick(&others).clone();
            // Never all of it, which is something to be suspicious of.
            if all.iter().filter(|p| p.starts_with(&path)).count() + 12 < others.len() {
                let _ = if meta(&path).is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            }
        }
        _ => write(&new, &contents(dice)),
    }
}

fn fresh_name(dice: &mut Dice) -> std::ffi::OsString {
    let n = dice.below(1_000_000);
    match dice.below(12) {
        0 => format!("{n}-{}", "x".repeat(230)).into(),
        1 => std::ffi::OsString::from_vec([format!("{n}").as_bytes(), b"\xff\xfe raw"].concat()),
        2 => format!("{n} ümläut \"quoted\" \\ back").into(),
        3 => format!("{n}\nnew line").into(),
        4 => format!(".{n}").into(),
        5 => format!("-{n}").into(),
        _ => format!("{n}").into(),
    }
}

fn dice_bytes(dice: &mut Dice, at_most: usize) -> Vec<u8> {
    let len = dice.below(at_most);
    dice.bytes(len)
}

fn contents(dice: &mut Dice) -> Vec<u8> {
    match dice.below(20) {
        0 => Vec::new(),
        1 => {
            let len = (1 << 20) + dice.below(2 << 20);
            dice.bytes(len)
        }
        2 => format!("line {}\n", dice.draw()).repeat(dice.below(20_000)).into_bytes(),
        3..=6 => dice_bytes(dice, 200_000),
        _ => dice_bytes(dice, 4_000),
    }
}

fn write(path: &Path, bytes: &[u8]) {
    if !path.is_dir() {
        let _ = fs::write(path, bytes);
    }
}

fn append(path: &Path, bytes: &[u8]) {
    if let Ok(mut file) = fs::File::options().append(true).open(path) {
        std::io::Write::write_all(&mut file, bytes).unwrap();
    }
}

fn overwrite(path: &Path, dice: &mut Dice) {
    let Ok(file) = fs::File::options().write(true).open(path) else { return };
    let len = file.metadata().unwrap().len();
    let at = dice.below(usize::try_from(len).unwrap()) as u64;
    let bytes = dice_bytes(dice, 3000);
    let keep = bytes.len().min(usize::try_from(len - at.min(len)).unwrap());
    file.write_all_at(&bytes[..keep], at).unwrap();
}

/// Other contents of the same length, under the time of before.
fn touched_not_told(path: &Path, dice: &mut Dice) {
    let Ok(before) = fs::metadata(path) else { return };
    overwrite(path, dice);
    if let Ok(file) = fs::File::options().write(true).open(path) {
        file.set_modified(before.modified().unwrap()).unwrap();
    }
}

fn sparse(path: &Path, dice: &mut Dice) {
    let Ok(file) = fs::File::create_new(path) else { return };
    file.set_len((6 << 20) + dice.below(1 << 20) as u64).unwrap();
    for _ in 0..dice.below(3) {
        let at = dice.below(6 << 20) as u64;
        file.write_all_at(&dice_bytes(dice, 9000), at).unwrap();
    }
}

fn describe(others: &[PathBuf], dice: &mut Dice) {
    if others.is_empty() {
        return;
    }
    let path = dice.pick(others);
    if path.is_symlink() {
        return;
    }
    let root = rustix::process::geteuid().is_root();
    let (uid, gid) = (dice.below(3) as u32 * 1000, dice.below(3) as u32 * 1000);
    let modes: &[u32] = if root { &[0o600, 0o644, 0o755, 0o700, 0o000, 0o4755, 0o2770, 0o1777] } else { &[0o700, 0o750, 0o755, 0o770] };
    if root && dice.percent(50) {
        std::os::unix::fs::chown(path, Some(uid), Some(gid)).unwrap();
    }
    fs::set_permissions(path, fs::Permissions::from_mode(*dice.pick(modes))).unwrap();
}

fn aged(others: &[PathBuf], dice: &mut Dice) {
    if others.is_empty() {
        return;
    }
    let path = dice.pick(others);
    let since = Duration::new(dice.below(2_000_000_000) as u64, dice.below(1_000_000_000) as u32);
    if !path.is_symlink()
        && let Ok(file) = fs::File::open(path)
    {
        file.set_modified(SystemTime::UNIX_EPOCH + since).unwrap();
    }
}
