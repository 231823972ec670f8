//! `keepctl drill`: has a backup proven.

use keepd_protocol::methods::{ListJobs, StartDrill, list_jobs, start_drill};
use keepd_protocol::model::escape;

use crate::client::Client;
use crate::keys::Keys;
use crate::{Exit, Failure};

/// Starts the drill of a backup, of a job's newest good one, or of the only job's.
pub fn start(client: &mut Client, backup: Option<String>, mut job: Option<String>, keys: &Keys) -> Result<start_drill::Out, Failure> {
    if backup.is_none() && job.is_none() {
        let jobs = client.call::<ListJobs>(&list_jobs::In {})?.jobs;
        job = match jobs.as_slice() {
            [one] => Some(one.name.clone()),
            several => {
                let names = several.iter().map(|j| escape(&j.name)).collect::<Vec<_>>().join(", ");
                return Err(Failure::new(Exit::Usage, format!("say which backup, or --job with one of {names}")));
            }
        };
    }
    client.call_lending::<StartDrill>(&start_drill::In { backup, job, private_keys: keys.places(0) }, keys)
}

/// Seconds as people say them.
pub fn duration(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}
