//! Whether a backup that was made without an error is to be trusted: a pure function of what it holds and of the job's last good ones.
//!
//! A dump tool that fails quietly, an application that comes up empty, or somebody who encrypts the files all leave a backup that looks
//! like any other. What is far off is called suspect: kept and told, but it displaces nothing until somebody accepts it.

use std::collections::BTreeMap;

use keepd_protocol::model::{BackupDetail, SourceInfo};

use crate::config::Suspect;

/// Good backups that make the trend.
pub const HISTORY: u32 = 10;
/// So many of them at least, where one alone may be chance.
const TREND: usize = 3;
/// Sources, tables and contents below these say nothing when they shrink or grow.
const MIN_FILES: u64 = 10;
const MIN_ROWS: u64 = 100;
const MIN_BYTES: u64 = 64 << 10;
const MIN_NEW_BYTES: u64 = 1 << 20;
const MIN_LARGE_BYTES: u64 = 16 << 20;
/// A table that is empty now counts when it had so much of all rows, in percent.
const LARGE_TABLE: u64 = 10;

/// Why `now` is suspect, in words and numbers; nothing when it is good. `history`: the job's newest good backups, newest first.
pub fn judge(now: &BackupDetail, history: &[BackupDetail], limits: &Suspect) -> Vec<String> {
    let mut reasons = Vec::new();
    for source in &now.sources {
        if tables(source).is_some_and(|t| t.is_empty()) {
            reasons.push(format!("source {}: the database has no tables", source.name));
        }
    }
    let Some(last) = history.first() else { return reasons };
    for before in &last.sources {
        let Some(source) = now.sources.iter().find(|s| s.name == before.name) else {
            reasons.push(format!("source {} is gone; the last good backup has it, with {} bytes", before.name, before.bytes));
            continue;
        };
        let earlier: Vec<&SourceInfo> =
            history.iter().filter_map(|b| b.sources.iter().find(|s| s.name == source.name && s.kind == source.kind)).collect();
        if source.kind == before.kind {
            rows(source, before, limits, &mut reasons);
            contents(source, before, &earlier, limits, &mut reasons);
        }
    }
    trend(now, history, limits, &mut reasons);
    reasons
}

/// Tables with their rows; None where they were not counted. Not a database: None.
fn tables(source: &SourceInfo) -> Option<BTreeMap<&str, Option<u64>>> {
    let tables = source.facts.get("tables")?.as_object()?;
    Some(tables.iter().map(|(name, rows)| (name.as_str(), rows.as_u64())).collect())
}

fn rows(source: &SourceInfo, before: &SourceInfo, limits: &Suspect, reasons: &mut Vec<String>) {
    let (Some(now), Some(then)) = (tables(source), tables(before)) else { return };
    let name = &source.name;
    let gone: Vec<&str> = then.keys().filter(|t| !now.contains_key(*t)).copied().collect();
    if !gone.is_empty() && !now.is_empty() {
        reasons.push(format!("source {name}: tables are gone that the last good backup has: {}", gone.join(", ")));
    }
    if limits.fewer_rows == 0 {
        return;
    }
    // Only tables that were counted both times can be compared.
    let both = || then.iter().filter_map(|(table, rows)| Some((*table, (*rows)?, (*now.get(table)?)?)));
    let (all_then, all_now) = both().fold((0u64, 0u64), |sum, (_, then, now)| (sum.0 + then, sum.1 + now));
    if all_then >= MIN_ROWS && is_fewer(all_now, all_then, limits.fewer_rows) {
        reasons.push(format!("source {name}: {all_now} rows, {all_then} in the last good backup"));
        return;
    }
    for (table, rows, _) in both().filter(|(_, rows, now)| *now == 0 && *rows >= MIN_ROWS && rows * 100 >= all_then * LARGE_TABLE) {
        reasons.push(format!("source {name}: table {table} is empty, it has {rows} rows in the last good backup"));
    }
}

fn contents(source: &SourceInfo, before: &SourceInfo, earlier: &[&SourceInfo], limits: &Suspect, reasons: &mut Vec<String>) {
    let name = &source.name;
    // The root of a directory is an entry of its own.
    if source.kind == "files" && source.entries <= 1 && source.bytes == 0 && before.entries > 1 {
        reasons.push(format!("source {name} is empty; it has {} entries in the last good backup", before.entries));
        return;
    }
    let files = median(earlier.iter().map(|s| s.entries));
    if source.kind == "files" && files >= MIN_FILES && is_fewer(source.entries, files, limits.fewer_files) {
        reasons.push(format!("source {name}: {} entries, usual are {files}", source.entries));
    }
    let bytes = median(earlier.iter().map(|s| s.bytes));
    if bytes >= MIN_BYTES && is_fewer(source.bytes, bytes, limits.smaller) {
        reasons.push(format!("source {name}: {} bytes, usual are {bytes}", source.bytes));
    }
    let larger = limits.larger > 0 && earlier.len() >= TREND && source.bytes >= MIN_LARGE_BYTES;
    if larger && source.bytes > bytes.saturating_mul(u64::from(limits.larger)) {
        reasons.push(format!("source {name}: {} bytes, usual are {bytes}", source.bytes));
    }
}

/// What was new in this backup, beside what is new usually.
fn trend(now: &BackupDetail, history: &[BackupDetail], limits: &Suspect, reasons: &mut Vec<String>) {
    let percent = |part: u64, of: u64| if of == 0 { 0 } else { (u128::from(part) * 100 / u128::from(of)) as u64 };
    let share = |b: &BackupDetail| Some(percent(b.new_bytes?, b.backup.bytes));
    // A job's first backup is new as a whole; it says nothing of the others.
    let usual: Vec<u64> = history.iter().filter(|b| b.parent.is_some()).filter_map(share).collect();
    if let (Some(new), Some(changed)) = (now.new_bytes, share(now))
        && new >= MIN_NEW_BYTES
    {
        let usually = median(usual.iter().copied());
        if limits.changed > 0 && usual.len() >= TREND && changed >= u64::from(limits.changed) && usually * 4 <= changed {
            reasons.push(format!("{changed} % of all contents are new, usual are {usually} %"));
        }
        let left: Vec<u64> = history
            .iter()
            .filter_map(|b| Some((b.new_bytes?, b.backup.added_bytes)))
            .filter(|(new, _)| *new >= MIN_BYTES)
            .map(|(new, added)| percent(added, new))
            .collect();
        let (packed, usually) = (percent(now.backup.added_bytes, new), median(left.iter().copied()));
        let limit = u64::from(limits.incompressible);
        if limit > 0 && left.len() >= TREND && packed >= limit && usually * 100 <= limit * 85 {
            reasons.push(format!("what is new takes {packed} % of its size when compressed, usual are {usually} %: was it encrypted?"));
        }
    }
}

/// Less by more than `percent` of what it was; 0 asks for nothing.
fn is_fewer(now: u64, then: u64, percent: u32) -> bool {
    percent > 0 && u128::from(now) * 100 < u128::from(then) * u128::from(100 - percent.min(100))
}

fn median(numbers: impl Iterator<Item = u64>) -> u64 {
    let mut sorted: Vec<u64> = numbers.collect();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use keepd_protocol::model::Backup;
    use serde_json::json;

    fn database(rows: &[(&str, u64)], bytes: u64) -> SourceInfo {
        let tables: serde_json::Map<_, _> = rows.iter().map(|(t, n)| ((*t).to_owned(), json!(n))).collect();
        let facts = BTreeMap::from([("tables".to_owned(), json!(tables))]);
        SourceInfo { name: "db".into(), kind: "sqlite".into(), entries: 1, bytes, facts, ..SourceInfo::default() }
    }

    fn files(entries: u64, bytes: u64) -> SourceInfo {
        SourceInfo { name: "files".into(), kind: "files".into(), entries, bytes, ..SourceInfo::default() }
    }

    fn backup(sources: Vec<SourceInfo>, new: u64, added: u64) -> BackupDetail {
        let bytes = sources.iter().map(|s| s.bytes).sum();
        let backup = Backup { bytes, added_bytes: added, ..Backup::default() };
        BackupDetail { backup, sources, new_bytes: Some(new), parent: Some("aa".into()), ..BackupDetail::default() }
    }

    fn usual() -> Vec<BackupDetail> {
        let one = || backup(vec![database(&[("users", 1000), ("orders", 9000)], 8 << 20), files(500, 50 << 20)], 2 << 20, 600 << 10);
        vec![one(), one(), one(), BackupDetail { parent: None, new_bytes: Some(58 << 20), ..one() }]
    }

    fn reasons(now: BackupDetail) -> Vec<String> {
        judge(&now, &usual(), &Suspect::default())
    }

    #[test]
    fn what_is_as_usual_is_good() {
        assert!(reasons(usual().remove(0)).is_empty());
        assert!(judge(&usual()[0], &[], &Suspect::default()).is_empty(), "the first one of a job");
        let grown =
            backup(vec![database(&[("users", 1500), ("orders", 5001), ("new", 1)], 12 << 20), files(800, 99 << 20)], 30 << 20, 8 << 20);
        assert!(reasons(grown).is_empty());
    }

    #[test]
    fn each_rule_says_what_it_saw() {
        let db = || database(&[("users", 1000), ("orders", 9000)], 8 << 20);
        let tree = || files(500, 50 << 20);
        let cases: Vec<(&str, BackupDetail)> = vec![
            ("no tables", backup(vec![database(&[], 8 << 20), tree()], 0, 0)),
            ("gone that the last good backup has: users", backup(vec![database(&[("orders", 9000)], 8 << 20), tree()], 0, 0)),
            ("4000 rows, 10000", backup(vec![database(&[("users", 1000), ("orders", 3000)], 8 << 20), tree()], 0, 0)),
            ("table users is empty", backup(vec![database(&[("users", 0), ("orders", 9000)], 8 << 20), tree()], 0, 0)),
            ("source files is gone", backup(vec![db()], 0, 0)),
            ("source files is empty", backup(vec![db(), files(1, 0)], 0, 0)),
            ("100 entries, usual are 500", backup(vec![db(), files(100, 50 << 20)], 0, 0)),
            ("source files: 1048576 bytes", backup(vec![db(), files(500, 1 << 20)], 0, 0)),
            ("source files: 1073741824 bytes", backup(vec![db(), files(500, 1 << 30)], 0, 0)),
            ("94 % of all contents are new, usual are 3 %", backup(vec![db(), tree()], 55 << 20, 20 << 20)),
            ("was it encrypted?", backup(vec![db(), tree()], 10 << 20, 10 << 20)),
        ];
        for (wanted, now) in cases {
            let found = reasons(now);
            assert!(found.len() == 1 && found[0].contains(wanted), "{wanted}: {found:?}");
        }
    }

    #[test]
    fn rules_can_be_turned_off_and_small_things_say_nothing() {
        let off = Suspect { fewer_rows: 0, fewer_files: 0, smaller: 0, larger: 0, changed: 0, incompressible: 0 };
        let now = backup(vec![database(&[("users", 1), ("orders", 1)], 8 << 10), files(2, 10)], 55 << 20, 55 << 20);
        assert!(judge(&now, &usual(), &off).is_empty());
        let small = || backup(vec![database(&[("users", 90)], 8 << 10), files(9, 1000)], 5000, 5000);
        let now = backup(vec![database(&[("users", 1)], 4 << 10), files(2, 10)], 4000, 4000);
        assert!(judge(&now, &[small(), small(), small()], &Suspect::default()).is_empty());
    }

    #[test]
    fn any_numbers_are_no_trouble() {
        let now = backup(vec![database(&[("users", 0)], u64::MAX / 2), files(u64::MAX, u64::MAX / 2)], u64::MAX, u64::MAX);
        let _ = judge(&now, &[now.clone(), now.clone(), now.clone()], &Suspect::default());
    }
}
