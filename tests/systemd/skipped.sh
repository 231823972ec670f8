# To be sourced: what says that a test cannot be had here. $what is the test.
skipped() {
    echo "********************************************************************************"
    echo "SKIPPED: $what: $1"
    echo "********************************************************************************"
    [ -z "${KEEPD_REQUIRE_SYSTEMD:-}" ] || exit 1
    exit 0
}
