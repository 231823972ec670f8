//! All targets in one program, so that they are linked once: KEEPD_FUZZ_TARGET says which one it is.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<keepd_fuzz::Run> = LazyLock::new(|| {
    let name = std::env::var("KEEPD_FUZZ_TARGET").expect("KEEPD_FUZZ_TARGET names the target");
    keepd_fuzz::target(&name).unwrap_or_else(|| panic!("there is no target {name}"))
});

fuzz_target!(|data: &[u8]| {
    TARGET(data);
});
