//! Which backups to keep, and why: a pure function.
