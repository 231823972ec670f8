//! On whose behalf something is done, and what that takes.

use std::fmt;
use std::sync::Arc;

use keepd_protocol::access::Right;

use super::judge::KnownRole;
use super::{Caller, Judge, Standing};

/// What a right is wanted for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Of {
    /// Any job will do: of what is shown, each is looked at by itself.
    Any,
    /// All jobs, or what belongs to none.
    Whole,
    Job(String),
}

/// A right, and what for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    pub right: Right,
    pub of: Of,
    /// How the caller named what it is about, to stand behind what is refused: ` of job shop`.
    pub what: String,
}

impl Need {
    pub fn new(right: Right, of: Of, what: impl Into<String>) -> Self {
        Self { right, of, what: what.into() }
    }
}

/// What somebody may not do, and who may.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    pub right: Right,
    pub text: String,
}

/// keepd itself, or a caller with what the call took. Who holds it can ask again whether that is still so.
#[derive(Clone)]
pub struct By {
    name: Arc<str>,
    asked: Option<Arc<Asked>>,
}

struct Asked {
    caller: Caller,
    needs: Vec<Need>,
    judge: Arc<Judge>,
}

impl Asked {
    fn may(&self, roles: &[KnownRole], name: &str, needs: &[Need]) -> Result<(), Refusal> {
        let standing = self.judge.standing(roles, &self.caller);
        match needs.iter().find(|need| !standing.may(need.right, &need.of)) {
            Some(need) => Err(self.judge.refusal(roles, name, need.right, &need.what)),
            None => Ok(()),
        }
    }
}

impl By {
    /// keepd by itself; `name` is what its runs tell: `schedule`, or who began what they follow from.
    pub fn keepd(name: impl Into<Arc<str>>) -> Self {
        Self { name: name.into(), asked: None }
    }

    /// What is started by time, or goes on from before.
    pub fn schedule() -> Self {
        Self::keepd("schedule")
    }

    /// A caller that may do all of `needs` now.
    pub(super) fn caller(name: Arc<str>, caller: Caller, needs: Vec<Need>, judge: Arc<Judge>) -> Self {
        Self { name, asked: Some(Arc::new(Asked { caller, needs, judge })) }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// None: keepd itself.
    pub fn uid(&self) -> Option<u32> {
        self.asked.as_ref().map(|asked| asked.caller.uid)
    }

    pub fn needs(&self) -> &[Need] {
        self.asked.as_ref().map_or(&[], |asked| &asked.needs)
    }

    /// What follows by itself from what was asked for, as the configuration has it: a backup's copies. It takes no right of its own and counts for no limit.
    pub fn following(&self) -> Self {
        Self { name: self.name.clone(), asked: None }
    }

    /// Whether what it took is still so. May block on the directory of users.
    pub fn ask_again(&self) -> Result<(), Refusal> {
        let Some(asked) = &self.asked else { return Ok(()) };
        self.may(&asked.needs)
    }

    /// The same for the threads that everybody waits for.
    pub async fn still(&self) -> Result<(), Refusal> {
        let Some(asked) = &self.asked else { return Ok(()) };
        asked.may(&asked.judge.roles_for(asked.caller.uid).await, &self.name, &asked.needs)
    }

    /// What the caller may, with the configuration in force now; None: keepd itself, which may all.
    pub async fn standing_now(&self) -> Option<Standing> {
        let asked = self.asked.as_ref()?;
        Some(asked.judge.standing(&asked.judge.roles_for(asked.caller.uid).await, &asked.caller))
    }

    /// Whether the caller may also do these. May block on the directory of users.
    pub fn may(&self, needs: &[Need]) -> Result<(), Refusal> {
        let Some(asked) = &self.asked else { return Ok(()) };
        asked.may(&asked.judge.roles_blocking_for(asked.caller.uid), &self.name, needs)
    }

    /// Whether the caller is an administrator; else a refusal of `right` that says what an administrator is needed for. May block on the directory of users.
    pub fn is_admin(&self, right: Right, what: &str) -> Result<(), Refusal> {
        let Some(asked) = &self.asked else { return Ok(()) };
        let roles = asked.judge.roles_blocking_for(asked.caller.uid);
        match asked.judge.standing(&roles, &asked.caller).is_admin() {
            true => Ok(()),
            false => Err(asked.judge.admin_wanted(&roles, &self.name, right, what)),
        }
    }
}

impl Default for By {
    fn default() -> Self {
        Self::keepd("keepd")
    }
}

impl fmt::Debug for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("By").field("name", &self.name).field("uid", &self.uid()).field("needs", &self.needs()).finish()
    }
}
