//! Entries as members of a tar archive (POSIX.1-2001, with pax headers where they are needed), and back.
