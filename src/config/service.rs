//! The services that are built in, and the options of each, as OpenDAL itself declares them.

use std::collections::BTreeMap;

use opendal::{Configurator, ErrorKind, Operator, services};
use serde_aux::serde_introspection::serde_introspect;

/// A service as OpenDAL knows it.
struct Service {
    /// The names of its options.
    options: fn() -> &'static [&'static str],
    /// An operator with these options; the error says what is wrong with them.
    operator: fn(BTreeMap<String, String>) -> Result<Operator, opendal::Error>,
}

macro_rules! built_in {
    ($($(#[$cfg:meta])* $name:literal: $config:ident),* $(,)?) => {
        fn find(service: &str) -> Option<Service> {
            match service {
                $($(#[$cfg])* $name => Some(Service {
                    options: || serde_introspect::<services::$config>(),
                    operator: |options| Operator::from_config(services::$config::from_iter(options)?),
                }),)*
                _ => None,
            }
        }

        /// The names of all services, beside `exec`, that a destination can have.
        pub(super) fn names() -> Vec<&'static str> {
            vec![$($(#[$cfg])* $name),*]
        }
    };
}

built_in! {
    "fs": FsConfig,
    #[cfg(feature = "services-common")] "azblob": AzblobConfig,
    #[cfg(feature = "services-common")] "b2": B2Config,
    #[cfg(feature = "services-common")] "ftp": FtpConfig,
    #[cfg(feature = "services-common")] "gcs": GcsConfig,
    #[cfg(feature = "services-common")] "s3": S3Config,
    #[cfg(feature = "services-common")] "sftp": SftpConfig,
    #[cfg(feature = "services-common")] "swift": SwiftConfig,
    #[cfg(feature = "services-common")] "webdav": WebdavConfig,
    #[cfg(feature = "services-more")] "aliyun-drive": AliyunDriveConfig,
    #[cfg(feature = "services-more")] "alluxio": AlluxioConfig,
    #[cfg(feature = "services-more")] "azdls": AzdlsConfig,
    #[cfg(feature = "services-more")] "azfile": AzfileConfig,
    #[cfg(feature = "services-more")] "cos": CosConfig,
    #[cfg(feature = "services-more")] "dropbox": DropboxConfig,
    #[cfg(feature = "services-more")] "gdrive": GdriveConfig,
    #[cfg(feature = "services-more")] "koofr": KoofrConfig,
    #[cfg(feature = "services-more")] "obs": ObsConfig,
    #[cfg(feature = "services-more")] "onedrive": OnedriveConfig,
    #[cfg(feature = "services-more")] "oss": OssConfig,
    #[cfg(feature = "services-more")] "pcloud": PcloudConfig,
    #[cfg(feature = "services-more")] "seafile": SeafileConfig,
    #[cfg(feature = "services-more")] "upyun": UpyunConfig,
    #[cfg(feature = "services-more")] "webhdfs": WebhdfsConfig,
    #[cfg(feature = "services-more")] "yandex-disk": YandexDiskConfig,
}

/// Services of OpenDAL that keepd can be built with, by the cargo feature `services-more`.
pub(super) const MORE: [&str; 16] = [
    "aliyun-drive",
    "alluxio",
    "azdls",
    "azfile",
    "cos",
    "dropbox",
    "gdrive",
    "koofr",
    "obs",
    "onedrive",
    "oss",
    "pcloud",
    "seafile",
    "upyun",
    "webhdfs",
    "yandex-disk",
];

/// The words that make an option a secret, which has no place in the configuration itself.
const SECRET: [&str; 9] = [
    "secret",
    "password",
    "token",
    "application_key",
    "account_key",
    "temp_url_key",
    "encryption_key",
    "encryption_customer_key",
    "credential",
];
/// Options whose names hold such a word and which are none.
const NO_SECRET: [&str; 5] = [
    "application_key_id",
    "credential_path",
    "encryption_key_sha256",
    "server_side_encryption_customer_key_md5",
    "temp_url_hash_algorithm",
];

/// Whether an option of a service is a secret, by its name.
pub(crate) fn is_secret(option: &str) -> bool {
    !NO_SECRET.contains(&option) && SECRET.iter().any(|word| option.contains(word))
}

/// The options of a service, other names for the same left out; None for a service that is not built in.
pub(super) fn options(service: &str) -> Option<Vec<&'static str>> {
    let all = (find(service)?.options)();
    // What OpenDAL keeps for old configurations, and what cannot be written as one word.
    const LEFT_OUT: [&str; 15] = [
        "allow_anonymous",
        "assume_role_session_tags",
        "atomic_write_dir",
        "batch_max_operations",
        "bucket_name",
        "delete_max_size",
        "disable_stat_with_override",
        "disable_write_with_if_match",
        "enable_copy",
        "enable_versioning",
        "enable_write_with_append",
        "endpoint_url",
        "request_payer",
        "service_account_key",
        "virtual_hosted_style_request",
    ];
    let is_alias = |o: &str| {
        o.starts_with("aws_")
            || o.starts_with("azure_")
            || o.starts_with("google_")
            || LEFT_OUT.contains(&o)
            || (o == "token" && all.contains(&"session_token"))
    };
    Some(all.iter().copied().filter(|o| !is_alias(o)).collect())
}

/// An operator of a service; nothing is contacted.
pub fn operator(service: &str, options: BTreeMap<String, String>) -> Result<Operator, opendal::Error> {
    let found = find(service).ok_or_else(|| opendal::Error::new(ErrorKind::Unsupported, format!("there is no service '{service}'")))?;
    (found.operator)(options)
}

/// What a service says against its options. Values that are not known yet are given as None.
pub(super) fn check(service: &str, options: &BTreeMap<String, Option<String>>) -> Result<(), String> {
    let Some(found) = find(service) else { return Ok(()) };
    // Something that is text, a base64 string and a word of a header.
    let stand_in = |value: &Option<String>| value.clone().unwrap_or_else(|| "AAAA".into());
    let all_known = options.values().all(Option::is_some);
    match (found.operator)(options.iter().map(|(k, v)| (k.clone(), stand_in(v))).collect()) {
        // One that may be so only because a secret is not known yet.
        Err(e) if e.kind() == ErrorKind::ConfigInvalid || all_known => {
            let cause = std::error::Error::source(&e).map(|source| format!(": {source}")).unwrap_or_default();
            Err(format!("{}{cause}", e.message()).replace('\n', " "))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_tells_its_options_and_which_are_secret() {
        for name in names() {
            let options = options(name).unwrap();
            assert!(options.contains(&"root"), "{name}: {options:?}");
        }
        #[cfg(feature = "services-common")]
        {
            let s3 = options("s3").unwrap();
            for option in ["bucket", "endpoint", "region", "enable_virtual_host_style", "server_side_encryption", "default_storage_class"] {
                assert!(s3.contains(&option) && !is_secret(option), "{option}");
            }
            assert!(s3.iter().all(|o| !o.starts_with("aws_") && *o != "enable_versioning"));
            let secrets = |service| options(service).unwrap().into_iter().filter(|o| is_secret(o)).collect::<Vec<_>>();
            assert_eq!(secrets("s3"), ["secret_access_key", "session_token", "server_side_encryption_customer_key"]);
            assert_eq!(secrets("webdav"), ["password", "token"]);
            assert_eq!(secrets("sftp"), [""; 0]);
            assert_eq!(secrets("b2"), ["application_key"]);
            assert_eq!(secrets("azblob"), ["account_key", "encryption_key", "sas_token"]);
            assert_eq!(secrets("gcs"), ["credential", "token"]);
            assert_eq!(secrets("swift"), ["token", "temp_url_key"]);
            assert_eq!(secrets("ftp"), ["password"]);
        }
    }

    #[cfg(feature = "services-common")]
    #[test]
    fn what_a_service_cannot_be_opened_with_is_told() {
        let options = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).to_owned(), Some((*v).to_owned()))).collect();
        assert!(check("s3", &options(&[("region", "eu-1")])).is_err(), "no bucket");
        assert!(check("s3", &options(&[("region", "eu-1"), ("bucket", "b"), ("enable_virtual_host_style", "perhaps")])).is_err());
        assert_eq!(check("s3", &options(&[("region", "eu-1"), ("bucket", "b")])), Ok(()));
        assert!(check("sftp", &options(&[("endpoint", "host"), ("known_hosts_strategy", "trust")])).unwrap_err().contains("trust"));
    }
}
