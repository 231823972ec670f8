//! Private keys that somebody lends for the time of a run.

use std::fmt;
use std::sync::Arc;

use super::hpke::PrivateKey;

/// None, mostly. They are nowhere but in memory, and gone with the last run that has them.
#[derive(Clone, Default)]
pub struct Lent(Vec<Arc<PrivateKey>>);

impl Lent {
    pub fn of(keys: Vec<PrivateKey>) -> Self {
        Self(keys.into_iter().map(Arc::new).collect())
    }

    pub fn keys(&self) -> &[Arc<PrivateKey>] {
        &self.0
    }
}

/// Never the keys.
impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} private keys", self.0.len())
    }
}
