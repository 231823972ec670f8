# To be sourced inside a container: a check a line, and questions about keepd.service. "$failures" counts what did not hold.
failures=0
job_log() { journalctl -q -u keepd.service --no-pager -o cat "$@"; }

ok() { echo "ok    $*"; }
bad() { echo "FAIL  $*"; failures=$((failures + 1)); }
check() { # check WHAT COMMAND…
    local what=$1; shift
    if "$@" >/tmp/check.out 2>&1; then ok "$what"; else bad "$what"; sed 's/^/      /' /tmp/check.out | tail -15; fi
}
property() { systemctl show -P "$1" keepd.service; }
until_true() { # until_true SECONDS COMMAND…
    local end=$((SECONDS + $1)); shift
    until "$@"; do [ $SECONDS -lt $end ] || return 1; sleep 0.1; done
}
status_has() { [[ "$(property StatusText)" == *"$1"* ]]; }
log_has() { job_log | grep -qF -- "$1"; }
is() { [ "$(property "$1")" = "$2" ] || { echo "$1 is '$(property "$1")', not '$2'"; return 1; }; }
is_not() { [ "$(property "$1")" != "$2" ] || { echo "$1 is still '$2'"; return 1; }; }
held() { # held WHAT: the end, with the exit code of the script
    if [ $failures -gt 0 ]; then
        echo "--- the service's journal"; job_log -n 60
        echo "$failures checks of $1 failed"
        exit 1
    fi
    echo "every check of $1 held"
}
