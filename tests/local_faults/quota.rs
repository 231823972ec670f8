//! A quota that is used up (EDQUOT), as the layer of `faultfs` answers it: a disk that is full for keepd alone.

use keepd_faultfs::{Mounted, Rule, Verb, errno};

use super::*;

/// The layer at a place of a keepd; None where no file system can be mounted.
pub fn layer(keepd: &Keepd, place: &str) -> Option<Mounted> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(why) = keepd_faultfs::unavailable() {
        skipped(&why);
        return None;
    }
    let (behind, at) = (keepd.path(&format!("behind-{}", place.replace('/', "-"))), keepd.path(place));
    for directory in [&behind, &at] {
        fs::create_dir_all(directory).unwrap();
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).unwrap();
    }
    Some(Mounted::new(&behind, &at).unwrap())
}

fn used_up(from: u64) -> Rule {
    Rule::on(Verb::NEEDING_SPACE, "**").from(from).fails(errno::EDQUOT)
}

#[test]
fn a_quota_that_is_used_up_is_told_as_that_and_over_when_there_is_room() {
    const CAUSES: [&str; 4] = ["no space left", "quota", "disk is full", "mib are free"];
    for place in ["repository", "state/work", "state"] {
        let mut keepd = filled(Keepd::prepared());
        if place == "state/work" {
            fs::create_dir(keepd.path("state")).unwrap();
            fs::set_permissions(keepd.path("state"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        }
        let Some(mounted) = layer(&keepd, place) else { return };
        keepd.start();
        keepd.ok(&["backup", "shop"]);
        let first = keepd.backups().remove(0);
        let mut table = Table::default();
        let steps: Vec<u64> = if is_long() { (1..=60).collect() } else { vec![1, 2, 4, 8, 16, 32] };
        for (n, from) in steps.into_iter().enumerate() {
            change(&keepd, n as u64 + 1);
            let fault = format!("{place}: quota used up at write {from}");
            mounted.control().add(used_up(from));
            let good = attempt(&keepd, &mut table, &fault, &CAUSES);
            let met = mounted.control().fired();
            mounted.control().clear_rules();
            assert!(keepd.is_alive(), "{fault}: {}", keepd.log());
            assert!(met > 0 || good.is_some(), "{fault}: it failed of nothing");
            recovers(&keepd, &fault, &first, good);
        }
        let left = files_below(&keepd.path("repository/tmp"));
        assert!(left.is_empty(), "half an object was left: {left:?}");
        keepd.ok(&["check", "local", "--read-data"]);
        table.print(&format!("a quota on {place}"));
        assert!(table.failed > 0, "{place}: it was never used up");
        keepd.stop();
        mounted.unmount().unwrap();
    }
}

#[test]
fn a_restore_over_a_quota_says_so_and_is_not_complete() {
    let keepd = Keepd::started();
    let Some(mounted) = layer(&keepd, "target") else { return };
    keepd.ok(&["backup", "shop"]);
    for from in [1, 2, 4] {
        mounted.control().add(used_up(from));
        let to = keepd.path(&format!("target/{from}"));
        let said = text(&keepd.ctl(&["restore", "latest", "--to", to.to_str().unwrap()]));
        assert!(mounted.control().fired() > 0);
        mounted.control().clear_rules();
        assert!(said.to_lowercase().contains("quota") || said.contains("no space"), "{from}: {said}");
        let again = keepd.path(&format!("target/again-{from}"));
        keepd.ok(&["restore", "latest", "--to", again.to_str().unwrap()]);
        assert_same(&keepd.path("files"), &again.join("files"));
    }
    mounted.unmount().unwrap();
}
