//! What becomes of each item, rule by rule. Nothing is read or written here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use jiff::Timestamp;
use keepd_protocol::configuration::{Allow, ImportMode, ItemConflict};
use serde_json::{Value, json};

use super::*;
use crate::crypto::{Key, key_file};
use crate::meta::secrets;
use crate::portable::envelope::{Item, Secret, SecretKind, VERSION};

const DIRECTORY: &str = "/etc/keepd";

/// A configuration's items.
fn items(toml: &str) -> BTreeMap<ItemName, Value> {
    let all: Value = toml::from_str(toml).expect("TOML");
    let mut found = BTreeMap::new();
    for (key, value) in all.as_object().expect("a table") {
        match ItemKind::from_word(key).filter(|_| key != "access") {
            Some(kind) => found.extend(value.as_object().unwrap().iter().map(|(name, v)| (ItemName::new(kind, name), v.clone()))),
            None => {
                drop(found.insert(ItemName::new(if key == "access" { ItemKind::Access } else { ItemKind::Settings }, key), value.clone()))
            }
        }
    }
    found
}

/// What is on the machine, by `file /etc/keepd/main.key` and the like.
type Machine<'a> = BTreeMap<String, &'a str>;

fn machine<'a>(list: &[(&str, &'a str)]) -> Machine<'a> {
    list.iter().map(|(from, text)| ((*from).to_owned(), *text)).collect()
}

/// An export, with these texts for secrets: `destination.offsite password`.
fn file(toml: &str, texts: &[(&str, &str)]) -> Envelope {
    let list = items(toml).into_iter().map(|(name, value)| {
        let named = secrets::of(&name, &value, Path::new(DIRECTORY)).into_iter();
        let text = |at: &str| texts.iter().find(|(place, _)| *place == format!("{name} {at}")).map(|(_, t)| *t).unwrap_or_default();
        let secrets = named.map(|n| Secret { value: text(&n.at).to_owned().into(), at: n.at, kind: n.kind }).collect();
        Item { r#type: name.kind.word().into(), name: name.name, value, secrets }
    });
    let items: Vec<Item> = list.collect();
    Envelope {
        format_version: VERSION,
        keepd_version: "0.1.0".into(),
        export_type: "all".into(),
        exported_at: now(),
        instance: "there".into(),
        item_count: items.len() as u64,
        includes_secrets: !texts.is_empty(),
        items,
    }
}

fn now() -> Timestamp {
    "2026-05-01T12:00:00Z".parse().unwrap()
}

fn here(toml: &str, machine: &Machine<'_>, file: &Envelope) -> Here {
    let directory = Path::new(DIRECTORY);
    let items = items(toml);
    let digest = |named: &secrets::Named| machine.get(&named.from()).map(|text| Digest::of(text));
    let held = |(name, value): (&ItemName, &Value)| {
        (name.clone(), secrets::of(name, value, directory).into_iter().map(|named| Held { text: digest(&named), named }).collect())
    };
    let offered = file.items.iter().filter_map(|item| {
        let name = ItemName::new(item.kind()?, item.name.as_str());
        let all = secrets::of(&name, &item.value, directory).into_iter().map(|named| {
            let below = named.from().strip_prefix("file /etc/keepd/").map(str::to_owned);
            let is_key = named.kind == SecretKind::Secret && machine.get(&named.from()).is_some_and(|text| secrets::is_key(text));
            Offered { here: digest(&named), is_key, place: below.filter(|_| digest(&named).is_none()), named }
        });
        Some((name, all.collect()))
    });
    Here {
        directory: directory.to_owned(),
        secrets: items.iter().map(held).collect(),
        offered: offered.collect(),
        taken: BTreeSet::new(),
        schedule: BTreeMap::new(),
        now: now(),
        items,
    }
}

fn with(mode: ImportMode, on_conflict: ItemConflict, allow: &[Allow]) -> Options {
    Options { mode, on_conflict, allow: allow.iter().copied().collect(), ..Options::default() }
}

fn merge(on_conflict: ItemConflict) -> Options {
    with(ImportMode::Merge, on_conflict, &[])
}

const FULL: ImportMode = ImportMode::Full;

/// A plan between configurations without secrets.
fn between(here_toml: &str, file_toml: &str, options: &Options) -> Plan {
    let file = file(file_toml, &[]);
    plan(&here(here_toml, &Machine::new(), &file), &file, options)
}

/// `add job.shop`, `rename job.shop > job.shop-2`.
fn actions(plan: &Plan) -> Vec<String> {
    let one = |i: &PlannedItem| match &i.to {
        Some(to) => format!("{} {} > {to}", i.action, i.item),
        None => format!("{} {}", i.action, i.item),
    };
    plan.items.iter().map(one).collect()
}

fn value<'p>(plan: &'p Plan, item: &str) -> &'p Value {
    plan.set
        .iter()
        .find(|(name, _)| name.to_string() == item)
        .map(|(_, v)| v)
        .unwrap_or_else(|| panic!("{item} is written: {:?}", actions(plan)))
}

fn notes(plan: &Plan, item: &str) -> String {
    plan.items.iter().find(|i| i.item == item).unwrap_or_else(|| panic!("{item} is planned")).notes.join("\n")
}

fn good(plan: &Plan) {
    assert_eq!(plan.problems, [""; 0]);
}

/// The configuration after a plan.
fn after(here: &Here, plan: &Plan) -> BTreeMap<ItemName, Value> {
    let mut all = here.items.clone();
    all.retain(|name, _| !plan.remove.contains(name));
    all.extend(plan.set.iter().cloned());
    all
}

const SHOP: &str = "
[encryption.main]
pkcs11 = { module = '/m.so', token = 't', key = 'k' }
[destination.local]
service = 'fs'
root = '/backups'
encryption = 'main'
[job.shop]
destinations = ['local']
every = '6h'
[[job.shop.source]]
files = '/srv/shop'
";

fn shop(change: &[(&str, &str)]) -> String {
    change.iter().fold(SHOP.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    })
}

#[test]
fn what_is_missing_is_added_and_what_is_the_same_stays() {
    let without_job = SHOP.split("[job.shop]").next().unwrap();
    let plan = between(without_job, SHOP, &merge(ItemConflict::Skip));
    good(&plan);
    assert_eq!(actions(&plan), ["same encryption.main", "same destination.local", "add job.shop"]);
    assert_eq!(plan.set.len(), 1);
    let added = plan.items.iter().find(|i| i.item == "job.shop").unwrap();
    assert_eq!(added.changes.iter().map(|c| c.at.as_str()).collect::<Vec<_>>(), ["destinations", "every", "source"]);
    assert!(added.changes.iter().all(|c| c.before.is_none() && c.after.is_some()));
}

#[test]
fn what_differs_stays_unless_something_else_is_said() {
    let file = shop(&[("6h", "1h")]);
    let plan = between(SHOP, &file, &merge(ItemConflict::Skip));
    good(&plan);
    assert_eq!(actions(&plan).last().unwrap(), "skip job.shop");
    assert!(plan.set.is_empty() && notes(&plan, "job.shop").contains("this machine's"), "{}", notes(&plan, "job.shop"));

    let plan = between(SHOP, &file, &merge(ItemConflict::Overwrite));
    good(&plan);
    assert_eq!(actions(&plan).last().unwrap(), "overwrite job.shop");
    let change = &plan.items.last().unwrap().changes;
    assert_eq!((change[0].at.as_str(), change[0].before.as_deref(), change[0].after.as_deref()), ("every", Some("\"6h\""), Some("\"1h\"")));
    assert_eq!(change.len(), 1);

    let plan = between(SHOP, &file, &merge(ItemConflict::Ask));
    assert_eq!(actions(&plan).last().unwrap(), "ask job.shop");
    assert!(plan.problems[0].contains("job.shop") && plan.set.is_empty());
    let answered = Options { answers: BTreeMap::from([("job.shop".to_owned(), ItemConflict::Overwrite)]), ..merge(ItemConflict::Ask) };
    let plan = between(SHOP, &file, &answered);
    good(&plan);
    assert_eq!(value(&plan, "job.shop")["every"], "1h");
    let wrong = Options { answers: BTreeMap::from([("job.shp".to_owned(), ItemConflict::Skip)]), ..merge(ItemConflict::Skip) };
    assert!(between(SHOP, &file, &wrong).problems[0].contains("job.shp"));
}

#[test]
fn a_rename_takes_references_along_and_leaves_this_machines_alone() {
    let file = shop(&[("/backups", "/other"), ("key = 'k'", "key = 'l'"), ("6h", "1h")])
        + "[config_backup]\nevery = '1d'\ndestination = 'local'\nencryption = 'main'\n[job.more]\ndestinations = ['usb', 'local']\n[destination.usb]\nservice = 'fs'\nroot = '/usb'\nencryption = 'none'\n";
    let options = with(ImportMode::Merge, ItemConflict::Rename, &[Allow::WeakerEncryption, Allow::Commands]);
    let taken = format!("{SHOP}[job.shop-2]\ndestinations = ['local']\n");
    let plan = between(&taken, &file, &options);
    good(&plan);
    assert_eq!(
        actions(&plan),
        [
            "add settings.config_backup",
            "rename encryption.main > encryption.main-2",
            "rename destination.local > destination.local-2",
            "add destination.usb",
            "add job.more",
            "rename job.shop > job.shop-3",
        ]
    );
    assert_eq!(value(&plan, "destination.local-2")["encryption"], "main-2");
    assert_eq!(value(&plan, "job.shop-3")["destinations"], json!(["local-2"]));
    assert_eq!(value(&plan, "job.more")["destinations"], json!(["usb", "local-2"]));
    assert_eq!(value(&plan, "destination.usb")["encryption"], "none");
    let stored = value(&plan, "settings.config_backup");
    assert_eq!((&stored["destination"], &stored["encryption"]), (&json!("local-2"), &json!("main-2")));
    assert!(plan.set.iter().all(|(name, _)| !items(&taken).contains_key(name)), "nothing that is here is written");
    assert!(notes(&plan, "job.more").contains("destination.local-2 instead of destination.local"));
}

#[test]
fn a_reference_to_what_is_skipped_means_this_machines() {
    let file = shop(&[("/backups", "/other")]) + "[job.more]\ndestinations = ['local']\n";
    let plan = between(SHOP, &file, &merge(ItemConflict::Skip));
    good(&plan);
    assert_eq!(value(&plan, "job.more")["destinations"], json!(["local"]));
    assert!(notes(&plan, "job.more").contains("destination.local, which is this machine's"), "{}", notes(&plan, "job.more"));
}

#[test]
fn names_are_free_and_short_enough() {
    let long = "x".repeat(64);
    let table = |every: &str| format!("[job.{long}]\nevery = '{every}'\n[job.{}-2]\nevery = '1d'\n", "x".repeat(62));
    let in_file = format!("[job.{long}]\nevery = '2h'\n[job.{}-3]\nevery = '3h'\n", "x".repeat(62));
    let plan = between(&table("1h"), &in_file, &merge(ItemConflict::Rename));
    good(&plan);
    let name = format!("job.{}-4", "x".repeat(62));
    assert_eq!(value(&plan, &name)["every"], "2h");
}

#[test]
fn settings_do_not_come_under_another_name() {
    let plan = between("[coverage]\nroots = ['/a']", "[coverage]\nroots = ['/b']", &merge(ItemConflict::Rename));
    good(&plan);
    assert_eq!(actions(&plan), ["skip settings.coverage"]);
}

#[test]
fn full_replaces_the_kinds_that_the_file_has() {
    let here_toml = format!("{SHOP}[job.old]\ndestinations = ['local']\n[coverage]\nroots = ['/a']\n");
    let mut file = file(&shop(&[("6h", "1h")]), &[]);
    let here = here(&here_toml, &Machine::new(), &file);
    let plan_all = plan(&here, &file, &with(FULL, ItemConflict::Skip, &[]));
    good(&plan_all);
    assert_eq!(
        actions(&plan_all),
        ["same encryption.main", "same destination.local", "overwrite job.shop", "remove settings.coverage", "remove job.old"]
    );
    assert_eq!(after(&here, &plan_all), items(&shop(&[("6h", "1h")])));

    file.items.retain(|i| i.r#type == "job");
    file.export_type = "jobs".into();
    let jobs = plan(&here, &file, &with(FULL, ItemConflict::Skip, &[]));
    good(&jobs);
    assert_eq!(actions(&jobs), ["overwrite job.shop", "remove job.old"]);

    for wrong in [with(FULL, ItemConflict::Rename, &[]), with(FULL, ItemConflict::Ask, &[])] {
        assert!(plan(&here, &file, &wrong).problems[0].contains("--on-conflict"));
    }
    file.export_type = "all,jbs".into();
    assert!(plan(&here, &file, &with(FULL, ItemConflict::Skip, &[])).problems[0].contains("jbs"));
}

#[test]
fn full_keeps_what_something_that_stays_needs() {
    let mut file = file("[destination.usb]\nservice = 'fs'\nroot = '/usb'\nencryption = 'main'", &[]);
    file.export_type = "destination,encryption".into();
    let here_toml =
        format!("{SHOP}[destination.old]\nservice = 'fs'\nroot = '/old'\nencryption = 'older'\n[encryption.older]\ncredential = 'o'\n");
    let here = here(&here_toml, &Machine::new(), &file);
    let plan = plan(&here, &file, &with(FULL, ItemConflict::Skip, &[]));
    good(&plan);
    let mut told = actions(&plan);
    told.sort();
    assert_eq!(
        told,
        ["add destination.usb", "remove destination.old", "remove encryption.older", "skip destination.local", "skip encryption.main"]
    );
    assert!(notes(&plan, "destination.local").contains("job.shop needs it"));
}

#[test]
fn single_items_are_chosen_by_name_or_kind() {
    let only = |list: &[&str]| Options {
        mode: ImportMode::Selective,
        only: list.iter().map(|s| (*s).to_owned()).collect(),
        on_conflict: ItemConflict::Overwrite,
        ..Options::default()
    };
    let file = shop(&[("6h", "1h"), ("/backups", "/other")]) + "[job.more]\ndestinations = ['local']\n";
    assert_eq!(actions(&between(SHOP, &file, &only(&["job.shop"]))), ["overwrite job.shop"]);
    assert_eq!(
        actions(&between(SHOP, &file, &only(&["jobs", "destination.local"]))),
        ["overwrite destination.local", "add job.more", "overwrite job.shop"]
    );
    let wrong = between(SHOP, &file, &only(&["job.shp"]));
    assert!(wrong.problems[0].contains("did you mean 'job.shop'"), "{:?}", wrong.problems);
    for wrong in ["", "jub", "access", "job.", ".shop", "job.shop\u{1b}[2J"] {
        let problems = between(SHOP, &file, &only(&[wrong])).problems;
        assert!(problems[0].contains("there is no") && !problems[0].contains('\u{1b}'), "{problems:?}");
    }
    assert!(!between(SHOP, &file, &only(&[])).problems.is_empty());
    let merged = Options { mode: ImportMode::Merge, ..only(&["job.shop"]) };
    assert!(!between(SHOP, &file, &merged).problems.is_empty());
}

#[test]
fn what_names_something_that_is_nowhere_is_left_out_with_all_that_names_it() {
    let file = "
        [destination.far]\nservice = 'fs'\nroot = '/far'\nencryption = 'gone'
        [destination.near]\nservice = 'fs'\nroot = '/near'\nencryption = 'none'
        [job.both]\ndestinations = ['near', 'far']
        [job.one]\ndestinations = ['near']
        [config_backup]\ndestination = 'far'\n";
    let plan = between("", file, &with(ImportMode::Merge, ItemConflict::Skip, &[Allow::WeakerEncryption]));
    good(&plan);
    assert_eq!(
        actions(&plan),
        ["skip settings.config_backup", "skip destination.far", "add destination.near", "skip job.both", "add job.one"]
    );
    assert!(notes(&plan, "destination.far").contains("encryption.gone"));
    assert!(notes(&plan, "job.both").contains("destination.far, which is left out itself"), "{}", notes(&plan, "job.both"));
    let strict = Options { strict: true, ..with(ImportMode::Merge, ItemConflict::Skip, &[Allow::WeakerEncryption]) };
    assert_eq!(between("", file, &strict).problems.len(), 3);
    // What is here counts, too; what is chosen and what is not are two things.
    let here = "[encryption.gone]\ncredential = 'g'\n";
    assert_eq!(between(here, file, &with(ImportMode::Merge, ItemConflict::Skip, &[Allow::WeakerEncryption])).set.len(), 5);
    let only = Options { mode: ImportMode::Selective, only: vec!["job.one".into()], ..Options::default() };
    assert_eq!(actions(&between("", file, &only)), ["skip job.one"]);
}

/// What an overwrite of one item by another needs.
fn needs_of(before: &str, after: &str) -> Vec<(Allow, String)> {
    let plan = between(before, after, &merge(ItemConflict::Overwrite));
    let all: Vec<(Allow, String)> = plan.items.iter().flat_map(|i| i.needs.iter().map(|n| (*n, i.notes.join("; ")))).collect();
    assert_eq!(plan.problems.len(), plan.needs.len(), "{:?}", plan.problems);
    for need in &plan.needs {
        assert!(plan.problems.iter().any(|p| p.contains(&format!("--allow-{need}"))), "{:?}", plan.problems);
    }
    all
}

#[test]
fn less_encryption_must_be_allowed() {
    let main = "[encryption.main]\npkcs11 = { module = '/m.so', token = 't', key = 'k' }\n";
    let away = "[encryption.away]\npkcs11 = { module = '/m.so', token = 't', key = 'a' }\npublic_key = 'a.pub'\n";
    let fs = |name: &str, profile: &str| format!("[destination.{name}]\nservice = 'fs'\nroot = '/{name}'\nencryption = '{profile}'\n");
    let job = |list: &str| format!("[job.shop]\ndestinations = [{list}]\n[[job.shop.source]]\nfiles = '/srv'\n");
    let world = format!("{main}{away}{}{}", fs("plain", "none"), fs("kept", "main"));
    let weaker = |before: &str, after: &str| {
        let needs = needs_of(&format!("{world}{before}"), &format!("{world}{after}"));
        needs.iter().any(|(need, _)| *need == Allow::WeakerEncryption)
    };
    assert!(weaker("", &fs("new", "none")), "a new one");
    assert!(!weaker("", &fs("new", "main")));
    assert!(weaker(&fs("a", "main"), &fs("a", "none")));
    assert!(weaker(&fs("a", "away"), &fs("a", "main")), "what could only be written can be read");
    assert!(!weaker(&fs("a", "main"), &fs("a", "away")));
    assert!(!weaker(&fs("a", "none"), &fs("a", "none").replace("/a", "/b")));
    assert!(weaker("", &job("'kept', 'plain'")) && !weaker("", &job("'kept'")));
    assert!(weaker(&job("'kept'"), &job("'kept', 'plain'")) && !weaker(&job("'plain'"), &job("'kept'")));
    assert!(!weaker(&job("'plain', 'kept'"), &job("'plain'")), "it went there before");
    let backup = |more: &str| format!("[config_backup]\n{more}\n");
    assert!(weaker("", &backup("destination = 'plain'")) && !weaker("", &backup("destination = 'kept'")));
    assert!(weaker("", &backup("destination = 'kept'\nencryption = 'none'")));
    assert!(weaker("", &backup("destination = 'kept'\ninclude_secrets = true")), "all secrets leave the machine");
    assert!(weaker(&backup("destination = 'kept'"), &backup("destination = 'kept'\ninclude_secrets = true")));
    assert!(weaker(
        &backup("destination = 'kept'\ninclude_secrets = true"),
        &backup("destination = 'plain'\nencryption = 'main'\ninclude_secrets = true")
    ));
    assert!(!weaker(&backup("destination = 'plain'"), &backup("destination = 'plain'\non_change = true")));
    let http = |scheme: &str| format!("[destination.w]\nservice = 'webdav'\nendpoint = '{scheme}://x'\nencryption = 'main'\n");
    assert!(weaker(&http("https"), &http("http")) && !weaker(&http("http"), &http("https")));
    let server = |mode: &str| format!("[job.db]\ndestinations = ['kept']\n[[job.db.source]]\npostgres = {{ dbname = 'x'{mode} }}\n");
    assert!(weaker(&server(", sslmode = 'verify-full'"), &server(", sslmode = 'require'")));
    assert!(weaker(&server(", sslmode = 'require'"), &server("")) && !weaker(&server(""), &server(", sslmode = 'require'")));
    let profile = needs_of(&world, &world.replace("public_key = 'a.pub'\n", ""));
    assert!(profile.iter().any(|(need, why)| *need == Allow::WeakerEncryption && why.contains("public_key")), "{profile:?}");
}

#[test]
fn programs_must_be_allowed() {
    let job = |more: &str| format!("{SHOP}{more}\n");
    let commands = |before: &str, after: &str| needs_of(before, after).iter().any(|(need, _)| *need == Allow::Commands);
    let hooked = |more: &str| SHOP.replace("every = '6h'", &format!("every = '6h'\n{more}"));
    for more in [
        "hooks = { before = ['/bin/x'] }",
        "health = { url = 'http://127.0.0.1/' }",
        "health = { command = ['/bin/x'] }",
        "version = ['/bin/x']",
        "schema_version = { command = ['/bin/x'] }",
        "quiesce = { begin = ['/bin/x'], end = ['/bin/y'] }",
        "services = ['a.service']\nquiesce = true",
        "assert = [{ command = ['/bin/x'] }]",
        "drill = { assert = [{ shell = 'x' }] }",
    ] {
        assert!(commands(SHOP, &hooked(more)), "{more}");
        assert!(commands("", &hooked(more)), "{more}");
        assert!(!commands(&hooked(more), &hooked(more).replace("6h", "1h")), "{more}");
        assert!(!commands(&hooked(more), SHOP), "{more}");
    }
    let source = |text: &str| job(&format!("[[job.shop.source]]\n{text}"));
    for more in [
        "command = ['/bin/x']",
        "command = ['/bin/x']\nrestore_command = ['/bin/y']\nrun_as = 'root'",
        "postgres = { dbname = 'x', bin_dir = '/tmp/bin' }",
        "mysql = { dbname = 'x', run_as = 'root' }",
        "postgres = { dbname = 'x' }\nreferences = { sql = 'copy x to program', under = 'shop' }",
    ] {
        assert!(commands(SHOP, &source(more)), "{more}");
    }
    assert!(commands(&source("command = ['/bin/x']\nrun_as = 'a'"), &source("command = ['/bin/x']")), "nobody in particular is root");
    assert!(!commands(SHOP, &hooked("assert = [{ file = 'shop/x' }]")));
    assert!(commands(SHOP, &hooked("services = ['a.service']")), "a restore stops them");
    assert!(commands(&hooked("services = ['a.service']"), &hooked("services = ['a.service', 'sshd.service']")));
    let hidden = "[destination.s]\nservice = 'sftp'\nendpoint = { env = 'E' }\nencryption = 'main'\n";
    assert!(commands(SHOP, &job(hidden)), "it can be anything");
    let many = (0..2000).map(|n| format!("{{ command = ['/bin/x', '{n}'] }}")).collect::<Vec<_>>().join(", ");
    assert!(commands(&hooked(&format!("assert = [{many}]")), &hooked(&format!("assert = [{many}, {{ command = ['/bin/y'] }}]"))));
    assert!(!commands(SHOP, &hooked("assert = [{ sql = 'select 1' }]")), "a file of SQLite's can be asked anything");
    assert!(commands(
        &source("postgres = { dbname = 'x' }"),
        &(hooked("version = { sql = 'select 1' }") + "[[job.shop.source]]\npostgres = { dbname = 'x' }\n")
    ));
    let plugin = "[destination.p]\nservice = 'exec'\ncommand = ['/bin/x']\noptions = { a = 'b' }\nencryption = 'main'\n";
    assert!(commands(SHOP, &job(plugin)) && commands(&job(plugin), &job(&plugin.replace("'b'", "'--evil'"))));
    assert!(commands(SHOP, &job("[destination.s]\nservice = 'sftp'\nendpoint = '-oProxyCommand=x'\nencryption = 'main'\n")));
    assert!(commands(SHOP, &SHOP.replace("/m.so", "/tmp/m.so")), "a library is a program");
}

#[test]
fn administrators_must_be_allowed() {
    let admins = |before: &str, after: &str| needs_of(before, after).iter().any(|(need, _)| *need == Allow::Admins);
    assert!(admins("", "[access]\nadmin = ['anna']"));
    assert!(admins("[access]\nadmin = ['anna']", "[access]\nadmin = ['anna', 'mallory']"));
    assert!(admins("[access]\nadmin = ['anna']", "[access]\nadmin = { group = 'users' }"));
    assert!(admins("", "[access]\nroles = { admins = 'mallory' }"));
    assert!(!admins("[access]\nadmin = ['anna', 'bert']", "[access]\nadmin = ['bert']\nviewer = ['carl']"));
    // A right that can be made into all of them counts as much, and not less for being limited to a job.
    let role = |members: &str, rights: &str| format!("[access.role.ops]\nmembers = [{members}]\nrights = [{rights}]\njobs = ['shop']");
    assert!(admins("", &role("'mallory'", "'view', 'job_edit'")));
    assert!(admins(&role("'anna'", "'job_edit'"), &role("'anna', 1000", "'job_edit'")));
    assert!(admins(&role("'anna'", "'view'"), &role("'anna'", "'view', 'key_manage'")));
    assert!(!admins("", &role("'mallory'", "'view', 'browse', 'backup'")));
    assert!(!admins(&role("'anna', 'bert'", "'job_edit', 'delete'"), &role("'anna'", "'job_edit'")));
}

fn keys() -> [String; 2] {
    std::array::from_fn(|_| key_file::text_of(&Key::generate().unwrap()).to_string())
}

const KEYED: &str = "[encryption.main]\nkey_file = 'keys/main.key'\n";

/// Here, the machine, the file and its texts.
fn keyed(here_toml: &str, on: &[(&str, &str)], file_toml: &str, texts: &[(&str, &str)], options: &Options) -> Plan {
    let file = file(file_toml, texts);
    plan(&here(here_toml, &machine(on), &file), &file, options)
}

#[test]
fn a_key_that_is_missing_is_put_where_it_belongs() {
    let [a, _] = keys();
    let plan = keyed("", &[], KEYED, &[("encryption.main key_file", &a)], &merge(ItemConflict::Skip));
    good(&plan);
    assert_eq!(plan.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["keys/main.key"]);
    assert_eq!(*plan.files[0].text, a);
    assert_eq!(value(&plan, "encryption.main")["key_file"], "keys/main.key");
    // What is there is not made again.
    let plan = keyed("", &[("file /etc/keepd/keys/main.key", &a)], KEYED, &[("encryption.main key_file", &a)], &merge(ItemConflict::Skip));
    assert!(plan.files.is_empty() && plan.problems.is_empty());
    // Without its text it is told.
    let plan = keyed("", &[], KEYED, &[], &merge(ItemConflict::Skip));
    good(&plan);
    assert_eq!(plan.missing, ["encryption.main key_file: put the key file at /etc/keepd/keys/main.key"]);
}

#[test]
fn what_cannot_be_put_where_it_was_goes_to_a_file_of_its_own() {
    let [a, _] = keys();
    let file_toml = "
        [encryption.main]\ncredential = 'main'
        [destination.w]\nservice = 'webdav'\nendpoint = 'https://x'\npassword = { env = 'P' }\nencryption = 'main'
        [job.db]\ndestinations = ['w']\n[[job.db.source]]\npostgres = { dbname = 'x', password = { file = '/root/pg' } }\n";
    let texts =
        [("encryption.main credential", a.as_str()), ("destination.w password", "pass"), ("job.db source[0].postgres.password", "pg")];
    let plan = keyed("", &[], file_toml, &texts, &merge(ItemConflict::Skip));
    good(&plan);
    assert_eq!(value(&plan, "encryption.main"), &json!({"key_file": "secrets/encryption.main.credential"}));
    assert_eq!(value(&plan, "destination.w")["password"], json!({"file": "secrets/destination.w.password"}));
    assert_eq!(value(&plan, "job.db")["source"][0]["postgres"]["password"], json!({"file": "secrets/job.db.source.0.postgres.password"}));
    let files: Vec<(&str, &str)> = plan.files.iter().map(|f| (f.name.as_str(), f.text.as_str())).collect();
    assert_eq!(files[1..], [("secrets/destination.w.password", "pass\n"), ("secrets/job.db.source.0.postgres.password", "pg\n")]);
    assert!(notes(&plan, "destination.w").contains("instead of variable P"));
    let told = serde_json::to_string(&plan.items).unwrap() + &plan.missing.join("");
    assert!(!told.contains("\"pass\"") && !told.contains(a.lines().last().unwrap()), "no secret is shown");
    let missing = keyed("", &[], file_toml, &[], &merge(ItemConflict::Skip)).missing;
    assert_eq!(
        missing,
        [
            "encryption.main credential: give the key file to keepd's service as the credential main",
            "destination.w password: set the variable P in keepd's environment",
            "job.db source[0].postgres.password: put it into /root/pg",
        ]
    );
}

#[test]
fn a_name_in_secrets_is_never_written_over() {
    let file_toml = "[destination.w]\nservice = 'webdav'\nendpoint = 'https://x'\npassword = { env = 'P' }\nencryption = 'none'\n";
    let file = file(file_toml, &[("destination.w password", "pass")]);
    let mut here = here("", &Machine::new(), &file);
    here.taken = ["destination.w.password".to_owned(), "destination.w.password-2".to_owned()].into();
    let plan = plan(&here, &file, &with(ImportMode::Merge, ItemConflict::Skip, &[Allow::WeakerEncryption]));
    good(&plan);
    assert_eq!(plan.files[0].name, "secrets/destination.w.password-3");
}

#[test]
fn two_items_share_a_file_only_where_they_mean_the_same() {
    let two = "[encryption.a]\nkey_file = 'k'\n[encryption.b]\nkey_file = 'k'\n";
    let [a, b] = keys();
    let shared = keyed("", &[], two, &[("encryption.a key_file", &a), ("encryption.b key_file", &a)], &merge(ItemConflict::Skip));
    good(&shared);
    assert_eq!(shared.files.len(), 1);
    let apart = keyed("", &[], two, &[("encryption.a key_file", &a), ("encryption.b key_file", &b)], &merge(ItemConflict::Skip));
    good(&apart);
    assert_eq!(apart.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["k", "secrets/encryption.b.key_file"]);
    assert_eq!(value(&apart, "encryption.b")["key_file"], "secrets/encryption.b.key_file");
}

#[test]
fn a_key_is_neither_dropped_nor_swapped_without_a_word() {
    let [a, b] = keys();
    let on = [("file /etc/keepd/keys/main.key", a.as_str())];
    let texts = [("encryption.main key_file", b.as_str())];
    // The tables say the same, and mean different keys.
    let plan = keyed(KEYED, &on, KEYED, &texts, &merge(ItemConflict::Skip));
    good(&plan);
    assert_eq!(actions(&plan), ["skip encryption.main"]);
    assert!(notes(&plan, "encryption.main").contains("key_file is another one in the file than here"));
    let plan = keyed(KEYED, &on, KEYED, &texts, &merge(ItemConflict::Overwrite));
    assert_eq!(plan.needs, [Allow::KeyChange]);
    let plan = keyed(KEYED, &on, KEYED, &texts, &with(ImportMode::Merge, ItemConflict::Overwrite, &[Allow::KeyChange]));
    good(&plan);
    assert_eq!(value(&plan, "encryption.main")["key_file"], "secrets/encryption.main.key_file");
    assert_eq!(plan.files.len(), 1);
    let plan = keyed(KEYED, &on, KEYED, &texts, &merge(ItemConflict::Rename));
    good(&plan);
    assert_eq!(actions(&plan), ["rename encryption.main > encryption.main-2"]);
    assert_eq!(value(&plan, "encryption.main-2")["key_file"], "secrets/encryption.main-2.key_file");
    let plan = keyed(KEYED, &on, KEYED, &texts, &with(FULL, ItemConflict::Skip, &[]));
    assert_eq!(plan.needs, [Allow::KeyChange]);
    // Nothing of that name is here, but the file that it names holds another key.
    let plan = keyed("", &on, KEYED, &texts, &merge(ItemConflict::Skip));
    assert_eq!(plan.needs, [Allow::KeyChange]);
}

#[test]
fn a_profile_changes_its_keys_only_when_that_is_allowed() {
    let [a, b] = keys();
    let on =
        [("file /etc/keepd/keys/main.key", a.as_str()), ("file /etc/keepd/keys/b.key", b.as_str()), ("file /etc/keepd/pair.pub", "public")];
    let changes = |before: &str, after: &str| {
        let table = |text: &str| format!("[encryption.main]\n{text}\n");
        let plan = keyed(&table(before), &on, &table(after), &[], &merge(ItemConflict::Overwrite));
        plan.needs.contains(&Allow::KeyChange)
    };
    let main = "key_file = 'keys/main.key'";
    assert!(changes(main, "key_file = 'keys/b.key'"), "another key that is here");
    assert!(changes(main, "key_file = 'keys/nowhere.key'"), "nobody knows which");
    assert!(!changes(main, "key_file = '/etc/keepd/keys/main.key'"), "the same key, said otherwise");
    assert!(changes(main, "passphrase = { env = 'P' }"));
    assert!(changes(main, "key_file = 'keys/main.key'\npublic_key = 'pair.pub'"), "only somebody else reads it then");
    assert!(changes(main, "key_file = 'keys/main.key'\nretired = ['keys/b.key']"), "another would be tried");
    assert!(changes(main, "key_file = 'keys/main.key'\nretired = ['keys/nowhere.key']"));
    assert!(!changes(main, "key_file = 'keys/main.key'\nretired = ['/etc/keepd/keys/main.key']"), "a key that it has");
    assert!(changes("key_file = 'keys/main.key'\nretired = ['keys/b.key']", main), "one that opened things is dropped");
    assert!(
        !changes(
            "key_file = 'keys/gone.key'\nretired = ['keys/b.key', 'keys/away.key']",
            "key_file = 'keys/gone.key'\nretired = ['keys/away.key', 'keys/b.key']"
        ),
        "what cannot be read stays so"
    );
    let token = |key: &str| format!("pkcs11 = {{ module = '/m.so', token = 't', key = '{key}' }}");
    assert!(changes(&token("a"), &token("b")) && changes(main, &token("a")));
    // Another profile at a destination is another key.
    let at = |profile: &str| {
        format!("{KEYED}[encryption.b]\nkey_file = 'keys/b.key'\n[destination.d]\nservice = 'fs'\nroot = '/d'\nencryption = '{profile}'\n")
    };
    assert_eq!(keyed(&at("main"), &on, &at("b"), &[], &merge(ItemConflict::Overwrite)).needs, [Allow::KeyChange]);
}

#[test]
fn a_key_that_the_machine_lacks_is_not_taken_from_anybody() {
    let [a, _] = keys();
    let texts = [("encryption.main key_file", a.as_str())];
    let plan = keyed(KEYED, &[], KEYED, &texts, &merge(ItemConflict::Skip));
    good(&plan);
    assert!(plan.files.is_empty() && plan.missing.len() == 1 && notes(&plan, "encryption.main").contains("--allow-key-change"));
    let plan = keyed(KEYED, &[], KEYED, &texts, &with(ImportMode::Merge, ItemConflict::Skip, &[Allow::KeyChange]));
    good(&plan);
    assert_eq!((actions(&plan), plan.files.len(), plan.missing.len()), (vec!["same encryption.main".to_owned()], 1, 0));
}

#[test]
fn a_secret_of_this_machine_is_not_told_to_somebody_else() {
    let dav = |host: &str| {
        format!(
            "{SHOP}[destination.w]\nservice = 'webdav'\nendpoint = 'https://{host}'\npassword = {{ file = 'w' }}\nencryption = 'main'\n"
        )
    };
    let on = [("file /etc/keepd/w", "pass"), ("file /etc/keepd/keys/main.key", "key")];
    let plan = keyed(&dav("ours"), &on, &dav("theirs"), &[], &merge(ItemConflict::Overwrite));
    assert_eq!(plan.needs, [Allow::KeyChange]);
    assert!(notes(&plan, "destination.w").contains("told to another place"));
    assert_eq!(keyed(&dav("ours"), &on, &dav("theirs"), &[], &merge(ItemConflict::Rename)).needs, [Allow::KeyChange]);
    let own = keyed(
        &dav("ours"),
        &on,
        &dav("theirs"),
        &[("destination.w password", "another")],
        &with(ImportMode::Merge, ItemConflict::Rename, &[]),
    );
    good(&own);
    let db = |host: &str| {
        format!(
            "{SHOP}[job.db]\ndestinations = ['local']\n[[job.db.source]]\npostgres = {{ dbname = 'x', host = '{host}', password = {{ file = 'w' }} }}\n"
        )
    };
    assert_eq!(keyed(&db("ours"), &on, &db("theirs"), &[], &merge(ItemConflict::Overwrite)).needs, [Allow::KeyChange]);
    // A key is no password.
    let thief = dav("theirs").replace("file = 'w'", "file = 'keys/main.key'");
    let plan = keyed(
        KEYED,
        &on,
        &thief.replace("pkcs11 = { module = '/m.so', token = 't', key = 'k' }", "key_file = 'keys/main.key'"),
        &[],
        &merge(ItemConflict::Skip),
    );
    assert!(plan.needs.contains(&Allow::KeyChange) && plan.problems.iter().any(|p| p.contains("give away")), "{:?}", plan.problems);
}

#[test]
fn a_new_item_gets_no_secret_of_this_machine() {
    let to = |place: &str| {
        format!(
            "{SHOP}[destination.w]\nservice = 'webdav'\nendpoint = 'https://evil'\npassword = {{ {place} }}\nencryption = 'main'\n[job.db]\ndestinations = ['local']\n[[job.db.source]]\npostgres = {{ dbname = 'x', host = 'evil', password = {{ {place} }} }}\n"
        )
    };
    let on = [("file /etc/shadow", "root"), ("variable P", "pass"), ("credential c", "cred"), ("file /etc/keepd/x", "x")];
    for place in ["file = '/etc/shadow'", "env = 'P'", "credential = 'c'", "file = 'x'"] {
        let plan = keyed(SHOP, &on, &to(place), &[], &merge(ItemConflict::Skip));
        assert_eq!(plan.needs, [Allow::KeyChange], "{place}");
        for item in ["destination.w", "job.db"] {
            assert!(notes(&plan, item).contains("told to another place"), "{place} {item}");
        }
    }
    // What the file itself has is no news to whoever made it.
    let texts = [("destination.w password", "x"), ("job.db source[0].postgres.password", "x")];
    good(&keyed(SHOP, &on, &to("file = 'x'"), &texts, &merge(ItemConflict::Skip)));
    // What is not here is nobody's yet.
    good(&keyed(SHOP, &[], &to("file = 'x'"), &[], &merge(ItemConflict::Skip)));
    // A place more on an item that is here.
    let dav = |more: &str| {
        format!(
            "{SHOP}[destination.w]\nservice = 'webdav'\nendpoint = 'https://ours'\n{more}password = {{ file = 'x' }}\nencryption = 'main'\n"
        )
    };
    let plan = keyed(&dav(""), &on, &dav("token = { env = 'P' }\n"), &[], &merge(ItemConflict::Overwrite));
    assert_eq!(plan.needs, [Allow::KeyChange]);
    good(&keyed(&dav(""), &on, &dav("compression = 'gzip'\n"), &[], &merge(ItemConflict::Overwrite)));
}

#[test]
fn a_passphrase_is_a_key() {
    let profile = "[encryption.main]\npassphrase = { file = 'phrase' }\n";
    let dav = "[destination.w]\nservice = 'webdav'\nendpoint = 'https://evil'\npassword = { file = 'copy' }\nencryption = 'main'\n";
    let on = [("file /etc/keepd/phrase", "long phrase"), ("file /etc/keepd/copy", "long phrase")];
    for place in ["copy", "phrase"] {
        let plan = keyed(
            profile,
            &on,
            &format!("{profile}{}", dav.replace("copy", place)),
            &[],
            &with(ImportMode::Merge, ItemConflict::Overwrite, Allow::ALL),
        );
        assert!(plan.problems.iter().any(|p| p.contains("give away")), "{place}: {:?}", plan.problems);
    }
    // One that is missing here is not taken from anybody.
    let texts = [("encryption.main passphrase", "their phrase")];
    let plan = keyed(profile, &[], profile, &texts, &merge(ItemConflict::Skip));
    assert!(plan.files.is_empty() && notes(&plan, "encryption.main").contains("--allow-key-change"), "{plan:?}");
}

#[test]
fn an_option_that_is_hidden_is_not_taken_for_what_it_was() {
    let on = [("file /etc/keepd/x", "x"), ("file /etc/keepd/evil", "https://evil")];
    let dav = |endpoint: &str| {
        format!("{SHOP}[destination.w]\nservice = 'webdav'\nendpoint = {endpoint}\npassword = {{ file = 'x' }}\nencryption = 'main'\n")
    };
    let plan = keyed(&dav("'https://ours'"), &on, &dav("{ file = 'evil' }"), &[], &merge(ItemConflict::Overwrite));
    assert_eq!(plan.needs, [Allow::WeakerEncryption, Allow::Commands, Allow::KeyChange]);
    assert!(notes(&plan, "destination.w").contains("password: file /etc/keepd/x of this machine would be told to another place"));
    // Not put where it is missing, either.
    let hidden = dav("{ file = 'gone' }");
    let texts = [("destination.w endpoint", "https://evil")];
    let plan = keyed(&hidden, &on, &hidden, &texts, &merge(ItemConflict::Skip));
    assert!(plan.files.is_empty() && plan.missing.len() == 1, "{plan:?}");
    let ssh = |strategy: &str| {
        format!("{SHOP}[destination.s]\nservice = 'sftp'\nendpoint = 'ours'\nknown_hosts_strategy = {strategy}\nencryption = 'main'\n")
    };
    let plan = keyed(&ssh("'strict'"), &[], &ssh("{ env = 'S' }"), &[], &merge(ItemConflict::Overwrite));
    assert_eq!(plan.needs, [Allow::WeakerEncryption, Allow::KeyChange]);
    // Who somebody is may be read from a file.
    let user = dav("'https://ours'\nusername = { env = 'U' }");
    good(&keyed(SHOP, &[], &user, &[], &merge(ItemConflict::Skip)));
}

#[test]
fn an_account_that_says_where_its_token_comes_from_is_a_program() {
    let gcs = format!("{SHOP}[destination.g]\nservice = 'gcs'\nbucket = 'b'\ncredential = {{ file = 'g' }}\nencryption = 'main'\n");
    let needs = |account: Value| {
        let text = data_encoding::BASE64.encode(account.to_string().as_bytes());
        keyed(SHOP, &[], &gcs, &[("destination.g credential", &text)], &merge(ItemConflict::Skip)).needs
    };
    assert_eq!(needs(json!({"type": "service_account", "private_key": "k"})), []);
    assert_eq!(needs(json!({"type": "external_account", "credential_source": {"file": "/etc/shadow"}})), [Allow::Commands]);
    assert_eq!(needs(json!({"type": "service_account", "credential_source": {"url": "http://x"}})), [Allow::Commands]);
}

#[test]
fn a_job_goes_to_others_keys_only_when_that_is_allowed() {
    let world = |to: &str, every: &str| {
        format!(
            "{}[encryption.b]\npkcs11 = {{ module = '/m.so', token = 't', key = 'b' }}\n[destination.same]\nservice = 'fs'\nroot = '/s'\nencryption = 'main'\n[destination.b]\nservice = 'fs'\nroot = '/b'\nencryption = 'b'\n",
            shop(&[("destinations = ['local']", &format!("destinations = [{to}]")), ("6h", every)])
        )
    };
    let needs = |to: &str| between(&world("'local'", "6h"), &world(to, "1h"), &merge(ItemConflict::Overwrite)).needs;
    assert_eq!(needs("'local'"), []);
    assert_eq!(needs("'local', 'same'"), []);
    assert_eq!(needs("'b'"), [Allow::KeyChange]);
    assert_eq!(needs("'local', 'b'"), [Allow::KeyChange]);
}

#[test]
fn a_server_is_asked_for_encryption_as_before_wherever_it_stands() {
    let db = |list: &[(&str, &str)]| {
        let sources = list.iter().map(|(host, mode)| {
            format!("[[job.db.source]]\nname = '{host}'\npostgres = {{ dbname = 'x', host = '{host}', sslmode = '{mode}' }}\n")
        });
        format!("{SHOP}[job.db]\ndestinations = ['local']\n{}", sources.collect::<String>())
    };
    let needs = |before: &[(&str, &str)], after: &[(&str, &str)]| between(&db(before), &db(after), &merge(ItemConflict::Overwrite)).needs;
    let before = [("a", "disable"), ("b", "verify-full")];
    assert_eq!(needs(&before, &[("b", "verify-full"), ("a", "disable")]), []);
    assert_eq!(needs(&before, &[("b", "disable"), ("a", "verify-full")]), [Allow::WeakerEncryption]);
    assert_eq!(needs(&before, &[("c", "require")]), [Allow::WeakerEncryption]);
}

#[test]
fn a_daemon_keeps_its_state_and_its_socket() {
    let file_toml = "[daemon]\nstate_dir = '/evil'\nsocket = '/evil.sock'\nmax_parallel_runs = 9\n";
    for options in [merge(ItemConflict::Overwrite), with(FULL, ItemConflict::Skip, &[])] {
        let plan = between("[daemon]\nstate_dir = '/mine'\nmemory = '1GiB'\n", file_toml, &options);
        good(&plan);
        assert_eq!(value(&plan, "settings.daemon"), &json!({"state_dir": "/mine", "max_parallel_runs": 9}));
        let notes = notes(&plan, "settings.daemon");
        assert!(notes.contains("state_dir stays \"/mine\"") && notes.contains("socket stays"), "{notes}");
        // Nor does it lose them to a file that has none.
        let plan = between("[daemon]\nstate_dir = '/mine'\n", "[coverage]\nroots = ['/a']", &options);
        good(&plan);
        assert!(plan.remove.is_empty() && !actions(&plan).iter().any(|a| a.contains("daemon")), "{:?}", actions(&plan));
        let plan = between(SHOP, "[daemon]\nstate_dir = '/evil'\n", &options);
        assert!(!plan.set.iter().any(|(name, _)| name.name == "daemon"), "{:?}", plan.set);
    }
    // Where nothing is configured, there is nothing to be kept.
    let plan = between("", file_toml, &merge(ItemConflict::Skip));
    assert_eq!(value(&plan, "settings.daemon")["state_dir"], "/evil");
}

#[test]
fn large_forged_files_are_judged_quickly() {
    let start = std::time::Instant::now();
    // Each names the next, and the last names nothing that is there.
    let mut file = file(SHOP, &[]);
    let item = |kind: &str, name: String, value: Value| Item { r#type: kind.into(), name, value, secrets: Vec::new() };
    let all: Vec<String> = (0..1000).map(|n| format!("d{n}")).collect();
    file.items.extend((0..1000).map(|n| item("destination", format!("d{n}"), json!({"service": "fs", "encryption": "gone"}))));
    file.items.extend((0..1000).map(|n| item("job", format!("j{n}"), json!({"destinations": all}))));
    let plan_all = plan(&here("", &Machine::new(), &file), &file, &with(ImportMode::Merge, ItemConflict::Skip, Allow::ALL));
    good(&plan_all);
    assert_eq!(plan_all.set.len(), 3);
    // Deep, and wide at its end.
    let wide: Vec<Value> = (0..20_000).map(|_| json!({"url": {"k": 1}})).collect();
    let deep = (0..20).fold(json!(wide), |inner, n| json!({(format!("{n}").repeat(100)): inner}));
    file.items = vec![item("job", "deep".into(), deep), item("job", "wide".into(), json!({"destinations": vec!["d"; 1001]}))];
    let plan_deep = plan(&here("", &Machine::new(), &file), &file, &with(ImportMode::Merge, ItemConflict::Skip, Allow::ALL));
    assert!(plan_deep.problems[0].contains("more than 1000"), "{:?}", plan_deep.problems);
    assert!(format!("{:?}", plan_deep.items).len() < 1 << 20);
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}

#[test]
fn what_is_less_safe_without_needing_leave_is_told() {
    let dest = |more: &str| format!("{SHOP}[destination.s]\nservice = 's3'\nbucket = 'b'\nencryption = 'main'\n{more}\n");
    let told = |before: &str, after: &str, item: &str| {
        notes(&between(before, after, &with(ImportMode::Merge, ItemConflict::Overwrite, &[Allow::KeyChange])), item)
    };
    assert!(told(&dest("append_only = true"), &dest(""), "destination.s").contains("append_only is turned off"));
    assert!(told(&dest("object_lock = '30d'"), &dest(""), "destination.s").contains("object_lock is turned off"));
    assert!(told(&dest("object_lock = '30d'"), &dest("object_lock = '1d'"), "destination.s").contains("object_lock"));
    assert!(told(&dest(""), &dest("").replace("'b'", "'c'"), "destination.s").contains("another place"));
    assert!(
        told(&dest("retention = { keep_last = 9 }"), &dest("retention = { keep_last = 3 }"), "destination.s")
            .contains("keep_last 9 becomes 3")
    );
    let job = |more: &str| SHOP.replace("every = '6h'", more);
    assert!(told(SHOP, &job("every = '6h'\nretention = { keep_last = 1 }"), "job.shop").contains("removed"));
    assert!(told(SHOP, &job("enabled = false\nevery = '6h'"), "job.shop").contains("switched off"));
    assert!(told(SHOP, &job(""), "job.shop").contains("no longer runs by itself"));
    assert!(told("[daemon]\nstate_dir = '/a'", "[daemon]\nstate_dir = '/b'", "settings.daemon").contains("state_dir"));
}

fn state(schedule: &str, due: &str) -> ScheduleState {
    ScheduleState {
        schedule: schedule.into(),
        first_seen: Some("2026-01-01T00:00:00Z".parse().unwrap()),
        last_due: Some(due.parse().unwrap()),
        ..ScheduleState::default()
    }
}

#[test]
fn schedules_go_on_where_jobs_come_and_stay_where_they_are() {
    let once = state("at 2026-04-01T00:00 ", "2026-04-01T00:00:00Z");
    let mut file = file(&shop(&[("6h", "1h")]), &[]);
    let mut forged = once.clone();
    forged.last_good = Some("2036-01-01T00:00:00Z".parse().unwrap());
    forged.last_run = Some("r1".into());
    file.items.push(Item {
        r#type: "schedule".into(),
        name: "shop".into(),
        value: serde_json::to_value(&forged).unwrap(),
        secrets: Vec::new(),
    });
    let without_job = SHOP.split("[job.shop]").next().unwrap();
    let states = |here_toml: &str, known: Option<&ScheduleState>, options: &Options| {
        let mut here = here(here_toml, &Machine::new(), &file);
        here.schedule = known.map(|s| ("shop".to_owned(), s.clone())).into_iter().collect();
        plan(&here, &file, options).schedule
    };
    assert_eq!(states(without_job, None, &merge(ItemConflict::Skip)), [("shop".to_owned(), once.clone())], "without what is not believed");
    assert_eq!(states(SHOP, None, &merge(ItemConflict::Rename)), [("shop-2".to_owned(), once.clone())]);
    assert_eq!(states(SHOP, None, &merge(ItemConflict::Overwrite)), [], "an overwrite keeps the history");
    assert_eq!(states(SHOP, None, &merge(ItemConflict::Skip)), []);
    assert_eq!(
        states(&shop(&[("6h", "1h")]), None, &merge(ItemConflict::Skip)),
        [("shop".to_owned(), once.clone())],
        "the same job, never seen"
    );
    let newer = state(&once.schedule, "2026-04-02T00:00:00Z");
    assert_eq!(states(&shop(&[("6h", "1h")]), Some(&newer), &merge(ItemConflict::Skip)), []);
    assert_eq!(states(without_job, Some(&newer), &merge(ItemConflict::Skip)), [], "what ran since the export does not run again");
    let older = state(&once.schedule, "2026-03-02T00:00:00Z");
    assert_eq!(states(without_job, Some(&older), &merge(ItemConflict::Skip)).len(), 1);
    let only = Options { mode: ImportMode::Selective, only: vec!["destination".into()], ..Options::default() };
    assert_eq!(states(without_job, None, &only), []);
    let only = Options { mode: ImportMode::Selective, only: vec!["job.shop".into()], ..Options::default() };
    assert_eq!(states(without_job, None, &only).len(), 1);
}

#[test]
fn forged_files_are_problems_and_never_more() {
    let whole = file(SHOP, &[]);
    let with_item = |r#type: &str, name: &str, value: Value, secrets: Vec<Secret>| {
        let mut file = whole.clone();
        file.items.push(Item { r#type: r#type.into(), name: name.into(), value, secrets });
        file
    };
    let deep = (0..100).fold(json!(1), |inner, _| json!([inner]));
    let secret = |at: &str, kind| Secret { at: at.into(), kind, value: "x".to_owned().into() };
    let forged = [
        with_item("jub", "x", json!({}), Vec::new()),
        with_item("job", "x\u{1b}[2J", json!({}), Vec::new()),
        with_item("job", "", json!({}), Vec::new()),
        with_item("job", "../x", json!({}), Vec::new()),
        with_item("job", "shop", json!({}), Vec::new()),
        with_item("job", "x", json!([]), Vec::new()),
        with_item("job", "x", json!(null), Vec::new()),
        with_item("job", "x", json!({ "a": deep }), Vec::new()),
        with_item("job", "x", json!({ "a": null }), Vec::new()),
        with_item("settings", "job", json!({"evil": {"hooks": {"before": ["/bin/x"]}}}), Vec::new()),
        with_item("settings", "destination", json!({}), Vec::new()),
        with_item("access", "job", json!({}), Vec::new()),
        with_item("encryption", "none", json!({}), Vec::new()),
        with_item("schedule", "shop", json!({"runs_good": -1}), Vec::new()),
        with_item("job", "x", json!({}), vec![secret("hooks.before", SecretKind::Secret)]),
        with_item("encryption", "x", json!({"key_file": "k"}), vec![secret("key_file", SecretKind::Secret)]),
        with_item("encryption", "x", json!({"key_file": "k"}), vec![secret("key_file", SecretKind::KeyFile)]),
    ];
    for (n, file) in forged.iter().enumerate() {
        let plan = plan(&here("", &Machine::new(), file), file, &merge(ItemConflict::Overwrite));
        assert!(!plan.problems.is_empty(), "{n}");
        assert!(!format!("{plan:?}").contains('\u{1b}'), "{n}");
    }
    // Odd, and nothing that the planner has to judge.
    for value in [
        json!({"destinations": "shop", "source": {"postgres": []}, "hooks": 3, "retention": "x", "quiesce": []}),
        json!({"destinations": [1, ["shop"]], "source": [[], 1, {"postgres": {"password": {"file": 1, "env": 2}}}]}),
        json!({"destinations": ["shop", "shop"], "drill": [[[]]], "assert": {"command": {}}}),
    ] {
        let file = with_item("job", "odd", value, Vec::new());
        for options in [merge(ItemConflict::Rename), merge(ItemConflict::Overwrite), with(FULL, ItemConflict::Skip, &[])] {
            plan(&here(&format!("{SHOP}[job.odd]\nevery = '1d'\n"), &Machine::new(), &file), &file, &options);
        }
    }
    for value in [
        json!({"encryption": ["x"]}),
        json!({"service": 1, "endpoint": {}, "options": 7}),
        json!({"retired": "x", "key_file": {}, "pkcs11": []}),
    ] {
        for kind in ["destination", "encryption", "settings", "notification"] {
            let file = with_item(kind, "odd", value.clone(), Vec::new());
            plan(
                &here(&format!("{SHOP}[destination.odd]\nservice = 'x'\n[encryption.odd]\nkey_file = 'x'\n"), &Machine::new(), &file),
                &file,
                &merge(ItemConflict::Overwrite),
            );
        }
    }
}

#[test]
fn names_and_values_cannot_play_with_the_terminal() {
    let mut file = file(SHOP, &[]);
    let text = "x\u{1b}[31m\u{202e}\u{7f}";
    file.items[1].value =
        json!({"service": text, "root": text, "encryption": text, (text): text, "command": [text], "password": {"file": text}});
    file.items[2].value = json!({"destinations": [text, "local"], "hooks": {(text): [text]}});
    for here_toml in ["", SHOP] {
        for options in
            [merge(ItemConflict::Skip), merge(ItemConflict::Overwrite), merge(ItemConflict::Rename), with(FULL, ItemConflict::Skip, &[])]
        {
            let plan = plan(&here(here_toml, &Machine::new(), &file), &file, &options);
            let mut told: Vec<String> = plan.problems.iter().chain(&plan.missing).cloned().collect();
            for item in plan.items {
                told.extend(item.notes);
                told.extend(item.changes.into_iter().flat_map(|c| [Some(c.at), c.before, c.after]).flatten());
            }
            assert!(told.iter().all(|t| !t.contains(['\u{1b}', '\u{202e}', '\u{7f}'])), "{told:?}");
        }
    }
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    /// A configuration of a few items that name each other, often rightly.
    fn configuration() -> impl Strategy<Value = String> {
        let name = || prop::sample::select(vec!["a", "b", "c"]);
        let profile =
            (name(), 0..3u8).prop_map(|(n, k)| format!("[encryption.{n}]\npkcs11 = {{ module = '/m', token = 't', key = '{k}' }}\n"));
        let destination = (name(), prop::sample::select(vec!["a", "b", "c", "none"]), 0..3u8)
            .prop_map(|(n, e, r)| format!("[destination.{n}]\nservice = 'fs'\nroot = '/{n}{r}'\nencryption = '{e}'\n"));
        let job = (name(), prop::collection::btree_set(name(), 1..3), 1..4u8)
            .prop_map(|(n, d, h)| format!("[job.{n}]\ndestinations = {:?}\nevery = '{h}h'\n", d.into_iter().collect::<Vec<_>>()));
        let all = (prop::collection::vec(profile, 0..3), prop::collection::vec(destination, 0..3), prop::collection::vec(job, 0..3));
        all.prop_map(|(p, d, j)| {
            let mut seen = BTreeSet::new();
            let tables = p.into_iter().chain(d).chain(j);
            tables.filter(|t| seen.insert(t.lines().next().unwrap_or_default().to_owned())).collect::<String>()
        })
    }

    fn all_allowed(mode: ImportMode, on_conflict: ItemConflict) -> Options {
        with(mode, on_conflict, Allow::ALL)
    }

    /// References that lead nowhere.
    fn dangling(all: &BTreeMap<ItemName, Value>) -> Vec<ItemName> {
        all.iter().flat_map(|(name, value)| references(name, value)).filter(|name| !all.contains_key(name)).collect()
    }

    proptest! {
        #[test]
        fn what_is_here_stays_unless_it_is_overwritten(mine in configuration(), theirs in configuration()) {
            let file = file(&theirs, &[]);
            let here = here(&mine, &Machine::new(), &file);
            for conflict in [ItemConflict::Skip, ItemConflict::Rename] {
                let plan = plan(&here, &file, &all_allowed(ImportMode::Merge, conflict));
                prop_assert_eq!(&plan.problems, &[""; 0]);
                let after = after(&here, &plan);
                prop_assert!(here.items.iter().all(|(name, value)| after.get(name) == Some(value)));
                // Nothing that comes leads nowhere that did not before.
                let before = dangling(&here.items);
                prop_assert!(dangling(&after).iter().all(|name| before.contains(name)));
            }
        }

        #[test]
        fn a_full_import_is_what_the_file_says_where_it_can_be(mine in configuration(), theirs in configuration()) {
            let file = file(&theirs, &[]);
            let here = here(&mine, &Machine::new(), &file);
            let plan = plan(&here, &file, &all_allowed(FULL, ItemConflict::Skip));
            prop_assert_eq!(&plan.problems, &[""; 0]);
            let after = after(&here, &plan);
            if dangling(&items(&theirs)).is_empty() {
                prop_assert_eq!(after, items(&theirs));
            }
        }

        #[test]
        fn a_second_import_finds_nothing_to_do(mine in configuration(), theirs in configuration(), overwrite: bool) {
            let file = file(&theirs, &[]);
            let mut here = here(&mine, &Machine::new(), &file);
            let options = all_allowed(ImportMode::Merge, if overwrite { ItemConflict::Overwrite } else { ItemConflict::Skip });
            here.items = after(&here, &plan(&here, &file, &options));
            prop_assert!(plan(&here, &file, &options).set.is_empty());
        }
    }
}
