//! The command line of a rescue.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Backups, newest first
    List {
        #[command(flatten)]
        place: Place,
        #[arg(long)]
        job: Option<String>,
    },
    /// What is in a backup
    Ls {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        of: Of,
        path: Option<OsString>,
        #[arg(short = 'R', long)]
        recursive: bool,
    },
    /// Write a backup, or parts of it, to a directory
    Restore {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        of: Of,
        /// Where DIR/<source>/… is written
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// <source> or <source>/<path>; none means all
        paths: Vec<OsString>,
        /// Replace files that exist
        #[arg(long)]
        overwrite: bool,
        /// Owners by number, not by name
        #[arg(long)]
        numeric_owner: bool,
    },
    /// Write a backup, or parts of it, as a tar archive
    Export {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        of: Of,
        /// A new file, or - for standard output
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// <source> or <source>/<path>; none means all
        paths: Vec<OsString>,
    },
    /// Begin anew on an empty machine: write the configuration that lies beside the backups, and take up what its destinations have
    Bootstrap {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        how: Beginning,
    },
    /// Prove that the backups are whole
    Check {
        #[command(flatten)]
        place: Place,
        /// Read the packs too, all or so many percent of them
        #[arg(long, value_name = "PERCENT", num_args = 0..=1, require_equals = true, default_missing_value = "100", value_parser = clap::value_parser!(u32).range(0..=100))]
        read_data: Option<u32>,
    },
}

/// Where the backups are, and what opens them.
#[derive(Debug, Args)]
pub struct Place {
    /// fs:/path, s3://bucket/prefix, sftp://user@host/path, webdavs://user@host/path, or a TOML file with a [destination.NAME]
    ///
    /// s3 takes AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and AWS_ENDPOINT_URL from the environment, webdav
    /// WEBDAV_PASSWORD, sftp the keys and known hosts of ssh.
    #[arg(long, value_name = "WHERE")]
    pub destination: OsString,
    /// Which destination of the TOML file, if there are several
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// A key file, a private key file or a recovery kit; may be repeated. Without one a passphrase is asked for, where one opens the repository
    #[arg(long, visible_alias = "kit", value_name = "FILE")]
    pub key: Vec<PathBuf>,
    /// A file with the passphrase
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// The PKCS#11 library of a token that has the key
    #[arg(long, value_name = "FILE", requires_all = ["token", "token_key"])]
    pub pkcs11_module: Option<PathBuf>,
    /// The token's label or serial number
    #[arg(long, value_name = "LABEL", requires = "pkcs11_module")]
    pub token: Option<String>,
    /// The label of the key in the token
    #[arg(long, value_name = "LABEL", requires = "pkcs11_module")]
    pub token_key: Option<String>,
    /// A file with the token's PIN
    #[arg(long, value_name = "FILE", requires = "pkcs11_module")]
    pub pin_file: Option<PathBuf>,
    /// Keep what was read of the index here, so that the next command starts sooner
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// One JSON document on standard output and nothing else
    #[arg(long)]
    pub json: bool,
    /// No progress bars
    #[arg(long)]
    pub no_progress: bool,
    /// Errors only
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct Of {
    /// An id, a unique start of one, or 'latest'
    pub backup: String,
    /// The job whose backup is meant
    #[arg(long, value_name = "JOB")]
    pub job: Option<String>,
}

#[derive(Debug, Args)]
pub struct Beginning {
    /// The configuration file that is written, with its drop-ins in conf.d beside it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Another one than the newest: its name at the destination, or a file that 'keepctl config export' wrote
    #[arg(long, value_name = "NAME|FILE")]
    pub from: Option<OsString>,
    /// Show what would be written, and write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Take a configuration that is not sealed, which anybody who can write to the destination could have made
    #[arg(long)]
    pub allow_unsealed: bool,
    /// The machine that wrote to the destinations is gone for good: this one writes there from now on
    #[arg(long)]
    pub take_over: bool,
}
