//! Recovery kits: what a profile's kit says of keys and destinations, and the key that is made where the profile's own cannot be written down.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keepd_protocol::model::Level;
use zeroize::Zeroizing;

use super::backup::Environment;
use super::keys::{self, NewKey};
use super::live::{Failure, Finish, LiveRun};
use super::restore::PatientWriter;
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
            let new = NewKey { label: LABEL.to_owned(), key: ProfileKey::Key(Arc::new(fresh.clone())) };
            for target in &wanted.targets {
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
    if !target.command.is_empty() {
        let words: Vec<String> = target.command.iter().map(|word| toml_string(word)).collect();
        add(&format!("command = [{}]", words.join(", ")));
    }
    let option = |(name, value): (&String, &OptionValue)| match value {
        OptionValue::Plain(text) => format!("{name} = {}", toml_string(text)),
        OptionValue::Secret(_) => format!("{name} = {{ env = {} }}", toml_string(&variable(&target.name, name))),
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
    // What is a path on the machine that may be gone.
    if target.service == "sftp"
        && let Some(path) = target.options.get("key").and_then(OptionValue::plain)
    {
        warnings.push(format!(
            "Destination {} is reached with the SSH key {path}: keep a copy of that file, it is not in this kit.",
            target.name
        ));
    }
    kit::Destination { name: target.name.clone(), toml, has_secrets: all_there, place: destination::location(target), fetch: fetch(target) }
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

/// A basic string of TOML.
fn toml_string(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// How any tool copies a destination to the directory `repository`.
fn fetch(target: &Destination) -> Vec<String> {
    let option = |name: &str| target.options.get(name).and_then(OptionValue::plain).unwrap_or_default();
    let root = option("root");
    let rclone = |remote: String| vec![format!("rclone copy {} repository", *shell(&remote))];
    match target.service.as_str() {
        "fs" => vec![format!("cp -a {} repository", *shell(root))],
        "s3" => {
            let endpoint = match option("endpoint") {
                "" => String::new(),
                endpoint => format!(" --endpoint-url {}", *shell(endpoint)),
            };
            let place = format!("s3://{}/{}", option("bucket"), root.trim_matches('/'));
            vec![format!("aws s3 sync {} repository{endpoint}", *shell(&place))]
        }
        "sftp" => {
            let endpoint = option("endpoint");
            let host = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
            let (host, port) = host.rsplit_once(':').unwrap_or((host, "22"));
            let user = match option("user") {
                "" => String::new(),
                user => format!("{user}@"),
            };
            vec![format!("scp -r -P {} {} repository", *shell(port), *shell(&format!("{user}{host}:{root}")))]
        }
        "webdav" => rclone(format!(":webdav,url=\"{}\":{root}", option("endpoint"))),
        "ftp" => rclone(format!(":ftp,host=\"{}\":{root}", option("endpoint").trim_start_matches("ftp://"))),
        "gcs" => rclone(format!(":gcs:{}/{}", option("bucket"), root.trim_matches('/'))),
        "azblob" => rclone(format!(":azureblob,account=\"{}\":{}/{}", option("account_name"), option("container"), root.trim_matches('/'))),
        "b2" => rclone(format!(":b2:{}/{}", option("bucket"), root.trim_matches('/'))),
        "swift" => rclone(format!(":swift:{}/{}", option("container"), root.trim_matches('/'))),
        _ => Vec::new(),
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
        assert_eq!(told.fetch, ["aws s3 sync 's3://my \"bucket\"/shop' repository"]);
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
}
