//! Recovery kits: what a profile's kit says of keys and destinations, and the key that is made where the profile's own cannot be written down.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keepd_protocol::model::Level;
use zeroize::Zeroizing;

use super::archived;
use super::backup::Environment;
use super::keys::{self, NewKey};
use super::live::{Failure, Finish, LiveRun};
use super::patient::PatientWriter;
use super::{destination, names};
use crate::config::{Destination, OptionValue};
use crate::crypto::key_file::{self, Kind};
use crate::crypto::{Key, PrivateKey, Profile, ProfileKey};
use crate::kit::{self, KeyKind, KeyLine, Kit};
use crate::secret;

/// What the slots of keys are called that are in kits.
pub const LABEL: &str = "recovery kit";
/// Without a byte that is taken.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is wanted of a kit.
pub struct Wanted {
    pub profile: Profile,
    /// The destinations of the profile.
    pub targets: Vec<Destination>,
    pub include_secrets: bool,
    pub private: Option<PrivateKey>,
    /// Made for this kit, where the profile's own key is in a head or a token.
    pub fresh: Option<Key>,
}

impl Wanted {
    /// With a fresh key where one is needed; a private key that opens nothing of the profile is refused.
    pub fn new(profile: Profile, targets: Vec<Destination>, include_secrets: bool, private: Option<PrivateKey>) -> Result<Self, String> {
        if let (Some(private), Some(recipient)) = (&private, &profile.recipient)
            && private.public().fingerprint() != recipient.fingerprint()
        {
            return Err(format!(
                "the private key given (fingerprint {}) is not that of the public key {} that encryption profile {} writes for",
                private.public().fingerprint(),
                recipient.fingerprint(),
                profile.name
            ));
        }
        let fresh = match &profile.key {
            ProfileKey::Key(_) => None,
            ProfileKey::Passphrase(_) | ProfileKey::Token(_) => Some(Key::generate().map_err(|e| e.to_string())?),
        };
        Ok(Self { profile, targets, include_secrets, private, fresh })
    }

    /// The key that is in the kit.
    fn key(&self) -> Option<&Key> {
        match &self.profile.key {
            ProfileKey::Key(key) => Some(key),
            _ => self.fresh.as_ref(),
        }
    }

    pub fn fingerprint(&self) -> Option<String> {
        self.key().map(|key| key.fingerprint().to_string())
    }
}

/// Makes the kit and writes it; a fresh key opens the destinations before the kit is written.
pub fn make(env: &Environment, wanted: &Wanted, out: OwnedFd, live: &LiveRun) -> Result<Finish, Failure> {
    live.step("gathering");
    let mut warnings = warnings(wanted);
    let destinations = wanted.targets.iter().map(|t| describe(t, wanted.include_secrets, &mut warnings)).collect();
    let mut begun = Vec::new();
    let written = (|| {
        if let Some(fresh) = &wanted.fresh {
            let kept = env.config.config_backup.as_ref();
            if let Some(kept) = kept.filter(|kept| kept.encryption.as_ref() == Some(&wanted.profile.name)) {
                warnings.push(format!(
                    "The configuration of keepd that is stored at {} does not open with the key of this kit, only with that of the profile.",
                    kept.destination
                ));
            }
            let new = NewKey { label: LABEL.to_owned(), key: ProfileKey::Key(Arc::new(fresh.clone())) };
            for target in &wanted.targets {
                if archived::is(target) {
                    warnings.push(format!(
                        "Destination {} keeps archives: the key of this kit does not open them, only that of the profile does.",
                        target.name
                    ));
                    continue;
                }
                if destination::identify(env, target)?.is_none() {
                    warnings.push(format!(
                        "Nothing was backed up to destination {} yet: the key of this kit will not open it. Make another kit after its first backup.",
                        target.name
                    ));
                    continue;
                }
                begun.push(target);
                keys::add(env, target, &new, live)?;
            }
        }
        warnings.iter().for_each(|text| live.message(Level::Warning, text.clone()));
        let text = text(wanted, destinations, warnings)?;
        live.step("writing");
        write(out, &text, live)
    })();
    if let Err(e) = written {
        take_back(env, wanted, &begun, live);
        return Err(e);
    }
    Ok(Finish::Good)
}

/// Slots of a key that nobody has.
fn take_back(env: &Environment, wanted: &Wanted, begun: &[&Destination], live: &LiveRun) {
    let Some(fresh) = &wanted.fresh else { return };
    let key = ProfileKey::Key(Arc::new(fresh.clone()));
    for target in begun {
        if let Err(e) = keys::remove_of(env, target, &key, live) {
            let fingerprint = fresh.fingerprint();
            let text = format!("the key slot {LABEL} of a key that nobody has (fingerprint {fingerprint}) may be left there: {e}");
            live.message(Level::Warning, format!("destination {}: {text}", target.name));
        }
    }
}

fn write(out: OwnedFd, text: &str, live: &LiveRun) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::Failed(format!("the kit cannot be written: {e}"));
    let mut out = PatientWriter::new(out, PATIENCE, live.cancel.clone())?;
    out.write_all(text.as_bytes()).map_err(failed)?;
    out.flush().map_err(failed)
}

fn warnings(wanted: &Wanted) -> Vec<String> {
    let mut warnings = Vec::new();
    if let (Some(recipient), None) = (&wanted.profile.recipient, &wanted.private) {
        warnings.push(format!(
            "Contents are written for the private key {}, which is not in this kit: with the kit alone they are listed and cannot be read. Keep that \
             private key file with it, or make the kit again with --private-key FILE.",
            recipient.fingerprint()
        ));
    }
    if wanted.targets.is_empty() {
        warnings.push(format!("No destination uses encryption profile {}.", wanted.profile.name));
    }
    warnings
}

fn text(wanted: &Wanted, destinations: Vec<kit::Destination>, warnings: Vec<String>) -> Result<Zeroizing<String>, Failure> {
    let mut keys: Vec<KeyLine> =
        wanted.key().map(|key| KeyLine { line: key.line(), fingerprint: key.fingerprint().to_string() }).into_iter().collect();
    keys.extend(
        wanted
            .private
            .as_ref()
            .map(|key| KeyLine { line: key_file::line(Kind::Private, key.bytes()), fingerprint: key.public().fingerprint().to_string() }),
    );
    let kit = Kit {
        profile: wanted.profile.name.clone(),
        kind: match wanted.profile.key {
            ProfileKey::Key(_) => KeyKind::KeyFile,
            ProfileKey::Passphrase(_) => KeyKind::Passphrase,
            ProfileKey::Token(_) => KeyKind::Token,
        },
        keys,
        private_elsewhere: wanted.profile.recipient.as_ref().filter(|_| wanted.private.is_none()).map(|r| r.fingerprint().to_string()),
        host: names::host(),
        made: Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
        keepd_version: env!("CARGO_PKG_VERSION").to_owned(),
        destinations,
        warnings,
    };
    kit::text(&kit).map_err(|e| Failure::Failed(e.to_string()))
}

/// A destination as a kit tells it: its table with its secrets beside it, or with what must be entered.
fn describe(target: &Destination, include_secrets: bool, warnings: &mut Vec<String>) -> kit::Destination {
    let mut toml = Zeroizing::new(String::with_capacity(64 << 10));
    let mut add = |line: &str| {
        toml.push_str(line);
        toml.push('\n');
    };
    let mut all_there = true;
    let secrets: Vec<(&String, String)> = target
        .options
        .iter()
        .filter(|(_, value)| matches!(value, OptionValue::Secret(_)))
        .map(|(name, _)| (name, variable(&target.name, name)))
        .collect();
    for (name, variable) in &secrets {
        let value = match target.options.get(*name) {
            Some(OptionValue::Secret(source)) if include_secrets => secret::read(source).map(Zeroizing::new),
            _ => Err(String::new()),
        };
        match value {
            Ok(value) => add(&Zeroizing::new(format!("# first, in the shell: export {variable}={}", *shell(&value)))),
            Err(why) => {
                all_there = false;
                add(&format!("# first, in the shell: export {variable}=... (its {name}, which is not in here)"));
                if !why.is_empty() {
                    warnings.push(format!("The {name} of destination {} could not be read and is not in this kit: {why}.", target.name));
                }
            }
        }
    }
    add(&format!("[destination.{}]", toml_string(&target.name)));
    add(&format!("service = {}", toml_string(&target.service)));
    if archived::is(target) {
        add("layout = \"archive\"");
    }
    if !target.command.is_empty() {
        let words: Vec<String> = target.command.iter().map(|word| toml_string(word)).collect();
        add(&format!("command = [{}]", words.join(", ")));
    }
    let option = |(name, value): (&String, &OptionValue)| match value {
        OptionValue::Plain(text) => format!("{} = {}", toml_key(name), toml_string(text)),
        OptionValue::Secret(_) => format!("{} = {{ env = {} }}", toml_key(name), toml_string(&variable(&target.name, name))),
    };
    let options: Vec<String> = target.options.iter().map(option).collect();
    match target.service.as_str() {
        "exec" if options.is_empty() => {}
        "exec" => add(&format!("options = {{ {} }}", options.join(", "))),
        _ => options.iter().for_each(|line| add(line)),
    }
    if let Some(path) = &target.transfer.ca_file {
        add(&format!("ca_file = {}", toml_string(&path.display().to_string())));
        warnings.push(format!("Destination {} wants the certificates of {}: keep a copy of that file.", target.name, path.display()));
    }
    what_lies_elsewhere(target, warnings);
    if let Some(source) = ambient(target) {
        all_there = false;
        warnings.push(format!(
            "Destination {} has no credentials in its settings: keepd takes them from {source}, and they are not in this kit. Write down who can \
             give you others.",
            target.name
        ));
    }
    kit::Destination { name: target.name.clone(), toml, has_secrets: all_there, place: destination::location(target), fetch: fetch(target) }
}

/// What is on the machine that may be gone, and that the destination is not reached without.
fn what_lies_elsewhere(target: &Destination, warnings: &mut Vec<String>) {
    let name = &target.name;
    if target.service == "exec" {
        warnings.push(format!(
            "Destination {name} is reached by the program {}, which is not in this kit: keep a copy of the program and of what it needs.",
            target.command.join(" ")
        ));
    }
    for (option, value) in target.options.iter().filter_map(|(option, value)| Some((option.as_str(), value.plain()?))) {
        match option {
            "root" | "bucket" => {}
            "key" if target.service == "sftp" => warnings
                .push(format!("Destination {name} is reached with the SSH key {value}: keep a copy of that file, it is not in this kit.")),
            _ if value.starts_with('/') => warnings
                .push(format!("Destination {name} wants {value} (its {option}): keep a copy of what lies there, it is not in this kit.")),
            _ => {}
        }
    }
}

/// Where a destination's credentials come from that has none in its options.
fn ambient(target: &Destination) -> Option<&'static str> {
    let has = |names: &[&str]| names.iter().any(|name| target.options.contains_key(*name));
    let is_open = |name: &str| target.options.get(name).and_then(OptionValue::plain) == Some("true");
    if is_open("skip_signature") || is_open("allow_anonymous") {
        return None;
    }
    match target.service.as_str() {
        "s3" if !has(&SECRET_ACCESS_KEY) => Some("the environment, ~/.aws or the machine's role at its provider"),
        "gcs" if !has(&["credential", "google_service_account_key", "service_account_key", "token"]) => {
            // A file with them is told as a path.
            let in_file = has(&["credential_path", "google_application_credentials"]);
            (!in_file).then_some("the environment or the machine's service account at its provider")
        }
        "azblob" => {
            let words = ["account_key", "access_key", "master_key", "sas_token", "sas_key"];
            let has_own = target.options.keys().any(|name| words.iter().any(|word| name.ends_with(word)));
            (!has_own).then_some("the environment or the machine's identity at its provider")
        }
        _ => None,
    }
}

/// The name of an environment variable for a secret: `OFFSITE_SECRET_ACCESS_KEY`.
fn variable(destination: &str, option: &str) -> String {
    let upper = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    format!("KEEPD_{destination}_{option}").chars().map(upper).collect()
}

/// A word of a shell, printable whatever is in it.
fn shell(value: &str) -> Zeroizing<String> {
    let plain = value.bytes().all(|b| (0x20..0x7f).contains(&b));
    Zeroizing::new(match plain {
        true => format!("'{}'", value.replace('\'', "'\\''")),
        false => format!("\"$(echo {} | base64 -d)\"", data_encoding::BASE64.encode(value.as_bytes())),
    })
}

/// A basic string of TOML, of ASCII alone: the crate writes literal strings for some texts, in which the escapes of a kit would be text.
fn toml_string(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match u32::from(c) {
            0x22 | 0x5c => out.extend(['\\', c]),
            0x20..=0x7e => out.push(c),
            n @ 0..=0xffff => out.push_str(&format!("\\u{n:04X}")),
            n => out.push_str(&format!("\\U{n:08X}")),
        }
    }
    out.push('"');
    out
}

fn toml_key(name: &str) -> String {
    let is_bare = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if is_bare { name.to_owned() } else { toml_string(name) }
}

/// OpenDAL's names of an option of S3.
const SECRET_ACCESS_KEY: [&str; 2] = ["secret_access_key", "aws_secret_access_key"];

/// How any tool copies a destination to the directory `repository`.
fn fetch(target: &Destination) -> Vec<String> {
    let option = |name: &str| target.options.get(name).and_then(OptionValue::plain).unwrap_or_default();
    let root = option("root");
    let rclone = |remote: String| format!("rclone copy {} repository", *shell(&remote));
    match target.service.as_str() {
        "fs" => vec![format!("cp -a {} repository", *shell(root))],
        "s3" => {
            let endpoint = match option("endpoint") {
                "" => String::new(),
                endpoint if endpoint.contains("://") => format!(" --endpoint-url {}", *shell(endpoint)),
                endpoint => format!(" --endpoint-url {}", *shell(&format!("https://{endpoint}"))),
            };
            let place = format!("s3://{}/{}", option("bucket"), root.trim_matches('/'));
            let variables = [
                ("AWS_ACCESS_KEY_ID", &["access_key_id", "aws_access_key_id"][..]),
                ("AWS_SECRET_ACCESS_KEY", &SECRET_ACCESS_KEY[..]),
                ("AWS_SESSION_TOKEN", &["session_token", "aws_session_token", "aws_token", "token"][..]),
                ("AWS_REGION", &["region", "aws_region"][..]),
            ];
            let set = |(name, options): (&str, &[&str])| {
                Some(format!("export {name}={}", *options.iter().find_map(|option| exported(target, option))?))
            };
            let sync = format!("aws s3 sync {} repository{endpoint}", *shell(&place));
            variables.into_iter().filter_map(set).chain([sync]).collect()
        }
        "sftp" => {
            let place = Authority::of(option("endpoint"));
            let key = match option("key") {
                "" => String::new(),
                key => format!(" -i {}", *shell(key)),
            };
            let port = place.port.map(|port| format!(" -P {}", *shell(port))).unwrap_or_default();
            let user = Some(option("user")).filter(|user| !user.is_empty()).or(place.user);
            let user = user.map(|user| format!("{user}@")).unwrap_or_default();
            // What has colons in it is a host to scp within brackets alone.
            let host = if place.host.contains(':') { format!("[{}]", place.host) } else { place.host.to_owned() };
            let root = if root.is_empty() { "." } else { root };
            vec![format!("scp -r{port}{key} {} repository", *shell(&format!("{user}{host}:{root}")))]
        }
        "webdav" => {
            let mut remote = format!(":webdav,url={}", rclone_value(option("endpoint")));
            if !option("username").is_empty() {
                remote.push_str(&format!(",user={}", rclone_value(option("username"))));
            }
            let mut lines = obscured(target, "RCLONE_WEBDAV_PASS");
            lines.extend(exported(target, "token").map(|token| format!("export RCLONE_WEBDAV_BEARER_TOKEN={}", *token)));
            lines.push(rclone(format!("{remote}:{root}")));
            lines
        }
        "ftp" => {
            let endpoint = option("endpoint");
            let place = Authority::of(endpoint);
            let mut remote = format!(":ftp,host={}", rclone_value(place.host));
            if let Some(port) = place.port {
                remote.push_str(&format!(",port={}", rclone_value(port)));
            }
            if !option("user").is_empty() {
                remote.push_str(&format!(",user={}", rclone_value(option("user"))));
            }
            // Without a scheme OpenDAL takes TLS.
            if !endpoint.starts_with("ftp://") {
                remote.push_str(",explicit_tls=true");
            }
            let mut lines = obscured(target, "RCLONE_FTP_PASS");
            lines.push(rclone(format!("{remote}:{root}")));
            lines
        }
        "gcs" => vec![rclone(format!(":gcs:{}/{}", option("bucket"), root.trim_matches('/')))],
        "azblob" => {
            let account = rclone_value(option("account_name"));
            vec![rclone(format!(":azureblob,account={account}:{}/{}", option("container"), root.trim_matches('/')))]
        }
        "b2" => vec![rclone(format!(":b2:{}/{}", option("bucket"), root.trim_matches('/')))],
        "swift" => vec![rclone(format!(":swift:{}/{}", option("container"), root.trim_matches('/')))],
        _ => Vec::new(),
    }
}

/// The value of an option for a shell: of a secret the variable that was exported before.
fn exported(target: &Destination, option: &str) -> Option<Zeroizing<String>> {
    Some(match target.options.get(option)? {
        OptionValue::Plain(text) => shell(text),
        OptionValue::Secret(_) => Zeroizing::new(format!("\"${}\"", variable(&target.name, option))),
    })
}

/// Gives rclone the password in its own way, and not on a command line.
fn obscured(target: &Destination, name: &str) -> Vec<String> {
    let password = exported(target, "password");
    password.map(|password| format!("export {name}=\"$(printf %s {} | rclone obscure -)\"", *password)).into_iter().collect()
}

/// A value in a remote of rclone that is named on the command line.
fn rclone_value(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// Who and where, of an endpoint: `ssh://user@[::1]:22/`, or without what is not needed.
struct Authority<'a> {
    user: Option<&'a str>,
    /// Without brackets.
    host: &'a str,
    port: Option<&'a str>,
}

impl<'a> Authority<'a> {
    fn of(endpoint: &'a str) -> Self {
        let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
        let rest = rest.split('/').next().unwrap_or_default();
        let (user, rest) = rest.rsplit_once('@').map_or((None, rest), |(user, rest)| (Some(user), rest));
        let bracketed = rest.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        let (host, port) = match bracketed {
            Some((host, port)) => (host, port.strip_prefix(':')),
            // More than one colon: an address of IPv6 without a port.
            None => match rest.split_once(':') {
                Some((host, port)) if !port.contains(':') => (host, Some(port)),
                _ => (rest, None),
            },
        };
        Self { user, host, port: port.filter(|port| !port.is_empty()) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::SecretSource;

    #[test]
    fn a_destination_is_told_with_its_secrets_or_with_what_must_be_entered() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        std::fs::write(&file, "it's hush\n").unwrap();
        let lines = directory.path().join("lines");
        std::fs::write(&lines, "a\nb").unwrap();
        let options = BTreeMap::from([
            ("bucket".to_owned(), "my \"bucket\"".into()),
            ("root".to_owned(), "/shop".into()),
            ("secret_access_key".to_owned(), OptionValue::Secret(SecretSource::File(file))),
            ("access_key_id".to_owned(), OptionValue::Secret(SecretSource::File(lines))),
            ("security_token".to_owned(), OptionValue::Secret(SecretSource::Environment("KEEPD_TEST_NONE".into()))),
        ]);
        let target = Destination::plain("off.site", "s3", options);
        let mut warnings = Vec::new();
        let told = describe(&target, true, &mut warnings);
        assert!(told.toml.contains("export KEEPD_OFF_SITE_SECRET_ACCESS_KEY='it'\\''s hush'\n"), "{}", *told.toml);
        assert!(told.toml.contains("export KEEPD_OFF_SITE_ACCESS_KEY_ID=\"$(echo YQpi | base64 -d)\"\n"), "{}", *told.toml);
        assert!(!told.has_secrets && warnings.len() == 1 && warnings[0].contains("security_token"), "{warnings:?}");
        assert_eq!(
            told.fetch,
            [
                "export AWS_ACCESS_KEY_ID=\"$KEEPD_OFF_SITE_ACCESS_KEY_ID\"",
                "export AWS_SECRET_ACCESS_KEY=\"$KEEPD_OFF_SITE_SECRET_ACCESS_KEY\"",
                "aws s3 sync 's3://my \"bucket\"/shop' repository"
            ]
        );
        // It is the configuration that it came from.
        let parsed: toml::Table = told.toml.parse().unwrap();
        let table = &parsed["destination"]["off.site"];
        assert_eq!(table["bucket"].as_str(), Some("my \"bucket\""));
        assert_eq!(table["secret_access_key"]["env"].as_str(), Some("KEEPD_OFF_SITE_SECRET_ACCESS_KEY"));
        let without = describe(&target, false, &mut Vec::new());
        assert!(!without.toml.contains("hush") && !without.toml.contains("YQpi") && !without.has_secrets);
        let plain =
            describe(&Destination::plain("local", "fs", BTreeMap::from([("root".to_owned(), "/a b".into())])), false, &mut Vec::new());
        assert!(plain.has_secrets && plain.fetch == ["cp -a '/a b' repository"]);
    }

    fn of(service: &str, options: &[(&str, &str)]) -> Destination {
        let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        Destination::plain("away", service, options)
    }

    #[test]
    fn strings_of_toml_are_basic_ones_of_ascii() {
        for text in ["", "plain", "C:\\dir", "it's \"so\"", "C:\\Käse", "a\nb\r\t\0", "\u{7f}\u{2028}", "\u{1f512}", "'''\"\"\""] {
            let written = toml_string(text);
            assert!(written.starts_with('"') && written.bytes().all(|b| (0x20..0x7f).contains(&b)), "{written}");
            let parsed: toml::Table = format!("a = {written}").parse().unwrap();
            assert_eq!(parsed["a"].as_str(), Some(text));
        }
        let told = describe(&of("exec", &[("a.b", "1"), ("c-d_e", "2")]), false, &mut Vec::new());
        let parsed: toml::Table = told.toml.parse().unwrap();
        assert_eq!(parsed["destination"]["away"]["options"]["a.b"].as_str(), Some("1"), "{}", *told.toml);
    }

    #[test]
    fn commands_reach_the_place_that_is_meant() {
        type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
        let cases: [Case; 10] = [
            (
                "s3",
                &[("bucket", "b"), ("endpoint", "s3.example.org")],
                "aws s3 sync 's3://b/' repository --endpoint-url 'https://s3.example.org'",
            ),
            ("s3", &[("bucket", "b"), ("endpoint", "http://[::1]:9")], "aws s3 sync 's3://b/' repository --endpoint-url 'http://[::1]:9'"),
            ("sftp", &[("endpoint", "ssh://host"), ("root", "/r")], "scp -r 'host:/r' repository"),
            (
                "sftp",
                &[("endpoint", "ssh://[fe80::1]:2222"), ("user", "me"), ("key", "/k y"), ("root", "/r")],
                "scp -r -P '2222' -i '/k y' 'me@[fe80::1]:/r' repository",
            ),
            ("sftp", &[("endpoint", "fe80::1"), ("root", "/r")], "scp -r '[fe80::1]:/r' repository"),
            ("sftp", &[("endpoint", "me@host:22")], "scp -r -P '22' 'me@host:.' repository"),
            (
                "ftp",
                &[("endpoint", "ftps://host:2121"), ("user", "me"), ("root", "/r")],
                "rclone copy ':ftp,host=\"host\",port=\"2121\",user=\"me\",explicit_tls=true:/r' repository",
            ),
            ("ftp", &[("endpoint", "ftp://host/"), ("root", "/r")], "rclone copy ':ftp,host=\"host\":/r' repository"),
            ("ftp", &[("endpoint", "host"), ("root", "/r")], "rclone copy ':ftp,host=\"host\",explicit_tls=true:/r' repository"),
            (
                "webdav",
                &[("endpoint", "https://host/dav"), ("username", "me \"x\""), ("root", "/r")],
                "rclone copy ':webdav,url=\"https://host/dav\",user=\"me \"\"x\"\"\":/r' repository",
            ),
        ];
        for (service, options, wanted) in cases {
            assert_eq!(fetch(&of(service, options)), [wanted]);
        }
        let mut webdav = of("webdav", &[("endpoint", "https://host"), ("root", "/r")]);
        webdav.options.insert("password".into(), OptionValue::Secret(SecretSource::Environment("X".into())));
        assert_eq!(fetch(&webdav)[0], "export RCLONE_WEBDAV_PASS=\"$(printf %s \"$KEEPD_AWAY_PASSWORD\" | rclone obscure -)\"");
        assert_eq!(fetch(&of("s3", &[("bucket", "b"), ("region", "eu-1")]))[0], "export AWS_REGION='eu-1'");
    }

    #[test]
    fn what_is_not_in_a_kit_is_told() {
        let warned = |target: &Destination| {
            let mut warnings = Vec::new();
            let told = describe(target, true, &mut warnings);
            (warnings.join("\n"), told.has_secrets)
        };
        let plugin = Destination { command: vec!["/opt/plugin".into(), "-x".into()], ..of("exec", &[("tls", "/etc/p.pem")]) };
        let (text, _) = warned(&plugin);
        assert!(text.contains("/opt/plugin -x") && text.contains("keep a copy of the program") && text.contains("/etc/p.pem"), "{text}");
        let (text, _) = warned(&of("sftp", &[("endpoint", "ssh://h"), ("key", "~/.ssh/k"), ("root", "/srv")]));
        assert!(text.contains("the SSH key ~/.ssh/k") && !text.contains("/srv"), "{text}");
        for service in ["s3", "gcs", "azblob"] {
            let (text, has_secrets) = warned(&of(service, &[("bucket", "/b"), ("root", "/r")]));
            assert!(text.contains("no credentials in its settings") && !has_secrets, "{service}: {text}");
        }
        let (text, _) = warned(&of("gcs", &[("bucket", "b"), ("credential_path", "/etc/g.json")]));
        assert!(text.contains("/etc/g.json") && !text.contains("no credentials"), "{text}");
        assert_eq!(warned(&of("s3", &[("bucket", "b"), ("skip_signature", "true")])), (String::new(), true));
        assert_eq!(warned(&of("fs", &[("root", "/r")])), (String::new(), true));
        let mut azblob = of("azblob", &[("container", "c")]);
        azblob.options.insert("azure_storage_account_key".into(), OptionValue::Secret(SecretSource::Environment("PATH".into())));
        assert_eq!(warned(&azblob), (String::new(), true));
    }
}
