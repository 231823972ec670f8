//! Judges: what a caller may, by the configuration in force. Names of users and groups become ids through the system (files, LDAP, SSSD), which
//! may take its time: what it said holds for [`FRESH`], and it is never asked on a thread that others wait for.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use keepd_protocol::access::{Grant, Right, Role};
use keepd_protocol::model::escape;
use tokio::sync::Notify;
use tokio::time::timeout_at;

use super::{By, Caller, Need, Of, Refusal, is_owner, user_name};
use crate::config::{self, Access, Member};

/// How long the system's answers hold.
const FRESH: Duration = Duration::from_secs(30);
/// Where the system does not answer in time, what it said before holds for so long.
const STALE: Duration = Duration::from_secs(600);
/// What was said before, or a number for a name, is taken when nothing newer was said for so long; where nothing was said before, it is waited longer.
const PATIENCE: Duration = Duration::from_millis(500);
const FIRST: Duration = Duration::from_secs(3);
/// So many users' names are asked for at once.
const MOST_ASKED: usize = 8;
/// Lines in the log about one user, each minute.
const LINES: u32 = 10;
/// Names and paces of so many users are remembered.
const MOST_USERS: usize = 4096;
/// Who may is told with so many names.
const MOST_TOLD: usize = 12;

const VIEWER: &[Right] = &[Right::View, Right::Browse];
const OPERATOR: &[Right] = &[Right::View, Right::Browse, Right::Backup, Right::RestoreTo];
const ADMIN: &[Right] = &[
    Right::View,
    Right::Browse,
    Right::Backup,
    Right::RestoreTo,
    Right::RestoreInPlace,
    Right::ExportBackup,
    Right::ImportBackup,
    Right::Delete,
    Right::Prune,
    Right::JobEdit,
    Right::ConfigExport,
    Right::ConfigExportSecrets,
    Right::ConfigImport,
    Right::KeyManage,
    Right::AuditRead,
];
const ADMIN_NAME: &str = "admin";
/// The roles that keepd has, the most powerful first.
pub const BUILTIN: [(&str, &[Right]); 3] = [(ADMIN_NAME, ADMIN), ("operator", OPERATOR), ("viewer", VIEWER)];

/// The jobs that somebody has a right for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Jobs {
    /// And what belongs to no job.
    All,
    Only(BTreeSet<String>),
}

impl Jobs {
    pub fn has(&self, job: &str) -> bool {
        match self {
            Jobs::All => true,
            Jobs::Only(names) => names.contains(job),
        }
    }
}

/// What somebody may.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    pub grants: Vec<Grant>,
}

impl Standing {
    /// Whether the right is there for this.
    pub fn may(&self, right: Right, of: &Of) -> bool {
        self.grants.iter().filter(|grant| grant.rights.contains(&right)).any(|grant| match (&grant.jobs, of) {
            (None, _) | (_, Of::Any) => true,
            (Some(jobs), Of::Job(job)) => jobs.contains(job),
            (Some(_), Of::Whole) => false,
        })
    }

    /// The jobs that the right is there for; None: it is not.
    pub fn jobs(&self, right: Right) -> Option<Jobs> {
        let mut found = None;
        for grant in self.grants.iter().filter(|grant| grant.rights.contains(&right)) {
            let Some(jobs) = &grant.jobs else { return Some(Jobs::All) };
            found.get_or_insert_with(BTreeSet::new).extend(jobs.iter().cloned());
        }
        found.map(Jobs::Only)
    }

    /// Whether the role of that name is there: all rights without a limit.
    pub fn is_admin(&self) -> bool {
        self.grants.iter().any(|grant| grant.role == ADMIN_NAME)
    }
}

/// A role whose members are known to the system, or not.
#[derive(Debug)]
pub struct KnownRole {
    name: String,
    rights: Vec<Right>,
    jobs: Option<Vec<String>>,
    members: Vec<(Member, Option<Id>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Id {
    User(u32),
    Group(u32),
}

struct Resolved {
    of: Access,
    since: Instant,
    roles: Arc<Vec<KnownRole>>,
}

type Pace = RateLimiter<u32, HashMapStateStore<u32>, DefaultClock>;

/// Says who may what.
pub struct Judge {
    config: Arc<config::Current>,
    resolved: Mutex<Option<Resolved>>,
    /// Held while the system is asked: once is enough.
    asking: Mutex<()>,
    /// Somebody asks for all who wait.
    is_asking: AtomicBool,
    /// The system said something, or gave up.
    answered: Notify,
    names: Mutex<HashMap<u32, (Instant, Arc<str>)>>,
    /// The users whose names are asked for.
    naming: Mutex<HashSet<u32>>,
    paces: Mutex<Option<Arc<Paces>>>,
    lines: Pace,
}

/// How often users may do what, as far as that is counted.
struct Paces {
    /// Times each second.
    of: u32,
    calls: Pace,
    connections: Pace,
}

/// Has those who wait look again when it is over, also by a panic.
struct Asking(Arc<Judge>);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.is_asking.store(false, Ordering::Release);
        self.0.answered.notify_waiters();
    }
}

struct Naming(Arc<Judge>, u32);

impl Drop for Naming {
    fn drop(&mut self) {
        lock(&self.0.naming).remove(&self.1);
        self.0.answered.notify_waiters();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Judge {
    pub fn new(config: Arc<config::Current>) -> Arc<Self> {
        Arc::new(Self {
            config,
            resolved: Mutex::default(),
            asking: Mutex::default(),
            is_asking: AtomicBool::new(false),
            answered: Notify::new(),
            names: Mutex::default(),
            naming: Mutex::default(),
            paces: Mutex::default(),
            lines: RateLimiter::hashmap(Quota::per_minute(number(LINES))),
        })
    }

    /// What the system said of these, and how long ago.
    fn known(&self, access: &Access) -> Option<(Duration, Arc<Vec<KnownRole>>)> {
        let resolved = lock(&self.resolved);
        let known = resolved.as_ref().filter(|known| known.of == *access).map(|known| (known.since.elapsed(), known.roles.clone()));
        known.filter(|(age, _)| *age < STALE)
    }

    /// The roles of the configuration in force. May block on the directory of users; one thread at a time, where the others have what was said before.
    pub fn roles_blocking(&self) -> Arc<Vec<KnownRole>> {
        let known = match self.known(&self.config.get().access) {
            Some((age, roles)) if age < FRESH => return roles,
            known => known,
        };
        let _asking = match (self.asking.try_lock(), known) {
            (Ok(asking), _) => asking,
            (Err(TryLockError::Poisoned(asking)), _) => asking.into_inner(),
            (Err(TryLockError::WouldBlock), Some((_, roles))) => return roles,
            (Err(TryLockError::WouldBlock), None) => lock(&self.asking),
        };
        // Somebody else may have asked meanwhile; and what is in force may be another one.
        let config = self.config.get();
        if let Some((_, roles)) = self.known(&config.access).filter(|(age, _)| *age < FRESH) {
            return roles;
        }
        let roles = Arc::new(known_roles(&config.access, true));
        *lock(&self.resolved) = Some(Resolved { of: config.access.clone(), since: Instant::now(), roles: roles.clone() });
        roles
    }

    /// The same for the threads that everybody waits for. Where the system does not answer, what it said before; and without that, who is named by number.
    pub async fn roles(self: &Arc<Self>) -> Arc<Vec<KnownRole>> {
        // Again where the configuration became another one meanwhile.
        for _ in 0..2 {
            let config = self.config.get();
            let known = match self.known(&config.access) {
                Some((age, roles)) if age < FRESH => return roles,
                known => known,
            };
            let mut answered = std::pin::pin!(self.answered.notified());
            answered.as_mut().enable();
            if !self.is_asking.swap(true, Ordering::AcqRel) {
                let asking = Asking(self.clone());
                tokio::task::spawn_blocking(move || drop(asking.0.roles_blocking()));
            }
            let until = tokio::time::Instant::now() + if known.is_some() { PATIENCE } else { FIRST };
            // Others' answers wake, too.
            while timeout_at(until, answered.as_mut()).await.is_ok() && self.is_asking.load(Ordering::Acquire) {
                answered.set(self.answered.notified());
                answered.as_mut().enable();
            }
            let now = self.known(&config.access);
            if let Some((_, roles)) = now.or(known) {
                return roles;
            }
        }
        tracing::warn!("the system does not say who is in [access]; until it does, only root and who is named by number has a role");
        self.unasked()
    }

    /// The roles with those who need not be asked for.
    fn unasked(&self) -> Arc<Vec<KnownRole>> {
        Arc::new(known_roles(&self.config.get().access, false))
    }

    /// The roles to judge a user by. Whoever owns the machine, or the daemon, waits for nobody to be let in.
    pub async fn roles_for(self: &Arc<Self>, uid: u32) -> Arc<Vec<KnownRole>> {
        if is_owner(uid) { self.unasked() } else { self.roles().await }
    }

    /// The same; may block on the directory of users.
    pub fn roles_blocking_for(&self, uid: u32) -> Arc<Vec<KnownRole>> {
        if is_owner(uid) { self.unasked() } else { self.roles_blocking() }
    }

    /// What a caller may by these roles.
    pub fn standing(&self, roles: &[KnownRole], caller: &Caller) -> Standing {
        standing(roles, caller, rustix::process::geteuid().as_raw())
    }

    /// The caller's name, or `uid 1000`, also where the system does not tell it in time.
    pub async fn name(self: &Arc<Self>, uid: u32) -> Arc<str> {
        let until = tokio::time::Instant::now() + PATIENCE;
        let mut has_asked = false;
        loop {
            let mut answered = std::pin::pin!(self.answered.notified());
            answered.as_mut().enable();
            let known = lock(&self.names).get(&uid).cloned();
            if let Some((_, name)) = known.as_ref().filter(|(since, _)| since.elapsed() < FRESH) {
                return name.clone();
            }
            let is_asked_for = {
                let mut naming = lock(&self.naming);
                match naming.contains(&uid) {
                    true => true,
                    // It was asked for, and could not be told.
                    false if has_asked => false,
                    false if naming.len() >= MOST_ASKED => true,
                    false => {
                        has_asked = naming.insert(uid);
                        let naming = Naming(self.clone(), uid);
                        tokio::task::spawn_blocking(move || naming.0.put_name(uid, user_name(uid)));
                        true
                    }
                }
            };
            if !is_asked_for || timeout_at(until, answered).await.is_err() {
                let number = if uid == 0 { "root".into() } else { format!("uid {uid}").into() };
                return known.map_or(number, |(_, name)| name);
            }
        }
    }

    fn put_name(&self, uid: u32, name: String) {
        let mut names = lock(&self.names);
        if names.len() >= MOST_USERS {
            names.clear();
        }
        names.insert(uid, (Instant::now(), name.into()));
    }

    /// A caller that may do all of `needs`, or what it lacks.
    pub async fn by(self: &Arc<Self>, caller: Caller, needs: Vec<Need>) -> Result<By, Refusal> {
        let name = self.name(caller.uid).await;
        let roles = self.roles_for(caller.uid).await;
        let standing = self.standing(&roles, &caller);
        match needs.iter().find(|need| !standing.may(need.right, &need.of)) {
            Some(need) => Err(self.refusal(&roles, &name, need.right, &need.what)),
            None => Ok(By::caller(name, caller, needs, self.clone())),
        }
    }

    /// That `user` may not, and who may.
    pub fn refusal(&self, roles: &[KnownRole], user: &str, right: Right, what: &str) -> Refusal {
        let who = holders(roles, |role| role.rights.contains(&right));
        let text = format!("{} may not {} (right {right}){}; {who}", escape(user), deed_of(right), escape(what));
        Refusal { right, text }
    }

    /// That it takes the role admin, and who has it.
    pub fn admin_wanted(&self, roles: &[KnownRole], user: &str, right: Right, what: &str) -> Refusal {
        let who = holders(roles, |role| role.name == ADMIN_NAME);
        let text = format!("{} may not {} so that {}: that takes the role admin; {who}", escape(user), deed_of(right), escape(what));
        Refusal { right, text }
    }

    /// Every role that somebody may have, with its members.
    pub fn roles_told(&self, roles: &[KnownRole]) -> Vec<Role> {
        roles
            .iter()
            .map(|role| Role { name: role.name.clone(), rights: role.rights.clone(), jobs: role.jobs.clone(), members: members_of(role) })
            .collect()
    }

    /// Counts a call of a user; an error is how long to wait. Root may call as often as it likes.
    pub fn pace(&self, uid: u32) -> Result<(), Duration> {
        if uid == 0 { Ok(()) } else { in_pace(&self.paces().calls, uid) }
    }

    /// The same of connections.
    pub fn pace_connections(&self, uid: u32) -> Result<(), Duration> {
        if uid == 0 { Ok(()) } else { in_pace(&self.paces().connections, uid) }
    }

    /// Counts a line in the log about a user; false when there were enough of them just now.
    pub fn is_logged(&self, uid: u32) -> bool {
        in_pace(&self.lines, uid).is_ok()
    }

    fn paces(&self) -> Arc<Paces> {
        let of = self.config.get().access.limits.calls_per_second.max(1);
        let mut kept = lock(&self.paces);
        match &*kept {
            Some(paces) if paces.of == of => paces.clone(),
            _ => {
                let pace = || RateLimiter::hashmap(Quota::per_second(number(of)).allow_burst(number(of.saturating_mul(2))));
                let paces = Arc::new(Paces { of, calls: pace(), connections: pace() });
                *kept = Some(paces.clone());
                paces
            }
        }
    }
}

fn number(n: u32) -> NonZeroU32 {
    NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN)
}

fn in_pace(pace: &Pace, uid: u32) -> Result<(), Duration> {
    if pace.len() > MOST_USERS {
        // Who waited long enough starts anew anyway.
        pace.retain_recent();
    }
    pace.check_key(&uid).map_err(|not_yet| not_yet.wait_time_from(DefaultClock::default().now()))
}

/// The roles with their members; those that are named by name only where the system `is_asked`.
fn known_roles(access: &Access, is_asked: bool) -> Vec<KnownRole> {
    let known = |member: &Member| {
        let id = match member {
            Member::Uid(uid) => Some(Id::User(*uid)),
            Member::Gid(gid) => Some(Id::Group(*gid)),
            Member::User(_) | Member::Group(_) if !is_asked => None,
            Member::User(name) => uzers::get_user_by_name(name).map(|user| Id::User(user.uid())),
            Member::Group(name) => uzers::get_group_by_name(name).map(|group| Id::Group(group.gid())),
        };
        (member.clone(), id)
    };
    let builtin = BUILTIN.into_iter().zip([&access.admin, &access.operator, &access.viewer]).map(|((name, rights), members)| KnownRole {
        name: name.into(),
        rights: rights.to_vec(),
        jobs: None,
        members: members.iter().map(known).collect(),
    });
    let own = access.roles.iter().map(|role| KnownRole {
        name: role.name.clone(),
        rights: role.rights.clone(),
        jobs: role.jobs.clone(),
        members: role.members.iter().map(known).collect(),
    });
    builtin.chain(own).collect()
}

fn standing(roles: &[KnownRole], caller: &Caller, own: u32) -> Standing {
    let mut grants = Vec::new();
    for role in roles {
        // Whoever owns the machine, or the daemon, cannot be locked out.
        let owner = match caller.uid {
            _ if role.name != ADMIN_NAME => None,
            0 => Some("root".to_owned()),
            uid if uid == own => Some("the daemon's own user".to_owned()),
            _ => None,
        };
        let is_it = |id: &Id| match id {
            Id::User(uid) => *uid == caller.uid,
            Id::Group(gid) => caller.is_in(*gid),
        };
        let through = owner.or_else(|| role.members.iter().find(|(_, id)| id.as_ref().is_some_and(is_it)).map(|(m, _)| m.to_string()));
        if let Some(through) = through {
            grants.push(Grant { role: role.name.clone(), rights: role.rights.clone(), jobs: role.jobs.clone(), through });
        }
    }
    Standing { grants }
}

/// As the configuration has them, with those who need not stand there.
fn members_of(role: &KnownRole) -> Vec<String> {
    let mut members = Vec::new();
    if role.name == ADMIN_NAME {
        members.push("root".to_owned());
        if !rustix::process::geteuid().is_root() {
            members.push("the daemon's own user".to_owned());
        }
    }
    for (member, _) in &role.members {
        let member = member.to_string();
        if !members.contains(&member) {
            members.push(member);
        }
    }
    members
}

/// `root and @wheel may (role admin), carol may (role deployers, job shop)`
fn holders(roles: &[KnownRole], has: impl Fn(&KnownRole) -> bool) -> String {
    let mut told = Vec::new();
    for role in roles.iter().filter(|role| has(role)) {
        let members = members_of(role);
        let names = match members.as_slice() {
            [] => continue,
            [one] => one.clone(),
            many if many.len() > MOST_TOLD => {
                let shown = many.iter().take(MOST_TOLD).cloned().collect::<Vec<_>>().join(", ");
                format!("{shown} and {} more", many.len() - MOST_TOLD)
            }
            [first @ .., last] => format!("{} and {last}", first.join(", ")),
        };
        let jobs = match role.jobs.as_deref() {
            None => String::new(),
            Some([one]) => format!(", job {one}"),
            Some(jobs) => format!(", jobs {}", jobs.join(", ")),
        };
        told.push(format!("{names} may (role {}{jobs})", role.name));
    }
    escape(&told.join(", "))
}

/// What a right is for, as it stands behind "may not".
fn deed_of(right: Right) -> &'static str {
    match right {
        Right::View => "look at what there is",
        Right::Browse => "look into backups",
        Right::Backup => "start backups, copies and checks",
        Right::RestoreTo => "restore",
        Right::RestoreInPlace => "restore in place",
        Right::ExportBackup => "export backups",
        Right::ImportBackup => "import backups",
        Right::Delete => "delete backups",
        Right::Prune => "prune",
        Right::JobEdit => "change the configuration",
        Right::ConfigExport => "read the configuration",
        Right::ConfigExportSecrets => "have the secrets of the configuration",
        Right::ConfigImport => "import a configuration",
        Right::KeyManage => "manage keys",
        Right::AuditRead => "read who did what",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AccessRole;

    fn caller(uid: u32, groups: &[u32]) -> Caller {
        Caller { uid, gid: 100, groups: groups.to_vec() }
    }

    fn access() -> Access {
        Access {
            admin: vec![Member::Uid(7), Member::Gid(70)],
            viewer: vec![Member::Gid(100), Member::User("nobody-of-that-name".into())],
            roles: vec![AccessRole {
                name: "deployers".into(),
                members: vec![Member::Uid(8)],
                rights: vec![Right::View, Right::RestoreInPlace],
                jobs: Some(vec!["shop".into()]),
            }],
            ..Access::default()
        }
    }

    #[test]
    fn builtin_roles_grow() {
        assert_eq!(ADMIN, Right::ALL.map(|(right, _)| right));
        assert!(VIEWER.iter().all(|r| OPERATOR.contains(r)) && OPERATOR.iter().all(|r| ADMIN.contains(r)));
    }

    #[test]
    fn grants_come_from_users_groups_and_ownership() {
        let roles = known_roles(&access(), true);
        let of = |uid, groups: &[u32]| standing(&roles, &caller(uid, groups), 55).grants;
        let told = |grants: Vec<Grant>| grants.into_iter().map(|g| (g.role, g.through)).collect::<Vec<_>>();
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(told(of(0, &[])), [pair("admin", "root"), pair("viewer", "@100")]);
        assert_eq!(told(of(55, &[])), [pair("admin", "the daemon's own user"), pair("viewer", "@100")]);
        assert_eq!(told(of(9, &[70])), [pair("admin", "@70"), pair("viewer", "@100")]);
        assert_eq!(told(of(9, &[7, 8])), [pair("viewer", "@100")]);
        let stranger = Caller { uid: 9, gid: 9, groups: Vec::new() };
        assert_eq!(standing(&roles, &stranger, 55), Standing::default());
    }

    #[test]
    fn a_limited_grant_is_for_its_jobs_alone() {
        let roles = known_roles(&access(), true);
        let limited = standing(&roles, &Caller { uid: 8, gid: 8, groups: Vec::new() }, 55);
        let job = |name: &str| Of::Job(name.to_owned());
        assert!(limited.may(Right::View, &job("shop")) && limited.may(Right::View, &Of::Any));
        assert!(!limited.may(Right::View, &job("other")));
        assert!(!limited.may(Right::View, &Of::Whole));
        assert!(!limited.may(Right::Browse, &job("shop")) && !limited.may(Right::Browse, &Of::Any));
        assert_eq!(limited.jobs(Right::View), Some(Jobs::Only(["shop".to_owned()].into())));
        assert_eq!(limited.jobs(Right::Delete), None);
        assert!(!limited.is_admin());
        // A second role may add what the first has only for some.
        let both = standing(&roles, &caller(8, &[]), 55);
        assert_eq!((both.jobs(Right::View), both.may(Right::RestoreInPlace, &Of::Whole)), (Some(Jobs::All), false));
    }

    fn judge(access: Access) -> Arc<Judge> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keepd.toml");
        std::fs::write(&path, "").unwrap();
        let config = config::Config { access, ..config::load(&path).unwrap() };
        Judge::new(Arc::new(config::Current::new(config)))
    }

    #[tokio::test]
    async fn a_system_that_does_not_answer_keeps_nobody_waiting() {
        let judge = judge(access());
        // As if somebody asked it, and it hung.
        judge.is_asking.store(true, Ordering::Release);
        lock(&judge.naming).extend([0, 7]);
        let of = |uid, roles: &[KnownRole]| judge.standing(roles, &Caller { uid, gid: 9, groups: Vec::new() });
        let began = tokio::time::Instant::now();
        assert!(of(0, &judge.roles_for(0).await).is_admin());
        assert!(began.elapsed() < PATIENCE);
        let unasked = judge.roles_for(7).await;
        assert!(
            of(7, &unasked).is_admin() && of(8, &unasked).may(Right::View, &Of::Job("shop".into())) && of(9, &unasked).grants.is_empty()
        );
        assert_eq!((&*judge.name(0).await, &*judge.name(7).await), ("root", "uid 7"));
        // With what it said before it goes on sooner.
        let old = Instant::now().checked_sub(FRESH * 2).unwrap();
        *lock(&judge.resolved) = Some(Resolved { of: access(), since: old, roles: Arc::new(known_roles(&access(), true)) });
        let began = tokio::time::Instant::now();
        assert!(of(8, &judge.roles_for(8).await).may(Right::View, &Of::Job("shop".into())));
        assert!(began.elapsed() < FIRST);
    }

    #[tokio::test]
    async fn each_user_has_a_pace_of_its_own() {
        let judge = judge(Access::default());
        let most = judge.config.get().access.limits.calls_per_second * 2;
        assert!((0..most).all(|_| judge.pace(7).is_ok()) && judge.pace(7).is_err());
        assert!(judge.pace_connections(7).is_ok() && judge.pace(8).is_ok());
        assert!((0..most * 2).all(|_| judge.pace(0).is_ok()));
        assert!((0..LINES).all(|_| judge.is_logged(7)) && !judge.is_logged(7) && judge.is_logged(0));
    }

    #[test]
    fn a_refusal_says_who_may() {
        let roles = known_roles(&access(), true);
        let may = |right| holders(&roles, |role: &KnownRole| role.rights.contains(&right));
        let own = if rustix::process::geteuid().is_root() { "root, 7" } else { "root, the daemon's own user, 7" };
        assert_eq!(may(Right::RestoreInPlace), format!("{own} and @70 may (role admin), 8 may (role deployers, job shop)"));
    }
}
